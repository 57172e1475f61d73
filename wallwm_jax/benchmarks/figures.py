"""Where parameters live on a mesh, as a table and as pictures; and bars of what fills a chip's memory or a step."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from wallwm_jax.evaluation.figures import BLUE, MUTED, ORANGE, STYLE, to_png
from wallwm_jax.models import param_axes
from wallwm_jax.parallel import sharding
from wallwm_jax.parallel.chips import GIB

_CHIP_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d")
_PART_COLOURS = (BLUE, ORANGE, "#54a24b", "#b279a2", MUTED)
_MIB = 2**20


def parameter_table(params: Any, mesh: Mesh | AbstractMesh) -> str:
    """The parameters of each group, arrays of one layout in one line: how many, logical axes, the mesh axes that split
    them ("-" is whole), MiB of a chip. Groups and lines in falling order of size.

    Args:
      params: nested dict of arrays or shapes, as `world_action_model.abstract_params` gives them.
      mesh: real or abstract, with the axes of `parallel.mesh`.
    """
    layouts: dict[tuple[str, ...], list[tuple[str, int, int]]] = defaultdict(list)

    def add(path: str, rule: param_axes.Rule, leaf: Any) -> None:
        group, name = path.split("/", 1)
        spec = sharding.spec_for(rule.axes, leaf.shape, mesh)
        part = math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape))
        shape, axes = " x ".join(map(str, leaf.shape)), ", ".join(rule.axes)
        split = ", ".join("-" if names is None else str(names) for names in spec)
        size = leaf.dtype.itemsize
        layouts[group, shape, axes, split].append((name, size * math.prod(leaf.shape), size * part))

    param_axes.map_params(add, params)
    groups: dict[str, list[tuple[int, int, tuple[str, ...]]]] = defaultdict(list)
    for (group, *layout), arrays in layouts.items():
        whole, part = sum(size for _, size, _ in arrays), sum(size for _, _, size in arrays)
        first = arrays[0][0] + (f" and {len(arrays) - 1} more" if len(arrays) > 1 else "")
        groups[group].append((whole, part, (first, *layout, f"{part / _MIB:,.3f}")))
    head = ("", "shape", "logical axes", "split over", "MiB per chip")
    widths = [max(len(row[i]) for row in [head, *(r for rows in groups.values() for *_, r in rows)]) for i in range(5)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(text.ljust(width) for text, width in zip(row[:4], widths)) + "  " + row[4].rjust(widths[4])

    lines = []
    for group, rows in sorted(groups.items(), key=lambda item: -sum(whole for whole, *_ in item[1])):
        whole, part = sum(size for size, *_ in rows), sum(size for _, size, _ in rows)
        title = f"{group}: {whole / GIB:,.3f} GiB, {part / _MIB:,.1f} MiB per chip"
        lines += [title.ljust(widths[0]) + line(head)[widths[0] :]]
        lines += [line(row) for *_, row in sorted(rows, key=lambda row: -row[1])] + [""]
    sizes = [(whole, part) for rows in groups.values() for whole, part, _ in rows]
    whole, part = (sum(column) for column in zip(*sizes))
    return "\n".join([*lines, f"all together: {whole / GIB:,.3f} GiB, {part / _MIB:,.1f} MiB per chip"])


def mesh_picture(mesh: Mesh) -> bytes:
    """The chips of a mesh by their coordinates: the innermost split axis across, the others down. PNG."""
    split = [(axis, size) for axis, size in mesh.shape.items() if size > 1]
    across = split[-1][1] if split else 1
    chips = np.array([device.id for device in mesh.devices.flat]).reshape(-1, across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.1 + 0.75 * across, 0.75 + 0.55 * len(chips)), layout="constrained")
        panel = figure.subplots()
        for y, x in np.ndindex(chips.shape):
            _chip(panel, x, y, 1, 1, int(chips[y, x]))
        names = [f"{axis} {i}" for axis, size in split[-1:] for i in range(size)]
        rows = itertools.product(*([f"{axis} {i}" for i in range(size)] for axis, size in split[:-1]))
        panel.set_xticks(np.arange(across) + 0.5, names or [""])
        panel.set_yticks(np.arange(len(chips)) + 0.5, [", ".join(row) for row in rows])
        _frame(panel, across, len(chips), f"{mesh.size} chips")
        return to_png(figure)


def shard_pictures(arrays: Mapping[str, tuple[Sequence[int], NamedSharding, Sequence[str]]]) -> bytes:
    """Which chip holds what: arrays as rectangles, cut where they are split. A chip that holds a piece has a strip in
    it, though it holds the whole piece.

    Args:
      arrays: name → shape, sharding on a real mesh, and a name for each dimension. Two dimensions are drawn: those
        that are split, else the last ones.

    Returns:
      PNG, three arrays in a row.
    """
    rows = math.ceil(len(arrays) / 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.9 * rows), layout="constrained")
        panels = np.atleast_1d(figure.subplots(rows, 3)).ravel()
        for panel, (name, (shape, where, dimensions)) in zip(panels, arrays.items()):
            _shards(panel, name, tuple(shape), where, dimensions)
        for panel in panels[len(arrays) :]:
            panel.set_axis_off()
        return to_png(figure)


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]], unit: str) -> bytes:
    """One horizontal bar per name, made of parts; values stand inside parts that are wide enough. PNG."""
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    longest = max(sum(bar.values()) for bar in bars.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 1.3 + 0.42 * len(bars)), layout="constrained")
        panel = figure.subplots()
        ends = np.zeros(len(bars))
        for part, colour in zip(parts, itertools.cycle(_PART_COLOURS)):
            values = np.array([bar.get(part, 0.0) for bar in bars.values()])
            told = f"{part}, {values[0]:.3g}" if len(bars) == 1 else part  # there is room for thin parts, too
            drawn = panel.barh(list(bars), values, 0.62, left=ends, color=colour, label=told)
            labels = [f"{value:.3g}" if value > 0.06 * longest else "" for value in values]
            panel.bar_label(drawn, labels, label_type="center", color="white", fontsize=8)
            ends += values
        panel.invert_yaxis()
        panel.set_title(title)
        panel.set_xlabel(unit)
        panel.grid(axis="y", visible=False)
        panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return to_png(figure)


def _shards(panel: Axes, name: str, shape: tuple[int, ...], where: NamedSharding, dimensions: Sequence[str]) -> None:
    spec = [*where.spec, *[None] * (len(shape) - len(where.spec))]
    split = [d for d, axes in enumerate(spec) if axes is not None]
    down, across = sorted([*split, *[d for d in reversed(range(len(shape))) if d not in split]][:2])
    holders: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
    device: Any
    for device, index in where.devices_indices_map(shape).items():
        (y0, y1, _), (x0, x1, _) = (index[d].indices(shape[d]) for d in (down, across))
        holders[x0, x1, y0, y1].append(device.id)
    width, height = shape[across], shape[down]
    for (x0, x1, y0, y1), chips in holders.items():
        strip = (x1 - x0) / width / len(chips)
        for number, chip in enumerate(sorted(chips)):
            _chip(panel, x0 / width + number * strip, y0 / height, strip, (y1 - y0) / height, chip)
        panel.add_patch(
            Rectangle((x0 / width, y0 / height), (x1 - x0) / width, (y1 - y0) / height, fill=False, ec="white", lw=7)
        )
    panel.set(xticks=[], yticks=[])
    panel.set_xlabel(_side(dimensions[across], width, spec[across], where.mesh))
    panel.set_ylabel(_side(dimensions[down], height, spec[down], where.mesh))
    copies = len(next(iter(holders.values())))
    kept = f"each on {copies} chips" if len(holders) > 1 else f"whole on all {copies} chips"
    _frame(panel, 1, 1, f"{name}\n{len(holders)} piece{'s' * (len(holders) > 1)}, {kept}")


def _side(name: str, size: int, axes: Any, mesh: Mesh | AbstractMesh) -> str:
    over = [axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if mesh.shape[axis] > 1]
    return f"{name} {size}" + (f" over {' x '.join(over)}" if over else "")


def _chip(panel: Axes, x: float, y: float, width: float, height: float, chip: int) -> None:
    panel.add_patch(Rectangle((x, y), width, height, fc=_CHIP_COLOURS[chip % len(_CHIP_COLOURS)], ec="white", lw=0.6))
    panel.text(x + width / 2, y + height / 2, str(chip), ha="center", va="center", color="white", fontsize=9)


def _frame(panel: Axes, width: float, height: float, title: str) -> None:
    panel.set(xlim=(0, width), ylim=(height, 0))
    panel.set_title(title)
    panel.grid(visible=False)
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)
