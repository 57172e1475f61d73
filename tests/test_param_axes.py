"""The parameter table: one rule each, ranks agree, and what the optimizer is told."""

import math

import jax
import pytest
from random_batch import tiny_config

from wallwm_jax.models import param_axes
from wallwm_jax.models.vlm import language_model, staircase, text_projector, vision_tower
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.staircase import StaircaseConfig
from wallwm_jax.models.vlm.text_projector import ProjectorConfig
from wallwm_jax.models.vlm.vision_tower import VisionConfig
from wallwm_jax.models.world_action_model import abstract_params
from wallwm_jax.optim.ownership import ADAMW, MatrixSpec


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
    }


@pytest.fixture(scope="module")
def params():
    model = tiny_config().model.copy_and_resolve_references()
    with model.unlocked():
        model.place_embedding = True
    language, tiny = language_model.abstract_params(LanguageConfig.tiny(tied=False)), LanguageConfig.tiny()
    vision = vision_tower.abstract_params(VisionConfig.tiny())
    projector = ProjectorConfig(in_width=16, vocabulary=8, queries=3, width=16, heads=2, depth=1)
    return {
        **abstract_params(model),
        "vlm": {"language": language, "vision": vision},
        "small": language,
        "vlm_text": jax.eval_shape(lambda: text_projector.init(projector, jax.random.key(0))),
        "staircase": jax.eval_shape(
            lambda backbone: staircase.init(StaircaseConfig((0,), 16, 16), tiny, backbone, jax.random.key(0)),
            language_model.abstract_params(tiny),
        ),
    }


def test_every_parameter_matches_exactly_one_rule_of_its_rank(params):
    for path, leaf in leaves(params).items():
        assert len(param_axes.rule_for(path).axes) == leaf.ndim, path


def test_every_rule_is_used(params):
    used = {param_axes.rule_for(path).pattern for path in leaves(params)}
    assert used == {rule.pattern for rule in param_axes.RULES}


def test_a_parameter_without_rule_is_an_error(params):
    with pytest.raises(ValueError, match="'video/extra' must match exactly one rule"):
        param_axes.map_params(lambda path, rule, leaf: 0, {"video": {"extra": params["video"]["head"]["bias"]}})


def test_a_parameter_of_another_rank_is_an_error(params):
    with pytest.raises(ValueError, match="'video/head/bias' has shape"):
        wrong = {"video": {"head": {"bias": params["video"]["head"]["kernel"]}}}
        param_axes.map_params(lambda path, rule, leaf: 0, wrong)


def test_muon_takes_nearly_all_of_the_blocks_and_nothing_else(params):
    sizes = {path: math.prod(leaf.shape) for path, leaf in leaves(params).items()}
    matrices = leaves(param_axes.muon_matrices(params))
    blocks = {path: size for path, size in sizes.items() if "/blocks/" in path}
    muon = {path: size for path, size in sizes.items() if matrices[path] != ADAMW}
    assert set(muon) <= set(blocks)
    assert sum(muon.values()) >= 0.9 * sum(blocks.values())
    assert matrices["video/blocks/ffn/up/kernel"] == MatrixSpec(reduction=1, output=2)
    assert leaves(params)["video/blocks/ffn/up/kernel"].shape == (2, 32, 64)


def test_decay_spares_biases_norms_and_modulation(params):
    decayed = {path for path, decay in leaves(param_axes.decay_mask(params)).items() if decay}
    assert {"video/patch_embedding/kernel", "text/embedding", "action/blocks/ffn/gate/kernel"} <= decayed
    assert not any(path.endswith(("bias", "scale", "modulation", "angles")) for path in decayed)


def test_groups_are_the_top_level_parts(params):
    parts = {"video", "action", "text", "duration", "vlm", "small", "vlm_text", "staircase"}
    assert set(leaves(param_axes.groups(params)).values()) == parts
