"""FLOPs of the VLM stages: the formula against the products of the traced step, and who asks for it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from test_preflight import products, sized_config

from wallwm_jax.benchmarks.random_batch import random_questions
from wallwm_jax.data.vlm_batches import VlmRows
from wallwm_jax.models import model_flops
from wallwm_jax.models.language_flops import RowShape, batch_flops, forward_flops, training_flops
from wallwm_jax.training.families import family_of
from wallwm_jax.training.language_objectives import compute_loss
from wallwm_jax.training.stages import get_stage


def sized_vlm_config(stage):
    """Widths at which products of weights are the work; one chunk of the delta rule is small beside them."""
    config = sized_config()
    with config.unlocked():
        config.train.stage = stage
        config.objective.update(latent_action_weight=1.0, latent_video_weight=1.0)
        config.data.vlm.update(image_size=64, length=128, answer_length=2, trace_length=64)
        config.vlm.entry_depths = (0, 1, 2, 3)
        for part in ("language", "small"):
            config.vlm[part].update(
                width=512, ffn=1536, depth=4, heads=8, kv_heads=4, head_dim=64, rotary_dim=32, mrope_section=(8, 4, 4),
                linear_key_heads=4, linear_value_heads=8, linear_key_dim=16, linear_value_dim=16,
            )  # fmt: skip
        config.vlm.vision.update(width=128, heads=2, ffn=512)
    return config


def traced(config, gradient):
    """FLOPs of the products in the loss of one row, or in loss and gradient."""
    stage = get_stage(config.train.stage)
    params = jax.eval_shape(lambda: family_of(stage).init(config, stage, jax.random.key(0)))
    spec = VlmRows.spec(config, 1, num_views=3)
    batch = {name: jax.ShapeDtypeStruct(*entry) for name, entry in spec.items()}

    def loss(trainable, frozen, batch):
        weight = jnp.ones(config.model.latent_channels)
        return compute_loss(trainable, frozen, config, stage, batch, jax.random.key(0), weight)[0]

    function = jax.value_and_grad(loss) if gradient else loss
    return products(jax.make_jaxpr(function)(*stage.split(params), batch).jaxpr)


@pytest.mark.parametrize("stage", ["vlm_sft", "vlm_text"])
def test_the_formula_is_what_the_step_multiplies(stage):
    config = sized_vlm_config(stage)
    assert training_flops(config, RowShape.of(config, 3), stage) == pytest.approx(traced(config, True), rel=0.03)


@pytest.mark.extended
def test_the_formula_is_what_the_ties_multiply():
    """Forward: the towers' attention computes some products again in its backward pass, which no formula counts."""
    config = sized_vlm_config("staircase")
    row = RowShape.of(config, 3)
    parts = forward_flops(config, row)
    towers = model_flops.training_flops(config, row.window, "joint") / 3
    forward = sum(parts[name] for name in ("prompt", "branch", "told", "match", "caption")) + towers
    assert forward == pytest.approx(traced(config, False), rel=0.03)
    read = parts["prompt"] + parts["caption"]
    passed = forward - read - parts["branch"]
    assert training_flops(config, row, "staircase") == pytest.approx(read + 3 * parts["branch"] + 2 * passed)


def test_a_full_batch_is_the_row_that_the_formula_counts():
    for stage in ("vlm_sft", "vlm_text", "staircase"):
        config = sized_vlm_config(stage)
        with config.unlocked():
            config.data.rows = 2
        batch, row = random_questions(config, views=3, full=True), RowShape.of(config, 3)
        assert batch_flops(config, batch) == pytest.approx(2 * training_flops(config, row, stage)), stage
        batch["window_index"][1] = -1
        assert batch_flops(config, batch) == pytest.approx(training_flops(config, row, stage)), stage


def test_a_tie_that_weighs_nothing_costs_nothing():
    config = sized_vlm_config("staircase")
    row, parts = RowShape.of(config, 3), forward_flops(config, RowShape.of(config, 3))
    whole = training_flops(config, row, "staircase")
    config.objective.trace_weight = 0.0
    assert whole - training_flops(config, row, "staircase") == pytest.approx(2 * parts["told"])
    config.objective.match_weight = 0.0
    alone = dataclasses.replace(row, window=None)
    assert training_flops(config, alone, "staircase") == pytest.approx(parts["prompt"] + 3 * parts["branch"])
