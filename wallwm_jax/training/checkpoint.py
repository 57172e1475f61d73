"""Checkpoints: what a run leaves on disk, how it resumes, how others read its parameters. Only this file knows Orbax.

    workdir/checkpoints/<step>/state    step, trained parameters, optimizer state: all that resuming needs
                              /ema      moving average of the trained parameters: what inference loads
                              /assets   JSON: store description (codec, clock, views ...), statistics
                              /config   JSON: the resolved config
    workdir/frozen                      frozen parameters, written once, referred to by checksum

Steps are written to a temporary directory and renamed, so a killed run leaves only whole checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from wallwm_jax.console import UserError
from wallwm_jax.models.convert import stream
from wallwm_jax.models.view_attention import from_self_attention
from wallwm_jax.parallel.distributed import barrier, this_host
from wallwm_jax.training.telemetry import METRICS_FILE
from wallwm_jax.training.train_state import TrainState, flatten

PyTree = Any

CHECKPOINTS = "checkpoints"
FROZEN = "frozen"
CONFIG_FILE = "config.json"
COMPILE_CACHE = "compile_cache"
_REPORTS = ("tensorboard", "goodput.json", "run_card.json", "profile", "profiles", "hlo")
_OWN = (CHECKPOINTS, FROZEN, METRICS_FILE, CONFIG_FILE, COMPILE_CACHE, *_REPORTS)
"""What a run writes into its workdir, and all that overwriting may delete."""


@dataclass(frozen=True)
class Loaded:
    """What inference needs of a run.

    Attributes:
      params: the whole parameter tree of the stage: average of the trained groups, and the frozen ones; float32.
      assets: "store" (description of the event store) and "stats" (its statistics), plain JSON.
      config: the resolved config as a nested dict.
      step: number of updates behind the parameters.
    """

    params: dict[str, Any]
    assets: dict[str, Any]
    config: dict[str, Any]
    step: int


def prepare_workdir(path: str | Path, *, resume: bool, overwrite: bool) -> Path:
    """The run's directory, made if absent; in it either nothing yet, or (with `resume`) a run to go on with.

    Raises:
      UserError: no path; both flags; the directory holds something and neither flag is given; or `overwrite` of a
        directory that no training run made.
    """
    if not str(path):
        raise UserError("no workdir given; pass --workdir=DIR, where checkpoints and metrics go")
    if resume and overwrite:
        raise UserError(
            "--resume and --overwrite exclude each other: the first goes on with a run, the second deletes it"
        )
    workdir = Path(path).expanduser().absolute()
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir {str(workdir)!r} is a file; pass a directory")
    entries = sorted({entry.name for entry in workdir.iterdir()} - {COMPILE_CACHE}) if workdir.is_dir() else []
    if entries and not resume and not overwrite:
        raise UserError(
            f"workdir {str(workdir)!r} exists; add --resume to go on with its run, or --overwrite to delete it"
        )
    barrier("workdir looked at")  # before any process writes into it
    if entries and overwrite:
        if not set(entries) & {CHECKPOINTS, METRICS_FILE, CONFIG_FILE}:
            raise UserError(
                f"workdir {str(workdir)!r} holds no training run but {entries[0]!r}; refusing to overwrite it"
            )
        if this_host().is_first:
            for name in _OWN:
                target = workdir / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        barrier("workdir overwritten")
    workdir.mkdir(parents=True, exist_ok=True)
    return workdir


class Checkpointer:
    """Saves and restores the state of one run, in the background; call `close` at the end."""

    def __init__(self, workdir: Path, *, keep: int, save_every: int):
        """Opens `workdir/checkpoints`.

        Args:
          workdir: from `prepare_workdir`.
          keep: newest checkpoints kept.
          save_every: steps between checkpoints.
        """
        self.workdir = workdir
        self._frozen_checksum = ""
        self._manager = _open(
            workdir,
            ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.LatestN(keep),
                save_decision_policy=save_decision_policy.AnySavePolicy(
                    [
                        save_decision_policy.FixedIntervalPolicy(save_every),
                        save_decision_policy.PreemptionCheckpointingPolicy(),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Updates made in the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def wants(self, step: int) -> bool:
        """Whether `save` without `force` would save at `step`."""
        return self._manager.should_save(step)

    def preempted(self, step: int) -> bool:
        """Whether the cluster has announced that it takes these machines away."""
        return this_host().count > 1 and self._manager.reached_preemption(step)

    def keep_frozen(self, frozen: PyTree) -> None:
        """Writes the frozen parameters once; later checkpoints refer to them by checksum."""
        if not frozen:
            return
        self._frozen_checksum = checksum(frozen)
        if not (self.workdir / FROZEN).exists():
            with ocp.StandardCheckpointer() as writer:
                writer.save(self.workdir / FROZEN, frozen)

    def save(
        self, step: int, state: TrainState, assets: Mapping[str, Any], config: Mapping[str, Any], *, force: bool = False
    ) -> bool:
        """Starts saving; returns whether it did. A step that is already saved is not saved again.

        Args:
          step: `state.step` on the host.
          state: copied before this returns, so it may be donated right after.
          assets: plain JSON, "store" and "stats".
          config: the resolved config as plain JSON.
          force: save even if `save_every` does not ask for it.
        """
        if step in self._manager.all_steps():
            return False
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_state_item(state)),
                ema=ocp.args.StandardSave(state.ema),
                assets=ocp.args.JsonSave({**assets, "frozen_checksum": self._frozen_checksum}),
                config=ocp.args.JsonSave(dict(config)),
            ),
            force=force,
        )

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest checkpoint's state, placed as `abstract` says.

        Raises:
          UserError: there is no checkpoint, its arrays differ from those of this config, or the frozen parameters are
            not those of the run.
        """
        step = self.latest_step
        if step is None:
            raise UserError(f"{str(self.workdir)!r} holds no checkpoint to resume from")
        _require_same_arrays(self._manager, step, abstract)
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_state_item(abstract)),
                ema=ocp.args.StandardRestore(abstract.ema),
                assets=ocp.args.JsonRestore(),
            ),
        )
        frozen: dict[str, Any] = {}
        if abstract.frozen:
            frozen = _read_frozen(self.workdir, items.assets["frozen_checksum"], abstract.frozen)
            self._frozen_checksum = items.assets["frozen_checksum"]
        return TrainState(**items.state, ema=items.ema, frozen=frozen)

    def read_config(self) -> dict[str, Any]:
        """The config saved with the newest checkpoint."""
        return self._manager.restore(self.latest_step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config

    def read_assets(self) -> dict[str, Any]:
        """The assets saved with the newest checkpoint."""
        return self._manager.restore(self.latest_step, args=ocp.args.Composite(assets=ocp.args.JsonRestore())).assets

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_params(path: str | Path, step: int | None = None) -> Loaded:
    """Reads what inference or a later stage needs of a run: average, frozen parameters, assets, config; no optimizer.

    Args:
      path: a workdir, or one of its checkpoints (`workdir/checkpoints/500`).
      step: which checkpoint of a workdir; None is the newest.

    Raises:
      UserError: no such directory, no checkpoint, no such step, or damaged frozen parameters.
    """
    workdir = Path(path).expanduser().absolute()
    if workdir.parent.name == CHECKPOINTS and workdir.name.isdigit():
        workdir, step = workdir.parent.parent, int(workdir.name)
    if not (workdir / CHECKPOINTS).is_dir():
        raise UserError(f"{str(path)!r} is not the workdir of a training run: it has no {CHECKPOINTS}/")
    with _open(workdir, ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise UserError(f"{str(workdir)!r} holds no finished checkpoint yet")
        if step is not None and step not in steps:
            raise UserError(f"{str(workdir)!r} has no checkpoint at step {step}; it has {', '.join(map(str, steps))}")
        step = steps[-1] if step is None else step
        items = manager.restore(
            step,
            args=ocp.args.Composite(
                ema=ocp.args.StandardRestore(_on_this_host(manager, step)),
                assets=ocp.args.JsonRestore(),
                config=ocp.args.JsonRestore(),
            ),
        )
    params = dict(items.ema)
    if items.assets["frozen_checksum"]:
        frozen = _read_frozen(workdir, items.assets["frozen_checksum"])
        params |= jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen)
    return Loaded(params=params, assets=items.assets, config=items.config, step=step)


def load_start(path: str | Path) -> tuple[dict[str, Any], str]:
    """The parameters that a new run starts from, and what they are: a run's average, or converted Wan weights.

    Converted weights are single-view: their cross-view branch is copied from the within-view attention.

    Raises:
      UserError: neither is there (see `load_params`).
    """
    if not (Path(path).expanduser() / stream.CONVERSION).is_file():
        loaded = load_params(path)
        return loaded.params, f"step {loaded.step}"
    params = stream.load(path, "wan").params
    video = dict(params["video"])
    video["blocks"] = {**video["blocks"], "view_attention": from_self_attention(video["blocks"])}
    return {**params, "video": video}, "converted weights"


def checksum(tree: PyTree) -> str:
    """Sixteen hex digits that change with any bit, path, shape or dtype of the arrays; the same for every sharding."""
    sums = jax.device_get(jax.jit(lambda leaves: jax.tree.map(_bit_sum, leaves))(tree))
    shapes = {path: (leaf.shape, str(leaf.dtype)) for path, leaf in flatten(tree).items()}
    lines = [f"{path} {shapes[path]} {int(value)}" for path, value in sorted(flatten(sums).items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _bit_sum(leaf: jax.Array) -> jax.Array:
    """Sum modulo 2^32 of the array's bits times odd weights that depend on the position."""
    width = jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).reshape(-1)
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)


def _open(workdir: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "ema": ocp.StandardCheckpointHandler(),
        "assets": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    with _quiet():
        return ocp.CheckpointManager(workdir / CHECKPOINTS, options=options, item_handlers=handlers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's remarks about its own options; errors still show."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _state_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}


def _require_same_arrays(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> None:
    """Raises `UserError` naming the first trained parameter whose shape is not the saved one's."""
    saved = {path: tuple(leaf.shape) for path, leaf in flatten(_saved_ema(manager, step)).items()}
    ours = {path: tuple(leaf.shape) for path, leaf in flatten(abstract.ema).items()}
    for path in sorted(set(saved) | set(ours)):
        if saved.get(path) != ours.get(path):
            raise UserError(
                f"parameter {path} is {ours.get(path, 'absent')} in this config, {saved.get(path, 'absent')} in the "
                "checkpoint; resume with the config of the run"
            )


def _saved_ema(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Shapes and dtypes of the saved average, as a nested dict."""
    return dict(manager.item_metadata(step)["ema"])


def _on_this_host(manager: ocp.CheckpointManager, step: int) -> PyTree:
    """The saved average as shapes on one device of this process."""
    return _abstract_local(_saved_ema(manager, step))


def _abstract_local(metadata: PyTree) -> PyTree:
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), metadata)


def _read_frozen(workdir: Path, expected: str, abstract: PyTree | None = None) -> dict[str, Any]:
    """Frozen parameters of a run, placed as `abstract` says (None: on this host); `UserError` if not those expected."""
    directory = workdir / FROZEN
    if not directory.is_dir():
        raise UserError(f"frozen parameters {str(directory)!r} are missing; copy them along with the checkpoints")
    with ocp.StandardCheckpointer() as reader:
        if abstract is None:
            abstract = _abstract_local(dict(reader.metadata(directory).item_metadata.tree))
        frozen = reader.restore(directory, abstract)
    if checksum(frozen) != expected:
        raise UserError(
            f"frozen parameters {str(directory)!r} do not match the checkpoint; they were replaced or damaged"
        )
    return dict(frozen)
