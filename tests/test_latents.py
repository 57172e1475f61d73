"""What latents and features tell: conditions that are the same cost the same, gaps and their shares, refusals."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_model import random_params
from vlm_setup import built_vlm_step, random_vlm_state, vlm_training_config

from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.vlm_batches import Questions
from wallwm_jax.evaluation import latents
from wallwm_jax.evaluation.latents import Resampled, Told, _closed, _heads, _others, conditions
from wallwm_jax.evaluation.planner_accuracy import request_of
from wallwm_jax.inference.latent_conditioner import LatentConditioner
from wallwm_jax.models.world_action_model import TextContext
from wallwm_jax.training.checkpoint import Loaded


def test_the_gap_closed_is_the_share_of_what_the_caption_brings():
    each = {"caption": np.array([1.0, 2.0]), "null": np.array([3.0, 4.0]), "latents": np.array([1.5, 2.5])}
    assert _closed(each, "latents", "null", np.arange(2)) == pytest.approx(0.75)
    assert _closed(each, "caption", "null", np.arange(2)) == 1.0 and _closed(each, "null", "null", np.arange(2)) == 0.0


def test_intervals_resample_whole_episodes():
    values = np.repeat([0.0, 1.0], 50)
    within, across = Resampled(np.tile(np.arange(50), 2), 0), Resampled(np.repeat([0, 1], 50), 0)
    each = within(lambda at: values[at].mean())
    assert each["low"] == each["mean"] == each["high"] == 0.5  # every episode has as much of both
    either = across(lambda at: values[at].mean())
    assert (either["low"], either["mean"], either["high"]) == (0.0, 0.5, 1.0)


def test_the_other_event_has_another_caption():
    texts = ["a", "b", "a", "c", "a", "b"]
    assert all(texts[other] != texts[number] for number, other in enumerate(_others(texts, seed=3)))
    with pytest.raises(UserError, match="one caption"):
        _others(["a", "a"], seed=0)


@pytest.mark.extended
def test_a_run_is_measured_under_all_conditions(clustered_store):
    """With a projector that gives nothing, all latents are one text; the losses of captions do not depend on it."""
    config, built = vlm_training_config(clustered_store, "staircase"), built_vlm_step(clustered_store, "staircase")
    state, store = random_vlm_state(built), open_store(clustered_store, "heldout")
    params = {**state.trainable, **jax.tree.map(lambda leaf: leaf.astype("float32"), state.frozen)}
    found, named = latents.measure(params, config, store, events=6, draws=2), conditions("latents")
    assert found["events"] == 6 and set(found["action"]) == set(found["video"]) == set(named)
    assert all(entry["low"] <= entry["mean"] <= entry["high"] for entry in found["action"].values())
    assert found["match"]["latents"]["mean"] > 0
    losses = {condition: found["action"][condition]["mean"] for condition in named}
    assert len(set(losses.values())) == len(named)
    share = found["gap_closed"]["action"]["latents"]["null"]["mean"]
    expected = (losses["null"] - losses["latents"]) / (losses["null"] - losses["caption"])
    assert share == pytest.approx(expected, rel=1e-3) == found["figures"]["share of the gap from the null text"]

    silent = params["staircase"]["border"]["projector"]
    silent["kernel"], silent["bias"] = silent["kernel"] * 0.0, silent["bias"] * 0.0
    same = latents.measure(params, config, store, events=6, draws=2)
    assert same["action"]["latents"] == same["action"]["other_latents"]
    assert same["action"]["caption"] == found["action"]["caption"]
    assert same["trace"]["latents"] == found["trace"]["latents"]  # the small model reads another projection
    with pytest.raises(UserError, match="is of a run of stage 'staircase' or 'vlm_text'"):
        latents.measure({}, config, store)


def test_a_projector_is_held_against_what_sees_nothing():
    """Three events of 2, 2 and 3 features of 4: the mean feature has distance 1, the right ones 0, and so on."""
    target = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    lengths, tokens, seconds = [2, 2, 3], [1, 3, 4], [1.0, 2.0, 6.0]
    batches = [{"answer_length": [n], "remaining_s": [s]} for n, s in zip(tokens, seconds)]
    mean = np.concatenate([row[:n] for row, n in zip(target, lengths)]).mean(0)

    def measured(features, said):
        told = [
            Told(
                TextContext(features[i][None, None], np.full((1, 1), said[i])),
                TextContext(target[i][None, None], np.full((1, 1), lengths[i])),
                {
                    "present": np.where(np.arange(4) < said[i], 1.0, -1.0),
                    "next": np.float32(i),
                    "vlm_next": np.float32(2 * i),
                    "log_s": np.log(np.float32(2.0)),
                },
            )
            for i in range(3)
        ]
        found = _heads(told, batches, 5.0, Resampled(np.arange(3), 0))
        return {name: {who: entry["mean"] for who, entry in row.items()} for name, row in found.items()}

    right, blind = measured(target, lengths), measured(np.broadcast_to(mean, target.shape), [2, 4, 3])
    assert right["align"]["head"] == 0.0 and blind["align"]["head"] == pytest.approx(1.0, rel=1e-3)
    assert right["present"] == {"head": 1.0, "constant": pytest.approx(11 / 12)} and right["length"]["head"] == 1.0
    assert blind["present"]["head"] == pytest.approx(10 / 12)
    assert blind["length"] == {"head": pytest.approx(2 / 3), "constant": pytest.approx(2 / 3)}
    assert right["next"] == {"head": pytest.approx(11 / 8), "vlm": pytest.approx(22 / 8)}
    assert right["time"] == {"head": pytest.approx(1.0), "constant": 3.0}


@pytest.mark.extended
def test_a_projectors_run_is_measured_with_the_towers_of_the_model_that_it_is_aligned_to(clustered_store, monkeypatch):
    """And its features are those that unified mode is told."""
    config, built = vlm_training_config(clustered_store, "vlm_text"), built_vlm_step(clustered_store, "vlm_text")
    state, store = random_vlm_state(built), open_store(clustered_store, "heldout")
    own = {**state.trainable, **jax.tree.map(lambda leaf: leaf.astype("float32"), state.frozen)}
    model = {**random_params(config.model, seed=9), "text": own["text"]}
    runs = {"world": model, "other": random_params(config.model, seed=8), "words": own}
    loaded = Loaded(own, {"store": store.meta}, config.to_dict(), 7)
    monkeypatch.setattr(latents, "load_params", lambda run: dataclasses.replace(loaded, params=runs[run]))
    with pytest.raises(UserError, match="--towers=words has no parameters of action and video"):
        latents.with_towers(loaded, config, "words")
    with pytest.raises(UserError, match="--towers=other has another text encoder"):
        latents.with_towers(loaded, config, "other")
    with config.unlocked():
        params = latents.with_towers(loaded, config, "world")

    found = latents.measure(params, config, store, events=3, draws=1)
    losses = {condition: found["action"][condition]["mean"] for condition in conditions("features")}
    assert len(set(losses.values())) == len(losses) and "trace" not in found
    expected = (losses["other_caption"] - losses["features"]) / (losses["other_caption"] - losses["caption"])
    assert found["figures"]["share of the gap from another caption"] == pytest.approx(expected, rel=1e-3)
    assert found["align"]["head"]["mean"] > 0.5 and found["next"]["head"]["mean"] > 1.0
    assert found["figures"]["time, the head's"] == found["time"]["head"]["mean"] > 0

    prepared, rows, windows = latents._prepared(config, store, 3, 1)
    tell = jax.jit(functools.partial(latents._tell, config=prepared))
    questions = Questions(store, config)
    asked = [request_of(questions.ask(window), config.data.views) for window in windows[:2]]
    for features, window in zip(LatentConditioner(own, config, batch_size=2).latents(asked), windows):
        told = tell(params, batch=latents._alone(rows.asked(window))).instead
        assert len(features) == int(told.length[0, 0])
        np.testing.assert_allclose(features, told.features[0, 0, : len(features)], atol=1e-4)
