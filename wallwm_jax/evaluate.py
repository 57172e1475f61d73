r"""Evaluates a trained model: in the simulator, against held-out recordings, and beside baselines.

Eight episodes in the environments that the store was recorded in, about three minutes on two cores:

    python -m wallwm_jax.evaluate --workdir=runs/quickstart --store=runs/store --out=runs/evaluation

More episodes of one family, with narrower intervals, the model deciding itself how long each event takes:

    python -m wallwm_jax.evaluate --workdir=runs/cpu --store=runs/store --out=runs/evaluation_chamber \
        --families=chamber --episodes=64 --max_seconds=1800 --own_duration

The vision-language model of a run names the next event, from pictures and what it named before:

    python -m wallwm_jax.evaluate --workdir=runs/cpu --store=runs/store --out=runs/evaluation_vlm --planner=runs/vlm

Unified mode, of a run on windows with history (configs/ocbench_chunk.py): chunks of fixed length, told the task's
instruction, the scripted planner's next event (--text=event), or by a VLM without words, the latents of a run of stage
staircase or the features of one of stage vlm_text:

    python -m wallwm_jax.evaluate --workdir=runs/chunk --store=runs/store --out=runs/evaluation_unified --mode=unified
    python -m wallwm_jax.evaluate --workdir=runs/chunk --store=runs/store --out=runs/evaluation_latents --mode=unified \
        --text=runs/staircase

`python -m wallwm_jax.evaluation.arms` compares several such ways to act on the same trials.

Closed loop: in event mode a scripted planner names the next event from the simulator's state (the oracle; --planner for
another), and the policy acts for the whole event; in unified mode it acts for a chunk, or its first --execute steps.
Subtasks are judged by the scripted planner's goals in any case. Seeds are new. Three policies run on the same trials:
the trained model, the same network untrained, and the expert's commands replayed through the model's action
representation, which shows what the adapter allows.
Open loop: on the store's heldout split, the error of the predicted actions beside two baselines, predicted durations,
and the predicted final frame; in unified mode on its windows with history, told their instruction.

--out then holds evaluation.json (rates with Wilson 95 % intervals, errors, every trial), rollout.gif and strips;
`python -m wallwm_jax.evaluation.report` makes a page of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from wallwm_jax.config import settings
from wallwm_jax.console import UserError, phase, run_command, write_text
from wallwm_jax.paths import open_run, require_local, use_compile_cache

# Simulator processes import this module again, so what is heavy (JAX) is imported where it is used.
if TYPE_CHECKING:
    from wallwm_jax.data.event_store import EventStore
    from wallwm_jax.evaluation.actors import Actor
    from wallwm_jax.evaluation.closed_loop import Film
    from wallwm_jax.evaluation.environments import Trial
    from wallwm_jax.evaluation.open_loop import OpenLoopResult
    from wallwm_jax.inference.policy import Policy

RESULT_FILE = "evaluation.json"

_OPEN_LOOP_SHARE, _TRAINED_SHARE = 0.4, 0.8  # of max_seconds, by which these phases end


@dataclass(frozen=True)
class Options:
    """What to evaluate; the flags of the command.

    Attributes:
      episodes: closed-loop episodes per policy; 0 leaves the simulator out.
      families: OCBench families or environment ids to act in; none takes those of the store.
      mode, planner, text, level, own_duration, execute: how the policy acts, see `evaluation.actors.Acting`.
      patience: control steps that a subtask may take, as a multiple of the expert's typical duration.
      max_seconds: time for everything; fewer windows and trials are run where it is short.
      windows: held-out windows of the open loop, at most.
      batch: episodes or windows that run at once.
      processes: simulator processes.
      seed: of trials and sampling noise.
      sampling: entries of `config.sampling` to change, as "name=value": "steps=20", "action_temperature=0.0".
      codec_weights, text_weights: folders of the frozen parts, where they are not where the store's build had them.
    """

    episodes: int = 8
    families: Sequence[str] = ()
    mode: str = "event"
    planner: str = "oracle"
    text: str = ""
    level: str = "subtask"
    own_duration: bool = False
    execute: int = 0
    patience: float = 3.0
    max_seconds: float = 180.0
    windows: int = 128
    batch: int = 8
    processes: int = 2
    seed: int = 20_000
    sampling: Sequence[str] = ()
    codec_weights: str = ""
    text_weights: str = ""


def evaluate(workdir: str | Path, store_path: str | Path, out: str | Path, options: Options) -> dict[str, Any]:
    """Evaluates the newest checkpoint of `workdir`; writes into `out` and returns the content of `evaluation.json`.

    Raises:
      UserError: a path is missing, the store has no heldout split or no clusters, or the simulator is not there.
    """
    begun = time.monotonic()
    run = open_run(workdir)
    if not str(out):
        raise UserError("no --out given; pass a directory for the results")
    require_local(out, "out")
    seconds: dict[str, float] = {}

    def deadline(share: float) -> float:
        return begun + share * options.max_seconds

    with phase("load", seconds):
        from wallwm_jax.data.event_store import open_store
        from wallwm_jax.evaluation.actors import Acting, open_actor
        from wallwm_jax.evaluation.closed_loop import draw_trials
        from wallwm_jax.evaluation.open_loop import evaluate_open_loop
        from wallwm_jax.inference.policy import Policy

        acting = Acting(**{field.name: getattr(options, field.name) for field in fields(Acting)})
        acting.check()
        store = open_store(store_path, "heldout")
        trials = draw_trials(store, options.families, options.episodes, options.seed)
        policy = Policy.from_checkpoint(
            run,
            batch_size=options.batch,
            sampling=settings(options.sampling),
            seed=options.seed,
            codec_weights=options.codec_weights,
            text_weights=options.text_weights,
        )
        actor, config = open_actor(policy, acting), policy.event_mode.config
        print(f"    step {policy.step}, {policy.num_parameters / 1e6:.1f} M parameters, {len(trials)} trials")
    result: dict[str, Any] = {
        "workdir": str(run),
        "store": str(store.path),
        "step": policy.step,
        "parameters": policy.num_parameters,
        "options": asdict(options),
        "config": config.to_dict(),
        "success": {},
        "rollout": None,
    }
    directory = Path(out).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    with phase("open loop", seconds):
        open_loop = evaluate_open_loop(
            actor.mode,
            store,
            levels=[level for level, share in config.data.levels.items() if share],
            limit=options.windows,
            seed=options.seed,
            out_of_time=lambda: time.monotonic() > deadline(_OPEN_LOOP_SHARE),
        )
        result["open_loop"] = open_loop.to_json()
        result["strips"] = _save_strips(open_loop, directory)
    if trials:
        film = _closed_loop(store, policy, actor, trials, options, result["success"], seconds, deadline)
        result["rollout"] = _save_film(film, float(store.meta["video_fps"]), directory)
    result["phase_seconds"] = seconds
    write_text(directory / RESULT_FILE, json.dumps(result, indent=1) + "\n")
    return result


def _closed_loop(
    store: EventStore,
    policy: Policy,
    actor: Actor,
    trials: list[Trial],
    options: Options,
    success: dict[str, Any],
    seconds: dict[str, float],
    deadline: Callable[[float], float],
) -> Film | None:
    """Fills `success` with the three policies; returns the best film of the trained one."""
    import jax

    from wallwm_jax.evaluation import closed_loop
    from wallwm_jax.models import world_action_model as wam

    engine = policy.event_mode
    with closed_loop.open_pool(
        store,
        min(options.batch, len(trials)),
        views=engine.views,
        level=options.level,
        patience=options.patience,
        processes=options.processes,
    ) as pool:
        with phase("expert replay", seconds):
            replays = closed_loop.replay_experts(pool, trials)
            success["expert_replay"] = closed_loop.summarize(replays) | {"expert_failed": len(trials) - len(replays)}
        with phase("closed loop, trained", seconds):
            results, films = closed_loop.run_actor(
                pool, actor, trials, label="trained", films=4, deadline=deadline(_TRAINED_SHARE)
            )
            success["trained"] = closed_loop.summarize(results)
        with phase("closed loop, untrained", seconds):
            params = jax.jit(lambda key: wam.init(engine.config.model, key))(jax.random.key(options.seed))
            results, _ = closed_loop.run_actor(
                pool, actor.untrained(params), trials, label="untrained", deadline=deadline(1.0)
            )
            success["untrained"] = closed_loop.summarize(results)
    return closed_loop.best_film(films)


def _save_film(film: Film | None, fps: float, out: Path) -> dict[str, Any] | None:
    if film is None or film.result is None:
        return None
    from wallwm_jax.evaluation import figures

    (out / "rollout.gif").write_bytes(figures.rollout_gif(film.frames, film.captions, fps=fps))
    trial = film.result.trial
    return {
        "file": "rollout.gif",
        "env_id": trial.env_id,
        "seed": trial.seed,
        "success": film.result.success,
        "subtasks": [[subtask.caption, subtask.success] for subtask in film.result.subtasks],
    }


def _save_strips(result: OpenLoopResult, out: Path) -> list[dict[str, Any]]:
    from wallwm_jax.evaluation import figures

    listed = []
    for number, strip in enumerate(result.strips):
        name = f"strip-{number:02d}.png"
        rows: dict[str, Any] = {}
        for view, (recorded, predicted) in strip.views.items():
            rows |= {f"{view}\nrecorded": recorded, f"{view}\npredicted": predicted}
        (out / name).write_bytes(figures.video_strip(rows))
        listed.append({"file": name, "caption": strip.caption, "duration_s": strip.duration_s})
    return listed


def _print(result: dict[str, Any]) -> None:
    open_loop = result["open_loop"]
    better = min(open_loop["baselines"].values())
    print(f"open loop: normalised L1 {open_loop['model']:.3f}, {open_loop['model'] / better:.2f} x the better baseline")
    for policy, row in result["success"].items():
        cells = [
            f"{name} {100 * row[name]['rate']:.0f} % [{100 * row[name]['low']:.0f}, {100 * row[name]['high']:.0f}]"
            f" of {row[name]['episodes']}"
            for name in ("subtask", "episode")
        ]
        print(f"{policy}: {', '.join(cells)}")


def _define_flags() -> None:
    default = Options()
    flags.DEFINE_string("workdir", "", "Run of wallwm_jax.train to evaluate; its newest checkpoint.")
    flags.DEFINE_string("store", "", "Event store with a heldout split, clustered; usually the one trained on.")
    flags.DEFINE_string("out", "", "Directory for the results; made if absent.")
    flags.DEFINE_integer(
        "episodes", default.episodes, "Closed-loop episodes per policy; 0 leaves the simulator out.", 0
    )
    flags.DEFINE_list("families", [], "OCBench families or environment ids to act in; none takes those of the store.")
    flags.DEFINE_enum("mode", default.mode, ["event", "unified"], "Whole events, or chunks after a history.")
    flags.DEFINE_string(
        "planner", default.planner, "Event mode: what names the events: oracle (scripted), or the run of a VLM."
    )
    flags.DEFINE_string(
        "text",
        default.text,
        "Unified mode: instruction (default), event (scripted), or a run of staircase or vlm_text.",
    )
    flags.DEFINE_enum("level", default.level, ["subtask", "action"], "Level of the events that the planner names.")
    flags.DEFINE_integer(
        "execute", default.execute, "Unified mode: steps of a chunk played before it looks again; 0 all.", 0
    )
    flags.DEFINE_float("patience", default.patience, "Time for a subtask, in multiples of the expert's typical one.", 1)
    flags.DEFINE_bool(
        "own_duration", default.own_duration, "Event mode: the model says how long events take, not the planner."
    )
    flags.DEFINE_float("max_seconds", default.max_seconds, "Time for everything; fewer trials where it is short.", 0)
    flags.DEFINE_integer("windows", default.windows, "Held-out windows of the open loop, at most.", 1)
    flags.DEFINE_integer("batch", default.batch, "Episodes or windows that run at once.", 1)
    flags.DEFINE_integer("processes", default.processes, "Simulator processes.", 1)
    flags.DEFINE_integer("seed", default.seed, "Of trials and sampling noise.")
    flags.DEFINE_multi_string("sampling", [], "Entry of config.sampling to change: name=value. May be repeated.")
    flags.DEFINE_string(
        "codec_weights", "", "Converted weights of the store's codec, if they have moved since its build."
    )
    flags.DEFINE_string("text_weights", "", "Converted weights of its text encoder, if they have moved.")


def main(_: list[str]) -> int:
    """The command; see the module docstring."""

    values = flags.FLAGS
    if values.workdir:
        use_compile_cache(values.workdir)
    chosen: dict[str, Any] = {field.name: values[field.name].value for field in fields(Options)}
    result = evaluate(values.workdir, values.store, values.out, Options(**chosen))
    _print(result)
    print(f"results: {Path(values.out) / RESULT_FILE}")
    return 0


if __name__ == "__main__":
    _define_flags()
    run_command(main)
