"""`python -m wallwm_jax.caption` and `build_events --inspect` as people run them."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_vlm_captioner import StandIn, answering
from training_setup import subprocess_environment

from wallwm_jax.console import TRY_AGAIN
from wallwm_jax.data.clusters import cluster_store
from wallwm_jax.data.event_store import open_store


def run(command, *arguments):
    line = [sys.executable, "-m", f"wallwm_jax.{command}", *map(str, arguments)]
    return subprocess.run(line, env=subprocess_environment(), capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.extended
def test_captions_go_out_to_people_and_come_back(clustered_store, tmp_path):
    store, file = shutil.copytree(clustered_store, tmp_path / "store"), tmp_path / "captions.csv"
    assert run("caption", "out", f"--store={store}", f"--file={file}").returncode == 0
    rows = list(csv.DictReader(file.read_text("utf-8-sig").splitlines()))
    rows[1]["caption"] = "räum auf"
    with open(file, "w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    arguments = ("caption", "human", f"--store={store}", f"--file={file}", "--author=ada")
    before = (store / "store.json").read_bytes()
    dry = run(*arguments, "--dry_run")
    assert "-> 'räum auf'" in dry.stdout and "1 captions change" in dry.stdout
    assert (store / "store.json").read_bytes() == before
    done = run(*arguments)
    assert done.returncode == 0 and "captions changed: 1 on level subtask" in done.stdout
    span = open_store(store).episodes[0]["spans"]["subtask"][0]
    assert (span["caption"], span["provenance"], span["confidence"]) == ("räum auf", "human:ada", 1.0)
    assert (open_store(store).index["cluster_vl"] >= 0).all() and "cluster windows: done" in done.stdout
    assert "nothing changed" in run(*arguments).stdout
    page = run("build_events", f"--inspect={store}", f"--out={tmp_path / 'page.html'}", "--episodes=1")
    assert page.returncode == 0 and "6 episodes" in page.stdout
    assert "human:ada" in (tmp_path / "page.html").read_text()


@pytest.mark.extended
def test_a_limit_leaves_the_store_alone_until_the_answers_are_all_there(clustered_store, tmp_path):
    store = shutil.copytree(clustered_store, tmp_path / "store")
    before = (store / "store.json").read_bytes()
    with StandIn(answering) as server:
        arguments = ("caption", "vlm", f"--store={store}", f"--endpoint={server.endpoint}", "--model=tiny")
        arguments += ("--levels=subtask", "--prices=1,1", "--nocluster")
        some = run(*arguments, "--max_tokens=6000")
        assert some.returncode == TRY_AGAIN, some.stderr
        assert "left" in some.stdout and (store / "store.json").read_bytes() == before
        asked = len(server.bodies)
        every = run(*arguments)
    assert every.returncode == 0, every.stderr
    subtasks = [span for entry in open_store(store).episodes for span in entry["spans"]["subtask"]]
    assert {span["provenance"] for span in subtasks} == {"vlm:tiny"}
    lines = [json.loads(line) for line in (store / "captions" / "journal.jsonl").read_text().splitlines()]
    assert len(server.bodies) == sum("answer" in line for line in lines) > asked > 0  # nothing was asked twice


@pytest.mark.extended
def test_vectors_of_the_old_captions_are_found_before_the_captions_change(clustered_store, tmp_path):
    store, file = shutil.copytree(clustered_store, tmp_path / "store"), tmp_path / "vectors.npz"
    captions = open_store(store).captions
    np.savez(file, caption=np.array(captions), features=np.eye(len(captions), dtype=np.float32))
    cluster_store(store, embedder=f"features:{file}")
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    refused = run("caption", "templates", f"--store={store}", "--levels=subtask")
    assert refused.returncode == 2 and "vectors of its present captions; give --nocluster" in refused.stderr
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    done = run("caption", "templates", f"--store={store}", "--levels=subtask", "--nocluster")
    assert done.returncode == 0 and open_store(store).meta["captions"]["captioner"] == "templates"


@pytest.mark.extended
def test_bad_input_is_one_line(clustered_store, tmp_path):
    for arguments, message in (
        (("human", f"--store={clustered_store}"), "say which table was edited"),
        (("templates", f"--store={clustered_store}", "--levels=word"), "unknown level 'word'"),
        (("templates", f"--store={tmp_path}"), "is not an event store"),
        (("vlm", f"--store={clustered_store}", "--max_cost=1"), "needs --prices"),
    ):
        done = run("caption", *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.startswith("error: ")
