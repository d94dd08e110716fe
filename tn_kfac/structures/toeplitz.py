"""Triangular Toeplitz matrices: coordinates are the first column (or row)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tn_kfac.structures.base import Structure

TRIANGLES = ("lower", "upper")


@dataclass(frozen=True)
class Toeplitz(Structure):
    """Lower: M[i, j] = c[i − j] for i ≥ j; upper: its transpose.

    Products of such matrices are truncated convolutions of their coordinates, products with
    vectors convolutions or correlations: by FFT, O(d log d) each. Π averages the diagonals of a
    symmetric matrix, adding those above to those below:
    Π(S)[m] = (2 − [m = 0]) / (d − m) · Σ_i S[i, i + m]; of a gram, that is the rows'
    autocorrelation, O(d log d) a row.

    Attributes:
        triangle: "lower" or "upper".
    """

    triangle: Literal["lower", "upper"] = "lower"

    def __post_init__(self) -> None:
        if self.triangle not in TRIANGLES:
            raise ValueError(
                f"triangle of Toeplitz must be one of {list(TRIANGLES)}, got {self.triangle!r}"
            )

    @property
    def name(self) -> str:
        return "triltoeplitz" if self.triangle == "lower" else "triutoeplitz"

    def coordinate_shape(self, dim: int) -> tuple[int, ...]:
        return (dim,)

    def trace(self, matrix: Tensor) -> Tensor:
        return matrix[..., 0] * matrix.shape[-1]

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return _convolved(left, right)

    def apply(self, matrix: Tensor, dense: Tensor) -> Tensor:
        by = _convolved if self.triangle == "lower" else _correlated
        return by(matrix[..., None, :], dense.mT).mT

    def apply_transposed(self, matrix: Tensor, dense: Tensor) -> Tensor:
        by = _correlated if self.triangle == "lower" else _convolved
        return by(matrix[..., None, :], dense.mT).mT

    def gram(self, matrix: Tensor) -> Tensor:
        """Entry (t, t + m) of the coordinates' products is met in d − m − t places.

        The same for both triangles: one gram is the other, read from the far end.
        """
        exact = _at_least_float32(matrix)
        places = _places(exact)
        weighted = exact * (len(places) - places)  # times t
        sums = _correlated(exact, exact) * places - _correlated(weighted, exact)
        return _averaged(sums).to(matrix.dtype)

    def project_gram(self, rows: Tensor) -> Tensor:
        if not rows.numel():
            return rows.sum(-2)
        spectrum, size = _spectrum(rows)
        power = (spectrum * spectrum.conj()).sum(-2)
        return _averaged(torch.fft.irfft(power, size)[..., : rows.shape[-1]]).to(rows.dtype)

    def add_to_diagonal_(self, matrix: Tensor, value: float) -> Tensor:
        matrix[..., 0].add_(value)
        return matrix

    def to_dense(self, matrix: Tensor) -> Tensor:
        index = torch.arange(matrix.shape[-1], device=matrix.device)
        offset = index[:, None] - index
        lower = torch.where(offset >= 0, matrix[..., offset.clamp(min=0)], 0)
        return lower if self.triangle == "lower" else lower.mT

    def norm(self, matrix: Tensor) -> Tensor:
        return torch.linalg.vector_norm(matrix * _places(matrix).sqrt(), dim=-1)


def _places(matrix: Tensor) -> Tensor:
    """How often each coordinate is in the matrix: d, d − 1, …, 1."""
    return torch.arange(matrix.shape[-1], 0, -1, dtype=matrix.dtype, device=matrix.device)


def _averaged(sums: Tensor) -> Tensor:
    """Sums over the diagonals of one triangle to the projection's coordinates."""
    coordinates = sums / _places(sums) * 2
    coordinates[..., 0] /= 2
    return coordinates


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spectrum(x: Tensor) -> tuple[Tensor, int]:
    """The Fourier transform of the last axis, with room for all offsets, and its length.

    Half precision has no transform on most devices: at least float32.
    """
    size = 1 << (2 * x.shape[-1] - 1).bit_length()
    return torch.fft.rfft(_at_least_float32(x), size), size


def _convolved(c: Tensor, x: Tensor) -> Tensor:
    """y[i] = Σ_j c[i − j] x[j], along the last axis."""
    return _filtered(x, c, lambda spectrum: spectrum)


def _correlated(c: Tensor, x: Tensor) -> Tensor:
    """y[i] = Σ_j c[j − i] x[j], along the last axis."""
    return _filtered(x, c, torch.conj)


def _filtered(x: Tensor, c: Tensor, response: Callable[[Tensor], Tensor]) -> Tensor:
    if not x.numel():  # has no transform
        return torch.zeros_like(x)
    (spectrum, size), (other, _) = _spectrum(c), _spectrum(x)
    return torch.fft.irfft(response(spectrum) * other, size)[..., : x.shape[-1]].to(x.dtype)
