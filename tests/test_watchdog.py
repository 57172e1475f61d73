"""The watchdog by hand: shares of a planted change, a place in the event by what is seen, thresholds from events."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from history_windows import HISTORY, STEPS

from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.evaluation import watchdog as evaluation
from wallwm_jax.evaluation.watchdog import Watched, calibrate, summarize, watch_episode
from wallwm_jax.models.codecs import get_codec
from wallwm_jax.serving.watchdog import Calibration, EventWatch, load_calibrations, save_calibrations

CODEC = get_codec("haar8")
MODE = SimpleNamespace(
    codec=CODEC,
    store={"size": (16, 16), "video_stride": 2, "action_hz": 10.0},
    config=SimpleNamespace(model=SimpleNamespace(duration_quantiles=(0.1, 0.5, 0.9))),
)
FRAMES = 12  # of an event of 24 control steps, 2.4 s, three latents


def film(brightness):
    """`[1 + n, 16, 16, 3]`: a grey scene whose left half has the brightness of each frame."""
    video = np.full((len(brightness), 16, 16, 3), 100, np.uint8)
    video[:, :, :8] = np.asarray(brightness, np.uint8)[:, None, None, None]
    return video


EVENT = film(100 + 10 * np.arange(FRAMES + 1))  # gets brighter by 10 with each frame


def watch_over(predicted=EVENT, **options):
    settings = dict(steps=24, seconds=2.4, quantiles_s=np.array([1.2, 2.4, 4.8])) | options
    return EventWatch(MODE, {"front": EVENT[:1]}, {"front": CODEC.encode(predicted)}, **settings)


def see(watch, video, frames=FRAMES):
    return [watch.observe(2 * n, {"front": video[n]}) for n in range(1, frames + 1)]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_score_is_the_share_of_the_predicted_change_that_is_missing(share):
    seen = film(100 + (1 - share) * 10 * np.arange(FRAMES + 1))
    judged = see(watch_over(), seen)
    assert [one.latents for one in judged] == [0] * 3 + [1] * 4 + [2] * 4 + [3]
    assert judged[0].score is None and judged[3].score == pytest.approx(share, abs=1e-4)
    assert judged[-1].score == pytest.approx(share, abs=1e-4) and judged[-1].worst >= judged[-1].score


def test_what_goes_the_other_way_misses_more_than_all_and_the_worst_is_kept():
    back_and_forth = np.concatenate([EVENT[:1], film(100 - 10 * np.arange(1, 5)), EVENT[5:]])
    judged = see(watch_over(), back_and_forth)
    assert judged[3].score == pytest.approx(2.0, abs=1e-4)
    assert judged[-1].score < 0.2 and judged[-1].worst == judged[3].score


def test_the_last_latent_holds_the_last_frame_and_frames_left_out_hold_the_one_before():
    short = watch_over(EVENT[np.minimum(np.arange(FRAMES + 1), 10)], steps=20, seconds=2.0)
    assert see(short, EVENT, 10)[-1].latents == 3 and short.judgement().score == pytest.approx(0.0, abs=1e-5)
    sparse = watch_over(EVENT[np.arange(FRAMES + 1) // 4 * 4])
    for step in (8, 16, 24):
        judged = sparse.observe(step, {"front": EVENT[step // 2]})
    assert judged.latents == 3 and judged.worst == pytest.approx(0.0, abs=1e-5)


def test_progress_is_the_clock_until_what_is_seen_says_that_the_event_is_slow():
    slow = EVENT[np.arange(FRAMES + 1) // 2]
    by_clock, by_sight = see(watch_over(), slow)[7], see(watch_over(spread=0.01), slow)[7]
    assert by_clock.progress == pytest.approx(0.66, abs=0.05)  # 1.6 of 2.4 s
    assert by_sight.progress == pytest.approx(0.33, abs=0.06)  # 4 of 12 frames
    on_time = see(watch_over(spread=0.01), EVENT)
    assert on_time[7].progress == pytest.approx(0.66, abs=0.05)
    assert on_time[3].done_probability < 0.01 and on_time[-1].progress > 0.9


def test_done_is_as_likely_as_the_durations_that_have_passed():
    watch = EventWatch(MODE, {}, None, steps=24, seconds=1.2, quantiles_s=np.array([1.0, 2.0, 4.0]))
    found = {step: watch.observe(step, {}).done_probability for step in (4, 6, 12, 24, 40)}
    assert found[4] == 0.0 and found[6] == pytest.approx(0.1, abs=0.1)  # 0.6 s is the 10 % quantile, around 1.2 s
    assert found[12] == pytest.approx(0.5, abs=0.05) and found[24] == pytest.approx(1.0, abs=0.1) and found[40] == 1.0


def test_steps_run_forward_and_views_stay():
    watch = watch_over()
    with pytest.raises(UserError, match="began with the view 'front'; send it"):
        watch.observe(2, {})
    watch.observe(2, {"front": EVENT[1]})
    with pytest.raises(UserError, match="step 2 was told already; the next is at least 3"):
        watch.observe(2, {"front": EVENT[1]})


def test_calibrations_are_of_one_checkpoint_and_survive_their_file(tmp_path):
    path = tmp_path / "watchdog.json"
    event = Calibration(step=7, threshold=0.8, false_alarm_rate=0.05, spread=0.4, events=9, store="store")
    found = {"event": event, "unified": dataclasses.replace(event, threshold=0.6)}
    save_calibrations(path, found)
    assert load_calibrations(path, 7) == found
    with pytest.raises(UserError, match="is of step 7, not 8; make it by --calibrate"):
        load_calibrations(path, 8)
    path.write_text('{"step": 7}')
    with pytest.raises(UserError, match="cannot be read"):
        load_calibrations(path, 7)


def test_the_threshold_is_what_so_many_recorded_events_reach(small_store, monkeypatch):
    store, policy = open_store(small_store), SimpleNamespace(step=7, event_mode=MODE)
    scores = iter(np.linspace(0.0, 1.0, 21))
    judged = SimpleNamespace(worst=0.0)
    fake = SimpleNamespace(steps=2, observe=lambda *_: judged, distances=lambda: [0.25])

    def predict(*_, **__):
        judged.worst = next(scores)
        return fake

    monkeypatch.setattr(evaluation, "predict", predict)
    found = calibrate(policy, store, events=21, false_alarm_rate=0.1)
    assert (found.step, found.events, found.threshold, found.spread) == (7, 21, pytest.approx(0.9), 0.25)
    with pytest.raises(UserError, match="a false alarm rate of"):
        calibrate(policy, store, events=1, false_alarm_rate=1.5)


def test_chunks_are_calibrated_on_recorded_windows_with_their_history(history_store, small_store, monkeypatch):
    policy, scores, told = SimpleNamespace(step=7, event_mode=MODE, unified_mode=object()), iter(range(3)), []

    def predict_chunk(mode, asked, words, *, seed):
        record, score = history_store.read(seed), next(scores)
        video, now = {view: record.video(view) for view in record.frames}, 4 * HISTORY
        assert words == history_store.caption(record.caption_id) and mode is policy.unified_mode
        for view, film in video.items():
            np.testing.assert_array_equal(asked.frames[view], film[: now + 1])

        def observe(step, frames):
            told.append(step)
            for view, film in video.items():
                np.testing.assert_array_equal(frames[view], film[now + step // 2])
            return SimpleNamespace(worst=float(score))

        return SimpleNamespace(steps=STEPS, observe=observe, distances=lambda: [0.25])

    monkeypatch.setattr(evaluation, "predict_chunk", predict_chunk)
    found = calibrate(policy, history_store, mode="unified", events=3, false_alarm_rate=0.5)
    assert (found.step, found.events, found.threshold, found.store) == (7, 3, 1.0, history_store.path.name)
    assert told[: STEPS // 2] == list(range(2, STEPS + 1, 2))
    with pytest.raises(UserError, match="has no history windows, on which mode 'unified' is calibrated"):
        calibrate(policy, open_store(small_store), mode="unified", events=3, false_alarm_rate=0.5)


def test_precision_and_recall_by_hand():
    def event(perturbation, alarm):
        return Watched("chamber", "reach", perturbation, 8, 0.5, alarm)

    found = summarize([event("", True), *[event("", False)] * 7, event("held", True), event("open", False)])
    assert found["recall"]["rate"] == 0.5 and found["precision"]["rate"] == 0.5
    assert found["false_alarms"]["rate"] == 1 / 8 and found["false_alarms"]["episodes"] == 8
    assert {name: rate["rate"] for name, rate in found["by_perturbation"].items()} == {"held": 1.0, "open": 0.0}


def test_an_episode_goes_as_the_expert_means_it_until_one_event_is_perturbed(monkeypatch):
    """In OCBench's smallest scene; a stand-in for the model notes how far the pictures of each event have changed."""
    from wallwm_jax.sources.simulator.ocbench_env import OCBenchEnv

    env_id, changes = "block-cpu-lite-single-task1-v0", []

    def predict(mode, asked, *, seed):
        def observe(step, frames):
            changes[-1] = np.abs(frames["front_pixels"].astype(float) - asked.frames["front_pixels"]).mean()
            return SimpleNamespace(worst=changes[-1])

        changes.append(0.0)
        return SimpleNamespace(observe=observe)

    monkeypatch.setattr(evaluation, "predict", predict)
    mode = SimpleNamespace(store={"video_stride": 2, "actions_per_latent": 8}, max_actions=128)
    policy = SimpleNamespace(event_mode=mode, unified_mode=None)
    calibration = Calibration(step=7, threshold=0.5, false_alarm_rate=0.05, spread=1.0, events=9, store="store")
    environments = OCBenchEnv(env_id, ("front_pixels",), 32), OCBenchEnv(env_id, ())
    watched = watch_episode(*environments, policy, calibration, "open", mode="event", seed=3, level="action")
    *before, last = watched
    assert last.perturbation == "open" and not any(event.perturbation for event in before)
    assert [event.score for event in watched] == changes and all(
        event.alarm == (event.score > 0.5) for event in watched
    )
    assert last.steps >= 8 and last.verb in ("grasp", "lift", "carry", "lower")  # where the expert holds something


@pytest.mark.extended
def test_in_unified_mode_a_chunk_is_perturbed_and_each_is_predicted_from_the_past(monkeypatch):
    from wallwm_jax.sources.simulator.ocbench_env import OCBenchEnv

    env_id, asked = "block-cpu-lite-single-task1-v0", []

    def predict_chunk(mode, request, instruction, *, seed):
        asked.append((request, instruction))
        return SimpleNamespace(observe=lambda step, frames: SimpleNamespace(worst=step / 16))

    monkeypatch.setattr(evaluation, "predict_chunk", predict_chunk)
    engine = SimpleNamespace(store={"video_stride": 2, "actions_per_latent": 8}, max_actions=8)
    policy = SimpleNamespace(event_mode=engine, unified_mode=SimpleNamespace(chunk=16, stride=2, past_frames=8))
    calibration = Calibration(step=7, threshold=0.5, false_alarm_rate=0.05, spread=1.0, events=9, store="store")
    environments = OCBenchEnv(env_id, ("front_pixels",), 32), OCBenchEnv(env_id, ())
    watched = watch_episode(*environments, policy, calibration, "open", mode="unified", seed=3, level="action")
    assert [one.steps for one in watched] == [16] * len(asked) and len(asked) >= 2
    assert [one.perturbation for one in watched] == [""] * (len(asked) - 1) + ["open"]
    assert watched[0].verb == "reach" and all(one.alarm and one.score == 1.0 for one in watched)
    assert [request.number for request, _ in asked] == list(range(1, len(asked) + 1))
    assert [len(request.command_poses) for request, _ in asked] == [0] + [16] * (len(asked) - 1)
    assert len({instruction for _, instruction in asked}) == 1
    first, second = (request.frames["front_pixels"] for request, _ in asked[:2])
    np.testing.assert_array_equal(second[0], first[-1])  # eight frames, sixteen steps later
