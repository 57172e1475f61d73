"""Pictures of a report, as PNG or GIF bytes: loss curves, cluster shares, intervals, timelines, video strips."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

INK = "#1f2933"
MUTED = "#8592a0"
BLUE = "#2f6db5"
ORANGE = "#d9822b"
GRID = "#e4e9ee"

STYLE: Any = {
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_WIDTH = 8.6  # inches of a full-width figure
_MOST_PANELS = 4  # of a sweep beside each other


Curves = tuple[Sequence[int], Mapping[str, Sequence[float]]]  # steps, and losses by stream


def loss_curves(losses: Curves, heldout: Curves = ((), {})) -> bytes:
    """One panel per stream: logged losses, thin, and their running median, bold; those on held-out events as points.
    Logarithmic where they fall far."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 2.5), layout="constrained")
        steps, streams = losses
        panels = np.atleast_1d(figure.subplots(1, max(1, len(streams))))
        for panel, (name, values) in zip(panels, streams.items()):
            curve = np.asarray(values, float)
            panel.plot(steps, curve, color=BLUE, alpha=0.3, linewidth=0.8)
            panel.plot(steps, _running_median(curve), color=BLUE, linewidth=1.8)
            if name in heldout[1]:
                panel.plot(heldout[0], heldout[1][name], "o", color=INK, markersize=3.5, label="held-out events")
                panel.legend(loc="upper right")
            positive = curve[np.isfinite(curve) & (curve > 0)]
            if len(positive) == len(curve) and len(positive) and positive.max() > 5 * positive.min():
                panel.set_yscale("log")
            panel.set_title(name)
            panel.set_xlabel("step")
        return to_png(figure)


def cluster_shares(title: str, before: np.ndarray, after: np.ndarray) -> bytes:
    """Share of windows per cluster, largest first: as the data has them and as the sampler draws them, in percent."""
    order = np.argsort(-np.asarray(before))
    place = np.arange(len(order))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        axes.bar(place - 0.2, 100 * np.asarray(before)[order], 0.4, color=MUTED, label="in the data")
        axes.bar(place + 0.2, 100 * np.asarray(after)[order], 0.4, color=BLUE, label="as drawn")
        axes.axhline(100 / max(1, len(order)), color=INK, linewidth=0.8, linestyle=":", label="uniform")
        axes.set_title(title)
        axes.set_xlabel("cluster, largest first")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("share, %")
        axes.set_xlim(-0.7, len(order) - 0.3)
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper right", ncols=3)
        return to_png(figure)


def shares(title: str, values: np.ndarray) -> bytes:
    """Share of events per cluster, in percent, in the order given, beside what each would have if all had the same."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 1.7), layout="constrained")
        axes = figure.subplots()
        axes.bar(np.arange(len(values)), 100 * np.asarray(values), 0.8, color=BLUE)
        axes.axhline(100 / len(values), color=INK, linewidth=0.8, linestyle=":", label="uniform")
        axes.set(title=title, xlabel="cluster, largest first", ylabel="% of events", xlim=(-0.7, len(values) - 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper right")
        return to_png(figure)


def intervals(
    rates: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    ours: Collection[str] = ("trained",),
    suffix: str = " success",
) -> bytes:
    """Rates with their 95 % intervals: policy → measure → {rate, low, high, episodes}; `ours` in colour.

    A panel's title is its measure and `suffix`.
    """
    measures = list(dict.fromkeys(measure for row in rates.values() for measure in row))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 0.7 + 0.42 * len(rates)), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, max(1, len(measures)), sharey=True))
        for panel, measure in zip(panels, measures):
            for y, (policy, row) in enumerate(rates.items()):
                value = row[measure]
                colour = BLUE if policy in ours else MUTED
                panel.plot([value["low"], value["high"]], [y, y], color=colour, lw=6, alpha=0.35, solid_capstyle="butt")
                panel.plot(value["rate"], y, "o", color=colour, markersize=7)
            panel.set_yticks(range(len(rates)), [name.replace("_", " ") for name in rates])
            panel.set_ylim(len(rates) - 0.5, -0.5)
            panel.set_xlim(-0.03, 1.03)
            panel.set_title(f"{measure}{suffix}")
            panel.grid(axis="y", visible=False)
        return to_png(figure)


def sweep(
    arms: Mapping[str, Mapping[str, Mapping[str, Any]]], curves: Mapping[str, Sequence[Sequence[float]]]
) -> bytes:
    """The loss curves of the arms, a line per seed; then a panel per measure: each seed, the interval of the mean."""
    measures = list(dict.fromkeys(measure for row in arms.values() for measure in row))
    colours = matplotlib.colormaps["tab10" if len(arms) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    with matplotlib.rc_context(STYLE):
        panels = 1 + len(measures)
        rows = math.ceil(panels / _MOST_PANELS)
        columns = math.ceil(panels / rows)
        size = max(_WIDTH, 3.4 * columns), rows * (1.4 + 0.3 * max(4, len(arms)))
        figure = Figure(figsize=size, layout="constrained")
        curve_panel, *measure_panels = figure.subplots(rows, columns, squeeze=False).flat
        for unused in measure_panels[len(measures) :]:
            unused.set_visible(False)
        for colour, lines in zip(colours, curves.values()):
            for line in lines:
                first = len(line) // 20  # the start would hide the differences
                curve_panel.plot(range(first, len(line)), line[first:], color=colour, linewidth=1.2)
        curve_panel.set(title="training loss, smoothed", xlabel="step", yscale="log")
        for axis in (curve_panel.yaxis.set_major_formatter, curve_panel.yaxis.set_minor_formatter):
            axis("{x:g}")
        for number, (panel, measure) in enumerate(zip(measure_panels, measures), 1):
            for y, (colour, row) in enumerate(zip(colours, arms.values())):
                entry = row.get(measure, {})
                if entry.get("low") is not None:
                    panel.plot([entry["low"], entry["high"]], [y, y], color=colour, lw=7, alpha=0.35)
                values = [value for value in entry.get("values", [entry.get("rate")]) if value is not None]
                panel.plot(values, [y] * len(values), "o", color=colour, markersize=5)
            named = number == 1 or number % columns == 0  # the first panel of its row, or the one beside the curves
            panel.set_yticks(range(len(arms)), list(arms) if named else [""] * len(arms))
            panel.set_ylim(len(arms) - 0.5, -0.5)
            panel.set_title(measure)
            panel.grid(axis="y", visible=False)
        return to_png(figure)


def motion(seconds: np.ndarray, curves: Mapping[str, np.ndarray], boundaries: Mapping[str, Sequence[float]]) -> bytes:
    """Curves of one episode below each other, with the boundaries of each level as lines, the coarsest boldest.

    Args:
      seconds: `[T + 1]`.
      curves: title of a panel → `[T + 1]`.
      boundaries: level → seconds, coarse to fine.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 0.5 + 0.95 * len(curves)), layout="constrained")
        panels = np.atleast_1d(figure.subplots(len(curves), 1, sharex=True))
        for panel, (name, curve) in zip(panels, curves.items()):
            panel.plot(seconds, curve, color=BLUE, linewidth=1.4)
            panel.set_title(name)
            panel.grid(axis="x", visible=False)
            for depth, (level, moments) in enumerate(boundaries.items()):
                colour, width = (INK, 1.4) if depth == 0 else (ORANGE, 1.0) if depth == 1 else (MUTED, 0.6)
                for number, moment in enumerate(moments):
                    label = level if panel is panels[0] and number == 0 else None
                    panel.axvline(moment, color=colour, linewidth=width, alpha=0.7, zorder=0, label=label)
        panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=len(boundaries))
        panels[-1].set_xlabel("seconds")
        panels[-1].set_xlim(seconds[0], seconds[-1])
        return to_png(figure)


def lengths(values: Mapping[str, Sequence[float]]) -> bytes:
    """A histogram of the seconds of spans per level, its title the median, on a logarithmic axis that all share."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 1.9), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(values)))
        every = np.concatenate([np.asarray(row, float) for row in values.values()])
        bins = np.geomspace(every.min(), max(every.max(), 1.1 * every.min()), 31)
        for panel, (level, row) in zip(panels, values.items()):
            panel.hist(row, bins=bins, color=BLUE)
            panel.axvline(np.median(row), color=ORANGE, linewidth=1.4)
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:g}")
            panel.set_title(f"{level}: {np.median(row):.1f} s")
            panel.set_xlabel("seconds")
            panel.grid(axis="x", visible=False)
        return to_png(figure)


def errors(title: str, values: Mapping[str, float], unit: str) -> bytes:
    """Horizontal bars, one per name, the value written beside each; the first bar is the model's."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 0.7 + 0.34 * len(values)), layout="constrained")
        axes = figure.subplots()
        colours = [BLUE if name.startswith("model") else MUTED for name in values]
        bars = axes.barh([name.replace("_", " ") for name in values], list(values.values()), 0.6, color=colours)
        axes.bar_label(bars, fmt="%.3f", padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.grid(axis="y", visible=False)
        return to_png(figure)


def scatter(title: str, true: np.ndarray, predicted: np.ndarray, unit: str) -> bytes:
    """Predicted against true values with the diagonal."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.4), layout="constrained")
        axes = figure.subplots()
        top = 1.05 * float(max(np.max(true, initial=0.1), np.max(predicted, initial=0.1)))
        axes.plot([0, top], [0, top], color=MUTED, linewidth=1, linestyle=":")
        axes.plot(true, predicted, "o", color=BLUE, markersize=3, alpha=0.5)
        axes.set(xlim=(0, top), ylim=(0, top), xlabel=f"true, {unit}", ylabel=f"predicted, {unit}")
        axes.set_title(title)
        return to_png(figure)


def video_strip(rows: Mapping[str, Sequence[np.ndarray]], *, columns: int = 8, height: int = 96) -> bytes:
    """Rows of frames at equally spaced moments, the name of each row on its left; all rows have as many frames."""
    font = _font(13)
    gap, label = 3, 82
    strips = []
    for name, frames in rows.items():
        moments = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
        cells = [Image.new("RGB", (label, height), "white")]
        ImageDraw.Draw(cells[0]).multiline_text((0, height / 2), name, fill=INK, font=font, anchor="lm", spacing=6)
        cells += [_scaled(frames[moment], height) for moment in moments]
        strips.append(_beside(cells, gap))
    return _encode(_below(strips, gap), "PNG")


def thumbnail(frame: np.ndarray, height: int = 64) -> bytes:
    """One `[H, W, 3]` uint8 frame as a JPEG of the given height."""
    return _encode(_scaled(frame, height), "JPEG")


def rollout_gif(
    views: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str], *, fps: float, height: int = 160
) -> bytes:
    """The views side by side over time with the event's caption below each frame.

    Args:
      views: view name → frames `[H, W, 3]` uint8, equally many in each.
      captions: text under each frame.
      fps: frames per second.
      height: of each picture, pixels.
    """
    font = _font(14)
    room = math.ceil(max(font.getlength(caption) for caption in captions)) + 12
    pages = []
    for moment, caption in enumerate(captions):
        picture = _beside([_scaled(frames[moment], height) for frames in views.values()], 3)
        page = Image.new("RGB", (max(picture.width, room), picture.height + 26), "white")
        page.paste(picture, (0, 0))
        ImageDraw.Draw(page).text((6, picture.height + 13), caption, fill=INK, font=font, anchor="lm")
        pages.append(page.quantize(128, dither=Image.Dither.NONE))
    out = io.BytesIO()
    pages[0].save(out, "GIF", save_all=True, append_images=pages[1:], duration=round(1000 / fps), loop=0, optimize=True)
    return out.getvalue()


def _running_median(values: np.ndarray) -> np.ndarray:
    half = max(1, len(values) // 40)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.median(window) for window in windows])


def _scaled(frame: np.ndarray, height: int) -> Image.Image:
    width = round(frame.shape[1] * height / frame.shape[0])
    enlarge = height > frame.shape[0]
    return Image.fromarray(
        cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC if enlarge else cv2.INTER_AREA)
    )


def _beside(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    page = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    x = 0
    for picture in pictures:
        page.paste(picture, (x, 0))
        x += picture.width + gap
    return page


def _below(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    page = Image.new("RGB", (max(picture.width for picture in pictures), height), "white")
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height + gap
    return page


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The sans-serif font that matplotlib ships."""
    return ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", size)


def _encode(picture: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return out.getvalue()


def to_png(figure: Figure) -> bytes:
    """A finished figure as PNG bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=170)
    return out.getvalue()
