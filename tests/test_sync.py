"""Pictures against actions: planted lags are found and removed, what cannot be told is quarantined with its reason."""

import dataclasses

import numpy as np
import pytest
from synthetic import synthetic_episode

from wallwm_jax.benchmarks.planted_faults import FAULTS, begun, late_pictures
from wallwm_jax.events.motion import Motion
from wallwm_jax.events.schema import Episode, Span
from wallwm_jax.events.sync import estimate_lag, shift, synchronise

FRAME_S = 0.2  # of the synthetic episodes, 10 Hz at stride 2


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return [synthetic_episode(seed, steps=160, size=32, smooth=True) for seed in range(4)]


def planted(name, episode, seed=0):
    return FAULTS[name][1](episode, np.random.default_rng(seed))


@pytest.mark.parametrize("steps", [-9, -4, -1, 0, 1, 3, 8])
def test_a_planted_lag_is_found_within_a_frame(episodes, steps):
    for episode in episodes:
        lag = estimate_lag(late_pictures(episode, steps))
        assert lag.seconds == pytest.approx(steps / 10, abs=FRAME_S / 2)
        assert lag.confidence > 0.9 and lag.correlation > 0.5
        assert all(abs(seconds - steps / 10) <= 2 * FRAME_S for seconds in lag.per_camera.values())


def test_a_lag_is_removed_and_told_in_words(episodes):
    late = late_pictures(episodes[0], 5)
    result = synchronise(late)
    assert result.verdict == "shifted" and result.episode is not None
    assert abs(estimate_lag(result.episode).seconds) < FRAME_S / 2
    assert synchronise(result.episode).episode is result.episode  # nothing is left to do
    (said,) = result.episode.provenance[len(late.provenance) :]
    assert "5 control steps (0.50 s) earlier" in said and f"of {late.num_steps} steps" in said


def test_an_episode_in_sync_is_handed_on_as_it_is(episodes):
    result = synchronise(episodes[1])
    assert result.verdict == "in_sync" and result.episode is episodes[1]


@pytest.mark.parametrize("steps", [-5, -4, 3, 6])
def test_shifting_back_and_forth_leaves_the_middle_of_the_episode_untouched(episodes, steps):
    episode = episodes[2]
    late = late_pictures(episode, steps)
    back = shift(late, steps)
    frame = episode.frames["front_pixels"].index(back.frames["front_pixels"][0])
    step = episode.video_stride * frame  # a picture and the pose at its moment are together again
    kept = slice(step, step + back.num_steps)
    assert np.array_equal(back.poses, episode.poses[kept.start : kept.stop + 1])
    assert np.array_equal(back.command_poses, episode.command_poses[kept])
    for view, camera in back.cameras.items():
        frames = slice(frame, frame + back.num_frames)
        assert back.frames[view] == episode.frames[view][frames]
        turned = np.abs(camera.extrinsics - episode.cameras[view].extrinsics[frames]).max()
        assert turned < 1e-12 if steps % 2 == 0 else turned < 0.02  # between two known poses it is interpolated
    assert episode.num_steps - back.num_steps <= 2 * (abs(steps) + 1)


def test_spans_follow_the_actions_unless_they_were_labelled_in_the_video():
    episode = synthetic_episode(0, steps=40, size=16)
    spans = {"task": [Span(0, 40, "all", "do")], "action": [Span(0, 3, "a", "a", 0), Span(3, 40, "b", "b", 0)]}
    episode = dataclasses.replace(episode, spans=spans)
    early = shift(episode, -4)  # pictures were 4 steps early: the first 4 states have none
    assert early.frames["front_pixels"][0] == episode.frames["front_pixels"][0]
    assert np.array_equal(early.poses[0], episode.poses[4]) and early.num_steps == 36
    assert [(span.start, span.end, span.caption) for span in early.spans["action"]] == [(0, 36, "b")]
    seen = shift(episode, -4, spans_follow="frames")
    assert [(span.start, span.end, span.caption) for span in seen.spans["action"]] == [(0, 3, "a"), (3, 36, "b")]


def test_nothing_that_moves_gives_no_confidence():
    still = planted("no motion", synthetic_episode(0, steps=60, size=16, smooth=True))
    assert estimate_lag(still).confidence == 0.0
    result = synchronise(still)
    assert (result.episode, result.verdict) == (None, "lag_unclear")


def test_a_few_frames_tell_nothing(episodes):
    assert synchronise(begun(episodes[0], 12)).verdict == "lag_unclear"


def test_a_camera_with_a_lag_of_its_own_is_named(episodes):
    for episode in episodes:
        result = synchronise(planted("one camera late", episode))
        assert (result.episode, result.verdict) == (None, "cameras_disagree")
        assert "camera '" in result.reason and "front_pixels" in result.reason


def test_pictures_lost_midway_are_a_drift(episodes):
    tries = [planted("pictures lost midway", episode, seed) for seed in (0, 1) for episode in episodes]
    verdicts = [synchronise(episode).verdict for episode in tries]
    assert verdicts.count("lag_drifts") >= 6  # of 8; a hand at rest when they are lost tells nothing


def test_a_lag_longer_than_a_cameras_delay_is_no_lag(episodes):
    result = synchronise(late_pictures(episodes[3], 13))
    assert (result.episode, result.verdict) == (None, "lag_too_long")
    assert result.lag.seconds == pytest.approx(1.3, abs=FRAME_S)


def test_travel_is_that_of_the_moment_before(episodes):
    motion = Motion(episodes[0])
    whole, earlier = motion.travel(), motion.travel(2 * FRAME_S)
    assert np.allclose(earlier[2:], whole[:-2]) and np.isnan(earlier[:2]).all()
