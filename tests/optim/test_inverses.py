"""Batched decompositions: equal to torch's on each block, and never the end of a run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tn_kfac.kernels.products import parted
from tn_kfac.optim.inverses import (
    COLD_ITERATIONS,
    Request,
    eigen,
    inverses,
    newton_inverse,
    warm_iterations,
)
from tn_kfac.structures import BlockDiagonal, Dense, Diagonal, Structure

SPACES = [Dense(), Diagonal(), BlockDiagonal(1), BlockDiagonal(3), BlockDiagonal(4)]
DTYPE = torch.float64
drawn = st.lists(
    st.tuples(st.sampled_from(SPACES), st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=6
)


def positive(space: Structure, groups: int, dim: int, seed: int, least: float = 0.1) -> Tensor:
    """Coordinates of positive matrices."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, dim + 3, dim, generator=generator, dtype=DTYPE)
    return space.add_to_diagonal_(space.project_gram(rows), least)


def requests_of(shapes, least: float = 0.1) -> list[Request]:
    made = (
        (space, positive(space, groups, dim, at, least))
        for at, (space, groups, dim) in enumerate(shapes)
    )
    return [
        Request(space, (m, space.eye(len(m), m.shape[1], DTYPE, m.device))) for space, m in made
    ]


@given(drawn)
def test_eigenvectors_are_in_the_space_and_rebuild_the_matrix(shapes):
    requests = [Request(r.space, r.matrices[:1]) for r in requests_of(shapes)]
    for (space, (matrix,)), (values, basis) in zip(requests, eigen(requests), strict=True):
        Q = space.to_dense(basis)
        eye = torch.eye(Q.shape[-1], dtype=DTYPE).expand_as(Q)
        torch.testing.assert_close(Q @ Q.mT, eye, rtol=1e-10, atol=1e-10)
        rebuilt = Q @ torch.diag_embed(values) @ Q.mT
        torch.testing.assert_close(rebuilt, space.to_dense(matrix), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "exponent"),
    [("cholesky", 1), ("newton-schulz", 1), ("newton-schulz", 0.5)],
)
@given(shapes=drawn)
def test_inverses_and_roots(shapes, method, exponent):
    requests = requests_of(shapes)
    if method == "cholesky":
        requests = [Request(r.space, r.matrices[:1]) for r in requests]
    found = inverses(requests, method, exponent, COLD_ITERATIONS)
    for request, inverse in zip(requests, found, strict=True):
        dense = request.space.to_dense(request.matrices[0])
        root = request.space.to_dense(inverse)
        product = dense @ (root if exponent == 1 else root @ root)
        eye = torch.eye(dense.shape[-1], dtype=DTYPE).expand_as(dense)
        torch.testing.assert_close(product, eye, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(root, root.mT, rtol=1e-9, atol=1e-9)


def test_blocks_of_one_size_are_one_call(monkeypatch):
    """Of all layers and channel groups, whatever their structures."""
    seen, whole = [], torch.linalg.eigh
    spy = lambda stack: seen.append(stack.shape) or whole(stack)  # noqa: E731
    monkeypatch.setattr(torch.linalg, "eigh", spy)
    shapes = [(Dense(), 2, 4), (BlockDiagonal(4), 1, 10), (Dense(), 1, 2), (Diagonal(), 1, 7)]
    eigen([Request(r.space, r.matrices[:1]) for r in requests_of(shapes)])
    assert sorted(seen) == [(2, 2, 2), (4, 4, 4)]


@given(st.integers(1, 12), st.floats(1e-6, 1e3), st.floats(0.0, 0.3), st.integers(0, 99))
def test_warm_start_follows_a_moving_average(dim, scale, change, seed):
    """Few iterations a step keep up with B ← (1 − c) B + c B̂, from a cold start of thirty."""
    B = scale * positive(Dense(), 1, dim, seed)
    (X,) = newton_inverse(B, B, COLD_ITERATIONS)
    for at in range(5):
        B = (1 - change) * B + change * scale * positive(Dense(), 1, dim, seed + at + 1)
        (X,) = newton_inverse(B, X, warm_iterations(change))
    for _ in range(4):  # and catches up when it stands still
        (X,) = newton_inverse(B, X, 1)
    eye = torch.eye(dim, dtype=DTYPE)
    assert torch.linalg.matrix_norm(X @ B - eye, 2).item() < 0.05


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_warm_start_survives_any_jump(factor):
    """A thousand-fold larger or smaller matrix: no divergence, and then convergence."""
    B = positive(Dense(), 2, 6, 0)
    (X,) = newton_inverse(B, B, COLD_ITERATIONS)
    eye = torch.eye(6, dtype=DTYPE)
    for _ in range(30):
        (X,) = newton_inverse(factor * B, X, 1)
        assert X.isfinite().all()
        assert (torch.linalg.eigvalsh(X) > 0).all()
        norms = torch.linalg.matrix_norm(factor * B @ X, 2)
        assert (norms < 10).all()
    torch.testing.assert_close(factor * B @ X, eye.expand(2, -1, -1), rtol=1e-6, atol=1e-6)


def bad(kind: str) -> Tensor:
    """Two matrices, of which the second is bad."""
    stack = torch.stack([torch.eye(4, dtype=DTYPE) * 2, torch.eye(4, dtype=DTYPE)])
    stack[1] = {
        "NaN": torch.full((4, 4), torch.nan, dtype=DTYPE),
        "inf": torch.full((4, 4), torch.inf, dtype=DTYPE),
        "negative": -torch.eye(4, dtype=DTYPE),
        "rank one": torch.ones(4, 4, dtype=DTYPE),
        "zero": torch.zeros(4, 4, dtype=DTYPE),
    }[kind]
    return stack


@pytest.mark.parametrize("kind", ["NaN", "inf", "negative", "rank one", "zero"])
@pytest.mark.parametrize("method", ["eigh", "cholesky", "newton-schulz", "root"])
def test_a_bad_block_spoils_no_other(kind, method):
    """It comes back as NaN, or as something finite; the other one as if it were alone."""
    request = Request(Dense(), (bad(kind), torch.eye(4, dtype=DTYPE).expand(2, -1, -1).clone()))
    if method == "eigh":
        values, basis = eigen([Request(Dense(), request.matrices[:1])])[0]
        good = basis[0] @ values[0].diag() @ basis[0].mT
        assert kind in ("NaN", "inf") or (values[1] >= 0).all()
        assert kind not in ("NaN", "inf") or values[1].isnan().all()
    else:
        exponent, name = (0.5, "newton-schulz") if method == "root" else (1, method)
        parts = request.matrices[:1] if method == "cholesky" else request.matrices
        found = inverses([Request(Dense(), parts)], name, exponent, COLD_ITERATIONS)[0]
        good = torch.linalg.inv(found[0] @ found[0] if method == "root" else found[0])
        assert kind not in ("NaN", "inf") or found[1].isnan().all()
    torch.testing.assert_close(good, 2 * torch.eye(4, dtype=DTYPE), rtol=1e-9, atol=1e-9)


def test_eigh_that_fails_is_tried_again(monkeypatch):
    """Each block alone, in float64, with more damping; what fails for good is NaN."""
    whole, calls = torch.linalg.eigh, []

    def failing(matrix):
        calls.append(matrix.dtype)
        if matrix.dim() == 3 or matrix[0, 0] == 7 or (matrix[0, 0] == 3 and len(calls) < 4):
            raise torch.linalg.LinAlgError("linalg.eigh: did not converge")
        return whole(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    stack = torch.stack([torch.eye(3) * scale for scale in (2.0, 3.0, 7.0)])
    monkeypatch.setattr("tn_kfac.optim.eigenvectors.MORE_DAMPING", (0.0,))
    values, basis = eigen([Request(Dense(), (stack,))])[0]
    assert values[:2].tolist() == [[2.0] * 3, [3.0] * 3]
    assert values[2].isnan().all() and basis[2].isnan().all()
    assert set(calls[1:]) == {torch.float64}


def test_rank_deficient_cholesky_gets_more_damping():
    ones = torch.ones(1, 5, 5, dtype=torch.float32)
    (inverse,) = inverses([Request(Dense(), (ones,))], "cholesky", 1, COLD_ITERATIONS)
    assert inverse.isfinite().all()
    vector = torch.ones(5)
    torch.testing.assert_close(inverse[0] @ vector, vector / 5, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["eigh", "cholesky", "newton-schulz"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_decomposed_in_float32(method, dtype):
    matrix = positive(Dense(), 2, 5, 0).to(dtype)
    if method == "eigh":
        values, basis = eigen([Request(Dense(), (matrix,))])[0]
        assert values.dtype == basis.dtype == torch.float32
    else:
        parts = (matrix,) if method == "cholesky" else (matrix, matrix)
        (inverse,) = inverses([Request(Dense(), parts)], method, 1, COLD_ITERATIONS)
        assert inverse.dtype == torch.float32
        eye = torch.eye(5).expand(2, -1, -1)
        torch.testing.assert_close(inverse @ matrix.float(), eye, rtol=1e-2, atol=1e-2)


@given(drawn)
def test_orthogonal_step(shapes):
    """One step from the last eigenvectors: the Q of B · last, sorted; of 30 the eigenvectors."""
    requests = requests_of(shapes)
    for (space, (matrix, last)), (_, basis) in zip(requests, eigen(requests, 1), strict=True):
        for at, B in enumerate(space.to_dense(matrix)):
            for part in torch.arange(len(B)).split(_width(space, len(B))):
                block, Q = B[part][:, part], space.to_dense(last)[at][part][:, part]
                order = (Q.mT @ block @ Q).diagonal().argsort(descending=True)
                expected = torch.linalg.qr((block @ Q)[:, order]).Q
                found = space.to_dense(basis)[at][part][:, part]
                torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-8, atol=1e-8)


def _width(space: Structure, dim: int) -> int:
    """Rows of a space's blocks."""
    return 1 if isinstance(space, Diagonal) else getattr(space, "size", dim)


@pytest.mark.parametrize(("damping", "error"), [(1e-1, 0.05), (1e-2, 0.05), (1e-6, None)])
def test_products_of_parts_follow_a_moving_average(monkeypatch, damping, error):
    """As on a GPU, of features whose variances span six decades; ill-conditioned, all is finite."""
    monkeypatch.setattr("tn_kfac.optim.inverses.product", parted)
    dim, new = 128, 0.05
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=DTYPE)).Q
    spread = torch.logspace(0, -3, dim, dtype=DTYPE)

    def features() -> Tensor:
        return torch.randn(dim, dim, generator=generator, dtype=DTYPE) * spread @ basis.mT

    average, X = torch.zeros(dim, dim, dtype=DTYPE), torch.eye(dim)[None]
    for step in range(30):
        x = features()
        average = (1 - new) * average + new * x.mT @ x / dim
        B = average / (1 - (1 - new) ** (step + 1))
        B = B + damping * B.diagonal().mean() * torch.eye(dim, dtype=DTYPE)
        iterations = warm_iterations(None if not step else new)
        (X,) = newton_inverse(B.float()[None], X, iterations)
    assert (torch.linalg.eigvalsh(X[0].double()) > 0).all()
    if error:
        gradient = features()[:4].mT
        exact = torch.linalg.solve(B, gradient)
        assert (X[0].double() @ gradient - exact).norm() <= error * exact.norm()


@pytest.mark.parametrize("seed", range(3))
def test_newton_inverses_beyond_all_digits_start_again(seed):
    """A jump of scale with a condition number of 1e8, in float32: nothing explodes."""
    dim, limit = 16, 1 / torch.finfo(torch.float32).eps
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=DTYPE)).Q
    for condition, factor, iterations in ((8, 1e4, 3), (8, 1e2, 3), (6, 1e2, 5)):
        spectrum = torch.logspace(0, -condition, dim, dtype=DTYPE)
        B = ((basis * spectrum) @ basis.mT).float()[None]
        (X,) = newton_inverse(B, B, COLD_ITERATIONS)
        for _ in range(27):
            (X,) = newton_inverse(factor * B, X, iterations)
            assert X.diagonal(dim1=1, dim2=2).max() * (factor * B).norm() <= 1.01 * limit
