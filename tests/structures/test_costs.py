"""What structured operations cost: never the d² of a dense matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tn_kfac.structures import (
    Arrow,
    BlockDiagonal,
    Dense,
    Diagonal,
    Hierarchical,
    Structure,
    Toeplitz,
)

STRUCTURES = [
    Diagonal(),
    BlockDiagonal(16),
    BlockDiagonal(15),  # with a last block that is filled up
    Hierarchical(8, 8),
    *(Arrow(t, d) for t in ("lower", "upper") for d in ("top-left", "bottom-right")),
    Toeplitz("lower"),
    Toeplitz("upper"),
]
OPERATIONS: dict[str, Callable[[Structure, Tensor, Tensor], Tensor]] = {
    "eye": lambda s, k, row: s.eye(1, row.shape[-1], row.dtype, row.device),
    "product": lambda s, k, row: s.product(k, k),
    "apply": lambda s, k, row: s.apply(k, row.mT),
    "apply_transposed": lambda s, k, row: s.apply_transposed(k, row.mT),
    "project_gram": lambda s, k, row: s.project_gram(row),
    "gram": lambda s, k, row: s.gram(k),
    "trace": lambda s, k, row: s.trace(k),
    "norm": lambda s, k, row: s.norm(k),
    "largest": lambda s, k, row: s.largest(k),
    "scale": lambda s, k, row: s.scale(k, row[..., 0, 0]),
    "add_to_diagonal_": lambda s, k, row: s.add_to_diagonal_(k, 1.0),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
each_structure = pytest.mark.parametrize("spec", STRUCTURES, ids=lambda spec: spec.name)


class _Sizes(TorchDispatchMode):
    """Counts the elements of every tensor that an operation returns, views included."""

    def __init__(self):
        super().__init__()
        self.created: list[int] = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.created += [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


@dataclass(frozen=True)
class Cost:
    """Multiplications and additions in products; elements of the largest tensor and of all."""

    flops: int
    largest: int
    total: int


def _cost(spec: Structure, operation: Callable, dim: int) -> Cost:
    k = spec.eye(1, dim, torch.float32, torch.device("cpu"))
    row = torch.randn(1, 1, dim)
    with FlopCounterMode(display=False) as flops, _Sizes() as sizes:
        operation(spec, k, row)
    return Cost(flops.get_total_flops(), max(sizes.created), sum(sizes.created))


@each_operation
@each_structure
def test_cost_is_linear_in_the_dimension(spec, operation):
    """Twice the rows, twice the work, and no tensor as large as a dense matrix."""
    costs = {dim: _cost(spec, operation, dim) for dim in (512, 1024)}
    for dim, cost in costs.items():
        assert cost.largest < dim * dim / 4
    assert costs[1024].flops <= 2.6 * costs[512].flops
    assert costs[1024].total <= 2.6 * costs[512].total


@pytest.mark.parametrize(
    ("spec", "name", "flops"),
    [
        (BlockDiagonal(16), "product", 2 * 512 * 16**2),
        (BlockDiagonal(16), "gram", 2 * 512 * 16**2),
        (BlockDiagonal(16), "apply", 2 * 512 * 16),
        (BlockDiagonal(16), "project_gram", 2 * 512 * 16),
        (Hierarchical(8, 8), "product", 2 * 512 * 16**2),
        (Hierarchical(8, 8), "gram", 2 * 512 * 16**2),
        (Hierarchical(8, 8), "apply", 2 * 512 * 16),
        (Hierarchical(8, 8), "apply_transposed", 2 * 512 * 16),
        (Hierarchical(8, 8), "project_gram", 2 * 512 * 16),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_products_cost_what_the_docstrings_say(spec, name, flops):
    """O(d b²) and O(d k²), or for one vector O(d b) and O(d k), without a hidden constant."""
    assert 0 < _cost(spec, OPERATIONS[name], 512).flops <= flops


def test_toeplitz_products_are_transforms():
    """They multiply no matrices, and their transforms are of at most 4 d entries."""
    for name in ("product", "apply", "apply_transposed", "gram", "project_gram"):
        cost = _cost(Toeplitz(), OPERATIONS[name], 512)
        assert cost.flops == 0 and cost.largest <= 4 * 512


def test_dense_costs_are_seen():
    """The counters do count: a dense product has d² entries and 2 d³ operations."""
    cost = _cost(Dense(), OPERATIONS["product"], 512)
    assert cost.flops == 2 * 512**3 and cost.largest == 512**2


@each_structure
def test_only_to_dense_forms_the_matrix(spec):
    """What costs d² is called so."""
    cost = _cost(spec, lambda s, k, row: s.to_dense(k), 512)
    assert cost.largest >= 512**2
