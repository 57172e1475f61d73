"""Cleaning: every planted fault trips its rule, what can be repaired is, and a good episode passes untouched."""

import dataclasses
import html
import json
import re

import cv2
import numpy as np
import pytest
from synthetic import synthetic_episode

from wallwm_jax import build_events
from wallwm_jax.benchmarks import sync as benchmark
from wallwm_jax.benchmarks.planted_faults import FAULTS, begun, late_pictures
from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.store_writer import StoreOptions
from wallwm_jax.evaluation.build_report import write_build_report
from wallwm_jax.events.clean import RULES, Limits, clean, explanation
from wallwm_jax.events.preparing import EXPLANATIONS, PrepareOptions, prepare
from wallwm_jax.events.schema import Episode, EpisodeError
from wallwm_jax.sources.simulator import rendering

LAG_FAULTS = {"one camera late", "pictures lost midway", "pictures backwards", "far too late"}
RECORDING_FAULTS = sorted(FAULTS.keys() - LAG_FAULTS - {"NaN in poses"})


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return [synthetic_episode(seed, steps=160, size=32, smooth=True) for seed in range(3)]


def planted(name, episode, seed=0):
    return FAULTS[name][1](episode, np.random.default_rng(seed))


def test_good_episodes_pass_untouched(episodes):
    for episode in episodes:
        cleaned = clean(episode)
        assert cleaned.findings == () and cleaned.motion.episode is episode


@pytest.mark.parametrize("name", RECORDING_FAULTS)
def test_a_planted_fault_trips_its_rule(episodes, name):
    for seed, episode in enumerate(episodes):
        findings = clean(planted(name, episode, seed)).findings
        assert {finding.rule for finding in findings} & set(FAULTS[name][0]), findings
        assert all(finding.where and finding.episode == episode.episode_id for finding in findings)


def test_spikes_are_interpolated(episodes):
    episode = episodes[0]
    poses = episode.poses.copy()
    poses[40, 0, :3, 3] += [0.0, 0.2, 0.0]
    cleaned = clean(dataclasses.replace(episode, poses=poses))
    (finding,) = cleaned.findings
    assert (finding.rule, finding.action, finding.where) == ("pose_spike", "repaired", "poses, step 40")
    assert finding.evidence["away, m"] == pytest.approx(0.2, abs=0.02)
    repaired = cleaned.motion.episode
    assert np.allclose(repaired.poses[40, 0, :3, 3], (poses[39] + poses[41])[0, :3, 3] / 2)
    assert np.abs(repaired.poses - episode.poses).max() < 0.01
    assert np.allclose(np.linalg.det(repaired.poses[40, 0, :3, :3]), 1.0)
    assert repaired.provenance[-1] == "pose_spike: poses, step 40 repaired"


def test_rounded_rotations_and_slack_grippers_are_repaired(episodes):
    rounded = clean(planted("rounded rotation", episodes[0])).motion.episode
    rotation = rounded.poses[..., :3, :3]
    assert np.abs(np.swapaxes(rotation, -1, -2) @ rotation - np.eye(3)).max() < 1e-12
    assert np.abs(rounded.poses - episodes[0].poses).max() < 0.01
    slack = planted("gripper below zero", episodes[0])
    gripper = clean(slack).motion.episode.grippers
    assert np.array_equal(gripper, np.maximum(slack.grippers, 0.0)) and gripper.min() == 0.0


def test_a_camera_without_calibration_keeps_its_pictures(episodes):
    damaged = planted("NaN in calibration", episodes[0])
    cleaned = clean(damaged).motion.episode
    assert len(cleaned.cameras) == 1 and len(cleaned.frames) == 2


def test_a_gripper_that_is_only_open_or_closed_is_no_jump(episodes):
    binary = dataclasses.replace(episodes[0], grippers=np.round(episodes[0].grippers))
    assert np.ptp(binary.grippers) == 1.0 and clean(binary).findings == ()


def test_one_repeated_frame_is_noted_and_the_episode_kept(episodes):
    frames = {view: list(seen) for view, seen in episodes[0].frames.items()}
    place = int(np.linalg.norm(np.diff(episodes[0].poses[::2, 0, :3, 3], axis=0), axis=-1).argmax())
    frames["front_pixels"][place + 1] = frames["front_pixels"][place]
    cleaned = clean(dataclasses.replace(episodes[0], frames=frames))
    (finding,) = cleaned.findings
    assert (finding.rule, finding.action) == ("duplicated_frame", "noted") and cleaned.motion is not None
    assert (finding.view, finding.frame) == ("front_pixels", place + 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_an_episode_of_a_few_steps_is_too_short_and_nothing_worse(episodes, steps):
    assert {finding.rule for finding in clean(begun(episodes[0], steps)).findings} <= {"too_short", "no_motion"}


def test_failures_are_kept_unless_success_is_asked_for(episodes):
    failed = dataclasses.replace(episodes[0], success=False)
    assert clean(failed).findings == ()
    assert clean(failed, Limits(require_success=True)).findings[0].rule == "failed"


def test_every_rule_explains_itself_in_a_sentence():
    assert all(explanation(rule).endswith(".") and EXPLANATIONS[rule.__name__] for rule in RULES)
    tripped = {rule for rules, _ in FAULTS.values() for rule in rules}
    others = {"failed_demonstration", "failed", "lag_corrected", "labels_left_out"}  # found by no rule of a signal
    assert tripped == EXPLANATIONS.keys() - others  # each has a fault that trips it


def several(episodes):
    """Six recordings: two good, one late, one frozen, one with a slack gripper, one that no episode can be made of."""
    yield episodes[0]
    yield dataclasses.replace(episodes[1], source="synthetic/other")
    yield planted("far too late", episodes[2])
    yield planted("frozen camera", episodes[0])
    yield planted("gripper below zero", episodes[1])
    try:
        yield planted("NaN in poses", episodes[2])
    except EpisodeError as error:
        yield error


def test_preparing_counts_everything_and_loses_nothing(episodes):
    prepared = prepare(several(episodes), PrepareOptions(clean=True, sync=True))
    assert prepared.summary.taken.total() == 0  # nothing is read before it is asked for
    kept = list(prepared)
    summary = prepared.summary
    assert [episode.episode_id for episode in kept] == [episodes[number].episode_id for number in (0, 1, 1)]
    assert summary.taken == {"synthetic/squares": 4, "synthetic/other": 1, "unknown": 1}
    assert summary.kept == {"synthetic/squares": 2, "synthetic/other": 1}
    assert summary.counts("dropped") == {"invalid_episode": 1, "frozen_camera": 1, "lag_too_long": 1}
    assert summary.counts("repaired") == {"gripper_range": 1}
    assert "poses is not finite at step" in summary.findings[-1].where
    assert [believed for *_, believed in summary.lags] == [True, True, False, True]


def test_without_options_episodes_go_through_as_they_are(episodes):
    prepared = prepare(episodes, PrepareOptions())
    assert [one is other for one, other in zip(prepared, episodes, strict=True)] == [True] * 3
    assert prepared.summary.findings == []


def test_the_page_of_a_build_shows_what_was_found(episodes, tmp_path):
    prepared = prepare(several(episodes), PrepareOptions(clean=True, sync=True))
    assert sum(1 for _ in prepared) == 3
    data = write_build_report(tmp_path, prepared.summary, "Event store of six recordings")
    assert data == json.loads((tmp_path / "build_report.json").read_text())
    assert (data["episodes_in"], data["episodes_kept"]) == (6, 3)
    assert data["dropped_by_rule"] == {"invalid_episode": 1, "frozen_camera": 1, "lag_too_long": 1}
    assert data["sources"]["synthetic/squares"] == {"in": 4, "kept": 2, "dropped": 2}
    assert data["limits"]["max_lag_s"] == 1.0 and data["limits"]["jump_m"] == 0.04
    page = (tmp_path / "build_report.html").read_text()
    assert "frozen camera" in page and EXPLANATIONS["lag_too_long"] in html.unescape(page)
    assert not re.search(r'(src|href)="(?!data:)', page)  # self-contained
    assert page.count("data:image/jpeg;base64,") == 3 * 7  # three findings with pictures, seven frames each
    assert page.count("data:image/png;base64,") == 2  # the histogram of lags, the motion of the late episode


def test_large_frames_are_judged_at_a_fraction_of_their_size(episodes):
    def enlarged(data):
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        return cv2.imencode(".jpg", cv2.resize(picture, (320, 320)))[1].tobytes()

    view, seen = next(iter(episodes[0].frames.items()))
    large = dataclasses.replace(episodes[0], size=(320, 320), frames={view: list(map(enlarged, seen))}, cameras={})
    assert clean(large).findings == ()


def test_a_build_prepares_its_episodes_and_keeps_the_page_in_the_store(episodes, tmp_path, monkeypatch):
    late, frozen = late_pictures(episodes[0], 4), planted("frozen camera", episodes[1])
    families = {"squares": build_events.FamilyCount(kept=3)}
    monkeypatch.setattr(build_events, "open_sources", lambda *_: ([late, frozen, episodes[2]], lambda: families))
    options = StoreOptions(kinds=("event",), heldout_fraction=0.0, latent_sample=4)
    target = str(tmp_path / "store")
    built = build_events.build("ocbench:squares", target, options, preparation=PrepareOptions(clean=True, sync=True))
    told = [line.split() for line in build_events.report(built, target).splitlines()]
    assert ["dropped", "frozen_camera", "1"] in told and ["repaired", "lag_corrected", "1"] in told
    store = open_store(target)
    assert [episode["name"] for episode in store.episodes] == [episodes[0].episode_id, episodes[2].episode_id]
    assert "4 control steps (0.40 s) earlier" in store.episodes[0]["provenance"][-1]
    assert json.loads((store.path / "build_report.json").read_text())["episodes_in"] == 3
    assert (store.path / "build_report.html").is_file()


def test_every_build_has_the_page_with_what_was_dropped_and_left_out(episodes, tmp_path, monkeypatch):
    note = "subtask labels left out: 1.00 s without one"
    labelled = [dataclasses.replace(episode, provenance=(note, "resampled")) for episode in episodes[:2]]
    families = {"squares": build_events.FamilyCount(3, 3, ("arm_7: arm.mp4: front: is no readable video",))}
    monkeypatch.setattr(build_events, "open_sources", lambda *_: ([*labelled, episodes[2]], lambda: families))
    options = StoreOptions(kinds=("event",), heldout_fraction=0.0, latent_sample=4)
    target = tmp_path / "store"
    built = build_events.build("ocbench:squares", str(target), options)
    told = [line.split() for line in build_events.report(built, str(target)).splitlines()]
    assert ["dropped", "failed_demonstration", "2"] in told and ["noted", "labels_left_out", "2"] in told
    data = json.loads((target / "build_report.json").read_text())
    assert (data["episodes_in"], data["episodes_kept"], data["limits"]) == (6, 3, {})
    assert data["dropped_by_rule"] == {"invalid_episode": 1, "failed_demonstration": 2}
    assert data["sources"]["squares"] == {"in": 3, "kept": 0, "dropped": 3}
    page = (target / "build_report.html").read_text()
    assert "neither cleaned nor synchronised" in page and "Thresholds" not in page
    assert "arm_7: arm.mp4: front: is no readable video" in page
    assert f'<td class="words">{note}</td><td>2</td>' in page and "resampled" not in page


@pytest.fixture(scope="session")
def recordings() -> list[Episode]:
    """Four real demonstrations, one of each family."""
    pytest.importorskip("ocbench")
    try:
        rendering.check_rendering()
    except UserError as error:
        pytest.skip(str(error))
    from wallwm_jax.sources.simulator.ocbench_demos import demonstrations

    return list(demonstrations(benchmark.FAMILIES, 1, seed=21, workers=0))


@pytest.mark.extended
def test_lags_and_faults_planted_into_demonstrations_are_found(recordings):
    result = benchmark.measure_on(recordings)
    assert result["recovered"] >= 0.7 and result["believed_right"] >= 0.95  # one of the four is short: quarantined
    assert result["clean"]["kept"] >= 3 and set(result["clean"]["found"]) <= {"lag_drifts"}
    caught = {name: row["caught"] / row["planted"] for name, row in result["faults"].items()}
    assert all(share == 1.0 for name, share in caught.items() if name not in LAG_FAULTS), caught
    assert all(caught[name] >= 0.5 for name in LAG_FAULTS), caught
    rows = (benchmark.LAGS_S, FAULTS, result["rules"], result["clean"]["found"])
    assert len(benchmark.table(result).splitlines()) == 7 + sum(map(len, rows))
