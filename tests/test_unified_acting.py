"""Unified mode acts in OCBench, untrained: from a store of windows with history to the table of arms and reports."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import pytest
from history_windows import STEPS, configured
from ml_collections import ConfigDict
from tiny_model import random_like, save_params, save_run
from vlm_setup import vlm_training_config

from wallwm_jax.console import UserError
from wallwm_jax.evaluate import Options, evaluate
from wallwm_jax.evaluation import arms
from wallwm_jax.evaluation.report import build_report
from wallwm_jax.models import language_pathway

ENV = "block-cpu-lite-single-task1-v0"


@pytest.fixture(scope="module")
def runs(history_store, tmp_path_factory):
    """(run on windows with history, run of stage staircase tied to its text encoder), both random."""
    base, config = tmp_path_factory.mktemp("runs"), configured(history_store)
    with config.unlocked():
        config.sampling.update(steps=2, video_steps=2, action_draws=1)
    average = save_run(base / "chunk", history_store, config)
    language = vlm_training_config(history_store.path, "staircase").copy_and_resolve_references()
    with language.unlocked():
        language.model = config.model
        language.data.levels = ConfigDict({"subtask": 1.0})
        language.data.text_length = config.data.text_length
    groups = ("vlm", "staircase")
    shapes = jax.eval_shape(lambda: language_pathway.init(language, jax.random.key(0), groups))
    params = {**random_like(shapes, 5, 0.1), "text": average["text"]}
    save_params(base / "staircase", history_store, language, params, params)
    return base / "chunk", base / "staircase"


@pytest.mark.extended
def test_an_untrained_model_acts_in_chunks_under_words_and_latents(runs, history_store, tmp_path):
    pytest.importorskip("ocbench")
    chunk, staircase = map(str, runs)
    options = Options(
        episodes=2, families=(ENV,), mode="unified", text=staircase, execute=8, windows=2, batch=2, max_seconds=3600,
        patience=1.0,
    )  # fmt: skip
    evaluate(chunk, history_store.path, tmp_path / "evaluation", options)
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert found["options"]["mode"] == "unified" and found["open_loop"]["windows"] == 2
    assert found["open_loop"]["model"] == found["open_loop"]["model_predicted_duration"] > 0
    assert found["open_loop"]["by_level"].keys() == {"task"} and len(found["strips"]) == 1
    for policy in ("trained", "untrained"):
        row = found["success"][policy]
        assert row["episode"]["episodes"] == 2 and row["subtask"]["episodes"] >= 2
        assert all(trial["steps"] > 0 and trial["subtasks"] for trial in row["trials"])
    assert (tmp_path / "evaluation" / found["rollout"]["file"]).stat().st_size > 1000
    page = build_report([tmp_path / "evaluation"], chunk, history_store.path, tmp_path / "report", {}).read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Does it act?",
        "One rollout",
        "How far are its actions from the expert's?",
        "What it expects to see",
        "Events of an episode",
        "Balance of the training chunks",
        "Where the time went",
    ]  # a chunk's duration is given
    assert "moves the arm for the first 8 steps of a chunk of fixed length; it is told what to do by latents of" in page
    assert "2 held-out chunks, with their true history" in page and "its own duration" not in page
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["open_loop"] == found["open_loop"] and report["success"] == found["success"]
    assert report["evaluations"][0]["acting"] == "unified: latents of staircase, the first 8 steps of a chunk"


@pytest.mark.extended
def test_arms_of_one_run_act_on_the_same_trials_and_a_second_call_finds_them_done(runs, history_store, tmp_path):
    pytest.importorskip("ocbench")
    chunk, staircase = map(str, runs)
    compared = [
        arms.parse_arm(f"instruction:run={chunk},mode=unified"),
        arms.parse_arm(f"staircase:run={chunk},mode=unified,text={staircase}"),
    ]
    how = arms.Options(episodes=2, families=(ENV,), batch=2, patience=1.0, processes=1)
    result, whole = arms.compare_arms(compared, history_store.path, tmp_path / "arms", how)
    assert whole and result["episodes"] == 2 and len(result["pairs"]) == 1
    again, _ = arms.compare_arms(compared, history_store.path, tmp_path / "arms", how)
    assert again == result
    with pytest.raises(UserError, match="made with another patience"):
        arms.compare_arms(compared, history_store.path, tmp_path / "arms", dataclasses.replace(how, patience=2.0))
    trials = json.loads((tmp_path / "arms" / "trials" / "staircase.json").read_text())["trials"]
    for trial in trials:  # whole chunks, but for one in which the episode ends
        assert sum(subtask["events"] for subtask in trial["subtasks"]) == -(-trial["steps"] // STEPS)
    assert "| instruction - staircase |" in (tmp_path / "arms" / "arms.md").read_text()
    assert (tmp_path / "arms" / "arms.png").stat().st_size > 5000
    page = build_report([], "", "", tmp_path / "report", {}, arms=[tmp_path / "arms"]).read_text()
    assert "on the 2 episodes that all 2 have finished" in page and "<td>instruction beside staircase</td>" in page
    assert f"unified: latents of staircase ({chunk}, step 7)" in page
