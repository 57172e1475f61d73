"""Windows against numbers worked out by hand: boundaries, caps, padding, and the true duration."""

import dataclasses
import itertools

import numpy as np
import pytest
from synthetic import synthetic_episode

from wallwm_jax.console import UserError
from wallwm_jax.events.schema import Span
from wallwm_jax.events.windows import Window, cut_windows


def episode_with(edges, steps):
    """An episode of `steps` commands at stride 2 whose subtasks have the given boundaries."""
    episode = synthetic_episode(0, steps=steps, size=16)
    bounds = [0, *edges, steps]
    subtasks = [Span(low, high, f"event {low}", "move", 0) for low, high in itertools.pairwise(bounds)]
    return dataclasses.replace(episode, spans={"task": episode.spans["task"], "subtask": subtasks})


def subtasks(edges, steps):
    return cut_windows(episode_with(edges, steps), ["event"], levels=["subtask"])


def test_even_boundaries_hold_frames_from_start_to_end_inclusive():
    first, second = subtasks([8], 20)
    assert (first.start, first.num_frames, first.num_actions, first.num_latents) == (0, 5, 8, 2)
    assert (second.start, second.num_frames, second.num_actions, second.num_latents) == (8, 7, 12, 3)
    assert first.frame_indices.tolist() == [0, 1, 2, 3, 4]  # frame 4 is step 8, the first frame of the next event
    assert second.frame_indices.tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert (first.duration_s, second.duration_s) == (0.8, 1.2)


def test_odd_boundaries_snap_up_and_stay_shared():
    first, second, third = subtasks([5, 11], 20)
    assert (first.start, first.num_actions) == (0, 6)
    assert (second.start, second.num_actions) == (6, 6)
    assert (third.start, third.num_actions) == (12, 8)
    assert [window.duration_s for window in (first, second, third)] == [0.5, 0.6, 0.9]
    assert (second.span_start, second.span_end) == (5, 11)


def test_last_span_ends_at_the_last_stored_frame():
    *_, last = subtasks([12], 21)  # 21 commands: frames at steps 0, 2 .. 20
    assert (last.start, last.num_actions) == (12, 8)
    assert last.frame_indices.tolist() == [6, 7, 8, 9, 10]
    assert last.duration_s == 0.9


def test_events_shorter_than_a_stride_keep_two_frames():
    windows = subtasks([6, 7, 8, 19], 20)
    assert [(window.start, window.num_actions) for window in windows] == [(0, 6), (6, 2), (8, 2), (8, 12), (18, 2)]
    one = windows[1]
    assert (one.num_frames, one.num_latents, one.duration_s) == (2, 2, 0.1)
    assert one.frame_indices.tolist() == [3, 4]
    assert windows[-1].frame_indices.tolist() == [9, 10]  # step 19 snaps beyond the video and is moved back


def test_cap_keeps_the_first_65_frames_and_the_true_duration():
    fits, longer = subtasks([128], 300)
    assert (fits.num_frames, fits.num_actions, fits.num_latents, fits.duration_s) == (65, 128, 17, 12.8)
    assert (longer.start, longer.num_frames, longer.num_actions, longer.num_latents) == (128, 65, 128, 17)
    assert longer.frame_indices[[0, -1]].tolist() == [64, 128]
    assert longer.duration_s == 17.2


@pytest.mark.parametrize(
    ("frames", "latents"), [(2, 2), (3, 2), (5, 2), (6, 3), (9, 3), (10, 4), (61, 16), (62, 17), (65, 17)]
)
def test_frames_are_padded_to_one_plus_four_n(frames, latents):
    assert Window("event", "action", 0, 0, 9, 0, frames, 2, 1.0).num_latents == latents


def test_latents_and_keyframes_of_a_padded_window():
    window = Window("event", "action", 0, 20, 34, 20, 8, 2, 1.4)
    assert window.num_latents == 3
    assert window.latent_frame_indices.tolist() == [10, 14, 17]  # the last latent ends on the held frame
    assert window.keyframes.tolist() == [0, 1, 3, 5]
    assert Window("event", "action", 0, 0, 2, 0, 2, 2, 0.2).keyframes.tolist() == [0, 0, 0, 0]


def test_fixed_windows_tile_the_episode_with_the_task():
    windows = cut_windows(synthetic_episode(0, steps=71, size=16), ["fixed"], fixed_steps=32)
    assert [(window.start, window.num_actions, window.num_latents) for window in windows] == [
        (0, 32, 5),
        (32, 32, 5),
        (64, 6, 2),
    ]
    assert {(window.kind, window.level) for window in windows} == {("fixed", "task")}
    assert [window.event_index for window in windows] == [0, 1, 2]
    assert [window.duration_s for window in windows] == [3.2, 3.2, 0.7]


def test_a_tile_without_a_frame_after_its_first_is_left_out():
    windows = cut_windows(synthetic_episode(0, steps=65, size=16), ["fixed"], fixed_steps=32)
    assert [window.start for window in windows] == [0, 32]  # step 64 is the last stored frame


def test_windows_of_all_levels_come_in_order():
    episode = synthetic_episode(3, steps=64, size=16)
    windows = cut_windows(episode, ["event", "fixed"], levels=["action", "subtask"], fixed_steps=16)
    assert [window.level for window in windows] == ["subtask"] * 4 + ["action"] * 16 + ["task"] * 4
    for window in windows:
        assert window.start % 2 == 0
        assert window.frame_indices[-1] < episode.num_frames
        assert window.start + window.num_actions <= episode.num_steps
    covered = np.zeros(64, int)
    for window in windows[:4]:
        covered[window.start : window.start + window.num_actions] += 1
    assert covered.tolist() == [1] * 64


def test_an_episode_shorter_than_a_video_stride_has_no_windows():
    episode = synthetic_episode(0, steps=16, size=16)
    short = dataclasses.replace(
        episode,
        frames={view: frames[:1] for view, frames in episode.frames.items()},
        poses=episode.poses[:2],
        grippers=episode.grippers[:2],
        command_poses=episode.command_poses[:1],
        command_grippers=episode.command_grippers[:1],
        spans={"task": [Span(0, 1, "wait", "wait")]},
        cameras={},
    )
    assert cut_windows(short, ["event", "fixed"], fixed_steps=16) == []


def test_wrong_requests_are_errors():
    episode = synthetic_episode(0, steps=16, size=16)
    with pytest.raises(UserError, match="unknown window kind or level 'random'"):
        cut_windows(episode, ["random"])
    with pytest.raises(
        UserError, match="fixed windows of 33 steps do not fit the video: give a multiple of 2 up to 128"
    ):
        cut_windows(episode, ["fixed"], fixed_steps=33)
    with pytest.raises(UserError, match="fixed windows of 130 steps"):
        cut_windows(episode, ["fixed"], fixed_steps=130)
