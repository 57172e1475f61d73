"""The evaluate command and its report, end to end on a tiny run: what they write, and what the page shows."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil

import numpy as np
import pytest
from tiny_model import save_run, store_config

from wallwm_jax.console import UserError
from wallwm_jax.data.clusters import cluster_store
from wallwm_jax.data.event_store import open_store
from wallwm_jax.evaluate import Options, evaluate
from wallwm_jax.evaluation import closed_loop, figures
from wallwm_jax.evaluation.closed_loop import EpisodeResult
from wallwm_jax.evaluation.environments import SubtaskResult, Trial
from wallwm_jax.evaluation.report import build_report


@pytest.fixture(scope="module")
def made(small_store, tmp_path_factory):
    """(store, workdir, evaluation) of a tiny run; the closed loop is filled in by hand."""
    base = tmp_path_factory.mktemp("report")
    store, workdir, evaluation = base / "store", base / "run", base / "evaluation"
    shutil.copytree(small_store, store)
    cluster_store(store, scale=1.0)
    train = open_store(store)
    save_run(workdir, train, store_config(train, buckets=(5,)))
    losses = [
        dict(step=s, loss_video=2.0 - s / 40, loss_action=1.0, step_s=0.5, input_wait_s=0.01, events=9)
        for s in range(40)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses) + '{"step": 40, "lo')
    evaluate(
        workdir, store, evaluation, Options(episodes=0, windows=4, batch=2, max_seconds=3600, sampling=["steps=3"])
    )
    content = json.loads((evaluation / "evaluation.json").read_text())
    for policy, won in (("trained", 3), ("untrained", 0), ("expert_replay", 4)):
        results = [
            EpisodeResult(Trial("block-x", n), n < won, (SubtaskResult("lift <b>it</b>", "place", n < won, 1, 9),), 9)
            for n in range(4)
        ]
        content["success"][policy] = closed_loop.summarize(results)
    frames = {"front": [np.full((8, 8, 3), 20 * n, np.uint8) for n in range(5)]}
    (evaluation / "rollout.gif").write_bytes(figures.rollout_gif(frames, ["lift it"] * 5, fps=5))
    content["rollout"] = dict(
        file="rollout.gif", env_id="block-x", seed=3, success=True, subtasks=[["lift <b>it</b>", True]]
    )
    (evaluation / "evaluation.json").write_text(json.dumps(content))
    return store, workdir, evaluation


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    store, workdir, evaluation = made
    out = tmp_path_factory.mktemp("page")
    path = build_report([evaluation], workdir, store, out, {"data": 12.5})
    return path.read_text(), json.loads((out / "report.json").read_text())


def test_evaluation_measures_the_open_loop_of_the_heldout_split(made):
    content = json.loads((made[2] / "evaluation.json").read_text())
    open_loop = content["open_loop"]
    assert open_loop["windows"] == 4 and content["step"] == 7 and content["parameters"] > 10_000
    assert content["config"]["sampling"]["steps"] == 3
    for value in (open_loop["model"], open_loop["model_predicted_duration"], *open_loop["baselines"].values()):
        assert 0 < value < 100
    assert set(content["phase_seconds"]) == {"load", "open loop"}
    assert len(content["strips"]) == 1 and all((made[2] / strip["file"]).is_file() for strip in content["strips"])


def test_a_report_without_a_closed_loop_or_a_log_leaves_those_parts_out(made, tmp_path):
    store, _, evaluation = made
    content = json.loads((evaluation / "evaluation.json").read_text()) | {"success": {}, "rollout": None}
    for name in (strip["file"] for strip in content["strips"]):
        shutil.copy(evaluation / name, tmp_path / name)
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    (tmp_path / "run").mkdir()
    text = build_report([tmp_path], tmp_path / "run", store, tmp_path / "out", {}).read_text()
    for heading in ("Does it act?", "One rollout", ">Training<"):
        assert heading not in text
    assert "What it expects to see" in text


def test_report_json_has_the_promised_figures(page):
    report = page[1]
    for policy, rate in (("trained", 0.75), ("untrained", 0.0), ("expert_replay", 1.0)):
        for measure in ("subtask", "episode"):
            assert report["success"][policy][measure]["rate"] == rate
            assert {"low", "high", "episodes"} < set(report["success"][policy][measure])
    assert set(report["open_loop"]["baselines"]) == {"hold_still", "cluster_mean"}
    assert 0.9 < report["packing_efficiency"] <= 1.0
    assert report["phase_seconds"]["data"] == 12.5 and "evaluation: open loop" in report["phase_seconds"]
    assert report["training"]["steps"] == 40 and report["training"]["median_step_s"] == 0.5
    assert report["training"]["input_wait_share"] == pytest.approx(0.02) and report["training"]["events"] == 360
    assert {entry["level"] for entry in report["balance"]} == {"subtask", "action"}


def test_the_page_needs_no_network_and_shows_every_part(page):
    text = page[0]
    sources = re.findall(r'src="([^"]{0,22})', text)
    assert len(sources) > 15 and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r'(href|url\()=?"?http', text) and "<script" not in text
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Does it act?",
        "One rollout",
        "How far are its actions from the expert's?",
        "What it expects to see",
        "How long will it take?",
        "Events of an episode",
        "Balance of the training events",
        "Training",
        "Where the time went",
    ]
    assert "<td>75 %</td><td>30 - 95</td><td>4</td>" in text  # the Wilson interval of 3 in 4
    assert text.count("data:image/gif;base64,") == 1


def test_captions_are_escaped_and_the_timeline_has_four_levels(made, page):
    text, store = page[0], open_store(made[0])
    assert "lift <b>" not in text and "lift &lt;b&gt;it&lt;/b&gt;: achieved" in text
    episode = store.episodes[int(store.index["episode"][0])]
    for level in ("task", "subtask", "action", "segment"):
        bars = re.findall(rf"<span>{level}</span><div class=\"bars {level}\">(.*?)</div>\s*</div>", text, re.S)
        titles = [html.unescape(title) for title in re.findall(r'title="(.*?) \(', bars[0])]
        assert titles == [span["caption"] for span in episode["spans"][level]]


def test_evaluations_beside_each_other_have_a_row_each(made, tmp_path):
    """One in event mode, one in unified mode on other trials, one without a closed loop; the page is the second's."""
    store, workdir, evaluation = made
    content = json.loads((evaluation / "evaluation.json").read_text())
    del content["options"]["mode"]  # as before there was another
    results = [
        EpisodeResult(Trial("block-x", n), n < 2, (SubtaskResult("lift", "place", n < 2, 1, 9),), 9) for n in (1, 5)
    ]
    unified = copy.deepcopy(content)
    unified["options"] |= {"mode": "unified", "text": "runs/staircase"}
    unified["success"]["trained"] = closed_loop.summarize(results)
    for name, one in {"chunks": unified, "words": content, "open": content | {"success": {}}}.items():
        shutil.copytree(evaluation, tmp_path / name)
        (tmp_path / name / "evaluation.json").write_text(json.dumps(one))
    page = build_report([tmp_path / n for n in ("chunks", "words", "open")], workdir, store, tmp_path / "out", {})
    text, rows = page.read_text(), json.loads((tmp_path / "out" / "report.json").read_text())["evaluations"]
    assert [(row["name"], row["mode"], row["told"]) for row in rows] == [
        ("chunks", "unified", "latents of staircase"),
        ("words", "event", "a scripted planner"),
        ("open", "event", "a scripted planner"),
    ]
    assert rows[0]["success"]["subtask"]["rate"] == 0.5 and rows[1]["success"]["subtask"]["rate"] == 0.75
    assert rows[2]["success"] == {} and rows[0]["open_loop_ratio"] == pytest.approx(rows[1]["open_loop_ratio"])
    assert "<td>50 % [9, 91] of 2</td>" in text and "<td>75 % [30, 95] of 4</td>" in text
    assert "Beside each other" in text and "did not act on the same trials" in text
    assert "moves the arm for a chunk of fixed length; it is told what to do by latents of staircase" in text
    assert "How long will it take?" not in text and "its own duration" not in text  # a chunk's is given


def test_missing_parts_are_one_line_with_a_remedy(made, tmp_path):
    store, workdir, evaluation = made
    with pytest.raises(UserError, match=r"evaluation .* does not exist; make it with python -m wallwm_jax.evaluate"):
        build_report([tmp_path / "nothing"], workdir, store, tmp_path / "out", {})
    with pytest.raises(UserError, match="no evaluation given; pass --evaluation=DIR"):
        build_report([], workdir, store, tmp_path / "out", {})
    with pytest.raises(UserError, match=r"evaluation.json' is missing or damaged"):
        build_report([tmp_path], workdir, store, tmp_path / "out", {})
    with pytest.raises(UserError, match=r"event store .* does not exist"):
        build_report([evaluation], workdir, tmp_path / "nothing", tmp_path / "out", {})
    with pytest.raises(UserError, match="no workdir given; pass --workdir=DIR"):
        evaluate("", store, tmp_path, Options())
    with pytest.raises(UserError, match="no --out given"):
        evaluate(workdir, store, "", Options())
    with pytest.raises(UserError, match="--sampling=steps: write name=value"):
        evaluate(workdir, store, tmp_path, Options(episodes=0, sampling=["steps"]))
    with pytest.raises(UserError, match=r"was not recorded in OCBench|(simulator|MuJoCo) is not installed"):
        evaluate(workdir, store, tmp_path / "out", Options(episodes=2))
