"""Training stages as data (WALL-WM Table 1): what trains, what is frozen, which losses, which windows, which noise.

    video    the video tower with its view attention, and the text encoder; video loss         (stage 1 of the paper)
    action   the action tower on a frozen video tower held at the anchor noise level           (stage 2 of the paper)
    chunk    both towers on the next chunk of fixed length, after a history                    (stage 5, optional)
    joint    everything at once, for small data sets and demonstrations
    vlm_sft  the vision-language model answers what comes next; a small language model reads reasoning traces
    vlm_text a projector from the frozen VLM into the video tower's text space, and its heads  (stage 3 of the paper)
    staircase  latents of a branch of the frozen VLM: a small model reads the trace from them  (stage 4 of the paper)

Additions to the paper's table, ours: the bytes text encoder trains in `video` and `joint` and is frozen after (the
paper's text encoder is pretrained and always frozen); the duration head trains in `joint` and `action`; in `chunk`,
whose noise the paper leaves open, half of the events have the video at the anchor, where inference reads its features,
and half anywhere, or the tower would forget how to get there; `vlm_sft` trains VLM and small language model, which the
paper takes as they are; `vlm_text` learns which features are text, too; `staircase` also ties its latents to the frozen
towers, which the paper leaves open, each tie by its weight in `objective`: what the video tower reads from them
("match"), and the towers' own losses with the latents in the caption's place, end to end. A parameter group that a
stage neither trains nor freezes is not attached: it is not in memory and not in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wallwm_jax.console import UserError


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
      name: what `config.train.stage` says.
      trains: top-level parameter groups that the optimizer updates.
      freezes: groups that are read but never updated; kept in bfloat16, outside the optimizer and its average.
      losses: streams in the loss, of "video", "action", "duration"; of a VLM stage, of "answer", "small", "align",
        "present", "next", "time", "trace", "match", "latent_action", "latent_video".
      window_kinds: kinds of event-store windows this stage can learn from.
      video_sigma: "uniform" (flow-matching time uniform, then shifted), "anchor" (`objective.anchor_sigma` with jitter)
        or "mixed" (either, half of the events each); "" without video.
      model: "world_action" or "language", which `training.families` knows.
    """

    name: str
    trains: tuple[str, ...]
    freezes: tuple[str, ...]
    losses: tuple[str, ...]
    window_kinds: tuple[str, ...]
    video_sigma: str = ""
    model: str = "world_action"

    @property
    def runs_actions(self) -> bool:
        """Whether the action tower is part of the forward pass."""
        return "action" in self.losses

    @property
    def trains_video(self) -> bool:
        """Whether gradients flow into the video tower."""
        return "video" in self.trains

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(trained groups, frozen groups) of a parameter tree; groups that the model does not have are passed over."""
        return _pick(params, self.trains), _pick(params, self.freezes)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="joint",
            trains=("video", "action", "text", "duration"),
            freezes=(),
            losses=("video", "action", "duration"),
            window_kinds=("event", "fixed", "history", "random"),
            video_sigma="uniform",
        ),
        Stage(
            name="video",
            trains=("video", "text"),
            freezes=(),
            losses=("video",),
            window_kinds=("event", "fixed", "random"),
            video_sigma="uniform",
        ),
        Stage(
            name="action",
            trains=("action", "duration"),
            freezes=("video", "text"),
            losses=("action", "duration"),
            window_kinds=("event", "fixed", "random"),
            video_sigma="anchor",
        ),
        Stage(
            name="chunk",
            trains=("video", "action"),
            freezes=("text", "duration"),
            losses=("video", "action"),
            window_kinds=("history",),
            video_sigma="mixed",
        ),
        Stage(
            name="vlm_sft",
            trains=("vlm", "small"),
            freezes=(),
            losses=("answer", "small"),
            window_kinds=("event",),
            model="language",
        ),
        Stage(
            name="vlm_text",
            trains=("vlm_text",),
            freezes=("vlm", "text"),
            losses=("align", "present", "next", "time"),
            window_kinds=("event",),
            model="language",
        ),
        Stage(
            name="staircase",
            trains=("staircase",),
            freezes=("vlm", "small", "video", "action", "text"),
            losses=("trace", "match", "latent_action", "latent_video"),
            window_kinds=("event",),
            video_sigma="anchor",
            model="language",
        ),
    )
}


def get_stage(name: str) -> Stage:
    """The stage called `name`.

    Raises:
      UserError: there is none.
    """
    if name not in STAGES:
        raise UserError(f"train.stage={name!r} is not a stage; the stages are {', '.join(STAGES)}")
    return STAGES[name]


def _pick(params: Mapping[str, Any], groups: Iterable[str]) -> dict[str, Any]:
    return {name: params[name] for name in groups if name in params}
