"""Charts as files; the one door to matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Bars", "Chart", "Lines", "Span", "Spans", "Stacks", "draw_charts"]

COLORS = ("#2a6f97", "#e07a5f", "#81b29a", "#f2cc8f", "#6d597a", "#b56576", "#355070", "#adb5bd")
PALE_COLORS = ("#ced4da", "#eef1f4")
LINE_STYLES = ("-", "--", ":")
PANEL_INCHES = (5.2, 3.8)
WIDE_PANEL_INCHES = (10.4, 5.7)
SPAN_FONT_SIZE = 7


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Groups of bars side by side."""

    title: str
    y_label: str
    groups: Sequence[str]
    values: Mapping[str, Sequence[float | None]]
    """By series, one per group; None leaves a gap."""
    ranges: Mapping[str, Sequence[tuple[float, float] | None]] = field(default_factory=dict)
    """By series: lowest and highest, drawn as whiskers."""
    marks: Sequence[float | None] = ()
    """A line across each group: a goal, or a limit."""
    mark_label: str = ""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Curves."""

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """By label: x and y."""
    curves_per_color: int = 1
    """Neighbours that belong together: of one color, told apart by their dashes."""
    log_x: bool = False
    log_y: bool = False
    mark: float | None = None
    """A horizontal line."""


@dataclass(frozen=True, kw_only=True)
class Stacks:
    """Bars cut into parts."""

    title: str
    y_label: str
    bars: Mapping[str, Mapping[str, float]]
    """By bar: its parts, bottom first."""


@dataclass(frozen=True)
class Span:
    """A rectangle of a `Spans` chart."""

    start: float
    end: float
    top: float
    """From the upper edge of the chart down."""
    height: float
    series: str
    label: str
    """Left out where it has no room."""


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Rectangles beside and below each other, on a wide panel."""

    title: str
    x_label: str
    y_label: str
    spans: Sequence[Span]
    series: Sequence[str]
    pale_series: Sequence[str] = ()


Chart = Bars | Lines | Stacks | Spans


def draw_charts(path: Path, charts: Sequence[Chart], *, caption: str = "", columns: int = 3) -> None:
    """Draw charts side by side, at most so many in a row, into one file; no display is needed."""
    from matplotlib.figure import Figure

    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    width, height = WIDE_PANEL_INCHES if any(isinstance(chart, Spans) for chart in charts) else PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    for index, chart in enumerate(charts):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(chart.title, fontsize=11)
        axes.set_ylabel(chart.y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if isinstance(chart, Spans) else "y", alpha=0.25)
        axes.set_axisbelow(True)
        if isinstance(chart, Bars):
            _draw_bars(axes, chart)
        elif isinstance(chart, Lines):
            _draw_lines(axes, chart)
        elif isinstance(chart, Spans):
            _draw_spans(axes, chart)
        else:
            _draw_stacks(axes, chart)
    if caption:
        figure.supxlabel(caption, fontsize=8, color="#666666")
    figure.savefig(path, dpi=150)


def _draw_bars(axes: Any, chart: Bars) -> None:
    width = 0.8 / max(1, len(chart.values))
    for index, (label, values) in enumerate(chart.values.items()):
        drawn = [(group, value) for group, value in enumerate(values) if value is not None]
        left = [group - 0.4 + width * (index + 0.5) for group, _ in drawn]
        color = COLORS[index % len(COLORS)]
        axes.bar(left, [value for _, value in drawn], width * 0.92, label=label, color=color)
        ranges = chart.ranges.get(label, ())
        for x, (group, value) in zip(left, drawn, strict=True):
            if group < len(ranges) and (limits := ranges[group]) is not None:
                low, high = limits
                axes.errorbar([x], [value], [[value - low], [high - value]], color="#333333", capsize=2, linewidth=1)
    for group, mark in enumerate(chart.marks):
        if mark is not None:
            named = {"label": chart.mark_label} if group == 0 and chart.mark_label else {}
            axes.hlines(mark, group - 0.45, group + 0.45, color="#333333", linestyle="--", linewidth=1, **named)
    axes.set_xticks(range(len(chart.groups)), chart.groups, fontsize=8)
    axes.legend(fontsize=8, frameon=False)


def _draw_lines(axes: Any, chart: Lines) -> None:
    for index, (label, (xs, ys)) in enumerate(chart.curves.items()):
        group, place = divmod(index, chart.curves_per_color)
        color, style = COLORS[group % len(COLORS)], LINE_STYLES[place]
        axes.plot(xs, ys, marker="o", markersize=3, label=label, color=color, linestyle=style)
    if chart.mark is not None:
        axes.axhline(chart.mark, color="#333333", linestyle="--", linewidth=1)
    axes.set_xlabel(chart.x_label)
    if chart.log_x:
        axes.set_xscale("log", base=2)
    if chart.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)


def _draw_stacks(axes: Any, chart: Stacks) -> None:
    parts = list(dict.fromkeys(part for bar in chart.bars.values() for part in bar))
    bottoms = [0.0] * len(chart.bars)
    for index, part in enumerate(parts):
        heights = [bar.get(part, 0.0) for bar in chart.bars.values()]
        axes.bar(range(len(heights)), heights, 0.6, bottoms, label=part, color=COLORS[index % len(COLORS)])
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(chart.bars)), list(chart.bars), fontsize=8)
    axes.legend(fontsize=8, frameon=False)


def _draw_spans(axes: Any, chart: Spans) -> None:
    last, bottom = max(span.end for span in chart.spans), max(span.top + span.height for span in chart.spans)
    colors = dict(zip(chart.series, COLORS, strict=False)) | dict(zip(chart.pale_series, PALE_COLORS, strict=False))
    for series, color in colors.items():
        if not (of_series := [span for span in chart.spans if span.series == series]):
            continue
        axes.barh(
            [span.top for span in of_series],
            [span.end - span.start for span in of_series],
            [span.height for span in of_series],
            [span.start for span in of_series],
            align="edge",
            label=series,
            color=color,
            edgecolor="white",
            linewidth=0.6,
        )
        for span in of_series:
            # the rest of the panel is ticks, legend and titles
            inches = (span.end - span.start) / last * WIDE_PANEL_INCHES[0] * 0.8
            room = (inches, span.height / bottom * WIDE_PANEL_INCHES[1] * 0.75)
            _label_span(axes, span, room, "white" if _is_dark(color) else "#222222")
    axes.set_xlim(0, last)
    axes.set_ylim(bottom, 0)
    axes.set_xlabel(chart.x_label)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _is_dark(color: str) -> bool:
    """Whether white is easier to read on a "#rrggbb" than black; luma of ITU-R BT.601."""
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 128


def _label_span(axes: Any, span: Span, room: tuple[float, float], color: str) -> None:
    """Write a label where it fits `room`, a width and a height in inches: as it is, on one line, or upwards."""
    width, height = room
    line = SPAN_FONT_SIZE * 1.3 / 72
    for text, rotation in ((span.label, 0), (span.label.replace("\n", ", "), 0), (span.label, 90)):
        lines = text.split("\n")
        along, across = max(map(len, lines)) * SPAN_FONT_SIZE * 0.6 / 72, len(lines) * line
        if (along <= width and across <= height) if rotation == 0 else (across <= width and along <= height):
            x, y = (span.start + span.end) / 2, span.top + span.height / 2
            axes.text(x, y, text, ha="center", va="center", rotation=rotation, fontsize=SPAN_FONT_SIZE, color=color)
            return
