"""What every structure's operations leave alone: dtypes, arguments, other matrices."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spaces import DTYPE, SPACES, TIGHT, dims, each_space, seeds
from torch import Tensor

from tn_kfac.structures import Structure, Toeplitz

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "product": lambda spec, k, h, dense, ones: spec.product(k, h),
    "apply": lambda spec, k, h, dense, ones: spec.apply(k, dense),
    "apply_transposed": lambda spec, k, h, dense, ones: spec.apply_transposed(k, dense),
    "gram": lambda spec, k, h, dense, ones: spec.gram(k),
    "project_gram": lambda spec, k, h, dense, ones: spec.project_gram(dense.mT),
    "curvature": lambda spec, k, h, dense, ones: spec.curvature(k, h),
    "trace": lambda spec, k, h, dense, ones: spec.trace(k),
    "norm": lambda spec, k, h, dense, ones: spec.norm(k),
    "scale": lambda spec, k, h, dense, ones: spec.scale(k, ones),
    "largest": lambda spec, k, h, dense, ones: spec.largest(k),
    "to_dense": lambda spec, k, h, dense, ones: spec.to_dense(k),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


def _operands(space, batch: int, dim: int, seed: int) -> list[Tensor]:
    """Positive ones, so that no exact result is a small difference of large numbers."""
    (_, k), (_, h) = space.members((batch,), dim, seed, 2)
    dense = torch.randn(batch, dim, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))
    factors = torch.arange(1, batch + 1, dtype=DTYPE)
    return [k.abs(), h.abs(), dense.abs(), factors]


def _check_dtype(spec: Structure, operation: Callable, operands: list[Tensor], dtype) -> None:
    """In bfloat16 the float64 result, but for about one rounding of its largest entries.

    Transforms are of float32: they meet a sum over d entries to a few roundings of the largest
    sum, and Π divides the sums over short diagonals by less than that one.
    """
    operands = [operand.to(dtype) for operand in operands]
    before = [operand.clone() for operand in operands]
    result = operation(spec, *operands)
    assert (result.dtype, result.device.type) == (dtype, "cpu")
    assert all(map(torch.equal, operands, before))
    exact = operation(spec, *(operand.double() for operand in operands))
    single = 8 * (operands[0].shape[-1] if isinstance(spec, Toeplitz) else 1)
    rounding = max(torch.finfo(dtype).eps, single * torch.finfo(torch.float32).eps)
    atol = rounding * exact.max().item()
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=atol)


@each_operation
@each_space
@settings(max_examples=10)
@given(dim=dims, seed=seeds)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_arguments_are_kept(space, operation, dim, seed, dtype):
    """Every operation stays in the dtype of its operands and leaves them as they are."""
    _check_dtype(space.structure, operation, _operands(space, 2, dim, seed), dtype)


@each_operation
@pytest.mark.parametrize("name", ["triltoeplitz", "hierarchical2_3", "block3diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_matrices_in_low_precision(name, operation, dtype):
    """Indices beyond the 256 that bfloat16 counts to are met exactly all the same."""
    spec = SPACES[name].structure
    shape = (2, *spec.coordinate_shape(700))
    used = spec.project_gram(torch.ones(2, 1, 700, dtype=DTYPE)) != 0
    k, h = torch.rand(shape, dtype=DTYPE) * used, torch.rand(shape, dtype=DTYPE) * used
    dense, factors = torch.rand(2, 700, 3, dtype=DTYPE), torch.ones(2, dtype=DTYPE)
    _check_dtype(spec, operation, [k, h, dense, factors], dtype)


@each_operation
@each_space
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_is_kept(space, operation, dtype):
    """No operation makes, or reads, a tensor elsewhere than its operands are."""
    operands = [operand.to(dtype) for operand in _operands(space, 2, 5, 0)]
    expected = operation(space.structure, *operands)
    actual = operation(space.structure, *(operand.to("meta") for operand in operands))
    assert (actual.device.type, actual.dtype) == ("meta", dtype)
    assert actual.shape == expected.shape


@each_space
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_and_border_keep_the_dtype(space, dtype):
    spec = space.structure
    k = spec.eye(2, 5, dtype, torch.device("cpu"))
    assert spec.add_to_diagonal_(k, 0.5).dtype == dtype
    if spec.reads == "rows":
        return
    column, corner = torch.ones(2, 5, dtype=dtype), torch.ones(2, dtype=dtype)
    operands = [k, column, corner]
    before = [operand.clone() for operand in operands]
    assert spec.border(*operands).dtype == dtype
    assert all(map(torch.equal, operands, before))


@each_operation
@each_space
@settings(max_examples=10)
@given(batch=st.integers(2, 3), dim=dims, seed=seeds)
def test_matrices_of_a_batch_are_independent(space, operation, batch, dim, seed):
    """Every operation on a batch is that operation on each of its matrices."""
    operands = _operands(space, batch, dim, seed)
    whole = operation(space.structure, *operands)
    for at in range(batch):
        part = operation(space.structure, *(operand[at : at + 1] for operand in operands))
        torch.testing.assert_close(whole[at : at + 1], part, **TIGHT)


@each_space
@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ("to_dense", "curvature")])
def test_results_own_their_memory(space, name):
    """Writing into a result changes no argument."""
    operands = _operands(space, 2, 5, 0)
    before = [operand.clone() for operand in operands]
    OPERATIONS[name](space.structure, *operands).fill_(-7.0)
    assert all(map(torch.equal, operands, before))
