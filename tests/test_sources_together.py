"""Several sources in one store: a LeRobot and an RLDS set, drawn in the shares asked for; what does not fit is said."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path

import lerobot_files
import numpy as np
import pytest
import rlds_files
from recorded_motion import DESCRIPTION, FRONT, recordings
from training_setup import subprocess_environment

from configs import base
from wallwm_jax import build_events
from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.sampler import Sampler
from wallwm_jax.data.store_writer import StoreOptions
from wallwm_jax.sources.opening import SourceOptions, open_sources

OPTIONS = SourceOptions(size=16, workers=0)


@dataclasses.dataclass
class Two:
    """A LeRobot set of four recordings, one of them damaged, and an RLDS set of two; each with its description."""

    sources: list[str]
    embodiments: list[str]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Two:
    folder, raws = tmp_path_factory.mktemp("sets"), recordings(6)
    kitchen = lerobot_files.write_set(folder / "kitchen", raws[:4], "v2.1")
    next(kitchen.glob(f"videos/*/{FRONT}/episode_000002.mp4")).unlink()
    lab, text = rlds_files.write_set(folder / "rlds", raws[4:]), DESCRIPTION
    for old, new in rlds_files.DESCRIPTION_CHANGES.items():
        text = text.replace(old, new)
    (folder / "kitchen.toml").write_text(DESCRIPTION)
    (folder / "lab.toml").write_text(text.replace("test_arm", "lab_arm"))
    return Two([f"lerobot:{kitchen}", f"rlds:{lab}"], [str(folder / "kitchen.toml"), str(folder / "lab.toml")])


@pytest.fixture(scope="module")
def both(two, tmp_path_factory) -> tuple[build_events.Build, Path]:
    """A build of both and its store, of events found in their motion."""
    target = tmp_path_factory.mktemp("stores") / "both"
    options = StoreOptions(kinds=("event",), heldout_fraction=0.0, latent_sample=8)
    built = build_events.build(two.sources, str(target), options, OPTIONS, embodiments=two.embodiments)
    return built, target


def test_each_source_keeps_its_name_its_robot_and_its_damage(both):
    built, target = both
    store = open_store(target)
    assert store.meta["sources"] == ["lerobot/kitchen", "rlds/test_arm"]
    assert store.meta["embodiments"] == ["test_arm", "lab_arm"]
    assert [one["source"] for one in store.episodes] == 3 * ["lerobot/kitchen"] + 2 * ["rlds/test_arm"]
    np.testing.assert_array_equal(store.index["source"], store.index["embodiment"])
    told = [line.split() for line in build_events.report(built, str(target)).splitlines()]
    assert ["episodes", "lerobot/kitchen", "3", "kept", "1", "dropped"] in told
    assert ["episodes", "rlds/test_arm", "2", "kept", "0", "dropped"] in told
    assert FRONT in built.families["lerobot/kitchen"].reasons[0]


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_mixture_draws_the_sets_in_the_shares_asked_for(both, share):
    store, config = open_store(both[1]), base.get_config()
    with config.unlocked():
        config.data.mixture = (("lerobot/", share), ("rlds/", 1 - share))
    sampler = Sampler(store.index, config, sources=store.meta["sources"])
    drawn = np.concatenate([row for block in range(16) for row in sampler.block(block)]).astype(int)
    assert np.mean(store.index["source"][drawn] == 0) == pytest.approx(share, abs=0.01)
    assert abs(np.mean(store.index["source"] == 0) - share) > 0.1  # unlike what the store holds


def test_a_build_killed_in_its_second_source_leaves_no_store(two, tmp_path):
    code = f"""
import time
from wallwm_jax import build_events
from wallwm_jax.data.store_writer import StoreOptions
from wallwm_jax.sources.opening import SourceOptions
from wallwm_jax.sources.rlds import RldsSet
def recording(*_):
    print("second", flush=True)
    time.sleep(60)
RldsSet.recording = recording
build_events.build({two.sources}, {str(tmp_path / "store")!r}, StoreOptions(kinds=("event",)),
    SourceOptions(size=16, workers=0), embodiments={two.embodiments})
"""
    line = [sys.executable, "-c", code]
    process = subprocess.Popen(
        line, env=subprocess_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None and "second\n" in process.stdout
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".store.partial-")
    with pytest.raises(UserError, match="is an unfinished build"):
        open_store(leftover)


def test_one_description_is_for_all_sets(two):
    _, counts = open_sources(two.sources[:1], OPTIONS, two.embodiments[:1])
    assert list(counts()) == ["lerobot/kitchen"]
    with pytest.raises(UserError, match="has no numbers 'observation"):  # those of the first set, in the second
        open_sources(two.sources, OPTIONS, two.embodiments[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("control_hz = 10", "control_hz = 10\nvideo_stride = 1"), "5 frames per second; a store has one clock"),
        (("[cameras.wrist]", "[cameras.hand]"), r"has views \['hand'\] that lerobot:.* lacks \(front, wrist\)"),
    ],
)
def test_sources_that_do_not_fit_together_are_an_error_before_any_is_read(two, tmp_path, change, message):
    other = tmp_path / "other.toml"
    other.write_text(Path(two.embodiments[1]).read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        open_sources(two.sources, OPTIONS, [two.embodiments[0], str(other)])


def test_names_and_descriptions_that_cannot_be_told_apart_are_errors(two):
    with pytest.raises(UserError, match="two sources are called 'lerobot/kitchen'"):
        open_sources(2 * two.sources[:1], OPTIONS, two.embodiments[:1])
    with pytest.raises(UserError, match=re.escape("here 2, and is given 3 times; give it once for all")):
        open_sources(two.sources, OPTIONS, 3 * two.embodiments[:1])
    with pytest.raises(UserError, match="here 0, and is given 1 times"):
        open_sources(["ocbench:chamber"], OPTIONS, two.embodiments[:1])
