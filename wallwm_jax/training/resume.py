"""What may change when a run goes on: whatever neither the parameters nor the order of data depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wallwm_jax.console import UserError

if TYPE_CHECKING:
    from wallwm_jax.training.checkpoint import Checkpointer


def check_resumed(config: Mapping[str, Any], assets: Mapping[str, Any], checkpointer: Checkpointer) -> None:
    """Refuses to go on with another model, stage, seed or store; prints whatever else changed since the checkpoint.

    Args:
      config: the resolved config as plain JSON.
      assets: those that the run would save.
      checkpointer: of the run to go on with.

    Raises:
      UserError: the model, the stage, the seed or the event store is another.
    """
    saved, given = checkpointer.read_assets()["store"]["fingerprint"], assets["store"]["fingerprint"]
    if saved != given:
        raise UserError(
            f"{str(checkpointer.workdir)!r} was trained on event store {saved}, but {config['data']['store']!r} is "
            f"{given}; give the old store, or train into another workdir"
        )
    for knob, (before, now) in config_changes(checkpointer.read_config(), config).items():
        change = f"{knob} was {before} and is now {now}"
        if knob.startswith(("model.", "vlm.")) or knob in ("train.stage", "seed"):
            raise UserError(f"cannot resume: {change}; give the old value, or train into another workdir")
        print(f"    changed since the checkpoint: {change}")


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{"section.knob": (value before, value now)} of the knobs that differ; None stands for absent."""
    old, new = _leaves(before), _leaves(now)
    return {
        knob: (old.get(knob), new.get(knob)) for knob in sorted(set(old) | set(new)) if old.get(knob) != new.get(knob)
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.knob": value} of a nested dict."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves
