"""Checkpoints: what a run leaves on disk, how it resumes, how others read its parameters. Only this file knows Orbax.

    workdir/checkpoints/<step>/state          step, trained parameters, optimizer state: all that resuming needs
                              /ema            moving average of the trained parameters: what inference loads
                              /assets         JSON: store description (codec, clock, views ...), statistics
                              /config         JSON: the resolved config
                              /manifest.json  sizes of all files, checksum of the arrays, when it was written
    workdir/frozen                            frozen parameters, written once, referred to by checksum

Steps are written to a temporary directory and renamed, or in a bucket closed with a last object, so a killed run leaves
only whole checkpoints. What happens to one afterwards is found out by its manifest: sizes before it is read, the
checksum of the arrays, which does not depend on the mesh, after it. Resuming takes the newest whole one and renames
what is newer to `<step>.damaged`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from wallwm_jax.console import UserError
from wallwm_jax.models.convert import stream
from wallwm_jax.models.view_attention import from_self_attention
from wallwm_jax.parallel.distributed import barrier, first_says, this_host
from wallwm_jax.paths import COMPILE_CACHE, check_writable, delete_tree, disk_errors, file_sizes, is_remote, open_path
from wallwm_jax.training.integrity import (
    UNFINISHED,
    Checksum,
    changed_bits,
    checksum,
    damage,
    delete_unfinished,
    is_finished,
    read_manifest,
    seal,
)
from wallwm_jax.training.telemetry import HELDOUT_FILE, METRICS_FILE
from wallwm_jax.training.train_state import TrainState, flatten

PyTree = Any

CHECKPOINTS = "checkpoints"
FROZEN = "frozen"
CONFIG_FILE = "config.json"
_REPORTS = ("tensorboard", "goodput.json", "run_card.json", "profile", "profiles", "hlo")
_OWN = (CHECKPOINTS, FROZEN, METRICS_FILE, HELDOUT_FILE, CONFIG_FILE, COMPILE_CACHE, *_REPORTS)
"""What a run writes into its workdir, and all that overwriting may delete."""

_ITEMS = ("state", "ema", "assets", "config")
_FOR_INFERENCE = ("ema", "assets", "config")
_DAMAGED = ".damaged"


@dataclass(frozen=True)
class Described:
    """What a checkpoint on disk is.

    Attributes:
      step: number of updates behind it.
      written: when, in UTC; "" where it does not say.
      damage: what is wrong with it; "" if it is whole.
      item_bytes: size on disk of each item.
      arrays: {"group": {dtype: number of elements}} of "params/<group>", "ema" and "opt_state".
      assets: as saved.
      config: as saved.
    """

    step: int
    written: str
    damage: str
    item_bytes: dict[str, int]
    arrays: dict[str, dict[str, int]]
    assets: dict[str, Any]
    config: dict[str, Any]


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


def prepare_workdir(path: str | Path, *, resume: bool, overwrite: bool) -> epath.Path:
    """The run's directory, made if absent; in it either nothing yet, or (with `resume`) a run to go on with.

    Raises:
      UserError: no path; both flags; the directory holds something and neither flag is given; `overwrite` of a
        directory that no training run made; or an object store that cannot be used.
    """
    if not str(path):
        raise UserError("no workdir given; pass --workdir=DIR, where checkpoints and metrics go")
    if resume and overwrite:
        raise UserError(
            "--resume and --overwrite exclude each other: the first goes on with a run, the second deletes it"
        )
    workdir = open_path(path)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir {str(workdir)!r} is a file; pass a directory")
    entries = sorted({entry.name for entry in workdir.iterdir()} - {COMPILE_CACHE}) if workdir.is_dir() else []
    if entries and not resume and not overwrite:
        raise UserError(
            f"workdir {str(workdir)!r} exists; add --resume to go on with its run, or --overwrite to delete it"
        )
    barrier("workdir looked at")  # before any process writes into it
    if this_host().is_first:
        check_writable(workdir)
    if entries and overwrite:
        if not set(entries) & {CHECKPOINTS, METRICS_FILE, CONFIG_FILE}:
            raise UserError(
                f"workdir {str(workdir)!r} holds no training run but {entries[0]!r}; refusing to overwrite it"
            )
        if this_host().is_first:
            for name in _OWN:
                target = workdir / name
                target.rmtree() if target.is_dir() else target.unlink(missing_ok=True)
        barrier("workdir overwritten")
    workdir.mkdir(parents=True, exist_ok=True)
    return workdir


class Checkpointer:
    """Saves and restores the state of one run, in the background; call `close` at the end."""

    def __init__(
        self,
        workdir: epath.Path,
        *,
        keep: int,
        save_every: int,
        keep_every: int = 0,
        save_minutes: float = 0.0,
        look_every: int = 1,
        max_failed: int = 0,
    ):
        """Opens `workdir/checkpoints`.

        Args:
          workdir: from `prepare_workdir`.
          keep: newest checkpoints kept.
          save_every: steps between checkpoints.
          keep_every: checkpoints at multiples of this many steps are kept for good; 0 none.
          save_minutes: minutes after a checkpoint when the next is due, whatever the step; 0 never.
          look_every: steps between looks at that clock, which all processes read from the first.
          max_failed: saves in a row that may fail.

        Raises:
          UserError: there are checkpoints, and none of them is whole.
        """
        self.workdir = workdir = open_path(workdir)
        self._frozen_checksum = ""
        self._minutes, self._look_every, self._last_save = save_minutes, look_every, time.monotonic()
        self._saving: int | None = None
        self._checksum: Checksum | None = None
        self._failed, self._max_failed = 0, max_failed
        kept: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(keep)]
        if keep_every:
            kept.append(preservation_policy.EveryNSteps(keep_every))
        delete_unfinished(workdir / CHECKPOINTS)  # what a killed run was writing
        self._manager = _open(
            workdir,
            ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
                save_decision_policy=save_decision_policy.AnySavePolicy(
                    [
                        save_decision_policy.FixedIntervalPolicy(save_every),
                        save_decision_policy.PreemptionCheckpointingPolicy(),
                    ]
                ),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )
        self._damaged: dict[int, str] = {}
        self._start = self._newest_whole()

    @property
    def start_step(self) -> int:
        """Updates behind the newest whole checkpoint that was found, from which the run goes on; 0 if there is none."""
        return self._start

    def wants(self, step: int) -> bool:
        """Whether a checkpoint is due at `step`.

        Raises:
          UserError: too many saves in a row have failed.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._settle()
        return self._manager.should_save(step) or self._is_time(step)

    def preempted(self, step: int) -> bool:
        """Whether the cluster has announced that it takes these machines away."""
        return this_host().count > 1 and self._manager.reached_preemption(step)

    def keep_frozen(self, frozen: PyTree) -> None:
        """Writes the frozen parameters once; later checkpoints refer to them by checksum.

        Raises:
          UserError: they cannot be written.
        """
        if not frozen:
            return
        self._frozen_checksum = checksum(frozen)
        if is_finished(self.workdir / FROZEN):
            return
        try:
            with ocp.StandardCheckpointer() as writer:
                writer.save(self.workdir / FROZEN, frozen, force=True)  # over what a killed run left in a bucket
        except disk_errors() as error:
            delete_unfinished(self.workdir)
            raise UserError(f"{str(self.workdir / FROZEN)!r} could not be written: {_line(error)}") from error

    def save(self, step: int, state: TrainState, assets: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Starts saving; returns whether it did. A step that is already saved is not saved again.

        A save that fails, here or in the background, leaves no trace but a warning, and the older checkpoints stay.

        Args:
          step: `state.step` on the host.
          state: copied before this returns, so it may be donated right after.
          assets: plain JSON, "store" and "stats".
          config: the resolved config as plain JSON.

        Raises:
          UserError: too many saves in a row have failed.
        """
        self._settle()
        if step in self._manager.all_steps():
            return False
        items = {"state": _state_item(state), "ema": state.averaged}
        self._checksum = Checksum(items)
        self._saving, self._last_save = step, time.monotonic()
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                    assets=ocp.args.JsonSave({**assets, "frozen_checksum": self._frozen_checksum}),
                    config=ocp.args.JsonSave(dict(config)),
                ),
                force=True,
            )
        except disk_errors() as error:
            self._report_failure(error)
            return False
        return True

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
          UserError: it could not be written.
        """
        self._settle()
        if self._failed:
            raise UserError(
                f"the last step could not be saved in {str(self.workdir)!r}; its newest checkpoint is that of step "
                f"{self._manager.latest_step()}. Make room, then --resume trains the steps since then again"
            )

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest whole checkpoint's state, placed as `abstract` says; `start_step` is its step.

        Newer checkpoints that turn out to be damaged are renamed once an older one has been read.

        Raises:
          UserError: there is no checkpoint, none can be read, its arrays differ from those of this config, or the
            frozen parameters are not those of the run.
        """
        reason = "none was found"
        while self._start and reason:
            items, reason = self._read(self._start, abstract)
            if reason:
                self._damaged[self._start] = reason
                self._start = self._newest_whole(before=self._start)
        if reason:
            raise UserError(f"{str(self.workdir)!r} holds no checkpoint to resume from")
        self._set_aside_damaged()
        frozen: dict[str, Any] = {}
        if abstract.frozen:
            frozen = _read_frozen(self.workdir, items.assets["frozen_checksum"], abstract.frozen)
            self._frozen_checksum = items.assets["frozen_checksum"]
        return TrainState(**items.state, ema=items.ema if abstract.ema else {}, frozen=frozen)

    def read_config(self) -> dict[str, Any]:
        """The config saved with the newest whole checkpoint."""
        return self._manager.restore(self._start, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config

    def read_assets(self) -> dict[str, Any]:
        """The assets saved with the newest whole checkpoint."""
        return self._manager.restore(self._start, args=ocp.args.Composite(assets=ocp.args.JsonRestore())).assets

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._settle()
        self._manager.close()

    def _is_time(self, step: int) -> bool:
        if not self._minutes or step % self._look_every:
            return False
        return bool(first_says(time.monotonic() - self._last_save > 60 * self._minutes))

    def _seal(self) -> None:
        """Writes the manifest; Orbax calls this in the background, before the checkpoint gets its name."""
        assert self._checksum is not None and self._saving is not None
        digits = self._checksum.digits()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        seal(self.workdir / CHECKPOINTS, self._saving, _ITEMS, checksum=digits, written=now)

    def _settle(self) -> None:
        """Waits for the save in the background, and counts it if it failed."""
        try:
            self._manager.wait_until_finished()
        except disk_errors() as error:
            self._report_failure(error)
        else:
            self._failed = 0 if self._saving is not None else self._failed
            self._saving = None
            delete_unfinished(self.workdir / CHECKPOINTS)  # also what threads of a failed save wrote after it

    def _report_failure(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        self._failed += 1
        delete_unfinished(self.workdir / CHECKPOINTS)
        with contextlib.suppress(*disk_errors()):  # Orbax has forgotten the failed step by itself
            self._manager.reload()
        what = (
            f"checkpoint of step {step} was not written: {_line(error)}; the newest one is of step "
            f"{self._manager.latest_step()} [{self._failed} of at most {self._max_failed} failures in a row]"
        )
        if self._failed > self._max_failed:
            raise UserError(f"{what}. Make room in {str(self.workdir)!r}, then --resume") from error
        print(f"warning: {what}", file=sys.stderr, flush=True)

    def _newest_whole(self, before: float = math.inf) -> int:
        """The newest step below `before` whose files are all there, as the first process sees them."""
        steps = [step for step in sorted(self._manager.all_steps(), reverse=True) if step < before]
        newest = 0
        if this_host().is_first:
            for step in steps:
                reason = damage(self.workdir / CHECKPOINTS / str(step))
                if not reason:
                    newest = step
                    break
                self._damaged[step] = reason
        newest = int(first_says(newest))
        if not newest and self._manager.all_steps():
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in sorted(self._damaged.items()))
            raise UserError(f"no checkpoint of {str(self.workdir)!r} can be read ({reasons}); nothing was changed")
        return newest

    def _read(self, step: int, abstract: TrainState) -> tuple[Any, str]:
        """The items of a checkpoint, or what is wrong with it."""
        try:
            _require_same_arrays(self._manager, step, abstract)
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(_state_item(abstract)),
                    ema=ocp.args.StandardRestore(abstract.averaged),
                    assets=ocp.args.JsonRestore(),
                ),
            )
        except disk_errors() as error:
            host = this_host()
            # The others have read their parts and wait for this one; a bucket may only be out of reach.
            if host.count > 1 or is_remote(self.workdir):
                raise UserError(
                    f"process {host.index} of {host.count} cannot read the checkpoint of step {step}: {_line(error)}; "
                    f"if it is damaged, move {str(self.workdir / CHECKPOINTS / str(step))!r} away and --resume"
                ) from error
            return None, _line(error)
        return items, changed_bits(self.workdir / CHECKPOINTS / str(step), {"state": items.state, "ema": items.ema})

    def _set_aside_damaged(self) -> None:
        if this_host().is_first:
            for step, reason in sorted(self._damaged.items()):
                source = self.workdir / CHECKPOINTS / str(step)
                target = source.with_name(f"{step}{_DAMAGED}")
                delete_tree(target)
                source.rename(target)
                print(
                    f"warning: checkpoint of step {step} is damaged ({reason}); it is now {str(target)!r}, and the run "
                    f"goes on from step {self._start}",
                    file=sys.stderr,
                    flush=True,
                )
        barrier("damaged checkpoints set aside")
        self._damaged = {}
        self._manager.reload()


def load_params(path: str | Path, step: int | None = None) -> Loaded:
    """Reads what inference or a later stage needs of a run: average, frozen parameters, assets, config; no optimizer.

    Args:
      path: a workdir, or one of its checkpoints (`workdir/checkpoints/500`).
      step: which checkpoint of a workdir; None is the newest.

    Raises:
      UserError: no such directory, no checkpoint, no such step, or damaged frozen parameters.
    """
    workdir = open_path(path)
    if workdir.parent.name == CHECKPOINTS and workdir.name.isdigit():
        workdir, step = workdir.parent.parent, int(workdir.name)
    if not (workdir / CHECKPOINTS).is_dir():
        raise UserError(f"{str(workdir)!r} is not the workdir of a training run: it has no {CHECKPOINTS}/")
    with _open(workdir, ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise UserError(f"{str(workdir)!r} holds no finished checkpoint yet")
        if step is not None and step not in steps:
            raise UserError(f"{str(workdir)!r} has no checkpoint at step {step}; it has {', '.join(map(str, steps))}")
        wanted = steps[::-1] if step is None else [step]
        reasons = {number: damage(workdir / CHECKPOINTS / str(number), _FOR_INFERENCE) for number in wanted}
        whole = [number for number in wanted if not reasons[number]]
        if not whole:
            raise UserError(f"checkpoint {wanted[0]} of {str(workdir)!r} is damaged: {reasons[wanted[0]]}")
        step = whole[0]
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


def describe_checkpoints(workdir: str | Path | epath.Path, *, verify: bool = False) -> list[Described]:
    """All checkpoints of a run, oldest first; changes nothing.

    Args:
      workdir: of the run.
      verify: also read every array and compare the checksum; takes the memory of one checkpoint on this host.

    Raises:
      UserError: no checkpoints directory.
    """
    workdir = open_path(workdir)
    if not (workdir / CHECKPOINTS).is_dir():
        raise UserError(f"{str(workdir)!r} is not the workdir of a training run: it has no {CHECKPOINTS}/")
    with _open(workdir, ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)) as manager:
        return [_describe(manager, workdir / CHECKPOINTS / str(step), verify) for step in sorted(manager.all_steps())]


def _describe(manager: ocp.CheckpointManager, directory: epath.Path, verify: bool) -> Described:
    step, reason = int(directory.name), damage(directory)
    arrays: dict[str, dict[str, int]] = {}
    texts: dict[str, Any] = {"assets": {}, "config": {}}
    try:
        shapes = dict(manager.item_metadata(step).items())
        state = dict(shapes["state"])
        groups = {f"params/{name}": tree for name, tree in state["trainable"].items()}
        for name, tree in {**groups, "ema": shapes["ema"], "opt_state": state["opt_state"]}.items():
            arrays[name] = {}
            for leaf in jax.tree.leaves(tree):
                arrays[name][str(leaf.dtype)] = arrays[name].get(str(leaf.dtype), 0) + math.prod(leaf.shape)
        for name in texts:
            texts[name] = manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore()}))[name]
        if verify and not reason:
            wanted = {name: ocp.args.StandardRestore(_abstract_local(shapes[name])) for name in ("state", "ema")}
            reason = changed_bits(directory, dict(manager.restore(step, args=ocp.args.Composite(**wanted)).items()))
    except disk_errors(TypeError, AttributeError) as error:  # metadata that is missing is None
        reason = reason or _line(error)
    item_bytes = dict.fromkeys(_ITEMS, 0)
    for name, size in file_sizes(directory).items():
        item = name.split("/")[0]
        item_bytes[item] = item_bytes.get(item, 0) + size
    return Described(
        step=step,
        written=read_manifest(directory).get("written", ""),
        damage=reason,
        item_bytes={name: size for name, size in item_bytes.items() if name in _ITEMS},
        arrays=arrays,
        **texts,
    )


def load_start(path: str | Path) -> tuple[dict[str, Any], str]:
    """The parameters that a new run starts from, and what they are: a run's average, or converted weights.

    Those of Qwen3.5 are the group "vlm". Those of Wan are single-view: their cross-view branch is copied from the
    within-view attention.

    Raises:
      UserError: neither is there (see `load_params`).
    """
    conversion = open_path(path) / stream.CONVERSION
    if not conversion.is_file():
        loaded = load_params(path)
        return loaded.params, f"step {loaded.step}"
    if json.loads(conversion.read_text())["kind"] == "qwen3_5":
        params = stream.load(path, "qwen3_5").params
        return {"vlm": {part: params[part] for part in ("language", "vision")}}, "converted weights"
    params = stream.load(path, "wan").params
    video = dict(params["video"])
    video["blocks"] = {**video["blocks"], "view_attention": from_self_attention(video["blocks"])}
    return {**params, "video": video}, "converted weights"


def _open(workdir: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "ema": ocp.StandardCheckpointHandler(),
        "assets": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_of_orbax)
    return ocp.CheckpointManager(workdir / CHECKPOINTS, options=options, item_handlers=handlers)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs remarks on its own options, and failures with the stacks of its threads; those we report in a line."""
    return "orbax" not in record.pathname and UNFINISHED not in record.getMessage()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 240 else f"{text[:80]} ... {text[-140:]}"


def _state_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}


def _require_same_arrays(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> None:
    """Raises `UserError` naming the first trained parameter whose shape is not the saved one's."""
    saved = {path: tuple(leaf.shape) for path, leaf in flatten(_saved_ema(manager, step)).items()}
    ours = {path: tuple(leaf.shape) for path, leaf in flatten(abstract.averaged).items()}
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


def _read_frozen(workdir: epath.Path, expected: str, abstract: PyTree | None = None) -> dict[str, Any]:
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
