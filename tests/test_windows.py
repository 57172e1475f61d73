"""Windows against numbers worked out by hand: boundaries, caps, padding, and the true duration."""

import dataclasses
import itertools

import numpy as np
import pytest
from synthetic import synthetic_episode

from wallwm_jax.benchmarks.planted_faults import begun, paused
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
    with pytest.raises(UserError, match="unknown window kind or level 'tile'"):
        cut_windows(episode, ["tile"])
    with pytest.raises(
        UserError, match="fixed windows of 33 steps do not fit the video: give a multiple of 2 up to 128"
    ):
        cut_windows(episode, ["fixed"], fixed_steps=33)
    with pytest.raises(UserError, match="fixed windows of 130 steps"):
        cut_windows(episode, ["fixed"], fixed_steps=130)


def resting(step, steps, **arguments):
    """A moving episode that rests for `steps` control steps at `step`; its only events are its halves."""
    episode = paused(begun(synthetic_episode(0, steps=90, size=16, smooth=True), 60), step, steps)
    middle = step + steps // 2 + 1  # in the rest, and between two frames
    spans = [Span(0, middle, "before", "move", 0), Span(middle, 60 + steps, "after", "move", 0)]
    episode = dataclasses.replace(episode, spans={"task": episode.spans["task"], "subtask": spans})
    return episode, cut_windows(episode, ["event"], levels=["subtask"], **arguments)


def test_the_inside_of_a_long_rest_is_left_out_and_the_clock_stays_true():
    _, whole = resting(30, 40)
    _, pruned = resting(30, 40, longest_pause_s=0.4)
    assert [window.num_frames for window in whole] == [27, 25]  # frames 0..26 and 26..50
    assert [window.num_frames for window in pruned] == [15 + 1 + 2, 1 + 2 + 15]  # two pairs of each rest are left
    for one, other in zip(whole, pruned):
        assert (one.start, one.span_start, one.span_end) == (other.start, other.span_start, other.span_end)
        assert one.duration_s == other.duration_s
        assert (other.frame_indices[0], other.frame_indices[-1]) == (one.frame_indices[0], one.frame_indices[-1])
    assert pruned[0].kept == (*range(17), 26) and pruned[1].kept == (26, 27, *range(35, 51))


def test_a_pruned_window_has_the_commands_that_lead_to_its_frames():
    episode, windows = resting(30, 40, longest_pause_s=0.4)
    for window in windows:
        assert len(window.action_steps) == window.num_actions == 2 * (window.num_frames - 1)
        frames, commands = window.frame_indices, window.action_steps.reshape(-1, 2)
        assert np.array_equal(commands, 2 * frames[1:, None] - [2, 1])
        reached = episode.poses[window.action_steps + 1]  # from command to command nobody moves faster than before
        jumps = np.linalg.norm(np.diff(reached[:, 0, :3, 3], axis=0), axis=-1).max()
        assert jumps <= np.linalg.norm(np.diff(episode.poses[:, 0, :3, 3], axis=0), axis=-1).max() + 1e-12
        assert window.latent_frame_indices[-1] == frames[-1] and window.num_latents == 1 + -(-(len(frames) - 1) // 4)


def test_short_rests_and_other_windows_stay_whole():
    episode, whole = resting(30, 6)
    assert resting(30, 6, longest_pause_s=0.6)[1][0].num_frames == whole[0].num_frames
    kinds = ["fixed", "history"]
    assert cut_windows(episode, kinds, longest_pause_s=0.2) == cut_windows(episode, kinds)


def test_the_cap_counts_the_frames_that_are_left():
    _, (before, _) = resting(30, 400, longest_pause_s=0.4)
    assert before.num_frames == 18 and before.span_end == 231 and before.duration_s == pytest.approx(23.1)


def test_random_windows_have_the_lengths_of_the_events_at_other_places():
    episode = episode_with([5, 11, 30, 45], 60)
    events, windows = (cut_windows(episode, [kind], levels=["subtask"]) for kind in ("event", "random"))
    assert sorted(window.num_frames for window in windows) == sorted(window.num_frames for window in events)
    assert [window.event_index for window in windows] == [0, 1, 2, 3, 4]
    starts = [window.start for window in windows]
    assert starts == sorted(starts) != [window.start for window in events]
    for window in windows:
        assert (window.kind, window.level, window.start % 2) == ("random", "task", 0)
        assert (window.span_start, window.span_end) == (window.start, window.start + window.num_actions)
        assert window.span_end <= 60 and window.duration_s == window.num_actions / 10


def test_random_windows_follow_from_the_seed_and_the_episode_alone():
    episode = synthetic_episode(3, steps=64, size=16)
    places = [[window.start for window in cut_windows(episode, kinds, seed=seed)]
              for kinds, seed in ((["random"], 0), (["random"], 0), (["random"], 1))]  # fmt: skip
    assert places[0] == places[1] != places[2]
    other = dataclasses.replace(episode, episode_id="another")
    assert [window.start for window in cut_windows(other, ["random"])] != places[0]


def test_a_random_window_lies_anywhere_it_fits():
    episode = episode_with([8], 20)  # events of 5 and 7 frames among 11
    starts = {(window.num_frames, window.start // 2) for seed in range(200)
              for window in cut_windows(episode, ["random"], levels=["subtask"], seed=seed)}  # fmt: skip
    assert starts == {(5, place) for place in range(7)} | {(7, place) for place in range(5)}
