"""What stands beside a policy in unified mode, opened from its run: what conditions it without words, a planner."""

from __future__ import annotations

from collections.abc import Iterable

from wallwm_jax.console import UserError, phase
from wallwm_jax.inference.latent_conditioner import LatentConditioner, check_alignment
from wallwm_jax.inference.planner import VlmPlanner
from wallwm_jax.inference.policy import Policy


def open_latents(run: str, policy: Policy) -> LatentConditioner:
    """What a run of stage `staircase` or `vlm_text` says in place of words, one robot at a time.

    Raises:
      UserError: no such run, the policy has no unified mode, or the two do not fit.
    """
    if policy.unified_mode is None:
        raise UserError("--latents is for unified mode, which this model does not have: it knows no history")
    with phase("load latents"):
        conditioner = LatentConditioner.from_checkpoint(run, batch_size=1)
    _check_views(run, conditioner.views, policy)
    check_alignment(conditioner, policy.unified_mode, run)
    return conditioner


def open_planner(run: str, policy: Policy) -> VlmPlanner:
    """The planner of a run with a VLM that was asked how long an event still takes, one robot at a time.

    Raises:
      UserError: no such run, one that was never asked so, the policy has no unified mode, or the two do not fit.
    """
    if policy.unified_mode is None:
        raise UserError("--planner is for unified mode, which this model does not have: it knows no history")
    with phase("load planner"):
        planner = VlmPlanner.from_checkpoint(run, batch_size=1)
    if not planner.config.data.vlm.inside_prob:
        raise UserError(
            f"the planner of {run!r} was trained with data.vlm.inside_prob=0: it was never asked how long an event "
            "still takes; take a run with more"
        )
    _check_views(run, planner.config.data.views, policy)
    return planner


def _check_views(run: str, views: Iterable[str], policy: Policy) -> None:
    if missing := set(views) - set(policy.event_mode.views):
        raise UserError(
            f"the VLM of {run!r} looks at {' and '.join(sorted(missing))}; robots of this policy send "
            f"{' and '.join(policy.event_mode.views)}"
        )
