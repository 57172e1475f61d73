"""RLDS sets as episodes, from ArrayRecord and from TFRecord files, without TensorFlow; what is bad is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import rlds_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_motion import DESCRIPTION, recording, recordings, row_of

from wallwm_jax.console import UserError
from wallwm_jax.sources import rlds
from wallwm_jax.sources.clock import choose_clock
from wallwm_jax.sources.embodiment import load_embodiment
from wallwm_jax.sources.lint import lint
from wallwm_jax.sources.recorded import read_episodes
from wallwm_jax.sources.rlds import RldsSet

RAWS = {len(raw.times): raw for raw in recordings(3)}  # TFDS shuffles: a recording is known by its length
FORMATS = ("array_record", "tfrecord")


@pytest.fixture(scope="module")
def good_sets(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rlds")
    version = rlds_files.write_set(folder / "array_record", list(RAWS.values()))
    copied = Path(shutil.copytree(version, folder / "tfrecord" / "test_arm" / "1.0.0"))
    rlds_files.to_tfrecord(copied)
    return {"array_record": version, "tfrecord": copied}


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    text = DESCRIPTION
    for old, new in rlds_files.DESCRIPTION_CHANGES.items():
        text = text.replace(old, new)
    path = tmp_path_factory.mktemp("embodiment") / "arm.toml"
    path.write_text(text)
    return load_embodiment(str(path))


def read(path, embodiment, **more):
    options = {"size": 64, "workers": 0, **more}
    stream = read_episodes(RldsSet(path), embodiment, choose_clock(embodiment, 0.0), **options)
    return list(stream), stream.count


@pytest.mark.parametrize("kind", FORMATS)
def test_every_step_becomes_a_row(good_sets, arm, kind):
    episodes, count = read(good_sets[kind], arm)
    assert (count.kept, count.damaged) == (3, [])
    assert {episode.num_steps + 1 for episode in episodes} == set(RAWS)
    for number, episode in enumerate(episodes):
        raw = RAWS[episode.num_steps + 1]
        assert (episode.episode_id, episode.source) == (f"test_arm/train_{number:06d}", "rlds/test_arm")
        assert np.abs(episode.poses[:, 0, :3, 3] - raw.state[:, :3]).max() < 1e-6
        assert np.abs(episode.command_poses[:, 0, :3, 3] - raw.action[:-1, :3]).max() < 1e-6
        for view in ("front", "wrist"):
            pictures = [cv2.imdecode(np.frombuffer(f, np.uint8), cv2.IMREAD_COLOR) for f in episode.frames[view]]
            assert [row_of(picture) for picture in pictures] == list(range(0, len(raw.times), 2))
        assert episode.instruction == raw.task
        assert episode.spans["task"][0].paraphrases == (f"please {raw.task}",)


def test_both_file_formats_give_the_same_episodes_from_worker_processes_too(good_sets, arm):
    array_record, _ = read(good_sets["array_record"], arm, size=16)
    tf_record, _ = read(good_sets["tfrecord"], arm, size=16, workers=1)
    for one, other in zip(array_record, tf_record):
        assert one.episode_id == other.episode_id and one.frames == other.frames
        assert np.array_equal(one.command_poses, other.command_poses)


def test_no_tensorflow_is_imported(good_sets, arm):
    code = f"""
import sys
from wallwm_jax.sources.clock import choose_clock
from wallwm_jax.sources.embodiment import load_embodiment
from wallwm_jax.sources.recorded import read_episodes
from wallwm_jax.sources.rlds import RldsSet
arm = load_embodiment({arm.path!r})
episodes = list(read_episodes(RldsSet({str(good_sets["tfrecord"])!r}), arm, choose_clock(arm, 0.0), workers=0))
assert len(episodes) == 3 and not {{"tensorflow", "jax"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_linter_reads_rlds_too(good_sets, arm):
    assert [finding for finding in lint(RldsSet(good_sets["array_record"]), arm) if "camera" not in finding.check] == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-50], "is damaged: its checksum is wrong"),
        (lambda content: content[: len(content) // 2], "the file ends after"),
        (lambda content: content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:], "its checksum is wrong"),
    ],
)
def test_damage_to_a_tfrecord_file_is_named(good_sets, arm, tmp_path, damage, reason):
    path = Path(shutil.copytree(good_sets["tfrecord"], tmp_path / "1.0.0"))
    (file,) = path.glob("*.tfrecord*")
    file.write_bytes(damage(file.read_bytes()))
    episodes, count = read(path, arm, size=16, damage_limit=1.0)
    assert count.damaged and len(episodes) + len(count.damaged) == 3
    assert str(file) in count.damaged[-1] and reason in " ".join(count.damaged)


def test_a_missing_file_is_named(good_sets, arm, tmp_path):
    path = Path(shutil.copytree(good_sets["array_record"], tmp_path / "1.0.0"))
    (file,) = path.glob("*.array_record*")
    file.unlink()
    with pytest.raises(
        UserError, match=r"2 of the first 2 episodes .* are damaged, .*array_record.*the file is missing"
    ):
        read(path, arm)


def test_what_the_set_lacks_is_an_error_before_any_work(good_sets, arm, tmp_path):
    text = Path(arm.path).read_text()
    for old, new, message in (
        (
            "observation/image",
            "observation/picture",
            r"has no pictures 'observation/picture'.*; it has observation/image",
        ),
        ('"action[', '"command[', r"has no numbers 'command'.*; it has action, is_last, observation/state"),
        ('robot = "test_arm"', 'robot = "a"\ntask = "text"', r"has no text 'text'.*; it has language_instruction"),
    ):
        changed = tmp_path / "arm.toml"
        changed.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            read(good_sets["array_record"], load_embodiment(str(changed)))
    with pytest.raises(UserError, match=r"is no RLDS set: 0 folders there hold a features.json"):
        RldsSet(tmp_path)


def change_json(path, name, change):
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))


def step_of(content):
    return content["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]


def shaped(column, *dimensions):
    return lambda content: step_of(content)[column]["tensor"].update(shape={"dimensions": list(dimensions)})


def test_a_kind_of_feature_that_needs_tensorflow_is_said_so_before_any_work(good_sets, arm, tmp_path):
    path = Path(shutil.copytree(good_sets["array_record"], tmp_path / "1.0.0"))
    video = {"pythonClassName": "tensorflow_datasets.core.features.video_feature.Video", "video": {}}
    change_json(path, "features.json", lambda content: step_of(content).update(clip=video))
    with pytest.raises(UserError, match=r"1.0.0 has features that TFDS reads with TensorFlow only \(No module named "):
        RldsSet(path)


@pytest.mark.parametrize("kind", ["riegeli", "parquet"])
def test_files_of_another_format_are_refused_with_the_command_that_converts_them(good_sets, tmp_path, kind):
    path = Path(shutil.copytree(good_sets["array_record"], tmp_path / "1.0.0"))
    change_json(path, "dataset_info.json", lambda content: content.update(fileFormat=kind))
    with pytest.raises(UserError, match=rf"holds files of format {kind}; .*`tfds convert_format` makes ArrayRecord"):
        RldsSet(path)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            NotImplementedError("no such decoder"),
            r"TFDS cannot parse the records of .*NotImplementedError.*features.json",
        ),
        (ImportError("No module named 'tensorflow'"), "reads with TensorFlow only"),
    ],
)
def test_what_tfds_cannot_do_is_no_damage_of_a_record(good_sets, arm, monkeypatch, raised, message):
    def fail(path, wanted):
        raise raised

    monkeypatch.setattr(rlds, "_wanted", fail)
    with pytest.raises(UserError, match=message):
        read(good_sets["array_record"], arm)


def test_columns_that_nothing_names_may_be_of_any_kind_and_named_ones_have_one_length(good_sets, arm, tmp_path):
    path = Path(shutil.copytree(good_sets["array_record"], tmp_path / "1.0.0"))
    change_json(path, "features.json", shaped("is_last", "-1", "-1"))
    assert read(path, arm, size=16)[1].kept == 3
    path = Path(shutil.copytree(good_sets["array_record"], tmp_path / "other" / "1.0.0"))
    change_json(path, "features.json", shaped("action", "-1"))
    with pytest.raises(UserError, match=r"has no numbers 'action', which the embodiment names; it has is_last, obs"):
        read(path, arm, size=16)


def test_a_rewording_that_is_no_text_is_left_out_and_its_episode_stays(short_sets, arm, tmp_path):
    path = Path(shutil.copytree(short_sets["tfrecord"], tmp_path / "1.0.0"))
    (file,) = path.glob("*.tfrecord*")
    records = rlds_files.records_of(file)
    rlds_files.write_records(file, [record.replace(b"please", b"plea\xff\xfe") for record in records])
    episodes, count = read(path, arm, size=16)
    assert count.kept == 2 and episodes[0].spans["task"][0].paraphrases == ()
    assert episodes[0].provenance[0].startswith("language_instruction_2 left out: is no UTF-8 text")


# Whatever is damaged, the file and the field are named


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["7", "float64"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def short_sets(tmp_path_factory) -> dict[str, Path]:
    """Sets of two recordings of a dozen rows, so that damage hits what matters."""
    folder = tmp_path_factory.mktemp("short")
    version = rlds_files.write_set(folder / "array_record", [recording(seed, 12 + seed) for seed in range(2)])
    copied = Path(shutil.copytree(version, folder / "tfrecord" / "test_arm" / "1.0.0"))
    rlds_files.to_tfrecord(copied)
    return {"array_record": version, "tfrecord": copied}


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_damage_to_a_set_is_ever_an_unnamed_crash(short_sets, arm, tmp_path_factory, kind, data):
    check_damage_is_named(short_sets[kind], arm, tmp_path_factory, data)


@pytest.mark.extended
@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_much_damage_to_a_set_is_never_an_unnamed_crash(short_sets, arm, tmp_path_factory, kind, data):
    check_damage_is_named(short_sets[kind], arm, tmp_path_factory, data)


def check_damage_is_named(good_set, arm, tmp_path_factory, data):
    """Bytes of a file, values of its JSON, or of a record whose checksum is right."""
    path = Path(shutil.copytree(good_set, tmp_path_factory.mktemp("fuzz") / "1.0.0"))
    (records,) = path.glob("*record*")
    what = data.draw(st.sampled_from(["cut", "bytes", "dataset_info.json", "features.json", "record"]))
    if what in ("cut", "bytes"):
        content = data.draw(damaged(records.read_bytes(), cut=what == "cut"))
        records.write_bytes(content)
    elif what == "record":
        contents = rlds_files.records_of(records)
        contents[1] = data.draw(damaged(contents[1], cut=data.draw(st.booleans())))
        rlds_files.write_records(records, contents)
    else:
        content = json.loads((path / what).read_text())
        entries = list(rlds_files.entries(content))
        holder, key = data.draw(st.sampled_from(entries))
        if data.draw(st.booleans()):
            holder[key] = data.draw(JSON)
        else:
            del holder[key]
        (path / what).write_text(json.dumps(content))
    try:
        episodes, count = read(path, arm, size=16, damage_limit=1.0)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert len(episodes) == count.kept and len(episodes) + len(count.damaged) == len(RldsSet(path))
    for line in count.damaged:
        name, file, field, _ = line.split(": ", 3)
        assert name and str(path) in file and field


@st.composite
def damaged(draw, content, cut):
    if cut:
        return content[: draw(st.integers(0, len(content) - 1))]
    changed = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
        changed[place] ^= draw(st.integers(1, 255))
    return bytes(changed)
