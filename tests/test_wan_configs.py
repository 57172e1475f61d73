"""The configs of published sizes: parameter counts of their towers, and that the published weights fit them."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from weight_files import wan_shapes

from wallwm_jax.data.packing import batch_spec
from wallwm_jax.models import param_axes
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.convert import wan
from wallwm_jax.training.objectives import compute_loss
from wallwm_jax.training.stages import STAGES

# config, tower of the published model, with view attention, config.json of the published model (diffusers layout)
PUBLISHED = {
    "wan1b3": (1_418_996_800, 1_702_527_216, dict(num_attention_heads=12, in_channels=16, ffn_dim=8960, num_layers=30)),
    "wan5b": (4_999_787_712, 6_133_079_408, dict(num_attention_heads=24, in_channels=48, ffn_dim=14336, num_layers=30)),
    "wan14b": (
        14_288_491_584,
        18_484_638_960,
        dict(num_attention_heads=40, in_channels=16, ffn_dim=13824, num_layers=40),
    ),
}


def get_config(name: str, stage: str = "video") -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(stage)


def count(params: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", PUBLISHED)
def test_towers_have_the_published_number_of_parameters(name):
    single, multi, published = PUBLISHED[name]
    config = get_config(name).model
    params = wam.abstract_params(config)
    assert count(params["video"]) == multi
    width, cameras = config.width, config.max_views * 22
    assert (
        multi - single == config.depth * (4 * (width * width + width) + 5 * width) + cameras
    )  # attention, norms, table
    param_axes.groups(params)  # every parameter has its rule
    with config.unlocked():
        config.view_attention = False
    video = wam.abstract_params(config)["video"]
    assert count(video) == single

    table = wan.table({"condition_embedder.time_proj.weight": ()}, published | dict(attention_head_dim=128))
    assert len(wan_shapes("diffusers", published | dict(attention_head_dim=128))) == 15 + 27 * config.depth
    assert table.parameters() == single
    shapes = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf.shape
              for keys, leaf in jax.tree_util.tree_leaves_with_path({"video": video})}  # fmt: skip
    assert shapes == {rule.path: rule.target_shape() for rule in table.rules}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_argument_names_the_stage(name):
    for stage in ("video", "action", "joint"):
        config = get_config(name, stage)
        assert config.train.stage == stage
        assert config.is_locked
    assert config.model.text.to_dict() | dict(kind="features", width=4096, pad_to=512) == config.model.text.to_dict()


@pytest.mark.extended
def test_six_action_draws_cost_little_more_than_one():
    """Stage action at 5B, forward and backward, on one row: the draws share one video forward (WALL-WM section 2.7).

    The layers are one scan, whose body is counted once in both.
    """

    def flops(draws: int) -> float:
        config = get_config("wan5b", "action").copy_and_resolve_references()
        with config.unlocked():
            config.objective.action_draws = draws
            config.data.update(rows=1, views=("head", "left", "right"))
        stage = STAGES["action"]
        trainable, frozen = stage.split(wam.abstract_params(config.model))
        batch = {name: jax.ShapeDtypeStruct(*spec) for name, spec in batch_spec(config, 1).items()}
        weight = jnp.ones(config.model.latent_channels)

        def loss(trainable, frozen, batch):
            return compute_loss(trainable, frozen, config, stage, batch, jax.random.key(0), weight)[0]

        return jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, batch).cost_analysis()["flops"]

    assert 1.0 < flops(6) / flops(1) < 1.3
