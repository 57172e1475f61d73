"""Where every parameter of the published sizes lives on the slices they are trained on, held against golden tables.

A change of the tables is a change of what each chip holds: look at the diff, and if it is meant, write them anew with

    WRITE_GOLDEN=1 python -m pytest tests/test_golden_shardings.py
"""

import importlib
import math
import os
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from wallwm_jax.benchmarks.figures import parameter_table
from wallwm_jax.models import param_axes
from wallwm_jax.models.world_action_model import abstract_params
from wallwm_jax.parallel import sharding
from wallwm_jax.parallel.mesh import AXES
from wallwm_jax.parallel.presets import mesh_preset

GOLDEN = Path(__file__).parent / "golden" / "shardings"
MESHES = {"context4_tensor2": {"slice": 1, "data": 4, "fsdp": 16, "context": 4, "tensor": 2}}
"""By name, what is no preset."""
CASES = [
    ("wan5b", "v5p:4x4x8"),
    ("wan14b", "v5p:8x8x8"),
    ("wan5b", "v5e:16x16"),
    ("wan5b", "v6e:16x16"),
    ("wan5b", "v6e:16x16*4"),
    ("wan5b", "tpu7x:4x4x4"),
    ("wan5b", "h100:8*16"),
    ("wan1b3", "h100:8"),
    ("wan1b3", "v5p:2x2x1"),
    ("wan14b", "context4_tensor2"),
]
REPLICATED = 0.02


def laid_out(model, topology):
    sizes = MESHES.get(topology) or mesh_preset(topology)
    mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return abstract_params(importlib.import_module(f"configs.{model}").get_config().model), mesh


@pytest.mark.parametrize(("model", "topology"), CASES)
def test_each_chip_holds_what_the_golden_table_says(model, topology):
    table = parameter_table(*laid_out(model, topology)) + "\n"
    file = GOLDEN / f"{model}_{topology.replace(':', '_').replace('*', '_by_')}.txt"
    if os.environ.get("WRITE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(table)
    assert file.read_text() == table, f"{file.name} differs; this test's file says how to write it anew"


@pytest.mark.parametrize(("model", "topology"), CASES)
def test_hardly_any_parameter_is_whole_on_every_chip(model, topology):
    params, mesh = laid_out(model, topology)
    whole, everything = 0, 0

    def add(_, rule, leaf):
        nonlocal whole, everything
        part = NamedSharding(mesh, sharding.spec_for(rule.axes, leaf.shape, mesh)).shard_shape(leaf.shape)
        everything += math.prod(leaf.shape)
        whole += math.prod(leaf.shape) if part == tuple(leaf.shape) else 0

    param_axes.map_params(add, params)
    assert everything == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert whole <= REPLICATED * everything
