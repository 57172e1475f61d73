r"""Compiles the real train step for a TPU slice that need not exist, and says whether it fits and how fast it would be.

    python -m wallwm_jax.preflight --config=configs/wan5b.py:video --topology=v5p:4x4x8 --views=3 \
        --config.mesh.data=4 --config.mesh.fsdp=32 --config.data.rows=128

Needs no TPU, only the compiler (pip install "jax[tpu]"). Exit code 0: it fits with a tenth of the memory free; 3: it
does not; 2: wrong input. Times are projections, see `wallwm_jax/benchmarks/preflight.py`; the rest is compiled fact.
"""

from __future__ import annotations

import json

from absl import flags

from wallwm_jax.config import define_config_flag
from wallwm_jax.console import phase, run_command

_DOES_NOT_FIT = 3


def _define_flags() -> None:
    define_config_flag()
    flags.DEFINE_string("topology", None, "TPU generation and extents of the torus, such as v5p:4x4x8.")
    flags.DEFINE_integer("views", 0, "Cameras, where config.data.views leaves them to the store.", 0)
    flags.DEFINE_bool("json", False, "Print JSON.")
    flags.mark_flags_as_required(["config", "topology"])


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    from wallwm_jax.benchmarks import preflight

    values = flags.FLAGS
    with phase(f"compile for {values.topology}"):
        report = preflight.inspect(values.config, values.topology, values.views)
    print(json.dumps(report.to_json(), indent=1) if values.json else report.table())
    return 0 if report.fits else _DOES_NOT_FIT


if __name__ == "__main__":
    _define_flags()
    run_command(main)
