"""LeRobot sets as episodes: every row and picture where it belongs, on the clock asked for; what is bad is named."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import lerobot_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_motion import DESCRIPTION, FRONT, SUBTASKS, WRIST, recording, recordings, row_of

from wallwm_jax import build_events
from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.store_writer import StoreOptions
from wallwm_jax.events.windows import cut_windows
from wallwm_jax.sources.clock import choose_clock
from wallwm_jax.sources.embodiment import load_embodiment
from wallwm_jax.sources.lerobot.dataset import LeRobotSet
from wallwm_jax.sources.opening import SourceOptions, open_source
from wallwm_jax.sources.recorded import read_episodes

RAWS = recordings(3)
VERSIONS = ("v2.1", "v3.0")


@pytest.fixture(scope="session")
def description(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("embodiments") / "arm.toml"
    path.write_text(DESCRIPTION)
    return path


@pytest.fixture(scope="session")
def good_sets(tmp_path_factory) -> dict[str, Path]:
    """Version → a set of three episodes with subtask rows; version 3 has two of them in one file. Copy to change."""
    folder = tmp_path_factory.mktemp("lerobot")
    return {version: lerobot_files.write_set(folder / version, RAWS, version, labels="rows") for version in VERSIONS}


@pytest.fixture
def arm(description):
    return load_embodiment(str(description))


def read(path, embodiment, fps=0.0, size=64, **more):
    stream = read_episodes(
        LeRobotSet(path), embodiment, choose_clock(embodiment, fps), size=size, **{"workers": 0, **more}
    )
    return list(stream), stream.count


def rows_seen(frames):
    return [row_of(cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_COLOR)) for frame in frames]


# What goes in comes out


@pytest.mark.parametrize("version", VERSIONS)
def test_every_picture_shows_the_row_it_is_stored_at(good_sets, arm, version):
    episodes, count = read(good_sets[version], arm)
    assert (count.kept, count.damaged) == (3, [])
    for number, (episode, raw) in enumerate(zip(episodes, RAWS)):
        assert (episode.episode_id, episode.source) == (f"{version}/episode_{number:06d}", f"lerobot/{version}")
        assert (episode.num_steps, episode.clock_hz, episode.video_stride) == (len(raw.times) - 1, 10.0, 2)
        for view in ("front", "wrist"):
            assert rows_seen(episode.frames[view]) == list(range(0, len(raw.times), 2))


@pytest.mark.parametrize("version", VERSIONS)
def test_columns_become_poses_grippers_and_commands(good_sets, arm, version):
    episode, raw = read(good_sets[version], arm, episodes=1)[0][0], RAWS[0]
    assert np.abs(episode.poses[:, 0, :3, 3] - raw.state[:, :3]).max() < 1e-6
    assert np.abs(episode.command_poses[:, 0, :3, 3] - raw.action[:-1, :3]).max() < 1e-6
    assert np.abs(episode.command_poses[:, 0, :3, :3] - episode.poses[1:, 0, :3, :3]).max() < 1e-5
    assert np.abs(episode.grippers[:, 0] - (0.08 - raw.state[:, 6]) / 0.08).max() < 1e-6
    assert set(episode.command_grippers[:, 0].round(6)) == {0.0, 1.0}
    assert episode.provenance == ()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scheme", ["", "rows", "language", "episodes"])
def test_event_labels_of_every_scheme_become_spans(tmp_path, arm, version, scheme):
    path = lerobot_files.write_set(tmp_path / "set", RAWS[:1], version, labels=scheme)
    ((episode,), _) = read(path, arm, size=16)
    assert [(span.start, span.end, span.caption) for span in episode.spans["task"]] == [
        (0, 40, "put the block on the left")
    ]
    if not scheme:
        assert set(episode.spans) == {"task"}
        return
    starts = [row for row in range(41) if row == 0 or RAWS[0].subtasks[row] != RAWS[0].subtasks[row - 1]]
    assert [(s.start, s.caption, s.verb) for s in episode.spans["subtask"]] == [
        (start, caption, caption.split()[0]) for start, caption in zip(starts, SUBTASKS)
    ]
    if scheme == "language":
        assert episode.spans["task"][0].paraphrases == ("move the block to the left side",)
        assert [span.caption for span in episode.spans["action"]] == [f"move {n}" for n in sorted({*starts, 13})]


def test_a_set_is_brought_to_the_clock_of_the_store(good_sets, arm):
    (episode, *_), _ = read(good_sets["v3.0"], arm, fps=2.5)
    assert (episode.clock_hz, episode.video_stride, episode.num_steps) == (5.0, 2, 20)
    assert rows_seen(episode.frames["front"]) == list(range(0, 41, 4))
    assert np.abs(episode.poses[:, 0, :3, 3] - RAWS[0].state[::2, :3]).max() < 1e-6
    # the command of step k is what the arm shall reach at step k + 1: the last one given before it
    assert np.abs(episode.command_poses[:, 0, :3, 3] - RAWS[0].action[1:-1:2, :3]).max() < 1e-6
    assert episode.provenance == ("resampled from 10 to 5 Hz",)
    (episode, *_), _ = read(good_sets["v3.0"], arm, fps=4)
    between = RAWS[0].state[2, :3] * 0.5 + RAWS[0].state[3, :3] * 0.5  # 0.25 s
    assert (episode.clock_hz, episode.num_steps) == (8.0, 32)
    assert np.abs(episode.poses[2, 0, :3, 3] - between).max() < 1e-6
    assert [span.start for span in episode.spans["subtask"]] == [0, 6, 10, 26]


def test_worker_processes_give_the_same_episodes_in_the_same_order(good_sets, arm):
    alone, together = (read(good_sets["v3.0"], arm, size=16, workers=workers)[0] for workers in (0, 2))
    assert [episode.episode_id for episode in together] == [f"v3.0/episode_{n:06d}" for n in range(3)]
    for one, other in zip(alone, together):
        assert one.frames == other.frames and np.array_equal(one.command_poses, other.command_poses)
    assert multiprocessing.active_children() == []


def test_pictures_may_be_images_in_the_rows(tmp_path, arm):
    path = lerobot_files.write_set(tmp_path / "set", RAWS[:2], as_images=True)
    episodes, count = read(path, arm)
    assert count.damaged == [] and rows_seen(episodes[1].frames["wrist"]) == list(range(0, 44, 2))


def test_rows_and_what_they_mean_need_no_pictures(good_sets, arm, tmp_path):
    path = Path(shutil.copytree(good_sets["v3.0"], tmp_path / "set"))
    shutil.rmtree(path / "videos")
    dataset = LeRobotSet(path)
    motions = [arm.motion(dataset.recording(number, arm).columns) for number in range(3)]
    assert [len(motion.poses) for motion in motions] == [len(raw.times) for raw in RAWS]


def test_captions_of_any_script_and_events_of_one_row(tmp_path, arm):
    raw = recording(0, 41)
    raw.task = "把积木放到左边 — déposer le bloc 🧱"
    raw.subtasks = ["reach for the block"] * 20 + ["grasp the block"] + ["carry the block to the left"] * 20
    path = lerobot_files.write_set(tmp_path / "set", [raw], labels="rows")
    ((episode,), _) = read(path, arm)
    assert episode.instruction == raw.task and episode.spans["task"][0].verb == "unknown"
    assert [(span.start, span.end) for span in episode.spans["subtask"]] == [(0, 20), (20, 21), (21, 40)]
    assert len(cut_windows(episode, ["event"], levels=["subtask"])) == 3


def test_long_unlabelled_time_leaves_a_level_out_and_says_so(tmp_path, arm):
    raw = recording(0, 41)
    raw.subtasks[12:15] = [""] * 3
    short = lerobot_files.write_set(tmp_path / "short", [raw], labels="rows")
    raw.subtasks[12:22] = [""] * 10
    long = lerobot_files.write_set(tmp_path / "long", [raw], labels="rows")
    ((extended,), _), ((left_out,), _) = read(short, arm), read(long, arm)
    assert extended.provenance == ("subtask labels extended over 0.30 s without one",)
    assert left_out.provenance == ("subtask labels left out: 1.00 s without one",)
    assert set(left_out.spans) == {"task"} and len(extended.spans["subtask"]) >= 3


# What is bad is named


def replace_rows(path: Path, change) -> None:
    """Rewrites the data file of episode 0 with `change(table)`."""
    file = sorted((path / "data").rglob("*.parquet"))[0]
    pq.write_table(change(pq.read_table(file)), file)


def set_value(column, row, value):
    def change(table):
        values = table[column].to_pylist()
        if isinstance(values[row], list):
            values[row] = [value, *values[row][1:]]
        else:
            values[row] = value
        return table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))

    return change


def truncate(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def first_video(path: Path, key: str) -> Path:
    return sorted(file for file in (path / "videos").rglob("*.mp4") if key in str(file))[0]


FAULTS = {
    "truncated video": (lambda path: truncate(first_video(path, WRIST), 0.6), WRIST, "is no readable video"),
    "empty video": (lambda path: truncate(first_video(path, FRONT), 0.0), FRONT, "is no readable video"),
    "missing video": (lambda path: first_video(path, FRONT).unlink(), FRONT, "is no readable video"),
    "not a number": (
        lambda path: replace_rows(path, set_value("observation.state", 7, np.nan)),
        "observation.state[0:3]",
        "is nan at row 7, dimension 0",
    ),
    "time goes back": (
        lambda path: replace_rows(path, set_value("timestamp", 9, 0.25)),
        "timestamp",
        "goes from 0.800 to 0.250 s at row 9",
    ),
    "missing column": (lambda path: replace_rows(path, lambda t: t.drop_columns(["action"])), "action", "is missing"),
    "missing task": (
        lambda path: replace_rows(path, set_value("task_index", 3, 5)),
        "task_index",
        "is 5, which meta does not name",
    ),
    "damaged rows": (
        lambda path: truncate(sorted((path / "data").rglob("*.parquet"))[0], 0.9),
        "rows",
        "cannot be read",
    ),
    "lost rows": (
        lambda path: replace_rows(path, lambda t: pa.concat_tables([t.slice(0, 20), t.slice(25)])),
        "length",
        "meta says 41 rows, there are 36",
    ),
    "no rows": (lambda path: replace_rows(path, lambda t: t.slice(0, 0)), "length", "meta says 41 rows, there are 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_episode_is_skipped_and_named_with_file_and_field(good_sets, arm, tmp_path, fault):
    path = Path(shutil.copytree(good_sets["v2.1"], tmp_path / "set"))
    plant, field, reason = FAULTS[fault]
    plant(path)
    episodes, count = read(path, arm, size=16)
    assert [episode.episode_id for episode in episodes] == ["set/episode_000001", "set/episode_000002"]
    assert count.kept == 2
    (line,) = count.damaged
    files = {"videos", "data"} & set(Path(line.split(": ")[1]).parts)
    assert len(files) == 1 and "episode_000000" in line.split(": ")[1]
    assert f": {field}: {reason}" in line


def test_episodes_of_no_rows_or_one_row_are_named(tmp_path, arm):
    raws = [recording(0, 41), recording(1, 41), recording(2, 41)]
    for raw, rows in zip(raws, (0, 1, 41)):
        raw.state, raw.action, raw.times, raw.subtasks = (
            values[:rows] for values in (raw.state, raw.action, raw.times, raw.subtasks)
        )
        raw.pictures = {key: pictures[:rows] for key, pictures in raw.pictures.items()}
    path = lerobot_files.write_set(tmp_path / "set", raws, per_file=3)
    episodes, count = read(path, arm, damage_limit=1.0)
    assert len(episodes) == 1
    assert count.damaged[0].endswith("length: no rows")
    assert count.damaged[1].endswith("timestamp: 1 rows; two are needed for one command and what came of it")


def test_a_video_that_ends_early_is_named_with_the_time_that_lacks(tmp_path, arm):
    raws = recordings(3)
    raws[1].pictures[FRONT] = raws[1].pictures[FRONT][:30]
    path = lerobot_files.write_set(tmp_path / "set", raws, "v2.1")
    _, count = read(path, arm)
    (line,) = count.damaged
    assert "episode_000001.mp4" in line and f"{FRONT}: video ends before 3.000 s" in line


def test_rows_at_another_rate_than_described_are_an_error(good_sets, arm, tmp_path):
    path = Path(shutil.copytree(good_sets["v2.1"], tmp_path / "set"))
    lerobot_files.change_info(path, fps=30)
    with pytest.raises(UserError, match=r"says 30 rows per second, the embodiment 'test_arm' has control_hz = 10"):
        read(path, arm)
    raws = recordings(2)
    for raw in raws:
        raw.times = raw.times / 2
    path = lerobot_files.write_set(tmp_path / "fast", raws)
    with pytest.raises(UserError, match=r"timestamp: says 20 rows per second, control_hz says 10"):
        read(path, arm)


class Dying(LeRobotSet):
    """A set whose first episode is too large for the memory of a worker."""

    def recording(self, number, embodiment):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault
def test_a_killed_worker_ends_the_build_with_a_remedy(good_sets, arm):
    stream = read_episodes(Dying(good_sets["v3.0"]), arm, choose_clock(arm, 0.0), workers=1)
    with pytest.raises(UserError, match=r"a process that read .* was killed, .*; give fewer --workers"):
        next(stream)


@pytest.mark.fault
def test_a_killed_build_leaves_no_process_and_starts_again_cleanly(good_sets, description, tmp_path):
    command = [sys.executable, "-m", "wallwm_jax.build_events", f"--source=lerobot:{good_sets['v3.0']}", "--size=16"]
    command += [f"--embodiment={description}", "--levels=task,subtask", "--workers=1", f"--out={tmp_path / 'store'}"]
    build = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{build.pid}/task/{build.pid}/children")
    while not any(tmp_path.glob(".store.partial-*/*")) or not children.read_text().strip():
        assert build.poll() is None
        time.sleep(0.01)
    workers = [int(number) for number in children.read_text().split()]
    build.kill()
    build.wait()
    assert [path.name.startswith(".store.partial-") for path in tmp_path.iterdir()] == [True]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ["episodes", "lerobot/v3.0", "3", "kept", "0", "dropped"] in map(str.split, again.stdout.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert len(open_store(tmp_path / "store")) > 10
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def test_too_much_damage_ends_the_build(good_sets, arm, tmp_path):
    path = Path(shutil.copytree(good_sets["v3.0"], tmp_path / "set"))
    first_video(path, FRONT).unlink()  # holds two of the three episodes
    with pytest.raises(
        UserError, match=r"2 of the first 2 episodes .* are damaged, more than 10% of 3: .*front: is no"
    ):
        read(path, arm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "meta" / "info.json").unlink(), r"is no LeRobot set: meta/info.json"),
        (lambda path: (path / "meta" / "info.json").write_text("{"), r"is no LeRobot set: meta/info.json"),
        (lambda path: lerobot_files.change_info(path, codebase_version="v1.6"), r"version v1.6 .* versions 2 and 3"),
        (lambda path: shutil.rmtree(path / "meta" / "episodes"), r"holds no episodes/\*/\*.parquet"),
        (lambda path: truncate(path / "meta" / "tasks.parquet", 0.5), r"tasks.parquet' cannot be read"),
        (lambda path: lerobot_files.change_info(path, features={FRONT: {"dtype": "video"}}), r"has no column 'action'"),
    ],
)
def test_a_set_that_cannot_be_opened_is_an_error_before_any_work(good_sets, arm, tmp_path, change, message):
    path = Path(shutil.copytree(good_sets["v3.0"], tmp_path / "set"))
    change(path)
    with pytest.raises(UserError, match=message):
        read(path, arm)


def test_the_damage_reaches_the_summary_of_a_build(good_sets, description, tmp_path):
    path = Path(shutil.copytree(good_sets["v2.1"], tmp_path / "kitchen"))
    first_video(path, FRONT).unlink()
    options = SourceOptions(size=16, workers=0, embodiment=str(description))
    stream, counts = open_source(f"lerobot:{path}", options)
    assert len(list(stream)) == 2
    count = counts()["lerobot/kitchen"]
    assert (count.kept, count.dropped) == (2, 1) and FRONT in count.reasons[0]


def test_a_set_of_subtasks_alone_has_windows_on_both_default_levels(good_sets, description, tmp_path):
    options = StoreOptions(kinds=("event",), heldout_fraction=0.0, latent_sample=4)
    reading = SourceOptions(size=16, workers=0, embodiment=str(description))
    built = build_events.build(f"lerobot:{good_sets['v3.0']}", str(tmp_path / "store"), options, reading)
    assert built.labelled == 3 and built.summary.windows["event", "action"] > built.summary.windows["event", "subtask"]
    for episode in open_store(tmp_path / "store").episodes:
        assert episode["provenance"] == ["action, segment found in its motion, task, subtask given"]
    data = json.loads((tmp_path / "store" / "build_report.json").read_text())
    assert (data["episodes_in"], data["episodes_kept"], data["findings"]) == (3, 3, [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_damage_to_a_file_is_ever_an_unnamed_crash(good_sets, arm, tmp_path_factory, data):
    check_damage_is_named(good_sets["v2.1"], arm, tmp_path_factory, data)


@pytest.mark.extended
@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_much_damage_is_never_an_unnamed_crash(good_sets, arm, tmp_path_factory, version, data):
    check_damage_is_named(good_sets[version], arm, tmp_path_factory, data)


def check_damage_is_named(good_set, arm, tmp_path_factory, data):
    """Whatever is changed in a set, it is read, or the file that is bad is named."""
    path = Path(shutil.copytree(good_set, tmp_path_factory.mktemp("fuzz") / "set"))
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    what = data.draw(st.sampled_from(["cut", "flip", "json"]))
    if what == "json" and file.suffix in (".json", ".jsonl"):
        lines = [json.loads(line) for line in content.decode().splitlines()]
        line = data.draw(st.sampled_from(lines))
        key = data.draw(st.sampled_from(sorted(line)))
        line[key] = data.draw(JSON)
        file.write_text("\n".join(json.dumps(line) for line in lines))
    elif what == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    else:
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
            content[place] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
    try:
        episodes, count = read(path, arm, size=16, damage_limit=1.0)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert len(episodes) == count.kept and len(episodes) + len(count.damaged) == len(LeRobotSet(path))
    for line in count.damaged:
        assert str(path) in line and len(line.split(": ")) >= 3
    for one, other in itertools.pairwise(episodes):
        assert one.episode_id < other.episode_id
