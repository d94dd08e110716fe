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
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from tn_kfac.tensor_network.diagram.picture import Box, Picture, Point
from tn_kfac.tensor_network.diagram.wiring import picture
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
ROUND = ("delta", "ones")
MARGIN, PANEL_GAP, WIDEST_CAPTION = 0.25, 0.8, 4.6
"""Around the figure, between its panels; a panel grows up to this for its caption (inches)."""
TITLE, HEADING, LINE = 0.3, 0.35, 0.2
"""Heights of a line of the title, of the headings and of a line of a caption."""
LETTERS_PER_INCH, TITLE_LETTERS_PER_INCH = 13.2, 8.5
STYLES: dict[str, dict[str, Any]] = {
    "title": {"fontsize": 13, "fontweight": "bold", "color": INK},
    "heading": {"fontsize": 10.5, "fontweight": "bold", "color": FAINT},
    "equation": {"fontsize": 9, "family": "DejaVu Sans Mono", "color": INK},
    "plain": {"fontsize": 9, "color": FAINT},
    "rules": {"fontsize": 9, "fontweight": "bold", "color": "#3b8544"},
    "arrow": {"fontsize": 20, "color": FAINT, "ha": "center", "va": "center"},
    "node": {"fontsize": 13, "color": INK, "va": "center_baseline"},
    "turned": {"fontsize": 13, "color": INK, "va": "center", "rotation": 90},
    "small": {"fontsize": 9, "color": INK, "va": "center_baseline"},
    "axis": {"fontsize": 10, "color": INK},
}
RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "tn_kfac",  # equal pictures are equal files
    "font.family": "DejaVu Sans",
    "text.usetex": False,
    "savefig.bbox": None,
}


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
    with rc_context(RC):
        figure = Figure(facecolor="white")
        _compose(figure, panels, title)
        for each in paths:
            kind = each.suffix.lower()[1:]
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(each, format=kind, dpi=200, facecolor="white", metadata=metadata)
    return figure


def _checked(path: AnyPath | Sequence[AnyPath] | None) -> list[Path]:
    """The paths to write."""
    given = [] if path is None else [path] if isinstance(path, (str, PathLike)) else list(path)
    paths = [Path(fspath(each)) for each in given]
    for each in paths:
        if each.suffix.lower() not in SUFFIXES:
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
    views = [("plain", view) for view in _views(network, result)]
    rule = ("rules", used) if used else ("plain", "no rule applies")
    return [
        _Panel("network", picture(network), _formula(network)),
        _Panel("simplified", picture(result), [*_formula(result), *views, rule]),
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
    words = (" ".join(g) if len(g) == 1 else f"({' '.join(g)})" if g else "1" for g in groups)
    return f"[{', '.join(words)}]"


def _views(before: Network, after: Network) -> list[str]:
    """How operands are read whose dimensions a rule has split, one line for each name."""
    known: dict[str, set[str]] = {}
    for node in _operands(before):
        known.setdefault(node.name, set()).update(node.axes)
    views: dict[str, str] = {}
    for node in _operands(after):
        new = [leg for leg in node.legs if set(leg.axes) - known[node.name]]
        if any(len(leg.axes) > 1 or any(leg.windows) for leg in new):
            how = "viewed with strides" if any(any(leg.windows) for leg in new) else "viewed"
            shown = _shown([leg.axes for leg in node.legs])
            views.setdefault(node.name, f"{node.name} {how} as {shown}")
    return list(views.values())


def _operands(network: Network) -> list[Operand]:
    return [node for node in network.nodes if isinstance(node, Operand)]


def _compose(figure: Figure, panels: list[_Panel], title: str | None) -> None:
    """Place the panels side by side on a figure of the right size."""
    widths = [_width(panel) for panel in panels]
    captions = [_caption(panel, width) for panel, width in zip(panels, widths, strict=True)]
    width = sum(widths) + PANEL_GAP * (len(panels) - 1) + 2 * MARGIN
    titles = wrap(title or "", int(width * TITLE_LETTERS_PER_INCH))
    tallest = max(panel.picture.height for panel in panels)
    foot = MARGIN + LINE * max(map(len, captions)) + 0.2
    top = foot + tallest + (HEADING if len(panels) > 1 else 0.0)
    height = top + TITLE * len(titles) + MARGIN
    figure.set_size_inches(width, height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    write = partial(axes.text, ha="center", va="top")
    for number, line in enumerate(titles):
        write(width / 2, height - MARGIN - TITLE * number, line, **STYLES["title"])
    left = MARGIN
    for panel, caption, each in zip(panels, captions, widths, strict=True):
        centre = left + each / 2
        write(centre, top, panel.heading, **STYLES["heading"])
        _ink(axes, panel.picture, (centre, foot + tallest / 2))
        for number, (style, line) in enumerate(caption):
            write(centre, foot - 0.2 - LINE * number, line, **STYLES[style])
        if panel is not panels[0]:
            axes.text(left - PANEL_GAP / 2, foot + tallest / 2, "→", **STYLES["arrow"])
        left += each + PANEL_GAP


def _width(panel: _Panel) -> float:
    """The width of a panel: its diagram's, or more for a caption that is a little longer."""
    longest = max(len(text) for _, text in panel.caption) / LETTERS_PER_INCH
    return max(panel.picture.width, min(longest + 0.1, WIDEST_CAPTION))


def _caption(panel: _Panel, width: float) -> list[tuple[str, str]]:
    """The lines of the caption; an equation is broken at commas."""
    letters = int(width * LETTERS_PER_INCH)
    lines = []
    for style, text in panel.caption:
        if style == "equation" and len(text) > letters:
            text = text.replace(",", ", ").replace("->", " ->")
        lines += [(style, line) for line in wrap(text, letters)]
    return lines


def _ink(axes: Axes, drawn: Picture, centre: Point) -> None:
    """Draw a picture around a point."""
    from matplotlib.patches import Circle, PathPatch

    left, bottom, right, top = drawn.bounds
    dx, dy = centre[0] - (left + right) / 2, centre[1] - (bottom + top) / 2
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
    from matplotlib.patches import Circle, FancyBboxPatch

    x, y = box.x + dx, box.y + dy
    fill, edge = COLOURS[box.kind]
    if box.kind in ROUND:
        patch = Circle((x, y), box.width / 2)
    else:
        corner = (x - box.width / 2, y - box.height / 2)
        style = "round,pad=0,rounding_size=0.12"
        patch = FancyBboxPatch(corner, box.width, box.height, boxstyle=style)
    patch.set(facecolor=fill, edgecolor=edge, linewidth=1.4, zorder=3)
    axes.add_patch(patch)
    font = STYLES["small" if box.kind in ROUND else "turned" if box.turned else "node"]
    axes.text(x, y, box.text, ha="center", zorder=4, **font)


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
