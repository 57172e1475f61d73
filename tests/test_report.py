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
from wallwm_jax.evaluation import arms, closed_loop, figures
from wallwm_jax.evaluation.closed_loop import EpisodeResult
from wallwm_jax.evaluation.environments import SubtaskResult, Trial
from wallwm_jax.evaluation.open_loop import PREDICTORS
from wallwm_jax.evaluation.planner_accuracy import ANSWERERS
from wallwm_jax.evaluation.report import build_report
from wallwm_jax.evaluation.statistics import success_rate


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


def test_report_json_has_the_promised_figures(made, page):
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
    drawn, kept = sum(entry["windows"] for entry in report["balance"]), len(open_store(made[0]))
    assert drawn < kept and f"<b>{drawn}</b><span>training windows</span>" in page[0]  # fixed windows are not drawn


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
    assert [(row["name"], row["mode"], row["acting"]) for row in rows] == [
        ("chunks", "unified", "unified: latents of staircase"),
        ("words", "event", "event: a scripted planner names subtasks, and their durations"),
        ("open", "event", "event: a scripted planner names subtasks, and their durations"),
    ]
    assert rows[0]["success"]["subtask"]["rate"] == 0.5 and rows[1]["success"]["subtask"]["rate"] == 0.75
    assert rows[2]["success"] == {} and rows[0]["open_loop_ratio"] == pytest.approx(rows[1]["open_loop_ratio"])
    assert "<td>50 % [9, 91] of 2</td>" in text and "<td>75 % [30, 95] of 4</td>" in text
    assert "Beside each other" in text and "did not act on the same trials" in text
    assert "moves the arm for a chunk of fixed length; it is told what to do by latents of staircase" in text
    assert "How long will it take?" not in text and "its own duration" not in text  # a chunk's is given


def test_true_and_predicted_durations_stand_side_by_side(made, page, tmp_path):
    """Open loop in all and by level; in closed loop the page says whose durations they are."""
    store, workdir, evaluation = made
    text, open_loop = page[0], page[1]["open_loop"]
    told, own = open_loop["model"], open_loop["model_predicted_duration"]
    assert told != own
    assert (
        f"<td>model</td><td>{told:.3f}</td>" in text and f"<td>model, its own duration</td><td>{own:.3f}</td>" in text
    )
    for level, row in open_loop["by_level"].items():
        errors = (f"<td>{row[name]:.3f}</td>" for name in PREDICTORS)
        assert f"<td>{level}</td><td>{row['windows']}</td>{''.join(errors)}</tr>" in text
    assert "names the next event and how long it takes; the model" in text
    shutil.copytree(evaluation, tmp_path / "own")
    content = json.loads((evaluation / "evaluation.json").read_text())
    content["options"]["own_duration"] = True
    (tmp_path / "own" / "evaluation.json").write_text(json.dumps(content))
    text = build_report([tmp_path / "own"], workdir, store, tmp_path / "out", {}).read_text()
    assert "names the next event; the model" in text and "says how long the event takes, and moves the arm" in text


# Comparisons of ways to act, and planners


def compared(directory, **settings):
    """Writes the comparison of three arms on ten trials of two subtasks; `settings` are those of the first."""
    won = {"oracle": (10, 10), "own <i>": (10, 1), "chunks": (5, 1)}  # first subtasks, second ones
    paired = {
        name: [
            EpisodeResult(
                Trial("block-x", n),
                n < second,
                (SubtaskResult("a", "press", n < first, 1, 9), SubtaskResult("b", "press", n < second, 1, 9)),
                9,
            )
            for n in range(10)
        ]
        for name, (first, second) in won.items()
    }
    run = {"run": "runs/event", "step": 7}
    hows = {"oracle": settings, "own <i>": {"own_duration": True}, "chunks": {"mode": "unified", "text": "event"}}
    found = arms.compare(paired) | {"settings": {name: run | how for name, how in hows.items()}}
    directory.mkdir(parents=True)
    (directory / "arms.json").write_text(json.dumps(found))
    return found


def measured(file):
    """Writes the accuracy of a planner and the two blind ones: how often of 40 questions each is right."""
    rights = {
        "exact": (30, 20, 10),
        "object": (32, 22, 12),
        "exact_unseen_order": (4, 3, 2),
        "object_unseen_order": (5, 4, 3),
    }
    found = {"workdir": "runs/vlm", "step": 9, "levels": ["subtask"], "questions": 40, "time_left": None}
    for number, name in enumerate(ANSWERERS):
        found[name] = {measure: success_rate(right[number], 40).to_json() for measure, right in rights.items()}
    found["planner"] |= {"seconds_error": 0.5, "seconds_share": 0.25}
    file.write_text(json.dumps(found))
    return found


def test_arms_and_planners_make_a_page_without_an_evaluation(tmp_path):
    first, second = compared(tmp_path / "modes"), compared(tmp_path / "views", level="action")
    planner = measured(tmp_path / "planner.json")
    directories = [tmp_path / "modes", tmp_path / "views"]
    page = build_report([], "", "", tmp_path / "out", {}, arms=directories, planner=tmp_path / "planner.json")
    text, report = page.read_text(), json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == {
        "phase_seconds": {},
        "arms": [{"name": "modes", **first}, {"name": "views", **second}],
        "planner": planner,
    }
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Ways to act on the same trials: modes",
        "Ways to act on the same trials: views",
        "Does the planner name the right next event?",
    ]
    assert text.count('src="data:image/png;base64,') == 3
    assert "<td>chunks</td><td>30 % [15, 52] of 20</td><td>0.60</td><td>10 % [2, 40] of 10</td>" in text
    pair = first["pairs"][0]
    assert (pair["episode"]["only_first"], pair["episode"]["p_value"]) == (9, pytest.approx(2 / 2**9))
    low, high = (100 * pair["subtask"][end] for end in ("low", "high"))
    assert (
        "<td>oracle beside own &lt;i&gt;</td>"
        f"<td>+45 points [{low:+.0f}, {high:+.0f}]</td><td>9</td><td>0</td><td>0.0039</td>"
    ) in text
    for how in (
        "event: a scripted planner names subtasks, and their durations (runs/event, step 7)",
        "event: a scripted planner names actions, and their durations (",
        "event: a scripted planner names subtasks, their durations are the model&#39;s own (",
        "unified: a scripted planner, chunk by chunk (",
    ):
        assert f'<td class="words">{how}' in text
    assert "<td>exact</td><td>75 % [60, 86] of 40</td><td>50 % [35, 65] of 40</td><td>25 % [14, 40] of 40</td>" in text
    assert "<td>right object, unseen order</td><td>12 % [5, 26] of 40</td>" in text
    assert "Duration of the next event: median error 0.50 s, 25 %." in text


def test_arms_and_planners_stand_beside_an_evaluation(made, tmp_path):
    store, workdir, evaluation = made
    compared(tmp_path / "modes")
    measured(tmp_path / "planner.json")
    beside = {"arms": [tmp_path / "modes"], "planner": tmp_path / "planner.json"}
    text = build_report([evaluation], workdir, store, tmp_path / "out", {}, **beside).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text)[:5] == [
        "Does it act?",
        "One rollout",
        "Ways to act on the same trials",
        "Does the planner name the right next event?",
        "How far are its actions from the expert's?",
    ]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["arms"][0]["name"] == "modes" and report["planner"]["questions"] == 40 and report["open_loop"]


def test_a_comparison_that_is_missing_or_broken_is_an_error_before_anything_is_drawn(tmp_path):
    def build(**beside):
        build_report([], "", "", tmp_path / "out", {}, **beside)

    found = compared(tmp_path / "good")
    with pytest.raises(UserError, match=r"arms .*nothing' does not exist; make it with .*evaluation\.arms"):
        build(arms=[tmp_path / "good", tmp_path / "nothing"])
    (tmp_path / "good" / "arms.json").write_text(json.dumps(found)[:-9])
    with pytest.raises(UserError, match=r"arms\.json' is missing or damaged"):
        build(arms=[tmp_path / "good"])
    del found["settings"]
    (tmp_path / "good" / "arms.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"arms\.json' has no 'settings'; make it with"):
        build(arms=[tmp_path / "good"])
    with pytest.raises(UserError, match=r"planner\.json' is missing or damaged .*; make it with .*planner_accuracy"):
        build(planner=tmp_path / "planner.json")
    measured(tmp_path / "planner.json")
    with pytest.raises(UserError, match="--workdir and --store are of an evaluated run"):
        build_report([], tmp_path, "", tmp_path / "out", {}, planner=tmp_path / "planner.json")
    assert not (tmp_path / "out").exists()


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
