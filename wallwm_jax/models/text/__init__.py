"""Text encoders: `bytes`, trained with the model, and `umt5`, frozen, whose features event stores hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wallwm_jax.console import UserError

if TYPE_CHECKING:
    from wallwm_jax.models.text.umt5 import CaptionEncoder

TEXT_ENCODERS = ("bytes", "umt5")


def open_text_encoder(store: Mapping[str, Any], weights: str = "") -> CaptionEncoder:
    """The frozen text encoder of an event store of features.

    Args:
      store: the store's description, `store.json`.
      weights: folder with its converted weights; by default the one that the store was built with.

    Raises:
      UserError: the store has no features; no weights there, or others than the store was built with.
    """
    if "text_weights" not in store:
        raise UserError(
            "the model reads features of a frozen text encoder, but this event store was built without one; "
            "give a store built with --text_encoder=umt5"
        )
    from wallwm_jax.models.convert.stream import same_weights
    from wallwm_jax.models.text.umt5 import CaptionEncoder

    return CaptionEncoder.from_directory(same_weights(store["text_weights"], weights, "umt5", "--text_weights"))
