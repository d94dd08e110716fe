"""Diagrams: valid files, every axis named, nothing on top of anything else, and repeatable."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, pairwise
from pathlib import Path
from runpy import run_path
from xml.etree import ElementTree

import pytest
import torch

from tn_kfac import expressions
from tn_kfac.tensor_network import draw as module
from tn_kfac.tensor_network.diagram.picture import Box, Label, Picture
from tn_kfac.tensor_network.diagram.wiring import picture
from tn_kfac.tensor_network.draw import draw
from tn_kfac.tensor_network.network import Network, operand
from tn_kfac.tensor_network.simplify import simplify

pytest.importorskip("matplotlib")

Rectangle = tuple[float, float, float, float]  # left, bottom, right, top
SAME = {"padding": 1, "groups": 2}
PATCHES = {"stride": 2, "groups": 2}


def of(name: str, *shapes: tuple[int, ...], **hyper) -> Network:
    """The network of an operation on tensors of these shapes."""
    tensors = (torch.zeros(shape) for shape in shapes)
    return getattr(expressions, name).expression(*tensors, **hyper).network


X, V, W = (2, 4, 8, 8), (2, 6, 8, 8), (6, 2, 3, 3)
X3 = (2, 4, 5, 5, 5)

CASES: dict[str, Callable[[], Network]] = {
    "conv_forward": lambda: of("conv_forward", X, W, **SAME),
    "conv_forward 1d": lambda: of("conv_forward", (2, 4, 8), (6, 4, 3), padding=1),
    "conv_forward 3d": lambda: of("conv_forward", X3, (6, 4, 3, 3, 3), padding=1),
    "conv_forward down-sampling": lambda: of("conv_forward", X, (6, 2, 1, 1), **PATCHES),
    "conv_input_vjp": lambda: of("conv_input_vjp", W, V, input_size=8, **SAME),
    "conv_input_vjp patches": lambda: of(
        "conv_input_vjp", (6, 2, 2, 2), (2, 6, 4, 4), input_size=8, **PATCHES
    ),
    "conv_weight_vjp": lambda: of("conv_weight_vjp", X, V, kernel_size=3, **SAME),
    "conv_weight_vjp per example": lambda: of(
        "conv_weight_vjp_per_example", X, V, kernel_size=3, **SAME
    ),
    "conv_weight_vjp sampled": lambda: (
        of("conv_weight_vjp", X, V, kernel_size=3, **SAME)
        .sampled("x", "c", 1, "sample c")
        .sampled("v", "o1", 4, "sample o1")
    ),
    "unfold_input": lambda: of("unfold_input", X, kernel_size=3, **SAME),
    "unfold_kernel": lambda: of("unfold_kernel", W, input_size=8, **SAME),
    "fold": lambda: of("fold", (2, 36, 64), output_size=(8, 8), kernel_size=3, padding=1),
    "conv_transpose_forward": lambda: of(
        "conv_transpose_forward", X, (4, 3, 3, 3), stride=2, padding=1, groups=2
    ),
    "kfac_expand": lambda: of("kfac_expand", X, kernel_size=3, **SAME),
    "kfac_expand 3d": lambda: of("kfac_expand", X3, kernel_size=3, **SAME),
    "kfac_expand patches": lambda: of("kfac_expand", X, kernel_size=2, **PATCHES),
    "kfac_expand diagonal": lambda: of("kfac_expand_diagonal", X, kernel_size=3, **SAME),
    "kfac_expand gradient": lambda: of("kfac_expand_gradient", V, groups=2),
    "kfac_reduce": lambda: of("kfac_reduce", X, kernel_size=3, **SAME),
    "kfac_reduce 1d": lambda: of("kfac_reduce", (2, 4, 8), kernel_size=3, padding=1),
    "kfac_reduce patches": lambda: of("kfac_reduce", X, kernel_size=2, **PATCHES),
    "kfac_reduce diagonal": lambda: of("kfac_reduce_diagonal", X, kernel_size=3, **SAME),
    "ggn_diagonal": lambda: of("ggn_diagonal", X, V, kernel_size=3, **SAME),
    "ggn_gram": lambda: of("ggn_gram", X, V, kernel_size=3, **SAME),
    "ggn_gram 3d": lambda: of("ggn_gram", X3, (2, 6, 5, 5, 5), kernel_size=3, **SAME),
    "ggn_gram stacked": lambda: of("ggn_gram", X, (5, *V), kernel_size=3, **SAME),
}
each_case = pytest.mark.parametrize(
    "network", [pytest.param(make(), id=name) for name, make in CASES.items()]
)


def saved(network: Network, path: Path) -> str:
    draw(network, path, title="title")
    return path.read_text(encoding="utf-8")


def words(svg: str) -> list[str]:
    """The texts of an SVG."""
    root = ElementTree.fromstring(svg)
    texts = root.iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()).strip() for text in texts]


def overlap(first: Rectangle, second: Rectangle) -> bool:
    left, low = max(first[0], second[0]), max(first[1], second[1])
    right, high = min(first[2], second[2]), min(first[3], second[3])
    return left < right and low < high


def of_label(label: Label) -> Rectangle:
    left, right = label.extent
    return left, label.y - 0.07, right, label.y + 0.07


def of_box(box: Box, within: float = 0.01) -> Rectangle:
    half = box.width / 2 - within
    return box.x - half, box.bottom + within, box.x + half, box.top - within


def lines(drawn: Picture) -> list[Rectangle]:
    """The straight pieces of all lines."""
    pieces = [pair for line in drawn.lines for pair in pairwise(line)]
    return [(min(a, c), min(b, d), max(a, c), max(b, d)) for (a, b), (c, d) in pieces]


@each_case
def test_nothing_lies_on_anything_else(network):
    for drawn in map(picture, (network, simplify(network))):
        pieces = lines(drawn)
        boxes = [of_box(box) for box in drawn.boxes]
        labels = [of_label(label) for label in drawn.labels]
        assert all(left == right or low == high for left, low, right, high in pieces)
        assert not [pair for pair in combinations(boxes + labels, 2) if overlap(*pair)]
        assert not [(a, b) for a in pieces for b in boxes + labels if overlap(a, b)]


@each_case
def test_lines_of_different_axes_do_not_run_into_one_another(network):
    for drawn in map(picture, (network, simplify(network))):
        for one, other in combinations(drawn.lines, 2):
            for first in lines(Picture(lines=[one])):
                for second in lines(Picture(lines=[other])):
                    left, low = max(first[0], second[0]), max(first[1], second[1])
                    right, high = min(first[2], second[2]), min(first[3], second[3])
                    touch = left <= right and low <= high
                    assert not touch or (right - left < 1e-9 and high - low < 1e-9)


@each_case
def test_every_axis_is_named_once(network):
    for each in (network, simplify(network)):
        labels = sorted(label.text for label in picture(each).labels)
        assert labels == sorted(each.size)


@each_case
def test_files_are_valid_and_name_every_axis(network, tmp_path):
    png, svg = tmp_path / "network.png", tmp_path / "network.svg"
    figure = draw(network, [png, svg], title="The title")
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    found = words(svg.read_text(encoding="utf-8"))
    assert {*network.size, *simplify(network).size, "The title", "network", "simplified"} <= {
        *found
    }
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)


def test_texts_of_a_figure_do_not_overlap():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(CASES["ggn_gram"](), title="A title that is too long for a single line " * 4)
    renderer = FigureCanvasAgg(figure).get_renderer()
    extents = [t.get_window_extent(renderer) for t in figure.axes[0].texts if t.get_text()]
    assert len(extents) > 50
    assert not [pair for pair in combinations(extents, 2) if pair[0].overlaps(pair[1])]
    assert all(figure.bbox.containsx(e.x0) and figure.bbox.containsx(e.x1) for e in extents)
    assert all(figure.bbox.containsy(e.y0) and figure.bbox.containsy(e.y1) for e in extents)


def test_same_network_same_file(tmp_path):
    network = CASES["kfac_reduce"]()
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    assert saved(network, first) == saved(network, second)
    assert "<dc:date>" not in first.read_text(encoding="utf-8")


def test_pictures_are_white_whatever_the_style(tmp_path):
    import matplotlib

    network = CASES["conv_forward 1d"]()
    plain, styled = tmp_path / "plain.svg", tmp_path / "styled.SVG"
    draw(network, plain)
    dark = {"savefig.facecolor": "black", "font.family": "serif", "savefig.bbox": "tight"}
    with matplotlib.rc_context(dark):
        draw(network, styled)
    assert plain.read_text(encoding="utf-8") == styled.read_text(encoding="utf-8")


def test_captions(tmp_path):
    found = words(saved(CASES["kfac_reduce patches"](), tmp_path / "a.svg"))
    assert "1/512 × abcde,fgd,hie,abjkl,mnk,opl->bcfhjmo" in found
    assert found.count("result [g, (c k1 k2), (c' k1' k2')]") == 2
    assert "x viewed as [n, (g c), (o1 k1), (o2 k2)]" in found
    assert "dense ×4" in found


def test_captions_of_strided_views_and_lost_dimensions(tmp_path):
    network = of("conv_weight_vjp", X, (2, 6, 4, 4), kernel_size=1, **PATCHES)
    found = words(saved(network, tmp_path / "a.svg"))
    assert "x viewed with strides as [n, (g c), o1, o2]" in found
    assert "result [(g d), c, 1, 1]" in found


def test_summed_legs_end_in_ones_and_copies_are_mirrored():
    drawn = picture(CASES["kfac_reduce"]())
    assert [box.text for box in drawn.boxes].count("1") == 4
    centre = sum(box.x for box in drawn.boxes) / len(drawn.boxes)
    at = {(box.text, round(box.x - centre, 6), round(box.y, 6)) for box in drawn.boxes}
    assert at == {(text, -x, y) for text, x, y in at}


def test_one_panel_without_simplification(tmp_path):
    network, path = CASES["kfac_expand patches"](), tmp_path / "a.svg"
    draw(network, path, simplified=False)
    found = words(path.read_text(encoding="utf-8"))
    assert "simplified" not in found and found.count("i1") == 1


def test_more_axes_than_letters(tmp_path):
    names = [f"a{i}" for i in range(53)]
    network = Network.build([operand("t", *names)], ((a,) for a in names), dict.fromkeys(names, 2))
    found = words(saved(network, tmp_path / "a.svg"))
    assert any("more than an einsum equation has letters" in text for text in found)
    assert {*names} <= {*found}


@pytest.mark.parametrize(
    "network", [Network.build([], (), {}, Fraction(3)), Network.build([operand("a")], (), {})]
)
def test_scalars(network, tmp_path):
    assert "result []" in words(saved(network, tmp_path / "a.svg"))


@pytest.mark.parametrize("path", ["network.pdf", "network", ["network.svg", "network.pdf"]])
def test_unknown_suffix(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = path if isinstance(path, str) else path[-1]
    with pytest.raises(ValueError, match=re.escape(f"path='{bad}'") + ".*end it in .png or .svg"):
        draw(CASES["conv_forward"](), path)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fresh = run_path(module.__file__)  # the module itself needs no matplotlib
    with pytest.raises(ImportError, match=r"pip install tn_kfac\[draw\]"):
        fresh["draw"](CASES["conv_forward"]())
