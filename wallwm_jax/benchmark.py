r"""Measures one part of the package and prints a table, or JSON with --json. Warm-up is apart, the machine is named.

The train step on the devices at hand, with random events; with --store=DIR, on the first batch of a store:

    python -m wallwm_jax.benchmark train_step --config=configs/wan1b3.py:video --views=1 --config.data.rows=4

The same beside diffusers' twin of the tower, with torch.compile (pip install 'wallwm_jax[parity]'; one view):

    python -m wallwm_jax.benchmark train_step --config=configs/wan1b3.py:video --views=1 --config.data.rows=4 \
        --config.model.view_attention=False --peer

The loader on an event store, in threads and with worker processes:

    python -m wallwm_jax.benchmark loader --config=configs/ocbench_quickstart.py --store=runs/quickstart/store

The same, and 20 of its episodes read as frames, as latents and by LeRobot with PyTorch's DataLoader, window by window
(pip install --no-deps lerobot==0.4.4 torchvision accelerate; pip install datasets, torchcodec where there is FFmpeg):

    python -m wallwm_jax.benchmark loader --config=configs/ocbench_quickstart.py --store=runs/quickstart/store --peer

Event mode, one event at a time, of a run; or of a config with random parameters, with --store=DIR or --views=N:

    python -m wallwm_jax.benchmark inference --workdir=runs/quickstart/train

The policy server as a robot feels it, through a client on loopback (pip install 'wallwm_jax[serve]'):

    python -m wallwm_jax.benchmark serving --workdir=runs/quickstart/train

Of its chunks alone, of a run on windows with history, conditioned by the latents of a run of stage staircase:

    python -m wallwm_jax.benchmark serving --workdir=runs/arms/chunk --mode=unified --latents=runs/arms/staircase

Staircase Decoding beside decoding as many tokens in turn:

    python -m wallwm_jax.benchmark staircase

Muon on a TPU slice that only the compiler knows, beside optax's, from the compiled programs (pip install "jax[tpu]"):

    python -m wallwm_jax.benchmark muon --topology=v5p:4x8x8 --model=wan14b --json

A long attention split over all chips of such a slice by all-to-all and in a ring (pip install tokamax):

    python -m wallwm_jax.benchmark context --topology=v5p:2x2x1 --config=configs/wan14b.py:video \
        --config.data.latents_per_row=21 "--config.model.latent_shape=(90,160)"

Boundaries found without labels against those of scripted experts, and of some MetaWorld tasks; lags and faults planted
into OCBench episodes, by how many are recovered and caught (pip install 'wallwm_jax[sim]'):

    python -m wallwm_jax.benchmark segment --episodes=20 --tasks=push,drawer-open,assembly --json
    python -m wallwm_jax.benchmark sync --json

What is drawn of ten million events: clusters, weights, rows and coverage, seconds and memory of each:

    python -m wallwm_jax.benchmark sampling --windows=10000000

All but muon, context, segment, sync and sampling take --steps=N, how many calls are timed. Where there is a config,
--config.section.knob=value changes it.
Progress goes to standard error, the figures alone to standard output.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys

from absl import flags

from wallwm_jax.config import define_config_flag
from wallwm_jax.console import UserError, run_command

# Part → the flags that it takes, which are the arguments of `measure` in its module. The loader's worker processes
# import this file again: JAX stays out of them because only `main` imports a module.
_PARTS = {
    "train_step": ("config", "steps", "store", "views", "peer"),
    "loader": ("config", "steps", "store", "peer", "episodes"),
    "inference": ("config", "steps", "store", "views", "workdir"),
    "serving": ("steps", "workdir", "mode", "latents"),
    "staircase": ("steps",),
    "muon": ("model", "topology", "rows"),
    "context": ("config", "topology", "rows"),
    "segment": ("episodes", "tasks"),
    "sync": (),
    "sampling": ("windows", "rows"),
}


def _define_flags() -> None:
    define_config_flag()
    flags.DEFINE_bool("json", False, "Print JSON.")
    flags.DEFINE_integer("steps", 20, "Steps, batches or calls that are timed.", 1)
    flags.DEFINE_string("store", "", "Event store, made by python -m wallwm_jax.build_events.")
    flags.DEFINE_integer("views", 0, "Cameras, where config.data.views leaves them to the store.", 0)
    flags.DEFINE_bool("peer", False, "Time the public twin, too. train_step: diffusers' tower; loader: LeRobot.")
    flags.DEFINE_string("workdir", "", "inference, serving: a run of python -m wallwm_jax.train.")
    flags.DEFINE_enum("mode", "", ["", "event", "unified"], "serving: the only decoding mode; none takes all.")
    flags.DEFINE_string("latents", "", "serving: run of stage staircase that tells the chunks what to do.")
    flags.DEFINE_string("topology", "v5p:4x8x8", "muon, context: TPU generation and extents of the torus.")
    flags.DEFINE_string("model", "wan14b", "muon: name of a config in configs/, whose video tower is taken.")
    flags.DEFINE_list("rows", [], "muon, context, sampling: rows of the table to measure; none takes all.")
    flags.DEFINE_integer("windows", 1_000_000, "sampling: events of the made-up index.", 100)
    flags.DEFINE_integer("episodes", 20, "segment: episodes per OCBench family; loader: of the peer.", 1)
    flags.DEFINE_list("tasks", [], "segment: MetaWorld tasks to report, too.")


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    if len(argv) != 2 or argv[1] not in _PARTS:
        raise UserError(f"say what to measure: python -m wallwm_jax.benchmark {{{','.join(_PARTS)}}} (see --help)")
    part, values = argv[1], flags.FLAGS
    for name in {name for names in _PARTS.values() for name in names} - set(_PARTS[part]):
        if values[name].present:
            taken = ", ".join(f"--{name}" for name in _PARTS[part]) or "none"
            raise UserError(f"--{name} is not for {part}, which takes {taken}")
    if "config" in _PARTS[part] and values.config is None and not values.workdir:
        raise UserError(f"{part} needs --config=FILE{' or --workdir=RUN' if part == 'inference' else ''}")
    module = importlib.import_module(f"wallwm_jax.benchmarks.{part}")
    with contextlib.redirect_stdout(sys.stderr):
        result = module.measure(**{name: getattr(values, name) for name in _PARTS[part]})
    print(json.dumps(result, indent=1) if values.json else module.table(result))


if __name__ == "__main__":
    _define_flags()
    run_command(main, positional=1)
