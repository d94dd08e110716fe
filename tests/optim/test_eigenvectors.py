"""Eigenvectors by steps of orthogonal iteration: as by QR, and orthogonal whatever comes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tn_kfac.kernels.products import parted
from tn_kfac.optim import eigenvectors
from tn_kfac.optim.eigenvectors import orthogonal_step, polished
from tn_kfac.optim.inverses import Request, eigen
from tn_kfac.structures import Dense

DTYPE = torch.float64


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal columns."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DTYPE)).Q


def symmetric(size: int, least: float, seed: int, rank: int | None = None) -> Tensor:
    """Eigenvalues from 1 down to `least`, of which `rank` are not zero."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = least ** (torch.arange(size, dtype=DTYPE) / max(size - 1, 1))
    spectrum[size if rank is None else rank :] = 0
    basis = rotation(size, generator)
    return (basis * spectrum) @ basis.mT


def positive(groups: int, size: int) -> Tensor:
    return torch.stack([symmetric(size, 0.05, seed) for seed in range(groups)])


def by_qr(B: Tensor, last: Tensor) -> Tensor:
    """The step as it is defined."""
    order = (last * (B @ last)).sum(-2).argsort(-1, descending=True)
    image = (B @ last).gather(-1, order[..., None, :].expand_as(last))
    return torch.linalg.qr(image).Q


def off_orthogonal(Q: Tensor) -> float:
    eye = torch.eye(Q.shape[-1], dtype=DTYPE)
    return (Q.double().mT @ Q.double() - eye).abs().max().item()


@given(st.integers(1, 3), st.integers(1, 20), st.floats(1e-3, 0.9), st.integers(0, 99))
def test_a_step_is_that_of_qr(groups, size, least, seed):
    stack = torch.stack([symmetric(size, least, seed + at) for at in range(groups)])
    generator = torch.Generator().manual_seed(seed)
    last = torch.stack([rotation(size, generator) for _ in range(groups)])
    values, Q = orthogonal_step(stack, last)
    if size > 1:
        torch.testing.assert_close(Q.abs(), by_qr(stack, last).abs(), rtol=1e-8, atol=1e-9)
    quotients = (Q * (stack @ Q)).sum(-2)
    torch.testing.assert_close(values, quotients, rtol=1e-10, atol=1e-12)


def test_well_conditioned_to_the_last_digits():
    stack, last = positive(2, 12), torch.eye(12, dtype=DTYPE).expand(2, 12, 12)
    for _ in range(5):
        expected = by_qr(stack, last)
        _, last = orthogonal_step(stack, last)
        torch.testing.assert_close(last.abs(), expected.abs(), rtol=1e-10, atol=1e-10)


def test_orthogonal_steps_converge():
    """However far the first ones are, and to the same eigenvalues."""
    matrix = positive(2, 6)
    values, basis = torch.ones(2, 6), torch.eye(6, dtype=DTYPE).expand(2, 6, 6)
    for _ in range(2000):
        values, basis = orthogonal_step(matrix, basis)
    exact = torch.linalg.eigvalsh(matrix).flip(-1)
    torch.testing.assert_close(values, exact, rtol=1e-9, atol=1e-9)
    diagonal = basis.mT @ matrix @ basis
    torch.testing.assert_close(diagonal, torch.diag_embed(exact), rtol=1e-6, atol=1e-6)


def test_orthogonal_step_of_what_is_not_finite():
    matrix = positive(2, 4)
    matrix[0, 1, 2] = float("nan")
    values, basis = orthogonal_step(matrix, torch.eye(4, dtype=DTYPE).expand(2, 4, 4))
    assert values[0].isnan().all() and basis[0].isnan().all()
    assert values[1].isfinite().all() and basis[1].isfinite().all()


def drifting(size: int, rank: int, condition: float, steps: int):
    """Averages in float32 and float64, of which 5 % are new in each step."""
    generator = torch.Generator().manual_seed(0)
    spread = condition ** (-0.5 * torch.arange(size, dtype=DTYPE) / (size - 1))
    spread[rank:] = 0
    spread = spread * rotation(size, generator)
    B = 0
    for step in range(steps):
        x = torch.randn(2 * size, size, generator=generator, dtype=DTYPE) @ spread.mT
        B = (0.95 * B + 0.05 * x.mT @ x / len(x)) if step else x.mT @ x / len(x)
        yield B.float()[None], B


def residual(B: Tensor, Q: Tensor) -> Tensor:
    """How far Qᵀ B Q is from a diagonal."""
    turned = Q.double().mT @ B @ Q.double()
    return (turned - turned.diagonal().diag()).norm() / B.norm()


@pytest.mark.parametrize("products", ["full", "parts"])
@pytest.mark.parametrize(("rank", "condition"), [(24, 1e2), (24, 1e6), (24, 1e12), (9, 1e2)])
def test_steps_follow_a_moving_average_as_qr_does(monkeypatch, products, rank, condition):
    """In float32, with products as on a GPU that may use TF32 too; nothing adds up."""
    if products == "parts":
        monkeypatch.setattr(eigenvectors, "product", parted)
        monkeypatch.setattr(eigenvectors, "precise", parted)
    ours, theirs = [], []
    Q = reference = torch.eye(24)[None]
    for step, (single, B) in enumerate(drifting(24, rank, condition, 200)):
        if not step:
            Q = reference = torch.linalg.eigh(single)[1]
        values, Q = orthogonal_step(single, Q)
        reference = by_qr(single, reference)
        assert off_orthogonal(Q[0]) < (2e-6 if products == "full" else 2e-5)
        quotients = (Q[0] * (B.float() @ Q[0])).sum(-2)
        assert (values[0] - quotients).abs().max() < 5e-5 * quotients.max()
        ours.append(residual(B, Q[0]))
        theirs.append(residual(B, reference[0]))
    assert sum(ours[20:]) < 1.05 * sum(theirs[20:])


@pytest.mark.parametrize("rank", [1, 2, 8, 40])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 1e30])
def test_any_jump(scale, rank):
    """An entirely new matrix of another scale and rank, from any basis: as far as QR gets."""
    B = symmetric(40, 1e-5, 1, rank)
    single = (scale * B).float()[None]
    Q = rotation(40, torch.Generator().manual_seed(2)).float()[None]
    reference = Q
    for _ in range(20):
        values, Q = orthogonal_step(single, Q)
        reference = by_qr(B.float()[None], reference)
        assert values.isfinite().all()
        assert off_orthogonal(Q[0]) < 1e-5
    assert residual(B, Q[0]) < 1.02 * residual(B, reference[0]) + 1e-6


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-45, 5e37])
def test_whatever_is_finite_has_a_finite_orthogonal_basis(scale):
    """Zero, negative, or at the ends of the range: the last ones where there is no step."""
    eye, Q = torch.eye(5), rotation(5, torch.Generator().manual_seed(0)).float()[None]
    for single in (scale * eye, torch.full((5, 5), scale)):
        values, basis = orthogonal_step(single[None], Q)
        assert values.isfinite().all() and (values >= 0).all()
        assert off_orthogonal(basis[0]) < 1e-5
    indefinite = torch.diag(torch.tensor([3.0, 1.0, -2.0, 1.0, 0.5]))
    _, basis = orthogonal_step(indefinite[None], eye[None])
    assert torch.equal(basis[0].sort(0)[0], eye.sort(0)[0])


def test_noise_as_large_as_that_of_sums_on_tensor_cores():
    """Averages that rounding made indefinite still have steps, by the larger shift."""
    generator = torch.Generator().manual_seed(0)
    B = symmetric(40, 1e-2, 0, 20)
    noise = 1e-6 * torch.randn(40, 40, generator=generator, dtype=DTYPE)
    noisy = (B + noise + noise.mT).float()[None]
    assert torch.linalg.eigvalsh(noisy[0]).min() < -4e-6
    Q = rotation(40, generator).float()[None]
    for _ in range(100):
        _, Q = orthogonal_step(noisy, Q)
    assert off_orthogonal(Q[0]) < 1e-5
    assert residual(B, Q[0]) < 3e-3


@pytest.mark.parametrize("size", [8, 300])
def test_last_ones_may_be_stored_in_few_digits(size):
    B = symmetric(size, 1e-4, 0).float()[None]
    Q = torch.linalg.eigh(B)[1].flip(-1)
    request = Request(Dense(), (B, Q.bfloat16()))
    values, basis = eigen([request], 1)[0]
    assert off_orthogonal(basis[0]) < 1e-5
    exact = torch.linalg.eigvalsh(B).flip(-1)
    torch.testing.assert_close(values, exact, rtol=2e-2, atol=1e-5)


def test_polish_and_its_bound():
    generator = torch.Generator().manual_seed(0)
    Q = rotation(30, generator)
    for off in (1e-3, 1e-2):
        noisy = Q + off / 30**0.5 * torch.randn(30, 30, generator=generator, dtype=DTYPE)
        norm = torch.linalg.matrix_norm(noisy.mT @ noisy - torch.eye(30, dtype=DTYPE), 2)
        better, bound = polished(noisy)
        assert norm <= bound <= 3 * norm
        assert off_orthogonal(better) < norm**3
