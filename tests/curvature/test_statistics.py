"""Captured factors equal the definition, computed example by example in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import kfac
from reference.cases import (
    APPROXIMATIONS,
    LOSS_AVERAGES,
    LayerCase,
    batch_loss,
    conv2d_cases,
    example_loss,
    linear_cases,
)
from tapping import tapped

from tn_kfac.structures import structure

# torch's own advice on even kernels with padding="same".
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
PROJECTIONS = {"dense": lambda A: A, "diagonal": lambda A: torch.diag_embed(A.diagonal(0, 1, 2))}


def _check(case: LayerCase, approx: str, loss_average: str | None, names, frozen: str) -> None:
    module = case.module
    use_weight = frozen != "weight" or module.bias is None
    use_bias = module.bias is not None and frozen != "bias"
    module.weight.requires_grad_(use_weight)
    if module.bias is not None:
        module.bias.requires_grad_(use_bias)
    a, h = kfac.rows_of_examples(module, case.examples, example_loss)
    terms = kfac.loss_terms(loss_average, *a.shape[:2])
    A, G = kfac.factors(a, h, approx, terms, use_weight, use_bias)

    tap = tapped(module, approx=approx, loss_average=loss_average, structures=names)
    y = module(case.x)
    batch_loss(y if case.batched else y[None], terms).backward()
    factors = tap.factors()

    for actual, expected, name in zip(factors, (A, G), names, strict=True):
        expected = PROJECTIONS[name](expected)
        torch.testing.assert_close(structure(name).to_dense(actual), expected, **TIGHT)


CHOICES = {
    "approx": st.sampled_from(APPROXIMATIONS),
    "loss_average": st.sampled_from(LOSS_AVERAGES),
    "names": st.tuples(*[st.sampled_from(sorted(PROJECTIONS))] * 2),
    "frozen": st.sampled_from(["nothing", "weight", "bias"]),
}


@settings(max_examples=150)
@given(case=linear_cases(), **CHOICES)
def test_linear_factors_equal_definition(case, approx, loss_average, names, frozen):
    """Linear with any shared dimensions, with or without a batch dimension."""
    _check(case, approx, loss_average, names, frozen)


@settings(max_examples=150)
@given(case=conv2d_cases(), **CHOICES)
def test_conv2d_factors_equal_definition(case, approx, loss_average, names, frozen):
    """Conv2d with every hyper-parameter, batched or not: one pair of factors per group."""
    _check(case, approx, loss_average, names, frozen)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same", "valid"])
@pytest.mark.parametrize("kernel", [(2, 2), (3, 4)])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_every_padding_on_every_mode(mode, padding, kernel, approx):
    """The table of paddings, even kernels included; nothing is left to chance."""
    module = torch.nn.Conv2d(2, 2, kernel, padding=padding, padding_mode=mode, groups=2).double()
    case = LayerCase(module, torch.randn(2, 2, 4, 5, dtype=torch.float64))
    _check(case, approx, "batch", ("dense", "dense"), "nothing")


@pytest.mark.parametrize("structures", [("dense", "dense"), ("diagonal", "diagonal")])
def test_statistics_have_the_dtype_asked_for(structures):
    """A float32 tap of a bfloat16 layer sums in float32: bfloat16 would round to 8 bits."""
    module = torch.nn.Linear(3, 2).bfloat16()
    x = torch.randn(50, 3).bfloat16()
    tap = tapped(module, structures=structures, dtype=torch.float32)
    module(x).float().pow(2).mean(1).mean().backward()
    A, G = tap.factors()
    assert A.dtype == G.dtype == torch.float32
    rows = torch.cat([x.double(), torch.ones(50, 1, dtype=torch.float64)], dim=1)
    expected = PROJECTIONS[structures[0]]((rows.T @ rows / 50)[None])
    dense = structure(structures[0]).to_dense(A).double()
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-7)


def test_keyword_input_is_captured():
    """`layer(input=x)` is the same call as `layer(x)`."""
    module = torch.nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    A, G = kfac.layer_factors(module, list(x), example_loss, "expand", "batch")
    tap = tapped(module)
    batch_loss(module(input=x), 4).backward()
    torch.testing.assert_close(tap.factors(), (A, G), **TIGHT)


@given(bias=st.booleans(), dims=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_one_example_without_sharing_is_exact(bias, dims):
    """G ⊗ A is the outer product of the gradient with itself, where KFAC makes no error."""
    module = torch.nn.Linear(*dims, bias=bias).double()
    tap = tapped(module)
    batch_loss(module(torch.randn(1, dims[0], dtype=torch.float64))).backward()
    columns = [p.grad.reshape(dims[1], -1) for p in module.parameters()]
    gradient = torch.cat(columns, dim=1).flatten()
    A, G = tap.factors()
    torch.testing.assert_close(torch.kron(G[0], A[0]), torch.outer(gradient, gradient), **TIGHT)
