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
from torch import Tensor

from tn_kfac.curvature import LayerTap
from tn_kfac.structures import structure

RTOL, ATOL = 1e-9, 1e-12
PROJECTIONS = {"dense": lambda A: A, "diagonal": lambda A: torch.diag_embed(A.diagonal(0, 1, 2))}
CHOICES = {
    "approx": st.sampled_from(APPROXIMATIONS),
    "loss_average": st.sampled_from(LOSS_AVERAGES),
    "names": st.tuples(*[st.sampled_from(sorted(PROJECTIONS))] * 2),
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


def assert_factors(tap: LayerTap, expected: tuple[Tensor, Tensor], names: tuple[str, str]) -> None:
    """A tap's factors are the dense ones, projected to the structures that the user chose.

    A layer whose A is diagonal by itself keeps that diagonal, whatever the user chose.
    """
    if tap.recipe.layer.diagonal_input:
        names = ("diagonal", names[1])
    for actual, dense, name in zip(tap.factors(), expected, names, strict=True):
        actual, dense = structure(name).to_dense(actual), PROJECTIONS[name](dense)
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
    y = case.outputs()
    assert (len(y), case.positions(y)) == (len(rows.a), rows.positions)
    batch_loss(y, terms).backward()
    assert_factors(tap, definition.factors([rows], approx, terms, use_weight, use_bias), names)
