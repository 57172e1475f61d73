r"""Measures one part of the package and prints a table, or JSON with --json.

Muon on a TPU slice that only the compiler knows, beside optax's, from the compiled programs (pip install "jax[tpu]"):

    python -m wallwm_jax.benchmark muon --topology=v5p:4x8x8 --model=wan14b --json
"""

from __future__ import annotations

import json

from absl import app, flags

from wallwm_jax.console import run_command

_PARTS = ("muon",)


def _define_flags() -> None:
    flags.DEFINE_bool("json", False, "Print JSON.")
    flags.DEFINE_string("topology", "v5p:4x8x8", "muon: TPU generation and extents of the torus.")
    flags.DEFINE_string("model", "wan14b", "muon: name of a config in configs/, whose video tower is taken.")
    flags.DEFINE_list("rows", [], "muon: rows of the table to compile; none takes all.")


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in _PARTS:
        raise app.UsageError(f"say what to measure: python -m wallwm_jax.benchmark {{{','.join(_PARTS)}}}")
    from wallwm_jax.benchmarks import muon

    values = flags.FLAGS
    result = muon.measure(values.model, values.topology, values.rows)
    print(json.dumps(result, indent=1) if values.json else muon.table(result))


if __name__ == "__main__":
    _define_flags()
    run_command(main, positional=1)
