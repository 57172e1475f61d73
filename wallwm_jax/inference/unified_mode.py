"""Unified mode: the recent past and an instruction in, a chunk of fixed length out (WALL-WM section 5, scheme B).

    history = History(mode)
    history.observe(observation)                     # at every control step, with the command that led to it
    chunk = mode.plan(history.request(), mode.encode_text("put the red block on the left"))
    for pose, gripper in zip(chunk.poses, chunk.grippers): ...

The model sees `1 + 4M` frames up to the observation and the commands between them, and denoises `N` latents and a chunk
of `H` actions relative to the observation's pose. What conditions it is `Conditioning`, features in the video tower's
text space: one instruction encoded once for a whole rollout, another for each chunk, latents of a staircase, or
features of a VLM (`inference/latent_conditioner.py`). They have one shape, so all run in the same compiled program and
may be swapped in the middle of a rollout; and the program is differentiable in them. All steps of the actions read the
keys and values of one forward of the video, text and past pictures in it (`samplers.anchored`); past commands attend to
the noisy ones and are run again at each step. Several robots are planned for at once (`UnifiedMode.plan_all`), each row
with its own past and conditioning.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.events.actions import ACTION_DIM, absolute_commands, relative_actions, state_vector
from wallwm_jax.events.windows import GROUP
from wallwm_jax.inference import denoising, event_mode
from wallwm_jax.inference.event_mode import EventMode
from wallwm_jax.inference.samplers import ModelFlow
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.codecs import to_uint8
from wallwm_jax.models.world_action_model import TextContext

PyTree = Any

_KEPT_TEXTS = 256  # features of 512 tokens of UMT5 take 8 MB


class Conditioning(NamedTuple):
    """What tells the model what to do: `features [L, Dt]` in the video tower's text space, `length []` of them valid.

    Attributes:
      null: the same of the null text, where guidance needs it; else None.
    """

    features: jax.Array
    length: jax.Array
    null: Any = None


@dataclass(frozen=True)
class ChunkRequest:
    """The recent past of a robot.

    Attributes:
      frames: view name → `[1 + 4M, H, W, 3]` uint8, the observation last; a view of the store that is missing counts
        as absent.
      pose, gripper: measured at the observation, `[G, 4, 4]` metres and `[G]`.
      command_poses, command_grippers: `[P, G, 4, 4]` and `[P, G]` commands that led to the observation, the newest
        last; at most those between the frames, fewer where the episode begins later.
      number: of this chunk along the episode, from 1.
    """

    frames: Mapping[str, np.ndarray]
    pose: np.ndarray
    gripper: np.ndarray
    command_poses: np.ndarray
    command_grippers: np.ndarray
    number: int


class Draft(NamedTuple):
    """One row of a batch whose video is still at the anchor: inputs, conditioning and latents of the batch, row, and
    what was asked."""

    inputs: Mapping[str, np.ndarray]
    conditioning: Conditioning
    latents: jax.Array
    row: int
    request: ChunkRequest


@dataclass(frozen=True)
class Chunk:
    """One chunk as the model sees it.

    Attributes:
      actions: `[H, 32]` canonical actions relative to the observation, un-normalised.
      poses, grippers: `[H, G, 4, 4]` absolute commands in the base frame, metres, and `[H, G]`.
      latents: view name → `[M + 1 + N, h, w, C]` un-normalised latents, the past first; None unless asked for.
      draft: what `UnifiedMode.finish` needs to denoise the video after all; None where `latents` are there.
    """

    actions: np.ndarray
    poses: np.ndarray
    grippers: np.ndarray
    latents: Mapping[str, np.ndarray] | None
    draft: Draft | None = None


def build_sampler(config: ConfigDict, futures: int) -> Any:
    """The jitted program, of parameters and `program_inputs`: -> normalised latents `[B, V, M + 1 + futures, h, w, C]`,
    left at the anchor by the anchored sampler, and actions `[B, P + A, 32]`, the past first."""
    return jax.jit(functools.partial(_sample, denoising.sampling_config(config), 1 + futures))


def program_inputs(
    config: ConfigDict, rows: int, views: int, history: int
) -> tuple[dict[str, jax.ShapeDtypeStruct], Conditioning, jax.ShapeDtypeStruct]:
    """Shapes of what the program is told of `rows` chunks after `history` latents: inputs as of
    `denoising.window_batch`, conditioning, and seeds of the noise."""
    model = config.model
    told = {name: jax.ShapeDtypeStruct(*spec) for name, spec in event_mode.program_inputs(config, rows, views).items()}
    first, number = told["first"], told["steps"]
    past = history * model.actions_per_latent
    inputs = {
        **{name: told[name] for name in ("state", "state_valid", "view_id", "futures", "steps")},
        "given": jax.ShapeDtypeStruct((rows, views, 1 + history, *first.shape[2:]), first.dtype),
        "past": jax.ShapeDtypeStruct((rows, past, ACTION_DIM), np.float32),
        "past_steps": number,
        "number": number,
    }
    words = {
        name: jax.ShapeDtypeStruct((rows, 1, *one.shape[1:]), one.dtype)
        for name, one in told.items()
        if name in ("text_ids", "text_features", "text_length")
    }

    def conditioning(params: PyTree, words: dict[str, Any]) -> Conditioning:
        text = wam.encode_text(params, model, words)
        encoded = text.features[:, 0].astype(jnp.float32), text.length[:, 0]
        return Conditioning(*encoded, None if config.sampling.guidance == 1.0 else encoded)

    return inputs, jax.eval_shape(conditioning, wam.abstract_params(model), words), told["seed"]


class UnifiedMode:
    """Runs a world action model that was trained on windows with history; one compiled program for all chunks.

    Args:
      engine: the model in event mode; parameters, batch size, codec, captions and statistics are shared.

    Raises:
      UserError: the model was not trained on windows with history.
    """

    def __init__(self, engine: EventMode) -> None:
        config, store = engine.config, engine.store
        if config.data.window_kind != "history":
            raise UserError(
                f"unified mode needs a model trained with data.window_kind='history', this one has "
                f"{config.data.window_kind!r}; build a store with --windows=history and train on it"
            )
        self.engine, self.config = engine, denoising.sampling_config(config)
        self.history, self.chunk = int(store["history_latents"]), int(store["fixed_steps"])
        self.stride = int(store["video_stride"])
        self._encode_text: Any = jax.jit(functools.partial(_encode_text, self.config))
        self._texts: tuple[PyTree, dict[str, tuple[jax.Array, jax.Array]]] = engine.params, {}
        self._sample = build_sampler(config, self._futures)
        self._finish: Any = jax.jit(functools.partial(_finish, self.config, 1 + self._futures))

    def with_params(self, params: PyTree) -> UnifiedMode:
        """The same programs with other parameters (an untrained twin); nothing is compiled again."""
        twin = copy.copy(self)
        twin.engine = self.engine.with_params(params)
        return twin

    @property
    def past_frames(self) -> int:
        """`4M`: frames before the observation."""
        return GROUP * self.history

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(program._cache_size() for program in (self._encode_text, self._sample, self._finish))

    def warm_up(self, *, video: bool = False) -> None:
        """Compiles the programs, with `video` the one that finishes videos too."""
        shape = (1 + self.past_frames, *self.engine.store["size"], 3)
        frames = {view: np.zeros(shape, np.uint8) for view in self.engine.views}
        nothing = np.zeros((0, 1, 4, 4)), np.zeros((0, 1))
        request = ChunkRequest(frames, np.eye(4)[None], np.zeros(1), *nothing, number=1)
        self.plan(request, self.encode_text(""), video=video)

    def encode_text(self, text: str) -> Conditioning:
        """An instruction as the text encoder of the model's training has it, encoded once; "" is the null text."""
        return Conditioning(*self._features(text), self._null())

    def from_latents(self, latents: jax.Array | np.ndarray) -> Conditioning:
        """Latents `[K, Dt]`, or what else stands in the place of a text's features.

        Raises:
          UserError: they are more, or of another width, than a text's features.
        """
        features, _ = self._features("")
        if latents.ndim != 2 or latents.shape[1] != features.shape[1] or len(latents) > len(features):
            raise UserError(
                f"latents {list(latents.shape)} cannot stand for a text of at most {len(features)} features of width "
                f"{features.shape[1]}"
            )
        pad: Any = np.pad if isinstance(latents, np.ndarray) else jnp.pad  # which is compiled for each K
        padded = pad(latents.astype(features.dtype), ((0, len(features) - len(latents)), (0, 0)))
        return Conditioning(padded, jnp.asarray(len(latents), jnp.int32), self._null())

    def plan(self, request: ChunkRequest, conditioning: Conditioning, *, seed: int = 0, video: bool = False) -> Chunk:
        """The next chunk of one robot; see `plan_all`."""
        return self.plan_all([request], [conditioning], seeds=[seed], video=video)[0]

    def plan_all(
        self,
        requests: Sequence[ChunkRequest],
        conditionings: Sequence[Conditioning],
        *,
        seeds: Sequence[int],
        video: bool = False,
    ) -> list[Chunk]:
        """The next chunk of each of several robots, in batches of the engine's size.

        Args:
          requests: from `History.request`.
          conditionings: from `encode_text` or `from_latents`, one for each request.
          seeds: of the sampling noise, one for each request.
          video: denoise the videos fully and return their latents.

        Raises:
          UserError: no view of the store, bad pictures, too many commands, or poses of another number of arms.
        """
        chunks: list[Chunk] = []
        for start in range(0, len(requests), self.engine.batch_size):
            rows = slice(start, start + self.engine.batch_size)
            chunks += self._plan_batch(requests[rows], conditionings[rows], seeds[rows], video)
        return chunks

    def finish(self, chunk: Chunk) -> Mapping[str, np.ndarray]:
        """The latents that planning with `video=True` would have returned, of a chunk without; its actions stay."""
        if chunk.draft is None:
            raise ValueError("this chunk has its video already")
        draft = chunk.draft
        if self.config.sampling.sampler != "anchored":
            return self._films(draft)
        latents = self._finish(self.engine.params, draft.inputs, draft.conditioning, draft.latents)
        return self._films(draft._replace(latents=latents))

    def decode(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """View name → `[1 + 4 (M + N), H, W, 3]` uint8, past and predicted; ValueError for a chunk without latents."""
        if chunk.latents is None:
            raise ValueError("this chunk has no video: ask plan(..., video=True)")
        return {view: to_uint8(self.engine.codec.decode(latents[None])[0]) for view, latents in chunk.latents.items()}

    def inputs(self, request: ChunkRequest) -> dict[str, np.ndarray]:
        """What the program is told of the past, `denoising.window_batch`; leading axes of one."""
        room = self.past_frames * self.stride
        if len(request.command_poses) > room:
            raise UserError(f"{len(request.command_poses)} past commands, the history holds {room}")
        state, valid = state_vector(request.pose, request.gripper)
        past = np.zeros((room, ACTION_DIM), np.float32)
        if steps := len(request.command_poses):
            relative, _ = relative_actions(request.command_poses, request.command_grippers, request.pose)
            past[-steps:] = np.where(valid, self.engine.stats.normalize_actions(relative), 0.0)
        table = self.engine.store["cameras"]
        return {
            "given": self._encoded(request.frames)[None],
            "past": past[None],
            "past_steps": np.array([steps], np.int32),
            "state": np.where(valid, self.engine.stats.normalize_state(state), 0.0).astype(np.float32)[None],
            "state_valid": valid[None],
            "view_id": np.array([[table.get(v, 0) if v in request.frames else 0 for v in self.engine.views]], np.int32),
            "futures": np.array([self._futures], np.int32),
            "steps": np.array([self.chunk], np.int32),
            "number": np.array([request.number], np.int32),
        }

    def _plan_batch(
        self,
        requests: Sequence[ChunkRequest],
        conditionings: Sequence[Conditioning],
        seeds: Sequence[int],
        video: bool,
    ) -> list[Chunk]:
        """At most a batch of requests; rows beyond them repeat the first."""
        padding = self.engine.batch_size - len(requests)
        rows = [self.inputs(request) for request in requests]
        rows += rows[:1] * padding
        inputs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        # On the host: what is placed otherwise, words of loaded parameters or latents, would be compiled for anew.
        text = jax.device_get(stacked([*conditionings, *[conditionings[0]] * padding]))
        noise = np.array([*seeds, *[seeds[0]] * padding], np.uint32)
        latents, actions = self._sample(self.engine.params, inputs, text, noise)
        if video and self.config.sampling.sampler == "anchored":
            latents = self._finish(self.engine.params, inputs, text, latents)
        future = np.asarray(actions)[:, inputs["past"].shape[1] :][:, : self.chunk]
        canonical = self.engine.stats.denormalize_actions(future)
        canonical = np.where(inputs["state_valid"][:, None], canonical, 0.0).astype(np.float32)
        chunks = []
        for row, request in enumerate(requests):
            draft = Draft(inputs, text, latents, row, request)
            poses, grippers = absolute_commands(canonical[row], request.pose)
            chunks.append(
                Chunk(
                    canonical[row],
                    poses,
                    grippers,
                    latents=self._films(draft) if video else None,
                    draft=None if video else draft,
                )
            )
        return chunks

    @property
    def _futures(self) -> int:
        return -(-self.chunk // int(self.engine.store["actions_per_latent"]))

    def _encoded(self, frames: Mapping[str, np.ndarray]) -> np.ndarray:
        """Normalised latents `[V, 1 + M, h, w, C]`; zeros for an absent view."""
        length = 1 + self.past_frames
        for view, shots in frames.items():
            if len(shots) != length:
                raise UserError(f"view {view!r} has {len(shots)} frames; the history is {length}")
        return self.engine.encode_views(frames)

    def _films(self, draft: Draft) -> dict[str, np.ndarray]:
        """Un-normalised latents by view of finished normalised ones."""
        z = self.engine.stats.denormalize_latents(np.asarray(draft.latents[draft.row]))
        return {view: z[v] for v, view in enumerate(self.engine.views) if view in draft.request.frames}

    def _features(self, text: str) -> tuple[jax.Array, jax.Array]:
        """Features and length of a text, encoded once with these parameters; beyond `_KEPT_TEXTS` all are forgotten."""
        params, known = self._texts
        if params is not self.engine.params or len(known) >= _KEPT_TEXTS:
            params, known = self._texts = self.engine.params, {}
        if text not in known:
            known[text] = self._encode_text(params, self.engine.captions.encode([text]))
        return known[text]

    def _null(self) -> tuple[jax.Array, jax.Array] | None:
        """The null text's features and length, where guidance needs them."""
        return None if self.config.sampling.guidance == 1.0 else self._features("")


def stacked(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Conditioning of a batch: every array gets a leading axis, one row each."""
    batch: Conditioning = jax.tree.map(lambda *rows: jnp.stack(rows), *conditionings)
    return batch


class History:
    """What a robot has seen and done since its episode began, as far as `UnifiedMode` looks back."""

    def __init__(self, mode: UnifiedMode) -> None:
        self._mode = mode
        self.reset()

    def reset(self) -> None:
        """Begins an episode."""
        self._frames: deque[dict[str, np.ndarray]] = deque(maxlen=1 + self._mode.past_frames)
        self._commands: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=self._mode.past_frames * self._mode.stride)
        self._last: Any = None
        self._step = 0

    def begin(self, observation: Any) -> None:
        """The observation that a chunk starts from: an episode's first one, or the last that was observed.

        Raises:
          UserError: it is neither.
        """
        if self._last is None:
            self.observe(observation)
        elif observation is not self._last:
            raise UserError("a chunk starts from the last observation: observe() each with the command that led to it")

    def observe(self, observation: Any, command: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """One control step: what the robot reports (`policy.Observation`), and the command that led there.

        Args:
          observation: `frames` are read at every `video_stride`-th step only.
          command: `poses [G, 4, 4]` and `grippers [G]`; None at the first observation of the episode alone.

        Raises:
          UserError: no command after the first observation, or one before it.
        """
        if (command is None) != (self._last is None):
            raise UserError(
                "every observation but the first comes with the command that led to it; reset() begins anew"
            )
        if command is not None:
            self._commands.append(command)
            self._step += 1
        if self._step % self._mode.stride == 0:
            self._frames.append({view: np.array(frame) for view, frame in observation.frames.items()})
        self._last = observation

    def follow(
        self, poses: np.ndarray, grippers: np.ndarray, frames: Mapping[str, Sequence[np.ndarray]], observation: Any
    ) -> None:
        """Several control steps at once, as `observe` would be told of them one by one.

        Args:
          poses, grippers: `[T, G, 4, 4]` and `[T, G]` commands that were played.
          frames: view name → those at every `video_stride`-th of the steps, the last of which is the observation's; of
            many steps the last `1 + 4M` frames are enough.
          observation: after the last of the steps.

        Raises:
          UserError: nothing was observed before, or there are fewer frames.
        """
        if self._last is None:
            raise UserError("an episode begins with an observation: observe() it before the commands that follow")
        due = (self._step + len(poses)) // self._mode.stride - self._step // self._mode.stride
        shown = [dict(zip(frames, map(np.array, pictures))) for pictures in zip(*frames.values())]
        if len(shown) < min(due, 1 + self._mode.past_frames):
            raise UserError(
                f"{len(poses)} control steps came with {len(shown)} frames; the history needs {due} of them"
            )
        self._commands.extend(zip(poses, grippers))
        self._frames.extend(shown[-due:] if due else ())
        self._step += len(poses)
        self._last = observation

    def request(self) -> ChunkRequest:
        """The past up to the last observation.

        Raises:
          UserError: nothing was observed, or the last observation is not at a frame of the video.
        """
        if self._last is None or self._step % self._mode.stride:
            raise UserError(
                f"a chunk begins at an observation, after a multiple of {self._mode.stride} control steps; this is "
                f"after {self._step}"
            )
        held = [self._frames[0]] * (1 + self._mode.past_frames - len(self._frames)) + list(self._frames)
        views = set.intersection(*(set(frames) for frames in held))
        poses, grippers = zip(*self._commands) if self._commands else ((), ())
        arms = len(self._last.pose)
        return ChunkRequest(
            frames={view: np.stack([frames[view] for frames in held]) for view in sorted(views)},
            pose=np.asarray(self._last.pose),
            gripper=np.asarray(self._last.gripper),
            command_poses=np.asarray(poses, np.float64).reshape(-1, arms, 4, 4),
            command_grippers=np.asarray(grippers, np.float64).reshape(-1, arms),
            number=1 + self._step // self._mode.chunk,  # that of the tile that begins here or holds this step
        )


def _encode_text(config: ConfigDict, params: PyTree, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Features `[L, Dt]` of one text, and how many are valid."""
    text = wam.encode_text(params, config.model, {name: jnp.asarray(array)[:, None] for name, array in arrays.items()})
    return text.features[0, 0].astype(jnp.float32), text.length[0, 0]


def _sample(
    config: ConfigDict,
    latents: int,
    params: PyTree,
    inputs: Mapping[str, jax.Array],
    conditioning: Conditioning,
    seeds: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return denoising.denoise(config, _flow(config, latents, params, inputs, conditioning), seeds)


def _finish(
    config: ConfigDict,
    latents: int,
    params: PyTree,
    inputs: Mapping[str, jax.Array],
    conditioning: Conditioning,
    video: jax.Array,
) -> jax.Array:
    return denoising.finish(config, _flow(config, latents, params, inputs, conditioning), video)


def _flow(
    config: ConfigDict, latents: int, params: PyTree, inputs: Mapping[str, jax.Array], conditioning: Conditioning
) -> ModelFlow:
    def context(features: jax.Array, length: jax.Array) -> TextContext:
        return TextContext(features[:, None], length[:, None])

    batch = denoising.window_batch(config.model, inputs, latents)
    text, null = context(conditioning.features, conditioning.length), conditioning.null
    null_text = None if null is None else context(*null)
    return ModelFlow(params, config.model, batch, text, null_text, float(config.sampling.guidance))
