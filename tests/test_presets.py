"""Mesh presets: which slices they know, how these are cut, and that the wildcard of a preset run is not needed."""

import math

import pytest

from configs import base
from wallwm_jax.console import UserError
from wallwm_jax.parallel.mesh import AXES, mesh_shape
from wallwm_jax.parallel.presets import mesh_preset, mesh_sizes


@pytest.mark.parametrize(
    ("name", "devices", "split"),
    [
        ("v5p:4x4x8", 128, {"data": 4, "fsdp": 32}),
        ("v5p:8x8x8", 512, {"data": 8, "fsdp": 64}),
        ("v5p:2x2x1", 4, {"fsdp": 4}),
        ("v5e:16x16", 256, {"data": 16, "fsdp": 16}),
        ("v6e:2x4", 8, {"fsdp": 8}),
        ("v6e:16x16*4", 1024, {"slice": 4, "data": 16, "fsdp": 16}),
        ("tpu7x:4x4x4", 128, {"data": 4, "fsdp": 32}),
        ("h100:8*16", 128, {"data": 16, "fsdp": 8}),
        ("h100:8", 8, {"fsdp": 8}),
    ],
)
def test_a_preset_uses_every_device_and_keeps_shards_off_the_whole_torus(name, devices, split):
    sizes = mesh_preset(name)
    assert {axis: size for axis, size in sizes.items() if size > 1} == split
    assert mesh_shape(sizes, devices) == tuple(sizes[axis] for axis in AXES)
    assert math.prod(sizes.values()) == devices


@pytest.mark.parametrize("name", ["v5p-128", "v5p:4x4", "v9:4x4", "v5e:16x16*", "v5e:16x0", "h100:2x4", ""])
def test_what_is_no_preset_is_an_error_that_shows_the_form(name):
    with pytest.raises(UserError, match="write generation and extents"):
        mesh_preset(name)


def test_a_named_preset_comes_before_the_sizes_of_the_config():
    config = base.get_config().copy_and_resolve_references().unlock()
    assert mesh_sizes(config) == config.mesh
    config.mesh_preset = "v5p:4x4x8"
    assert mesh_sizes(config)["fsdp"] == 32
