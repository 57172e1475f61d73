r"""Compiles the real train step for a TPU slice that need not exist, and says whether it fits and how fast it would be.

    python -m wallwm_jax.preflight --config=configs/wan5b.py:video --topology=v5p:4x4x8 --views=3 \
        --config.mesh_preset=v5p:4x4x8 --config.data.rows=128

--search tries meshes, remat policies and rows per chip instead, minutes each, and prints the best few:

    python -m wallwm_jax.preflight --config=configs/wan5b.py:video --topology=v5p:4x4x8 --views=3 \
        --search --search_remat=selective,products --search_rows=1,2,4

--program takes another program of the config: Muon's update alone, or the denoising programs of event mode or unified
mode, one request on as many chips as the mesh's context and tensor axes have:

    python -m wallwm_jax.preflight --config=configs/wan5b.py:joint --topology=v5p:4x4x8 --views=3 --program=event_mode

--peer=720p or 480p holds the figures against those of MaxDiffusion's public step, whose shapes the config then has to
have (docs/preflight.md has the command).

Needs no TPU, only the compiler (pip install "jax[tpu]"). Exit code 0: it fits with a tenth of the memory free; 3: it
does not; 2: wrong input. Times are projections, see `wallwm_jax/benchmarks/preflight.py`; the rest is compiled fact.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from typing import Any

from absl import flags

from wallwm_jax.config import define_config_flag
from wallwm_jax.console import UserError, phase, run_command

_DOES_NOT_FIT = 3


def _define_flags() -> None:
    define_config_flag()
    flags.DEFINE_string("topology", None, "TPU generation and extents of the torus, such as v5p:4x4x8; v6e:16x16*4.")
    flags.DEFINE_integer("views", 0, "Cameras, where config.data.views leaves them to the store.", 0)
    flags.DEFINE_enum("program", "train_step", ["train_step", "muon", "event_mode", "unified_mode"], "What to compile.")
    flags.DEFINE_integer("history", 1, "unified_mode: latents of four frames before the observation.", 0)
    flags.DEFINE_integer("fixed_steps", 32, "unified_mode: control steps of a chunk.", 1)
    flags.DEFINE_enum("peer", "", ["", "720p", "480p"], "Public step of the same shapes to compare with.")
    flags.DEFINE_bool("json", False, "Print JSON.")
    flags.DEFINE_bool("search", False, "Compile several ways to run and print the best few that fit.")
    flags.DEFINE_list("search_fsdp", [], "Chips that share the parameters; none takes products of the torus's sides.")
    flags.DEFINE_list("search_remat", ["full", "selective"], "Remat policies.")
    flags.DEFINE_list("search_rows", ["1", "2", "4"], "Rows per chip.")
    flags.mark_flags_as_required(["config", "topology"])


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    from wallwm_jax.benchmarks import decoding_cost, muon, preflight, preflight_peer

    values = flags.FLAGS
    for name in ("history", "fixed_steps"):
        if values[name].present and values.program != "unified_mode":
            raise UserError(f"--{name} is for --program=unified_mode, not {values.program}")
    if values.peer:
        if values.search or values.program != "train_step":
            raise UserError("--peer compares one train step; leave --search and --program out")
        preflight_peer.check_same_work(values.config, values.topology, values.views, values.peer)
    if values.search:
        if values.program != "train_step":
            raise UserError(f"--search tries ways to run the train step, not --program={values.program}")
        return _search()
    with phase(f"compile {values.program} for {values.topology}"):
        if values.program == "muon":
            result = muon.measure_config(values.config, values.topology)
            print(json.dumps(result, indent=1) if values.json else muon.table(result))
            return 0
        inspect: Any = {
            "train_step": preflight.inspect,
            "event_mode": decoding_cost.inspect_event_mode,
            "unified_mode": functools.partial(
                decoding_cost.inspect_unified_mode, history=values.history, fixed_steps=values.fixed_steps
            ),
        }[values.program]
        report = inspect(values.config, values.topology, values.views)
    if values.peer:
        report = preflight_peer.Compared(report, values.peer)
    print(json.dumps(report.to_json(), indent=1) if values.json else report.table())
    return 0 if report.fits else _DOES_NOT_FIT


def _search() -> int:
    from wallwm_jax.benchmarks import search

    values = flags.FLAGS
    tried = search.search(
        values.config,
        values.topology,
        values.views,
        fsdp=_numbers("search_fsdp", values.search_fsdp),
        remat=values.search_remat,
        rows=_numbers("search_rows", values.search_rows),
    )
    if values.json:
        listed = [{**asdict(one.candidate), "report": one.report and one.report.to_json()} for one in tried]
        print(json.dumps(listed, indent=1))
    else:
        print(search.table(tried))
    return 0 if tried[0].report is not None and tried[0].report.fits else _DOES_NOT_FIT


def _numbers(flag: str, given: list[str]) -> list[int]:
    if not all(text.isdigit() and int(text) for text in given):
        raise UserError(f"--{flag}={','.join(given)}: write positive whole numbers")
    return [int(text) for text in given]


if __name__ == "__main__":
    _define_flags()
    run_command(main)
