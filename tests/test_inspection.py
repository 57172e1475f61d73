"""The page of an event store: its figures are the store's, boundaries are counted one to one, nothing is fetched."""

import json
import re
import shutil

import pytest
from synthetic import synthetic_episode

from wallwm_jax.console import UserError
from wallwm_jax.data.recaption import stored_spans, write_layer
from wallwm_jax.evaluation.inspection import inspect_store
from wallwm_jax.evaluation.timelines import FOUND, MISSED, level_bars
from wallwm_jax.events.captioners import Caption, with_captions
from wallwm_jax.events.segment import match_boundaries, tolerance_s

EPISODES = [synthetic_episode(seed, steps=64 + 7 * seed) for seed in range(6)]  # as the fixture has them


@pytest.mark.parametrize(
    ("found", "true", "within", "pairs"),
    [
        ([10, 20], [10, 20], 0, [(10, 10), (20, 20)]),
        ([9, 11], [10], 2, [(9, 10)]),  # one true boundary is found once
        ([12], [10, 14], 2, [(12, 10)]),
        ([10, 12], [11, 13], 1, [(10, 11), (12, 13)]),  # the nearest pair, (12, 11), would leave two alone
        ([5], [9], 3, []),
        ([], [1], 3, []),
    ],
)
def test_boundaries_are_matched_one_to_one(found, true, within, pairs):
    assert match_boundaries(found, true, within) == pairs


def test_short_true_spans_are_matched_more_strictly():
    assert tolerance_s([0.8] * 5) == pytest.approx(0.2)
    assert tolerance_s([10.0]) == 0.3


def shifted(store_path, target):
    """A copy of a store in whose truth the second boundary of every row of actions is 5 steps later."""
    shutil.copytree(store_path, target)
    entries = json.loads((target / "episodes.json").read_text())
    for entry in entries:
        for before, after in zip(entry["spans"]["action"][1:2], entry["spans"]["action"][2:3]):
            before["end"] += 5
            after["start"] += 5
    (target / "episodes.json").write_text(json.dumps(entries))
    return target


def test_the_page_counts_what_the_store_holds(clustered_store, tmp_path):
    copy = shutil.copytree(clustered_store, tmp_path / "store")
    doubt = Caption("<b>a doubtful</b> thing", ("perhaps",), 0.25, "vlm:tiny")
    write_layer(copy, [with_captions(spans, {("action", 2): doubt}) for spans in stored_spans(copy)], "vlm:tiny")
    truth = shifted(clustered_store, tmp_path / "truth")
    told = inspect_store(copy, tmp_path / "pages" / "page.html", truth=str(truth), episodes=2)
    page = (tmp_path / "pages" / "page.html").read_text()
    figures = json.loads((tmp_path / "pages" / "page.json").read_text())
    levels = {row["level"]: row for row in figures["levels"]}
    assert {level: row["spans"] for level, row in levels.items()} == {
        level: sum(len(episode.spans[level]) for episode in EPISODES) for level in levels
    }
    assert {"level": "action", "provenance": "vlm:tiny", "captions": 6, "confidence": 3 * [0.25]} in figures[
        "captioners"
    ]
    assert [row["confidence"] for row in figures["doubtful"]] == 6 * [0.25]
    edges = sum(len(episode.spans["action"]) - 1 for episode in EPISODES)
    scores = {row["level"]: row for row in figures["scores"]}
    assert scores["subtask"]["f1"] == 1 and scores["subtask"]["spans"] == 1
    assert scores["action"]["recall"] == pytest.approx(
        1 - 6 / edges, abs=3 / edges
    )  # 5 steps off is sometimes the next
    assert f"action   boundary F1 {scores['action']['f1']:.2f}" in told
    assert page.count('<div class="timeline">') == 2 and FOUND in page and MISSED in page
    assert "&lt;b&gt;a doubtful&lt;/b&gt; thing" in page and "<b>a doubtful" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # one file, no network
    assert "action, motion:" in page and "subtask, seen and said:" in page


def test_edges_of_true_spans_say_whether_they_were_found():
    spans = [dict(start=s, end=e, caption="c", verb="v") for s, e in ((0, 20), (20, 40), (40, 60))]
    true = [dict(start=s, end=e, caption="c", verb="v") for s, e in ((0, 21), (21, 50), (50, 60))]
    rows = level_bars({"spans": {"action": spans}, "num_steps": 60}, 10.0, {"spans": {"action": true}})
    drawn = {row["name"]: row["bars"] for row in rows}
    assert [bar["edge"] for bar in drawn["true"]] == [FOUND, MISSED, ""]
    assert [bar["left"] for bar in drawn["action"]] == pytest.approx([0, 100 / 3, 200 / 3])


def test_a_truth_of_other_episodes_or_a_page_without_a_name_is_refused(small_store, clustered_store, tmp_path):
    other = shutil.copytree(small_store, tmp_path / "other")
    entries = json.loads((other / "episodes.json").read_text())
    (other / "episodes.json").write_text(json.dumps([{**entry, "name": "else"} for entry in entries]))
    with pytest.raises(UserError, match="has none of the episodes"):
        inspect_store(clustered_store, tmp_path / "page.html", truth=str(other))
    with pytest.raises(UserError, match=r"give the name of an \.html file"):
        inspect_store(clustered_store, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        inspect_store(tmp_path / "absent", tmp_path / "page.html")
