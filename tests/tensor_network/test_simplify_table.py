"""What each rule does, as a table of networks before and after; None: it does not apply."""

from fractions import Fraction

import pytest
import torch

from tensor_network.oracle import evaluate
from tensor_network.strategies import tensors_of
from tn_kfac.tensor_network.network import Delta, Leg, Network, Operand, Window, operand
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis
from tn_kfac.tensor_network.simplify import RULES

TILES = SpatialAxis(6, 3, stride=3)  # 2 windows of 3 pixels
SKIPS = SpatialAxis(7, 2, stride=3)  # 2 windows of 2 pixels, 3 pixels between and behind
SPREAD = SpatialAxis(6, 2, stride=3, dilation=2)  # 2 windows that reach over 3 pixels
OVERLAPS = SpatialAxis(4, 3)  # 2 windows that share 2 pixels
PADDED = SpatialAxis(4, 3, stride=3, padding=(1, 1))
OVERHANGS = SpatialAxis(5, 3, stride=3, padding=(0, 1))
WHOLE = SpatialAxis(3, 3)  # 1 window of all pixels, of whatever stride
CROPPED = SpatialAxis(4, 3, stride=2)  # 1 window, one pixel behind it
SQUARE = SpatialAxis(5, 3)  # as many windows as kernel pixels


def network(nodes, output, scale=1, **sizes):
    output = [(group,) if isinstance(group, str) else group for group in output]
    return Network.build(nodes, output, sizes, Fraction(scale))


def spatial(axis, nodes, output, scale=1, **sizes):
    """A network with the pattern Π[k, o, i] of `axis` in front."""
    sizes = dict(zip("koi", axis.extents, strict=True)) | sizes
    return network([Pattern(axis, "k", "o", "i"), *nodes], output, scale, **sizes)


def view(axis):
    """The legs (o, k) of a strided view."""
    return Leg(
        ("o", "k"), (Window(axis.output_size, axis.stride, axis.kernel_size, axis.dilation),)
    )


x_i, x_ni, v_o = operand("x", "i"), operand("x", "n", "i"), operand("v", "o")
a2b2 = {"a": 2, "b": 2}

TABLE = {
    "delta": [
        # An inner delta, one with an output on either side, and one that is an output.
        (
            network([operand("x", "a"), Delta("a", "b"), operand("y", "b")], "", **a2b2),
            network([operand("x", "a"), operand("y", "a")], "", a=2),
        ),
        (
            network([Delta("a", "b"), operand("y", "b")], "a", **a2b2),
            network([operand("y", "a")], "a", a=2),
        ),
        (
            network([operand("x", "a"), Delta("a", "b")], "b", **a2b2),
            network([operand("x", "b")], "b", b=2),
        ),
        (network([operand("x", "a"), Delta("a", "b")], "ab", **a2b2), None),
        # A delta of its own is the trace of an identity: a number.
        (
            network([operand("x", "c"), Delta("a", "a")], "c", a=2, c=3),
            network([operand("x", "c")], "c", scale=2, c=3),
        ),
        (
            network([operand("x", "c"), Delta("a", "b")], "c", c=3, **a2b2),
            network([operand("x", "c")], "c", scale=2, c=3),
        ),
    ],
    "dense": [
        # Windows that tile the axis reshape an operand, an output, or part of a leg.
        (
            spatial(TILES, [x_ni], "nko", n=2),
            network([operand("x", "n", ("o", "k"))], "nko", n=2, o=2, k=3),
        ),
        (
            spatial(TILES, [v_o, operand("w", "k")], "i"),
            network([v_o, operand("w", "k")], [("o", "k")], o=2, k=3),
        ),
        (
            spatial(TILES, [operand("x", ("c", "i"))], "cko", c=2),
            network([operand("x", ("c", "o", "k"))], "cko", c=2, o=2, k=3),
        ),
        (
            spatial(WHOLE, [x_ni], "nko", n=2),
            network([operand("x", "n", ("o", "k"))], "nko", n=2, o=1, k=3),
        ),
        # Anything else: pixels met twice, padding, a hyper-edge, pixels between windows, an
        # output that has o already, a summed pattern, one with two legs of one name.
        *((spatial(axis, [x_ni], "nko", n=2), None) for axis in (OVERLAPS, PADDED, SKIPS)),
        (spatial(TILES, [x_i, operand("y", "i")], "ko"), None),
        (spatial(TILES, [v_o, operand("w", "k")], "oi"), None),
        (network([Pattern(TILES, "k", None, "i"), x_i], "k", k=3, i=6), None),
        (network([Pattern(SpatialAxis(2, 2, stride=2), *"aoa"), v_o], "o", a=2, o=1), None),
    ],
    "down-sampling": [
        # Windows with pixels between them are a strided view.
        *(
            (
                spatial(axis, [x_ni], "nko", n=2),
                network([Operand("x", (Leg(("n",)), view(axis)))], "nko", n=2, o=2, k=2),
            )
            for axis in (SKIPS, SPREAD)
        ),
        (
            spatial(CROPPED, [x_ni], "nko", n=2),
            network([Operand("x", (Leg(("n",)), view(CROPPED)))], "nko", n=2, o=1, k=3),
        ),
        # Anything else: pixels met twice, padding, windows that tile, a view of part of a
        # leg, an output with pixels that no window meets.
        *(
            (spatial(axis, [x_ni], "nko", n=2), None)
            for axis in (OVERLAPS, PADDED, OVERHANGS, TILES)
        ),
        (spatial(SKIPS, [operand("x", ("c", "i"))], "cko", c=2), None),
        (spatial(SKIPS, [v_o, operand("w", "k")], "i"), None),
    ],
    "pattern collapse": [
        # Equal patterns that share two legs, or all three.
        *(
            (
                spatial(OVERLAPS, [Pattern(OVERLAPS, *legs), x_i], "k", **{legs[at]: size}),
                spatial(OVERLAPS, [x_i, Delta("koi"[at], legs[at])], "k", **{legs[at]: size}),
            )
            for at, (legs, size) in enumerate([("joi", 3), ("kpi", 2), ("koj", 4)])
        ),
        (
            spatial(OVERLAPS, [Pattern(OVERLAPS, "k", "o", "i"), x_i], "k"),
            spatial(OVERLAPS, [x_i], "k"),
        ),
        # One leg in common only; another axis; a leg summed away.
        (spatial(OVERLAPS, [Pattern(OVERLAPS, "j", "o", "l"), x_i], "k", j=3, l=4), None),
        (spatial(OVERLAPS, [Pattern(SpatialAxis(4, 3, outputs=2), *"koi"), x_i], "k"), None),
        (spatial(OVERLAPS, [Pattern(OVERLAPS, "k", None, "i"), x_i], "k"), None),
    ],
    "summed pattern": [
        (
            spatial(OVERLAPS, [x_i], "k"),
            network([Pattern(OVERLAPS, "k", None, "i"), x_i], "k", k=3, i=4),
        ),
        (
            network([Pattern(OVERLAPS, "k", None, "i"), x_i], "", k=3, i=4),
            network([Pattern(OVERLAPS, None, None, "i"), x_i], "", i=4),
        ),
        (
            network([Pattern(PADDED, "k", None, None), operand("x", "a")], "a", k=3, a=2),
            network([operand("x", "a")], "a", scale=4, a=2),
        ),
        (spatial(OVERLAPS, [x_i], "ko"), None),
        (network([Pattern(SQUARE, "k", "k", "i"), x_i], "", k=3, i=5), None),
    ],
    "squeeze": [
        (
            network([operand("x", "a", "b"), Delta("a", "c")], ["a", ("b", "c")], a=1, b=2, c=1),
            network([operand("x", (), "b")], [(), ("b", "c")], b=2, c=1),
        ),
        (
            spatial(SpatialAxis(3, 1), [x_i], "ko"),
            network([Pattern(SpatialAxis(3, 1), None, "o", "i"), x_i], [(), "o"], o=3, i=3),
        ),
        (
            network([Pattern(SpatialAxis(1, 2, padding=(2, 1)), None, "o", None)], "o", o=3),
            None,
        ),
        (
            network([operand("x", "o"), Pattern(SpatialAxis(3, 3), None, "o", None)], "o", o=1),
            network([operand("x", ())], [()], scale=3),
        ),
        (network([operand("x", "a")], "a", a=2), None),
    ],
    "merge": [
        (
            network([operand("x", "n", "a", "b"), operand("y", ("a", "b"))], "n", n=2, a=2, b=3),
            network(
                [
                    Operand("x", (Leg(("n",)), Leg(("a·b",), (None, None)))),
                    operand("y", "a·b"),
                ],
                "n",
                **{"n": 2, "a·b": 6},
            ),
        ),
        (
            network([operand("x", "a", "b")], [("a", "b")], a=2, b=3),
            network([Operand("x", (Leg(("a·b",), (None, None)),))], ["a·b"], **{"a·b": 6}),
        ),
        # Apart in the output, in one operand, in a pattern, in a strided view; or repeated.
        (network([operand("x", "a", "b")], "ab", a=2, b=3), None),
        (network([operand("x", "a", "b"), operand("y", "b", "a")], "", a=2, b=3), None),
        (network([operand("x", "a", "b"), operand("y", "b")], "", a=2, b=3), None),
        (network([operand("x", "k", "i"), Pattern(OVERLAPS, "k", None, "i")], "", k=3, i=4), None),
        (network([Operand("x", (view(SKIPS),))], [("o", "k")], o=2, k=2), None),
        (network([operand("x", "a", "a")], "", a=2), None),
    ],
}
ROWS = [(rule, *row) for rule, rows in TABLE.items() for row in rows]


def test_every_rule_has_rows_of_both_kinds():
    assert TABLE.keys() == RULES.keys()
    for rows in TABLE.values():
        assert {after is None for _, after in rows} == {True, False}


@pytest.mark.parametrize(("rule", "before", "after"), ROWS)
def test_rule(rule, before, after):
    assert RULES[rule](before) == after


@pytest.mark.parametrize(("before", "after"), [row[1:] for row in ROWS if row[2] is not None])
def test_row_has_equal_values(before, after):
    tensors = tensors_of(before)
    torch.testing.assert_close(
        evaluate(after, tensors), evaluate(before, tensors), rtol=1e-14, atol=0
    )
