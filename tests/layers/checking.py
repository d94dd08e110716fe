"""Captured factors against the definition, for drawn layers and choices of the user."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvature.tapping import tapped
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from reference import definition, kfac
from reference.cases import APPROXIMATIONS, LOSS_AVERAGES, LayerCase, batch_loss
from reference.singd import projection
from torch import Tensor

from tn_kfac.curvature import LayerTap
from tn_kfac.structures import structure

RTOL, ATOL = 1e-9, 1e-12
STRUCTURES = ("dense", "diagonal", "block2diagonal", "hierarchical1_1", "triltoeplitz",
              "triutoeplitz", "trilbottomrightdiag")  # fmt: skip
CHOICES = {
    "approx": st.sampled_from(APPROXIMATIONS),
    "loss_average": st.sampled_from(LOSS_AVERAGES),
    "names": st.tuples(*[st.sampled_from(STRUCTURES)] * 2),
    "frozen": st.sampled_from(["nothing", "weight", "bias"]),
}


def amounts(ordinary: int, nightly: int) -> Any:
    """Parametrise a test by how many cases it draws, in ordinary and in nightly runs."""
    many = pytest.param(nightly, marks=pytest.mark.nightly)
    return pytest.mark.parametrize("amount", [ordinary, many])


def check_drawn(amount: int, check: Callable[..., None], **strategies: SearchStrategy[Any]) -> None:
    """Call `check` with that many drawn cases."""
    settings(max_examples=amount)(given(**strategies)(check))()


def freeze(case: LayerCase, frozen: str) -> tuple[bool, bool]:
    """Freeze weight or bias, unless that leaves nothing: whether either is trained."""
    bias = getattr(case.module, "bias", None)
    case.module.weight.requires_grad_(frozen != "weight" or bias is None)
    if bias is not None:
        bias.requires_grad_(frozen != "bias")
    return case.module.weight.requires_grad, bias is not None and bias.requires_grad


def move(tap: LayerTap) -> None:
    """Give a tap factors K and C, members of their spaces, that are not the identity."""
    recipe, pair = tap.recipe, []
    for space, dim in (
        (recipe.input_structure, recipe.dim_in), (recipe.output_structure, recipe.dim_out),
    ):  # fmt: skip
        rows = torch.randn(recipe.layer.groups, 3, dim, dtype=tap.dtype)
        pair.append(space.add_to_diagonal_(space.project_gram(rows), 1.0))
    tap.basis = (pair[0], pair[1])


def assert_factors(tap: LayerTap, expected: tuple[Tensor, Tensor], names: tuple[str, str]) -> None:
    """A tap's factors are the dense ones, projected to the structures that the user chose.

    Structures that read rows see them through the tap's K and C. A layer whose A is diagonal by
    itself keeps that diagonal, whatever the user chose; one of few parameters is dense instead.
    """
    recipe = tap.recipe
    if recipe.layer.diagonal_input:
        names = ("diagonal", names[1])
    if not recipe.layer.structured:
        first, second = (name if name == "diagonal" else "dense" for name in names)
        names = first, second
    assert names == (recipe.input_structure.name, recipe.output_structure.name)
    for at, (actual, dense, name) in enumerate(zip(tap.factors(), expected, names, strict=True)):
        space = structure(name)
        if tap.basis is not None and name not in ("dense", "diagonal"):
            K = space.to_dense(tap.basis[at])
            dense = K.mT @ dense @ K
        actual, dense = space.to_dense(actual), projection(name)(dense)
        atol = ATOL * max(1.0, float(dense.abs().max())) if dense.numel() else 0.0
        torch.testing.assert_close(actual, dense, rtol=RTOL, atol=atol)


def check_one_batch(
    case: LayerCase, approx: str, loss_average: str | None, names: tuple[str, str], frozen: str
) -> None:
    """One forward and backward pass of one batch."""
    use_weight, use_bias = freeze(case, frozen)
    rows = definition.rows(case)
    terms = kfac.loss_terms(loss_average, len(rows.a), rows.positions)
    tap = tapped(case.module, approx=approx, loss_average=loss_average, structures=names)
    move(tap)
    y = case.outputs()
    assert (len(y), case.positions(y)) == (len(rows.a), rows.positions)
    batch_loss(y, terms).backward()
    assert_factors(tap, definition.factors([rows], approx, terms, use_weight, use_bias), names)
