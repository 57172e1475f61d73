"""Event mode: one observation and the text of the next event in, the whole event's actions and video out.

The event-mode loop of WALL-WM (section 5 of the report, arXiv 2606.01955): encode the current frame of each view, take
the next event's text and its duration, or the model's own median, and denoise the event's window with no history and no
fixed chunk. Shapes are static: an event runs in the smallest bucket of `config.sampling.buckets` that holds its
latents, cut at its true duration by masks, so there is one compilation per bucket and batch size.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.data.normalization import Stats
from wallwm_jax.data.packing import Spec
from wallwm_jax.events.actions import ACTION_DIM
from wallwm_jax.inference import denoising
from wallwm_jax.inference.captions import fit_picture, open_captions
from wallwm_jax.inference.denoising import sampling_config
from wallwm_jax.inference.samplers import ModelFlow
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.codecs import open_codec, to_uint8

_LOG_SECONDS = 7.0  # predicted durations stay within 1 ms and 18 minutes, whatever an untrained head says


@dataclass(frozen=True)
class EventRequest:
    """What the model is told about one event.

    Attributes:
      frames: view name → `[H, W, 3]` uint8, the current frame; a view of the store that is missing counts as absent.
      state: `[32]` un-normalised state, and `state_valid` `[32]` bool (`events.actions.state_vector`).
      caption: text of the next event; "" is the null text.
      duration_s: how long the event takes; None asks the model's duration head for its median.
      first: `[V, h, w, C]` the current frame as `EventMode.encode` fills it in, so that it is encoded only once.
    """

    frames: Mapping[str, np.ndarray]
    state: np.ndarray
    state_valid: np.ndarray
    caption: str
    duration_s: float | None = None
    first: np.ndarray | None = None


class Draft(NamedTuple):
    """One row of a batch whose video is still at the anchor: inputs and latents of the batch, row, future latents, the
    views that were there."""

    inputs: Mapping[str, np.ndarray]
    latents: jax.Array
    row: int
    futures: int
    views: tuple[str, ...]


@dataclass(frozen=True)
class EventPlan:
    """One whole event as the model sees it.

    Attributes:
      actions: `[T, 32]` canonical actions, un-normalised, one per control step.
      duration_s: length of the event; `T` control steps, fewer where the duration exceeds the longest bucket.
      latents: view name → `[1 + N, h, w, C]` un-normalised latents, the current frame first; None unless asked for.
      bucket: latents of the program that ran.
      draft: what `EventMode.finish` needs to denoise the video after all; None where `latents` are there.
    """

    actions: np.ndarray
    duration_s: float
    latents: Mapping[str, np.ndarray] | None
    bucket: int
    draft: Draft | None = None


class Programs(NamedTuple):
    """The jitted programs of event mode, all called with parameters, inputs (see `program_inputs`) and `bucket=`.

    Attributes:
      sample: -> normalised latents `[B, V, bucket, h, w, C]`, left at the anchor by the anchored sampler, and actions
        `[B, A, 32]`.
      finish: also takes these latents; -> the same, denoised to the end.
      durations: -> log-seconds quantiles `[B, Q]`.
    """

    sample: Any
    finish: Any
    durations: Any


def build_programs(config: ConfigDict) -> Programs:
    """The programs of `config`; nothing is compiled before the first call.

    Raises:
      UserError: an unknown sampler, no draws, or buckets that do not fit the model.
    """
    config = sampling_config(config)
    buckets = tuple(sorted(config.sampling.buckets))
    if not buckets or buckets[0] < 2 or buckets[-1] - 1 > config.model.max_latents:
        raise UserError(
            f"config.sampling.buckets={buckets} must lie between 2 and 1 + config.model.max_latents "
            f"= {1 + config.model.max_latents} latents"
        )
    parts = (functools.partial(part, config) for part in (_sample, _finish, _durations))
    return Programs(*(jax.jit(part, static_argnames=("bucket",)) for part in parts))


def program_inputs(config: ConfigDict, rows: int, views: int) -> Spec:
    """Name → (shape, dtype) of what a program is told of `rows` events.

    first        [B,V,h,w,C] normalised latents of the current frame       view_id   [B,V] 0 absent
    state        [B,32] normalised, and state_valid                        seed      [B] of the noise
    text_ids     [B,L], or text_features [B,L,Dt], and text_length [B]; "null_" of each where guidance is not 1
    futures      [B] latents to come                                       steps     [B] actions
    """
    model, length = config.model, config.data.text_length
    text: dict[str, tuple[tuple[int, ...], Any]] = {"text_length": ((rows,), np.int32)}
    if model.text.kind == "features":
        text["text_features"] = ((rows, length, model.text.width), np.float32)
    else:
        text["text_ids"] = ((rows, length), np.int32)
    if config.sampling.guidance != 1.0:
        text |= {f"null_{name}": shape for name, shape in text.items()}
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "first": ((rows, views, *model.latent_shape, model.latent_channels), np.float32),
        "state": ((rows, ACTION_DIM), np.float32),
        "state_valid": ((rows, ACTION_DIM), bool),
        "view_id": ((rows, views), np.int32),
        **text,
        "futures": ((rows,), np.int32),
        "steps": ((rows,), np.int32),
        "seed": ((rows,), np.uint32),
    }
    return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}


class EventMode:
    """Runs the world action model in event mode on batches of a fixed size.

    One compiled program per bucket, one more per bucket where videos are finished, and one for the duration head;
    `warm_up` compiles them before a robot waits for them. `with_params` shares the programs between parameter sets of
    one architecture.

    Args:
      params: parameters of `models.world_action_model` for `config.model`.
      config: the training config, `config.sampling` included.
      store: the store's description (`store.json`): views, camera table, codec, clock.
      stats: normalisation of actions, states and latents.
      batch_size: rows of every program; fewer requests are padded, more are run in several batches.
      codec_weights, text_weights: folders of the frozen parts that the store was built with, where they have moved.

    Raises:
      UserError: an unknown sampler, buckets that do not fit the model, or weights that are not the store's.
    """

    def __init__(
        self,
        params: Any,
        config: ConfigDict,
        store: Mapping[str, Any],
        stats: Stats,
        *,
        batch_size: int = 1,
        codec_weights: str = "",
        text_weights: str = "",
    ) -> None:
        self._programs = build_programs(config)
        self.buckets = tuple(sorted(int(bucket) for bucket in config.sampling.buckets))
        self.params = params
        self.config = config
        self.store = store
        self.stats = stats
        self.batch_size = batch_size
        self.views = tuple(config.data.views) or tuple(store["views"])
        self.codec = open_codec(store, codec_weights)
        self.captions = open_captions(config, store, text_weights)

    def with_params(self, params: Any) -> EventMode:
        """The same programs with other parameters (an untrained twin); nothing is compiled again."""
        twin = copy.copy(self)
        twin.params = params
        return twin

    @property
    def max_actions(self) -> int:
        """Actions of the longest event that fits; longer events are cut there and re-observed."""
        return self._actions_per_latent * (self.buckets[-1] - 1)

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(program._cache_size() for program in self._programs)

    def warm_up(self, buckets: Sequence[int] | None = None, *, video: bool = False) -> None:
        """Compiles the programs of `buckets` (all by default), with `video` those that finish videos too."""
        height, width = self.store["size"]
        request = EventRequest(
            frames={view: np.zeros((height, width, 3), np.uint8) for view in self.views},
            state=np.zeros(ACTION_DIM, np.float32),
            state_valid=np.ones(ACTION_DIM, bool),
            caption="",
        )
        self.durations([request])
        for bucket in buckets if buckets is not None else self.buckets:
            seconds = self._actions_per_latent * (bucket - 1) / self.store["action_hz"]
            self.plan([EventRequest(**{**vars(request), "duration_s": seconds})], video=video)

    def encode(self, request: EventRequest) -> EventRequest:
        """The request with its pictures encoded. Raises UserError: no view of the store, or a bad picture."""
        return dataclasses.replace(request, first=self._encode(request))

    def encode_views(self, frames: Mapping[str, np.ndarray]) -> np.ndarray:
        """View name → `[1 + 4N, H, W, 3]` uint8 to normalised latents `[V, 1 + N, h, w, C]`; zeros for an absent view.

        Raises:
          UserError: no view of the store, or a bad picture.
        """
        size, present = tuple(self.store["size"]), np.array([view in frames for view in self.views])
        if not present.any():
            raise UserError(f"the observation has none of the views {list(self.views)}, only {list(frames)}")
        length = max(len(frames[view]) for view in self.views if view in frames)
        videos = np.zeros((len(self.views), length, *size, 3), np.uint8)
        for v in np.flatnonzero(present):
            videos[v] = [fit_picture(frame, size, self.views[v]) for frame in frames[self.views[v]]]
        latents = self.stats.normalize_latents(self.codec.encode(videos))
        return np.where(present[:, None, None, None, None], latents, 0.0).astype(np.float32)

    def check_caption(self, caption: str) -> None:
        """Raises UserError where a caption is longer than what the model reads; `plan` would cut it."""
        length, limit = self.captions.tokens(caption), int(self.config.data.text_length)
        if length > limit:
            raise UserError(f"the caption has {length} text tokens, the model reads {limit}: {caption[:60]!r}...")

    @property
    def median(self) -> int:
        """Which of the duration quantiles is the median."""
        return int(np.argmin(np.abs(np.asarray(self.config.model.duration_quantiles) - 0.5)))

    def durations(self, requests: Sequence[EventRequest]) -> np.ndarray:
        """`[len(requests), Q]` seconds: the quantiles `config.model.duration_quantiles` of each event's duration."""
        chunks = []
        for chunk in _chunks(requests, self.batch_size):
            inputs = self._inputs(chunk, [1] * len(chunk), [self._stride] * len(chunk))
            log_seconds = self._programs.durations(self.params, inputs, bucket=self.buckets[0])
            log_seconds = np.clip(np.asarray(log_seconds, np.float64)[: len(chunk)], -_LOG_SECONDS, _LOG_SECONDS)
            chunks.append(np.exp(log_seconds))
        return np.concatenate(chunks) if chunks else np.zeros((0, len(self.config.model.duration_quantiles)))

    def plan(
        self, requests: Sequence[EventRequest], *, seeds: Sequence[int] | None = None, video: bool = False
    ) -> list[EventPlan]:
        """The whole event of each request, in order.

        Args:
          requests: any number; run in batches of `batch_size`.
          seeds: noise seed of each request (0 by default). A request's result depends on its seed only, not on what
            else is in the batch.
          video: denoise the video fully and return its latents; otherwise the anchored sampler leaves the video at the
            anchor and `latents` is None.

        Raises:
          UserError: a request has no view of the store, a bad picture, or a duration that is not positive.
        """
        seeds = list(seeds) if seeds is not None else [0] * len(requests)
        requests = [self.encode(request) for request in requests]
        seconds = self._resolve_durations(requests)
        plans: list[EventPlan] = []
        for start in range(0, len(requests), self.batch_size):
            rows = slice(start, start + self.batch_size)
            plans += self._plan_batch(requests[rows], seconds[rows], seeds[rows], video)
        return plans

    def finish(self, plan: EventPlan) -> Mapping[str, np.ndarray]:
        """The latents that `plan(..., video=True)` would have returned, of a plan without; its actions stay."""
        if plan.draft is None:
            raise ValueError("this plan has its video already")
        if self.config.sampling.sampler != "anchored":
            return self._films(plan.draft)
        latents = self._programs.finish(self.params, plan.draft.inputs, plan.draft.latents, bucket=plan.bucket)
        return self._films(plan.draft._replace(latents=latents))

    def decode(self, plan: EventPlan) -> dict[str, np.ndarray]:
        """The predicted video, view name → `[1 + 4N, H, W, 3]` uint8. Raises ValueError for a plan without latents."""
        if plan.latents is None:
            raise ValueError("this plan has no video: ask plan(..., video=True)")
        return {view: to_uint8(self.codec.decode(latents[None])[0]) for view, latents in plan.latents.items()}

    @property
    def _stride(self) -> int:
        return int(self.store["video_stride"])

    @property
    def _actions_per_latent(self) -> int:
        return int(self.store["actions_per_latent"])

    def _resolve_durations(self, requests: Sequence[EventRequest]) -> list[float]:
        for request in requests:
            if request.duration_s is not None and not 0.0 < request.duration_s < float("inf"):
                raise UserError(f"duration {request.duration_s} s of {request.caption!r} must be positive and finite")
        unknown = [request for request in requests if request.duration_s is None]
        medians = iter(self.durations(unknown)[:, self.median])
        return [float(next(medians)) if r.duration_s is None else float(r.duration_s) for r in requests]

    def num_actions(self, duration_s: float) -> int:
        """Control steps of an event of `duration_s`: whole video frames, at least one, at most `max_actions`."""
        frames = math.floor(duration_s * self.store["action_hz"] / self._stride + 0.5)
        return int(np.clip(frames * self._stride, self._stride, self.max_actions))

    def _plan_batch(
        self, requests: Sequence[EventRequest], seconds: Sequence[float], seeds: Sequence[int], video: bool
    ) -> list[EventPlan]:
        steps = [self.num_actions(duration) for duration in seconds]
        futures = [-(-count // self._actions_per_latent) for count in steps]
        bucket = next(bucket for bucket in self.buckets if bucket > max(futures))
        inputs = self._inputs(requests, futures, steps)
        inputs["seed"] = self._padded(np.asarray(seeds, np.uint32))
        latents, actions = self._programs.sample(self.params, inputs, bucket=bucket)
        if video and self.config.sampling.sampler == "anchored":
            latents = self._programs.finish(self.params, inputs, latents, bucket=bucket)
        actions = self.stats.denormalize_actions(np.asarray(actions))
        plans = []
        for row, (request, count, future) in enumerate(zip(requests, steps, futures)):
            draft = Draft(inputs, latents, row, future, tuple(view for view in self.views if view in request.frames))
            plans.append(
                EventPlan(
                    actions=np.where(request.state_valid, actions[row, :count], 0.0).astype(np.float32),
                    duration_s=seconds[row],
                    latents=self._films(draft) if video else None,
                    bucket=bucket,
                    draft=None if video else draft,
                )
            )
        return plans

    def _films(self, draft: Draft) -> dict[str, np.ndarray]:
        """Un-normalised latents by view of finished normalised ones."""
        z = self.stats.denormalize_latents(np.asarray(draft.latents[draft.row, :, : 1 + draft.futures]))
        return {view: z[self.views.index(view)] for view in draft.views}

    def _inputs(
        self, requests: Sequence[EventRequest], futures: Sequence[int], steps: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Arrays with leading axis `batch_size`; rows beyond the requests repeat the first one's content."""
        texts = self.captions.encode([request.caption for request in requests])
        if self.config.sampling.guidance != 1.0:
            texts |= {f"null_{name}": value for name, value in self.captions.encode([""] * len(requests)).items()}
        first = np.stack([self._encode(request) for request in requests])
        states = np.stack([self.stats.normalize_state(request.state) for request in requests])
        valid = np.stack([request.state_valid for request in requests])
        table = self.store["cameras"]
        view_id = [[table.get(view, 0) if view in r.frames else 0 for view in self.views] for r in requests]
        return {name: self._padded(value) for name, value in texts.items()} | {
            name: self._padded(np.asarray(value, dtype))
            for name, value, dtype in (
                ("first", first, np.float32),
                ("state", np.where(valid, states, 0.0), np.float32),
                ("state_valid", valid, bool),
                ("view_id", view_id, np.int32),
                ("futures", futures, np.int32),
                ("steps", steps, np.int32),
            )
        }

    def _encode(self, request: EventRequest) -> np.ndarray:
        """Normalised first latents `[V, h, w, C]` of a request; zeros for an absent view."""
        if request.first is not None:
            return request.first
        return self.encode_views({view: frame[None] for view, frame in request.frames.items()})[:, 0]

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows, np.repeat(rows[:1], self.batch_size - len(rows), axis=0)])


def _sample(
    config: ConfigDict, params: Any, inputs: Mapping[str, jax.Array], *, bucket: int
) -> tuple[jax.Array, jax.Array]:
    return denoising.denoise(config, _flow(config, params, inputs, bucket), inputs["seed"])


def _finish(
    config: ConfigDict, params: Any, inputs: Mapping[str, jax.Array], latents: jax.Array, *, bucket: int
) -> jax.Array:
    return denoising.finish(config, _flow(config, params, inputs, bucket), latents)


def _durations(config: ConfigDict, params: Any, inputs: Mapping[str, jax.Array], *, bucket: int) -> jax.Array:
    batch = _batch(config, inputs, bucket)
    text = wam.encode_text(params, config.model, batch)
    return wam.predict_duration(params, config.model, batch, text)[:, 0]


def _flow(config: ConfigDict, params: Any, inputs: Mapping[str, jax.Array], bucket: int) -> ModelFlow:
    """The model on its batch, with the null text encoded beside its captions where guidance needs it."""
    batch = _batch(config, inputs, bucket)
    text, null_text, guidance = wam.encode_text(params, config.model, batch), None, float(config.sampling.guidance)
    if guidance != 1.0:
        null_text = wam.encode_text(params, config.model, {**batch, **_texts_of(inputs, "null_")})
    return ModelFlow(params, config.model, batch, text, null_text, guidance)


def _batch(config: ConfigDict, inputs: Mapping[str, jax.Array], bucket: int) -> dict[str, jax.Array]:
    """A packed batch with one event per row: `bucket` latents, the first clean."""
    given = {**inputs, "given": inputs["first"][:, :, None]}
    return {**denoising.window_batch(config.model, given, bucket), **_texts_of(inputs)}


def _texts_of(inputs: Mapping[str, jax.Array], prefix: str = "") -> dict[str, jax.Array]:
    """The text arrays of a packed batch `[B, 1, ...]` that begin with `prefix` in the inputs."""
    names = ("text_ids", "text_features", "text_length")
    return {name: inputs[prefix + name][:, None] for name in names if prefix + name in inputs}


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
