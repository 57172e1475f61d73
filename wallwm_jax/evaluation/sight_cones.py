r"""Draws what patches of one camera see of another (`models/sight_cone.py`), on an event of a store.

    python -m wallwm_jax.evaluation.sight_cones --store=runs/quickstart/store --out=docs/sight_cones.png

Each row is one latent frame: left the camera `--of` with some patches framed, then, for each of them, the camera `--on`
with the patches dark that its cone does not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from wallwm_jax.console import UserError, run_command
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.models.sight_cone import sight_mask

_SIDE = 224  # pixels of a picture
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0))


def draw(store: EventStore, index: int, views: Sequence[str], patches: int, near: float, far: float) -> Image.Image:
    """The picture of window `index`: `views[0]`'s patches on `views[1]`, `patches` per side.

    Raises:
      UserError: a view that the window does not have, or one without calibration; a store of latents.
    """
    record = store.read(index)
    if record.latents is not None:
        raise UserError(
            f"event store {str(store.path)!r} holds latents, not pictures; give one built with a haar codec"
        )
    stored = list(store.meta["views"])
    for view in views:
        if view not in record.frames or not record.geometry[stored.index(view)].any():
            raise UserError(f"window {index} has no calibrated view {view!r}; the store's are {', '.join(stored)}")
    geometry = jnp.asarray(np.stack([record.geometry[stored.index(view)] for view in views], 1))
    mask = np.asarray(sight_mask(geometry, patches, patches, near=near, far=far))
    count, last = patches**2, len(record.frames[views[0]]) - 1
    near_corner, far_corner = patches // 4, patches - 1 - patches // 4
    chosen = [(r, c) for r in (near_corner, far_corner) for c in (near_corner, far_corner)]
    rows = []
    for latent in np.unique(np.linspace(0, record.num_latents - 1, 3).round().astype(int)):
        of, on = (_enlarged(record.picture(view, min(4 * latent, last))) for view in views)
        framed, seen = of.copy(), []
        for (r, c), colour in zip(chosen, _COLOURS):
            start, end = ((x * _SIDE // patches, y * _SIDE // patches) for x, y in ((c, r), (c + 1, r + 1)))
            cv2.rectangle(framed, start, end, colour, 2)
            is_open = mask[latent, r * patches + c, count:].reshape(patches, patches).astype(np.float32)
            light = cv2.resize(0.25 + 0.75 * is_open, (_SIDE, _SIDE), interpolation=cv2.INTER_NEAREST)
            seen.append(cv2.rectangle((on * light[..., None]).astype(np.uint8), (0, 0), (_SIDE - 1,) * 2, colour, 3))
        rows.append(np.concatenate([framed, *seen], 1))
    return Image.fromarray(np.concatenate(rows))


def _enlarged(picture: np.ndarray) -> np.ndarray:
    return cv2.resize(picture, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)


def _define_flags() -> None:
    flags.DEFINE_string("store", None, "Event store.")
    flags.DEFINE_string("out", None, "PNG file to write.")
    flags.DEFINE_integer("window", 0, "Which window of the train split.", 0)
    flags.DEFINE_string("of", "ur5e/wrist", "View whose patches are framed.")
    flags.DEFINE_string("on", "front_pixels", "View on which is shown what they see.")
    flags.DEFINE_integer("patches", 8, "Patches per side.", 2)
    flags.DEFINE_float("near", 0.1, "Nearest distance at which cones may meet, metres.", 0)
    flags.DEFINE_float("far", 3.0, "Farthest distance, metres.", 0)
    flags.mark_flags_as_required(["store", "out"])


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    values = flags.FLAGS
    store = open_store(values.store, "train")
    if values.window >= len(store):
        raise UserError(f"--window={values.window}: the store has {len(store)} windows")
    out = Path(values.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(store, values.window, (values.of, values.on), values.patches, values.near, values.far).save(out)
    print(f"picture: {out}")
    return 0


if __name__ == "__main__":
    _define_flags()
    run_command(main)
