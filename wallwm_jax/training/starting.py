"""How a run starts: with parameters of earlier ones, or where it ended, if nothing it depends on has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.models.vlm import staircase
from wallwm_jax.training.checkpoint import load_start
from wallwm_jax.training.train_state import TrainState, take_over

if TYPE_CHECKING:
    from wallwm_jax.training.checkpoint import Checkpointer
    from wallwm_jax.training.train_step import TrainStep


def fresh_state(built: TrainStep, config: ConfigDict) -> TrainState:
    """The state at step 0: random, then what `train.init_from` and `train.text_from` have; says what came from there.

    Raises:
      UserError: nothing is there, or it lacks what the stage freezes.
    """
    state = built.init()
    if not config.train.init_from:
        return state
    origin = config.train.init_from
    params, what = load_start(origin)
    if config.train.text_from:
        text, step = load_start(config.train.text_from)
        params |= {
            name: text[name] for name in ("text", "video", "action") if name in text and name in built.stage.freezes
        }
        origin, what = f"{origin} and {config.train.text_from}", f"{what} and {step}"
    if "staircase" in built.stage.trains and "staircase" not in params and "vlm" in params:
        params["staircase"] = staircase.clone(params["vlm"]["language"])  # a branch starts as its backbone
    state, result = take_over(state, params, origin)
    print(f"    parameters from {origin}, {what}:\n{result.table()}")
    return state


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
