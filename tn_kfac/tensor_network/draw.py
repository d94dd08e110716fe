"""The diagram of a network, as a picture.

Boxes are nodes (operands blue, index patterns Π orange, window counts S green), lines
are axes. A line that ends outside is an axis of the output; a dot is an axis that more
than two nodes, or two nodes and the output, share; a leg that ends in 1 is summed.
See https://arxiv.org/abs/2307.02275.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from tn_kfac.tensor_network.geometry import Box, Picture, Point, picture
from tn_kfac.tensor_network.network import Network, Operand
from tn_kfac.tensor_network.plan import einsum_equation
from tn_kfac.tensor_network.simplify import traced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AnyPath = str | PathLike[str]

SUFFIXES = (".png", ".svg")
INK, FAINT = "#2b2f36", "#6b7280"
COLOURS = {
    "operand": ("#dbe8f8", "#2f66a8"),
    "pattern": ("#fde3c8", "#c2691a"),
    "count": ("#dcefdc", "#3b8544"),
    "delta": ("#ffffff", INK),
    "ones": ("#ffffff", FAINT),
    "other": ("#ece6f6", "#6f4fa8"),
}
"""Fill and edge of each kind of node."""
MARGIN, PANEL_GAP, LINE = 0.25, 0.6, 0.2
COLUMNS_PER_INCH = 13.5


@dataclass(frozen=True)
class _Panel:
    heading: str
    picture: Picture
    caption: list[tuple[str, str]]


def draw(
    network: Network,
    path: AnyPath | Sequence[AnyPath] | None = None,
    *,
    title: str | None = None,
    simplified: bool = True,
) -> Figure:
    """Draw the diagram of a network, beside that of its simplification.

    Args:
        network: Of any operation, e.g. `kfac_expand.expression(...).network`.
        path: Where to save it, or several such; the suffix (.png, .svg) is the format.
        title: Above the diagrams.
        simplified: Whether to simplify the network and to draw the result as well.

    Raises:
        ValueError: If a path has another suffix.
        ImportError: If matplotlib is not installed.
    """
    paths = _checked(path)
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing a network needs matplotlib: pip install tn_kfac[draw]"
        ) from error
    panels = _panels(network, simplified)
    # Text stays text in an SVG, and equal pictures are equal files.
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "tn_kfac", "font.family": "DejaVu Sans"}
    ):
        figure = Figure(facecolor="white")
        _compose(figure, panels, title)
        for each in paths:
            metadata = {"Date": None} if each.suffix == ".svg" else None
            figure.savefig(each, dpi=200, metadata=metadata)
    return figure


def _checked(path: AnyPath | Sequence[AnyPath] | None) -> list[Path]:
    """The paths to write."""
    given = [] if path is None else [path] if isinstance(path, (str, PathLike)) else list(path)
    paths = [Path(fspath(each)) for each in given]
    for each in paths:
        if each.suffix not in SUFFIXES:
            raise ValueError(
                f"path={str(each)!r} has suffix {each.suffix!r}: end it in .png or .svg"
            )
    return paths


def _panels(network: Network, simplified: bool) -> list[_Panel]:
    """The diagram of the network, and that of the simplified one."""
    if not simplified:
        return [_Panel("", picture(network), _formula(network))]
    result, rules = traced(network)
    used = ", ".join(f"{rule} ×{count}" for rule, count in Counter(rules).items())
    notes = [("note", used or "no rule applies"), *(("plain", v) for v in _views(network, result))]
    return [
        _Panel("network", picture(network), _formula(network)),
        _Panel("simplified", picture(result), _formula(result) + notes),
    ]


def _formula(network: Network) -> list[tuple[str, str]]:
    """The einsum equation, the axes of the result and its scale."""
    try:
        equation = einsum_equation([node.axes for node in network.nodes], network.output_axes)
    except ValueError:
        equation = f"{len(network.sizes)} axes: more than an einsum equation has letters"
    scale = "" if network.scale == 1 else f"{network.scale} × "
    return [("equation", f"{scale}{equation}"), ("plain", f"result {_shown(network.output)}")]


def _shown(groups: Sequence[tuple[str, ...]]) -> str:
    """Dimensions in words: [g, (c k1 k2)]."""
    words = (" ".join(group) if len(group) == 1 else f"({' '.join(group)})" for group in groups)
    return f"[{', '.join(words)}]"


def _views(before: Network, after: Network) -> list[str]:
    """How operands are read whose dimensions a rule has split, one line for each name."""
    known = {leg for node in before.nodes if isinstance(node, Operand) for leg in node.legs}
    views: dict[str, str] = {}
    for node in after.nodes:
        if isinstance(node, Operand):
            new = [leg for leg in node.legs if leg not in known]
            if any(len(leg.axes) > 1 or any(leg.windows) for leg in new):
                shown = _shown([leg.axes for leg in node.legs])
                views.setdefault(node.name, f"{node.name} viewed as {shown}")
    return list(views.values())


STYLES: dict[str, dict[str, Any]] = {
    "title": {"fontsize": 13, "fontweight": "bold", "color": INK},
    "heading": {"fontsize": 10.5, "fontweight": "bold", "color": FAINT},
    "equation": {"fontsize": 9, "family": "DejaVu Sans Mono", "color": INK},
    "plain": {"fontsize": 9, "color": FAINT},
    "note": {"fontsize": 9, "fontweight": "bold", "color": "#3b8544"},
    "node": {"fontsize": 13, "color": INK},
    "axis": {"fontsize": 10, "color": INK},
}


def _compose(figure: Figure, panels: list[_Panel], title: str | None) -> None:
    """Place the panels side by side on a figure of the right size."""
    bounds = [panel.picture.bounds for panel in panels]
    widths = [max(right - left, 3.2) for left, _, right, _ in bounds]
    captions = [_lines(p.caption, width) for p, width in zip(panels, widths, strict=True)]
    tallest = max(top - bottom for _, bottom, _, top in bounds)
    foot = MARGIN + LINE * max(map(len, captions)) + 0.2
    head = MARGIN + (0.35 if title else 0) + (0.35 if panels[0].heading else 0)
    width = sum(widths) + PANEL_GAP * (len(panels) - 1) + 2 * MARGIN
    height = foot + tallest + head
    figure.set_size_inches(width, height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    if title:
        axes.text(width / 2, height - MARGIN, title, ha="center", va="top", **STYLES["title"])
    middle = MARGIN
    for panel, caption, box, each in zip(panels, captions, bounds, widths, strict=True):
        centre = middle + each / 2
        top = foot + tallest + 0.3
        axes.text(centre, top, panel.heading, ha="center", va="top", **STYLES["heading"])
        _ink(
            axes,
            panel.picture,
            centre - (box[0] + box[2]) / 2,
            foot + tallest / 2 - (box[1] + box[3]) / 2,
        )
        for number, (style, line) in enumerate(caption):
            y = foot - 0.2 - LINE * number
            axes.text(centre, y, line, ha="center", va="top", **STYLES[style])
        middle += each + PANEL_GAP


def _lines(caption: list[tuple[str, str]], width: float) -> list[tuple[str, str]]:
    """The caption, wrapped; an equation is wrapped at commas."""
    lines = []
    for style, text in caption:
        spaced = text.replace(",", ", ").replace("->", " ->") if style == "equation" else text
        lines += [(style, line) for line in wrap(spaced, int(width * COLUMNS_PER_INCH))]
    return lines


def _ink(axes: Axes, drawn: Picture, dx: float, dy: float) -> None:
    """Draw a picture, moved by (dx, dy)."""
    from matplotlib.patches import Circle, PathPatch

    for line in drawn.lines:
        path = _rounded([(x + dx, y + dy) for x, y in line])
        axes.add_patch(
            PathPatch(path, fill=False, edgecolor=INK, linewidth=1.5, capstyle="round", zorder=1)
        )
    for x, y in drawn.dots:
        axes.add_patch(Circle((x + dx, y + dy), 0.045, color=INK, zorder=2))
    for box in drawn.boxes:
        _node(axes, box, dx, dy)
    for label in drawn.labels:
        at = (label.x + dx, label.y + dy)
        axes.text(*at, label.text, ha=label.align, va="center", zorder=4, **STYLES["axis"])


def _node(axes: Axes, box: Box, dx: float, dy: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    fill, edge = COLOURS[box.kind]
    small = min(box.width, box.height)
    radius = small / 2 if box.kind in ("delta", "ones") else min(0.12, small / 2)
    corner = (box.x - box.width / 2 + dx, box.bottom + dy)
    style = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(
        FancyBboxPatch(
            corner,
            box.width,
            box.height,
            boxstyle=style,
            facecolor=fill,
            edgecolor=edge,
            linewidth=1.4,
            zorder=3,
        )
    )
    font = STYLES["node"] | ({"fontsize": 9} if small < 0.3 else {})
    axes.text(box.x + dx, box.y + dy, box.text, ha="center", va="center_baseline", zorder=4, **font)


def _rounded(points: list[Point], radius: float = 0.12) -> Any:
    """The path through the points, with round corners."""
    from matplotlib.path import Path as Outline

    vertices, codes = [points[0]], [Outline.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        vertices += [_towards(corner, before, radius), corner, _towards(corner, after, radius)]
        codes += [Outline.LINETO, Outline.CURVE3, Outline.CURVE3]
    return Outline([*vertices, points[-1]], [*codes, Outline.LINETO])


def _towards(start: Point, end: Point, distance: float) -> Point:
    """The point at a distance from `start` on the way to `end`, at most half-way."""
    (x, y), (u, v) = start, end
    share = min(distance / max(abs(u - x) + abs(v - y), 1e-9), 0.5)
    return x + share * (u - x), y + share * (v - y)
