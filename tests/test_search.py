"""Preflight's search: what is tried, what is left out because it must fail, and what is called best."""

from types import SimpleNamespace

import pytest

from configs import wan5b
from wallwm_jax.benchmarks import search
from wallwm_jax.console import UserError


@pytest.fixture
def compiled(monkeypatch):
    """Stands in for the compiler: more rows are faster and fill the memory; 3 rows do not fit, 9 it refuses."""
    seen = []

    def inspect(config, topology, views):
        rows = config.data.rows // 128
        seen.append((config.mesh.data, config.mesh.fsdp, config.model.remat, rows))
        if rows >= 9:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        free = 0.05 if rows == 3 else 0.5
        mfu = 0.1 * rows + (0.01 if config.model.remat == "selective" else 0.0) + config.mesh.fsdp / 1e4
        return SimpleNamespace(
            fits=free > 0.1, free_share=free, projections=(SimpleNamespace(mfu=mfu, seconds=1 / mfu),)
        )

    monkeypatch.setattr(search, "inspect", inspect)
    return seen


def run(**choices):
    chosen = {"fsdp": [32], "remat": ["full"], "rows": [1, 2]} | choices
    return search.search(wan5b.get_config(), "v5p:4x4x8", 3, **chosen)


def test_every_combination_is_compiled_with_rows_per_chip_and_the_best_comes_first(compiled):
    tried = run(fsdp=[16, 32], remat=["full", "selective"])
    assert len(compiled) == 8 and set(compiled) >= {(8, 16, "full", 1), (4, 32, "selective", 2)}
    assert str(tried[0].candidate) == "fsdp 32, remat selective, 2 rows per chip"
    assert [one.report.projections[0].mfu for one in tried] == sorted(
        (one.report.projections[0].mfu for one in tried), reverse=True
    )


def test_more_rows_than_do_not_fit_are_not_compiled(compiled):
    tried = run(rows=[1, 3, 4])
    assert [rows for *_, rows in compiled] == [1, 3]
    assert [one.candidate.rows for one in tried if not search._fits(one)] == [3, 4]
    text = search.table(tried)
    assert "does not fit (5 % free): fsdp 32, remat full, 3 rows per chip" in text
    assert "does not fit (fewer rows do not fit): fsdp 32, remat full, 4 rows per chip" in text


def test_where_the_compiler_finds_no_room_the_search_goes_on(compiled):
    tried = run(rows=[9], remat=["full", "selective"])
    assert len(compiled) == 2 and search.table(tried).startswith("nothing fits\n")
    assert "the compiler finds no room for it" in search.table(tried)


def test_other_errors_of_the_compiler_are_not_swallowed(monkeypatch):
    monkeypatch.setattr(search, "inspect", lambda *_: (_ for _ in ()).throw(RuntimeError("INTERNAL: a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run()


@pytest.mark.parametrize(
    ("topology", "sizes"),
    [("v5p:4x4x8", [4, 8, 16, 32]), ("v5e:16x16", [16, 256]), ("v5p:2x2x1", [4]), ("v6e:16x16*4", [16, 256])],
)
def test_parameters_are_split_over_sides_of_the_torus_but_never_over_three(topology, sizes):
    assert search.fsdp_sizes(topology) == sizes


def test_several_slices_hold_copies_of_the_parameters(compiled):
    (tried,) = search.search(wan5b.get_config(), "v5e:8x16*4", 3, fsdp=[8], remat=["full"], rows=[1])
    assert compiled == [(16, 8, "full", 4)]  # rows per chip of 128 chips: four slices of them
    assert tried.candidate.rows == 1


def test_a_share_that_does_not_divide_the_slice_is_an_error(compiled):
    with pytest.raises(UserError, match="--search_fsdp=24 does not divide the 128 devices of a slice"):
        run(fsdp=[24])
    assert compiled == []
