"""Stacks taken one by one, as large ones are on a GPU, are as batches."""

import pytest
import torch

from tn_kfac.kernels import solves


@pytest.fixture(params=["batched", "one by one"])
def stack(request, monkeypatch):
    """Three positive matrices and one that is not."""
    if request.param == "one by one":
        monkeypatch.setattr(solves, "_one_by_one", lambda stack: True)
    x = torch.randn(4, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positive = x @ x.mT
    positive[2, 3, 3] = -1.0
    return positive


def test_factors_and_what_has_none(stack):
    lower, info = solves.cholesky(stack)
    assert (info != 0).tolist() == [False, False, True, False]
    fits = info == 0
    torch.testing.assert_close(lower[fits] @ lower[fits].mT, stack[fits])
    assert torch.equal(lower[fits], lower[fits].tril())


def test_systems(stack):
    lower = torch.linalg.cholesky(stack[:2])
    found = solves.over_lower(stack[2:], lower)
    torch.testing.assert_close(found @ lower.mT, stack[2:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_large_ones_on_a_gpu():
    x = torch.randn(3, solves.ROWS, 2 * solves.ROWS, dtype=torch.float64, device="cuda")
    stack = x @ x.mT
    lower, info = solves.cholesky(stack)
    assert not info.any()
    torch.testing.assert_close(lower @ lower.mT, stack)
    torch.testing.assert_close(solves.over_lower(x[..., : solves.ROWS], lower) @ lower.mT,
                               x[..., : solves.ROWS])  # fmt: skip
