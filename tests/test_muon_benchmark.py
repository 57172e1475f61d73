"""Muon compiled by the TPU compiler: the bars of the update, and that the static plan says what the program does."""

import pytest

from wallwm_jax.benchmarks import muon
from wallwm_jax.console import UserError


def check_plan(row):
    assert set(row["collectives"]) <= {"all-to-all", "all-gather"}  # nothing reduced, nothing gathered but updates
    assert row["collectives"] == row["plan"]["collectives"]
    assert row["flops_per_chip"] == pytest.approx(row["plan"]["flops_per_chip"], rel=0.05)
    for figure in ("bytes_received_per_chip", "peak_bytes_per_chip"):
        assert row[figure] == pytest.approx(row["plan"][figure], rel=0.05), figure
    assert row["peak_bytes_per_chip"] <= row["temp_bytes_per_chip"]


@pytest.mark.tpu
@pytest.mark.parametrize(
    "model, topology, name, all_to_alls",
    [("wan1b3", "v5p:2x2x2", "ours_fsdp", 4), ("wan14b", "v5p:4x8x8", "ours_fsdp_tp", 8)],
)
def test_the_compiled_update_is_the_plan(model, topology, name, all_to_alls):
    """A small tower with many matrices for each of few chips; a large one split over two mesh axes."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    result = muon.measure(model, topology, [name])
    check_plan(result[name])
    assert result[name]["flops_per_chip"] <= 1.12 * result[name]["ideal_flops_per_chip"]
    assert result[name]["collectives"] == {"all-to-all": all_to_alls}
    assert name in muon.table(result)
    assert result["machine"]["cores"] >= 1 and set(result["machine"]) >= {"processor", "jax", "libtpu"}


@pytest.mark.tpu
@pytest.mark.slow
def test_the_14b_update_keeps_its_bars_on_256_chips():
    """Work, traffic and memory per chip of the published single-view layout and its multi-view twin."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    ours = ["ours_fsdp", "ours_fsdp_views", "ours_data_fsdp", "ours_fsdp_tp"]
    result = muon.measure("wan14b", "v5p:4x8x8", ours)
    for name in ours:
        check_plan(result[name])
    fsdp, views, both, tensor = (result[name] for name in ours)
    assert (fsdp["matrices"], views["matrices"]) == (400, 560)
    assert fsdp["flops_per_chip"] <= 1.15 * fsdp["ideal_flops_per_chip"]
    assert fsdp["bytes_received_per_chip"] <= 0.8e9 and fsdp["temp_bytes_per_chip"] <= 0.8e9
    assert max(fsdp["share_of_step"], both["share_of_step"], tensor["share_of_step"]) <= 0.012
    assert views["flops_per_chip"] <= 1.25 * views["ideal_flops_per_chip"]
    assert both["temp_bytes_per_chip"] <= 0.6e9
    assert tensor["bytes_received_per_chip"] <= 1.8e9 and tensor["temp_bytes_per_chip"] <= 1e9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("wan14b", "v5p:2x2x1", ["ours"]), "--rows=ours: one of ours_fsdp"),
        (("wan3", "v5p:2x2x1"), "no configs/wan3.py"),
    ],
)
def test_unknown_names_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        muon.measure(*arguments)
