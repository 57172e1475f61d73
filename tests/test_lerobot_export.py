"""LeRobot sets that we write: read back by pyarrow and PyAV alone, and by LeRobot itself where it is installed."""

import dataclasses
import importlib
import io
import json
import os

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation
from synthetic import synthetic_episode

from wallwm_jax.console import UserError
from wallwm_jax.events.schema import Span
from wallwm_jax.sources.lerobot.export import ExportSizes, write_lerobot

EPISODES = [synthetic_episode(seed, steps=32 + 7 * seed, size=48) for seed in range(3)]
CAMERAS = {"observation.images.front_pixels": "front_pixels", "observation.images.ur5e_wrist": "ur5e/wrist"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Path of a set of `EPISODES`, with small files: every episode has a video of its own."""
    out = tmp_path_factory.mktemp("sets") / "squares"
    summary = write_lerobot(out, EPISODES, sizes=ExportSizes(data=1, video=1))
    assert (summary.episodes, summary.rows) == (3, sum(episode.num_steps + 1 for episode in EPISODES))
    return out


def info(path):
    return json.loads((path / "meta" / "info.json").read_text())


def entries(path):
    return pq.read_table(path / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()


def rows(path, entry):
    name = info(path)["data_path"].format(chunk_index=entry["data/chunk_index"], file_index=entry["data/file_index"])
    table = pq.read_table(path / name)
    own = np.asarray(table["episode_index"]) == entry["episode_index"]
    return {key: np.stack(table[key].to_numpy(zero_copy_only=False)[own]) for key in table.column_names}


def video(path, entry, camera):
    """Frames of an episode and their times from its beginning."""
    place = {name: entry[f"videos/{camera}/{name}"] for name in ("chunk_index", "file_index")}
    start, end = (entry[f"videos/{camera}/{edge}_timestamp"] for edge in ("from", "to"))
    with av.open(str(path / info(path)["video_path"].format(video_key=camera, **place))) as container:
        found = [(frame.time - start, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [(time, frame) for time, frame in found if -1e-6 < time < end - start - 1e-6]


def texts(path, name):
    table = pq.read_table(path / "meta" / f"{name}s.parquet").to_pydict()
    return dict(zip(table[f"{name}_index"], table[name]))


def span_at(episode, level, step):
    return next(span for span in episode.spans[level] if span.start <= min(step, episode.num_steps - 1) < span.end)


def test_poses_and_commands_come_back(written):
    for entry, episode in zip(entries(written), EPISODES, strict=True):
        found = rows(written, entry)
        for key, poses, grippers in (
            ("observation.state", episode.poses, episode.grippers),
            ("action", episode.command_poses, episode.command_grippers),
        ):
            values = found[key][: len(poses)]
            np.testing.assert_allclose(values[:, :3], poses[:, 0, :3, 3], atol=1e-6)
            np.testing.assert_allclose(Rotation.from_quat(values[:, 3:7]).as_matrix(), poses[:, 0, :3, :3], atol=1e-6)
            np.testing.assert_allclose(values[:, 7], grippers[:, 0], atol=1e-6)
        np.testing.assert_array_equal(found["action"][-1], found["action"][-2])
        np.testing.assert_allclose(found["timestamp"], np.arange(episode.num_steps + 1) / 10, atol=1e-6)


def test_a_rotation_through_half_a_turn_has_no_jump_of_sign(tmp_path):
    episode = EPISODES[0]
    angles = np.linspace(0, 2 * np.pi, episode.num_steps + 1)
    poses = episode.poses.copy()
    poses[:, 0, :3, :3] = Rotation.from_rotvec(angles[:, None] * np.array([0, 0.6, 0.8])).as_matrix()
    write_lerobot(tmp_path / "set", [dataclasses.replace(episode, poses=poses)])
    quaternions = rows(tmp_path / "set", entries(tmp_path / "set")[0])["observation.state"][:, 3:7]
    assert np.abs(np.diff(quaternions, axis=0)).max() < 0.11
    np.testing.assert_allclose(quaternions[-1], -quaternions[0], atol=1e-5)  # once around


@pytest.mark.parametrize("level", ["subtask", "action"])
def test_every_row_lies_in_its_subtask(tmp_path, level):
    write_lerobot(tmp_path / "set", EPISODES, level=level)
    names = texts(tmp_path / "set", "subtask")
    assert len(names) == len({span.caption for episode in EPISODES for span in episode.spans[level]})
    for entry, episode in zip(entries(tmp_path / "set"), EPISODES, strict=True):
        found = rows(tmp_path / "set", entry)
        said = [names[int(index)] for index in found["subtask_index"]]
        assert said == [span_at(episode, level, step).caption for step in range(episode.num_steps + 1)]
        assert {texts(tmp_path / "set", "task")[int(index)] for index in found["task_index"]} == {episode.instruction}


def test_annotations_of_an_episode_are_free_of_gaps_and_keep_equal_neighbours_apart(tmp_path):
    first, second, *rest = EPISODES[0].spans["subtask"]
    same = dataclasses.replace(second, caption=first.caption)
    episode = dataclasses.replace(EPISODES[0], spans={**EPISODES[0].spans, "subtask": [first, same, *rest]})
    write_lerobot(tmp_path / "set", [episode])
    (entry,) = entries(tmp_path / "set")
    for prefix, level in (("sparse", "subtask"), ("dense", "action")):
        starts, ends = entry[f"{prefix}_subtask_start_frames"], entry[f"{prefix}_subtask_end_frames"]
        assert starts == [span.start for span in episode.spans[level]] == [0, *ends[:-1]]
        assert ends[-1] == entry["length"] == episode.num_steps + 1
        assert entry[f"{prefix}_subtask_names"] == [span.caption for span in episode.spans[level]]


def test_videos_show_the_frame_of_each_step_at_its_time(written):
    for entry, episode in zip(entries(written), EPISODES, strict=True):
        for camera, view in CAMERAS.items():
            found = video(written, entry, camera)
            assert len(found) == episode.num_steps + 1
            np.testing.assert_allclose([time for time, _ in found], np.arange(len(found)) / 10, atol=1e-5)
            frames = [np.asarray(Image.open(io.BytesIO(jpeg))).astype(int) for jpeg in episode.frames[view]]
            for step, (_, shown) in enumerate(found):
                errors = [np.abs(shown - frame).mean() for frame in frames]
                assert errors[step // 2] < 6 and errors[step // 2] < min(errors) + 0.5, step


def test_files_are_cut_where_they_are_full_and_never_in_an_episode(written, tmp_path):
    assert [entry["data/file_index"] for entry in entries(written)] == [0, 1, 2]
    assert [entry["videos/observation.images.ur5e_wrist/file_index"] for entry in entries(written)] == [0, 1, 2]
    write_lerobot(tmp_path / "whole", EPISODES)
    assert {entry["data/file_index"] for entry in entries(tmp_path / "whole")} == {0}
    last = entries(tmp_path / "whole")[2]
    assert last["videos/observation.images.front_pixels/from_timestamp"] == pytest.approx((33 + 40) / 10)
    np.testing.assert_array_equal(
        rows(tmp_path / "whole", last)["action"], rows(written, entries(written)[2])["action"]
    )
    times = [time for time, _ in video(tmp_path / "whole", last, "observation.images.front_pixels")]
    assert times[0] == pytest.approx(0) and len(times) == last["length"]


def test_statistics_are_those_of_all_rows(written):
    stats = json.loads((written / "meta" / "stats.json").read_text())
    every = np.concatenate([rows(written, entry)["action"] for entry in entries(written)]).astype(float)
    for name, value in (("min", every.min(0)), ("max", every.max(0)), ("mean", every.mean(0)), ("std", every.std(0))):
        np.testing.assert_allclose(stats["action"][name], value, atol=1e-6)
    assert stats["action"]["count"] == [len(every)] and len(stats["action"]["q01"]) == 8
    picture = stats["observation.images.front_pixels"]
    assert np.shape(picture["mean"]) == (3, 1, 1) and 0.2 < np.mean(picture["mean"]) < 0.6
    assert set(stats) == set(info(written)["features"])
    (first, *_) = entries(written)
    np.testing.assert_allclose(first["stats/action/max"], rows(written, first)["action"].max(0), atol=1e-6)


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path):
    one, other = EPISODES[:2]
    spans = {"task": [Span(0, one.num_steps, "x", "x")]}
    for episodes, message in (
        ([], "no episodes"),
        ([one, dataclasses.replace(other, embodiment="else")], "has embodiment 'else', the first episode 'one_arm'"),
        ([one, synthetic_episode(1, steps=39, size=48, views=["front_pixels"])], r"has views \['front_pixels'\]"),
        ([dataclasses.replace(one, spans=spans)], "no spans on level 'subtask'"),
        ([synthetic_episode(0, steps=20, size=33)], "needs even sides"),
        (
            [dataclasses.replace(one, frames={view: [b"?"] * one.num_frames for view in one.frames})],
            "is no JPEG picture",
        ),
    ):
        with pytest.raises(UserError, match=message):
            write_lerobot(tmp_path / "set", episodes)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="already exists"):
        write_lerobot(tmp_path / "set", EPISODES)


def _decoded(path, timestamps, tolerance_s, _=None):
    """As LeRobot's decoder, which needs a torchvision that still has `VideoReader`, or torchcodec with FFmpeg."""
    import torch

    with av.open(str(path)) as container:
        found = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    chosen = [min(found, key=lambda pair: abs(pair[0] - time)) for time in timestamps]
    assert max(abs(time - wanted) for (time, _), wanted in zip(chosen, timestamps)) < tolerance_s
    return torch.from_numpy(np.stack([frame for _, frame in chosen])).permute(0, 3, 1, 2) / 255


def _lerobot():
    """LeRobot's module; where CI is true it was installed, so that it cannot be imported is no reason to skip."""
    try:
        return importlib.import_module("lerobot.datasets.lerobot_dataset")
    except ImportError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(
            f"LeRobot cannot be imported ({error}): pip install --no-deps lerobot==0.4.4 torchvision accelerate; "
            "pip install av datasets"
        )


@pytest.mark.parity
def test_lerobot_itself_reads_the_set(written, monkeypatch):
    package = _lerobot()
    import torchvision

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if not hasattr(torchvision.io, "VideoReader"):
        monkeypatch.setattr(package, "decode_video_frames", _decoded)
    episodes = EPISODES[:2]
    data = package.LeRobotDataset(
        "squares", root=written, episodes=[0, 1], delta_timestamps={"action": [0.0, 0.1, 0.2]}, video_backend="pyav"
    )
    assert data.fps == 10 and data.meta.robot_type == "one_arm" and data.meta.total_episodes == 3
    assert set(data.meta.video_keys) == set(CAMERAS) and data.meta.stats["action"]["mean"].shape == (8,)
    number = 0
    for episode in episodes:
        for step in range(0, episode.num_steps + 1, 5):
            item = data[number + step]
            assert item["subtask"] == span_at(episode, "subtask", step).caption
            assert item["task"] == episode.instruction and int(item["frame_index"]) == step
            np.testing.assert_allclose(item["observation.state"][:3], episode.poses[step, 0, :3, 3], atol=1e-6)
            for offset in range(3):
                command = episode.command_poses[min(step + offset, episode.num_steps - 1), 0, :3, 3]
                np.testing.assert_allclose(item["action"][offset, :3], command, atol=1e-6)
            for camera, view in CAMERAS.items():
                frame = np.asarray(Image.open(io.BytesIO(episode.frames[view][step // 2]))) / 255
                assert item[camera].shape == (3, 48, 48)
                assert np.abs(item[camera].permute(1, 2, 0).numpy() - frame).mean() < 0.025
        number += episode.num_steps + 1
    assert len(data) == number
