"""Statistics of calls that other tests do not make: of other dtypes, by keyword, exact ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import kfac
from reference.cases import batch_loss, example_loss
from tapping import tapped

from tn_kfac.structures import structure

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
PROJECTIONS = {"dense": lambda A: A, "diagonal": lambda A: torch.diag_embed(A.diagonal(0, 1, 2))}


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
