"""What latents tell: conditions that are the same cost the same, gaps and their shares, and the refusals."""

import jax
import numpy as np
import pytest
from vlm_setup import built_vlm_step, random_vlm_state, vlm_training_config

from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.evaluation import latents
from wallwm_jax.evaluation.latents import CONDITIONS, Resampled, _closed, _others


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
    found = latents.measure(params, config, store, events=6, draws=2)
    assert found["events"] == 6 and set(found["action"]) == set(found["video"]) == set(CONDITIONS)
    assert all(entry["low"] <= entry["mean"] <= entry["high"] for entry in found["action"].values())
    assert found["match"]["latents"]["mean"] > 0
    losses = {condition: found["action"][condition]["mean"] for condition in CONDITIONS}
    assert len(set(losses.values())) == len(CONDITIONS)
    share = found["gap_closed"]["action"]["latents"]["null"]["mean"]
    expected = (losses["null"] - losses["latents"]) / (losses["null"] - losses["caption"])
    assert share == pytest.approx(expected, rel=1e-3) == found["figures"]["share of the gap from the null text"]

    silent = params["staircase"]["border"]["projector"]
    silent["kernel"], silent["bias"] = silent["kernel"] * 0.0, silent["bias"] * 0.0
    same = latents.measure(params, config, store, events=6, draws=2)
    assert same["action"]["latents"] == same["action"]["other_latents"]
    assert same["action"]["caption"] == found["action"]["caption"]
    assert same["trace"]["latents"] == found["trace"]["latents"]  # the small model reads another projection
    with pytest.raises(UserError, match="latents need a run of stage 'staircase'"):
        latents.measure({}, config, store)
