"""Muon on eight simulated devices: a mesh changes nothing but where the work is done. Run by test_muon.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wallwm_jax.optim.muon import MatrixSpec, MuonSharding, muon, scale_by_muon
from wallwm_jax.optim.muon_cost import muon_cost_report
from wallwm_jax.parallel.aot import count_instructions

SPEC = MatrixSpec(1, 2)

SHAPES = {
    "query": (5, 16, 16),
    "output": (5, 16, 16),
    "up": (5, 16, 48),
    "down": (5, 48, 16),
    "single": (16, 32),
    "odd": (3, 6, 16),
    "fused": (2, 16, 24),
    "joint": (2, 16, 8),
}
SPECS = {
    **dict.fromkeys(SHAPES, SPEC),
    "single": MatrixSpec(0, 1),
    "fused": MatrixSpec(1, 2, (8, 8, 8)),
}


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layouts(mesh):
    """Rows over fsdp, columns over tensor, as in `parallel.sharding`; "odd" is not divisible and stays whole."""
    fsdp, tensor = ("fsdp" if mesh.shape["fsdp"] > 1 else None), ("tensor" if mesh.shape["tensor"] > 1 else None)
    return {
        "query": PartitionSpec(None, fsdp, tensor),
        "output": PartitionSpec(None, tensor, fsdp),
        "up": PartitionSpec(None, fsdp, tensor),
        "down": PartitionSpec(None, tensor, fsdp),
        "single": PartitionSpec(fsdp, tensor),
        "odd": PartitionSpec(None, None, tensor),
        "fused": PartitionSpec(None, fsdp, tensor),
        "joint": PartitionSpec(None, ("fsdp", "tensor")),
    }


MESHES = {
    "fsdp": dict(slice=1, data=1, fsdp=8, tensor=1),
    "tensor": dict(slice=1, data=1, fsdp=1, tensor=8),
    "fsdp x tensor": dict(slice=1, data=1, fsdp=4, tensor=2),
    "data x fsdp": dict(slice=1, data=2, fsdp=4, tensor=1),
    "data x fsdp x tensor": dict(slice=1, data=2, fsdp=2, tensor=2),
    "slice x data x fsdp": dict(slice=2, data=2, fsdp=2, tensor=1),
    "slice x fsdp": dict(slice=2, data=1, fsdp=4, tensor=1),
}


def make_mesh(name):
    sizes = MESHES[name]
    grid = np.asarray(jax.devices()[:8]).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def steps(rule, params, placed=None, count=3):
    """`count` updates of a rule, jitted; the state begins where `placed` says."""
    put = (lambda tree: tree) if placed is None else (lambda tree: jax.device_put(tree, placed))
    state, update = rule.init(put(params)), jax.jit(rule.update)
    for step in range(count):
        grads = {name: random(leaf.shape, seed=100 * step + i) for i, (name, leaf) in enumerate(params.items())}
        updates, state = update(put(grads), state)
    return updates, state


@pytest.fixture(scope="module")
def unsharded():
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    return steps(scale_by_muon(SPECS, dtype=jnp.float32, neuron_decay=0.9), params)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_nothing(name, unsharded):
    mesh = make_mesh(name)
    specs = layouts(mesh)
    placed = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
    rule = scale_by_muon(SPECS, dtype=jnp.float32, neuron_decay=0.9, sharding=MuonSharding(mesh, specs))
    updates, state = steps(rule, {key: jnp.zeros(shape) for key, shape in SHAPES.items()}, placed)
    for key in SHAPES:
        np.testing.assert_allclose(updates[key], unsharded[0][key], atol=1e-5, err_msg=key)
        assert updates[key].sharding.is_equivalent_to(placed[key], len(SHAPES[key])), key
        np.testing.assert_allclose(state.momentum[key], unsharded[1].momentum[key], atol=1e-5, err_msg=key)


def test_a_bad_gradient_stays_with_its_matrix_on_a_mesh():
    mesh = make_mesh("fsdp x tensor")
    specs = layouts(mesh)
    rule = scale_by_muon(SPECS, dtype=jnp.float32, sharding=MuonSharding(mesh, specs))
    grads = {key: random(shape) for key, shape in SHAPES.items()}
    grads["up"] = grads["up"].at[2, 3, 4].set(jnp.nan)
    updates, _ = jax.jit(rule.update)(grads, rule.init(grads))
    bad = {key: np.isnan(update) for key, update in updates.items()}
    assert bad["up"][2].all() and not np.delete(bad["up"], 2, 0).any()
    assert not any(bad[key].any() for key in SHAPES if key != "up")


def test_the_state_does_not_know_the_mesh():
    """Resumed on another mesh, the next update is the same, bit for bit but for the order of sums."""
    first, second = make_mesh("fsdp"), make_mesh("data x fsdp")
    params = {key: jnp.zeros(shape) for key, shape in SHAPES.items()}
    rules = [
        scale_by_muon(SPECS, dtype=jnp.float32, sharding=MuonSharding(mesh, layouts(mesh))) for mesh in (first, second)
    ]
    _, state = steps(rules[0], params, {key: NamedSharding(first, spec) for key, spec in layouts(first).items()})
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), rule.init(params)) for rule in rules]
    assert shapes[0] == shapes[1] == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    grads = {key: random(shape, seed=7) for key, shape in SHAPES.items()}
    moved = jax.tree.map(np.asarray, state)
    same, other = (jax.jit(rule.update)(grads, moved)[0] for rule in rules)
    for key in SHAPES:
        np.testing.assert_array_equal(same[key], other[key], err_msg=key)


CONTRACTS = {
    "fsdp": {"all-to-all"},
    "fsdp x tensor": {"all-to-all"},
    "data x fsdp": {"all-to-all", "all-gather"},
    "slice x fsdp": {"all-to-all"},
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_compiled_update_is_the_plan(name):
    """No collective but those planned, no more work than that of the busiest chip: nothing is gathered or repeated."""
    mesh = make_mesh(name)
    shapes = {key: jax.ShapeDtypeStruct((shape[0] * 4, *shape[1:]), jnp.float32) for key, shape in SHAPES.items()
              if key not in ("single", "odd", "joint")}  # fmt: skip
    specs = {key: layouts(mesh)[key] for key in shapes}
    placed = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
    sharding = MuonSharding(mesh, specs)
    rule = scale_by_muon(SPECS, dtype=jnp.float32, sharding=sharding)
    grads = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[key]) for key, leaf in shapes.items()}
    state = jax.eval_shape(rule.init, grads)._replace(momentum=grads)
    compiled = jax.jit(rule.update, out_shardings=(placed, None)).lower(grads, state).compile()
    found, cost = count_instructions(compiled.as_text()), muon_cost_report(SPECS, shapes, sharding, dtype=jnp.float32)
    assert set(found.collectives) == CONTRACTS[name] == set(cost.collectives), found.table()
    assert dict(found.collectives) == cost.collectives
    owners = {mesh.shape[axis] for axis in ("data", "fsdp", "tensor")}
    assert {chips for _, chips in found.traffic} <= owners  # along one axis each, and never from slice to slice
    assert sum(found.received.values()) == pytest.approx(cost.bytes_received_per_chip, rel=0.05)
    assert found.flops == pytest.approx(cost.flops_per_chip, rel=0.05)
    assert cost.flops_per_chip < 1.35 * cost.ideal_flops_per_chip
    assert "chips own" in cost.table() and cost.matrices == 4 * (5 * 4 + 2 * 3)


def test_matrices_split_where_nobody_owns_are_an_error():
    mesh = make_mesh("fsdp x tensor")
    rule = scale_by_muon({"w": SPEC}, sharding=MuonSharding(mesh, {"w": PartitionSpec(None, "fsdp")}, ("tensor",)))
    grads = {"w": jnp.zeros((2, 8, 8))}
    with pytest.raises(ValueError, match="split over mesh axis 'fsdp', which is no owner axis"):
        rule.update(grads, rule.init(grads))


def test_joint_axes_out_of_order_are_an_error():
    mesh = make_mesh("fsdp x tensor")
    rule = scale_by_muon({"w": SPEC}, sharding=MuonSharding(mesh, {"w": PartitionSpec(None, ("tensor", "fsdp"))}))
    grads = {"w": jnp.zeros((2, 8, 8))}
    with pytest.raises(ValueError, match="name the axes in the order of the mesh"):
        rule.update(grads, rule.init(grads))


def test_a_split_stack_is_an_error():
    mesh = make_mesh("fsdp")
    rule = scale_by_muon({"w": SPEC}, sharding=MuonSharding(mesh, {"w": PartitionSpec("fsdp")}))
    grads = {"w": jnp.zeros((8, 8, 8))}
    with pytest.raises(ValueError, match="axis 0 of 'w' stacks matrices and is split over 'fsdp'"):
        rule.update(grads, rule.init(grads))


def test_muon_with_adamw_goes_down_on_a_mesh():
    mesh = make_mesh("fsdp")
    target = random((8, 16, 24))
    params = {"w": jnp.zeros((8, 16, 24)), "b": jnp.zeros(8)}
    layout = {"w": PartitionSpec(None, "fsdp"), "b": PartitionSpec()}
    rule = muon(0.2, {"w": SPEC, "b": None}, dtype=jnp.float32, sharding=MuonSharding(mesh, layout))

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["w"] - target) ** 2) + jnp.mean((p["b"] - 1.0) ** 2))(
            params
        )
        updates, state = rule.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 60))((params, rule.init(params)))
    assert losses[-1] < 0.1 * losses[0]
