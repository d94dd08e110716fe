"""Laws of every structure, against dense matrices: a new structure adds one entry.

An entry is the structure's oracle: `project` is Π on dense symmetric matrices (and takes any
matrix into the space), `coordinates` reads the coordinates off a dense member of the space.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tn_kfac.structures import _BY_NAME, Dense, Diagonal, Structure, structure

DTYPE = torch.float64
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@dataclass(frozen=True)
class Space:
    """A structure and its dense oracle."""

    structure: Structure
    project: Callable[[Tensor], Tensor]
    coordinates: Callable[[Tensor], Tensor]  # of a dense member


def _only_diagonal(matrix: Tensor) -> Tensor:
    return torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


SPACES = {
    "dense": Space(Dense(), lambda matrix: matrix, lambda matrix: matrix.clone()),
    "diagonal": Space(
        Diagonal(), _only_diagonal, lambda matrix: matrix.diagonal(dim1=-2, dim2=-1).clone()
    ),
}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)

batches = st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)
dims = st.integers(1, 6)
seeds = st.integers(0, 2**16)


def _members(space: Space, batch: tuple[int, ...], dim: int, seed: int, count: int):
    """Random members of the space: [(dense, coordinates)]."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        dense = space.project(torch.randn(*batch, dim, dim, generator=generator, dtype=DTYPE))
        pairs.append((dense, space.coordinates(dense)))
    return pairs


def _close(space: Space, coordinates: Tensor, dense: Tensor) -> None:
    torch.testing.assert_close(space.structure.to_dense(coordinates), dense, **TIGHT)


@each_space
@given(batch=batches, dim=dims, seed=seeds)
def test_coordinates_have_the_announced_shape(space, batch, dim, seed):
    """(*batch, *coordinate_shape), and `to_dense` gives the matrix back."""
    [(dense, coordinates)] = _members(space, batch, dim, seed, 1)
    assert coordinates.shape == (*batch, *space.structure.coordinate_shape(dim))
    _close(space, coordinates, dense)


@each_space
@given(batch=st.integers(1, 3), dim=dims)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_eye_is_the_identity(space, batch, dim, dtype):
    """In the dtype and on the device asked for; a batch is of independent memory."""
    spec = space.structure
    eye = spec.eye(batch, dim, dtype, torch.device("cpu"))
    assert eye.dtype == dtype
    assert torch.equal(spec.to_dense(eye), torch.eye(dim, dtype=dtype).expand(batch, -1, -1))
    spec.add_to_diagonal_(eye[0], 1.0)
    assert spec.trace(eye.double()).tolist() == [2.0 * dim] + [float(dim)] * (batch - 1)
    on_meta = spec.eye(batch, dim, dtype, torch.device("meta"))
    assert (on_meta.device.type, on_meta.shape) == ("meta", eye.shape)


@each_space
@given(batch=batches, dim=dims, seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_coordinates_are_linear(space, batch, dim, seed, a, b):
    """Adding and scaling tensors of coordinates adds and scales matrices."""
    (x, x_at), (y, y_at) = _members(space, batch, dim, seed, 2)
    _close(space, a * x_at + b * y_at, a * x + b * y)


@each_space
@given(batch=batches, dim=dims, seed=seeds)
def test_product(space, batch, dim, seed):
    """The space is closed under products, which are those of the matrices."""
    (x, x_at), (y, y_at) = _members(space, batch, dim, seed, 2)
    _close(space, space.structure.product(x_at, y_at), x @ y)


@each_space
@given(batch=batches, dim=dims, columns=st.integers(1, 4), seed=seeds)
def test_apply(space, batch, dim, columns, seed):
    """Both products with dense matrices (*batch, d, columns)."""
    [(x, x_at)] = _members(space, batch, dim, seed, 1)
    y = torch.randn(*batch, dim, columns, dtype=DTYPE)
    torch.testing.assert_close(space.structure.apply(x_at, y), x @ y, **TIGHT)
    torch.testing.assert_close(space.structure.apply_transposed(x_at, y), x.mT @ y, **TIGHT)


@each_space
@given(batch=batches, dim=dims, seed=seeds)
def test_congruence_and_gram_are_projected(space, batch, dim, seed):
    """Π(Kᵀ H K) and Π(KᵀK), for a symmetric member H."""
    (k, k_at), (h, _) = _members(space, batch, dim, seed, 2)
    h = h + h.mT
    actual = space.structure.congruence(k_at, space.coordinates(h))
    _close(space, actual, space.project(k.mT @ h @ k))
    _close(space, space.structure.gram(k_at), space.project(k.mT @ k))


@pytest.mark.parametrize("name", [n for n, s in SPACES.items() if s.structure.diagonal_suffices])
@given(batch=batches, dim=dims, seed=seeds)
def test_diagonal_suffices_where_that_is_claimed(name, batch, dim, seed):
    """Π(Kᵀ H K) of any symmetric H is that of its diagonal, so no more is ever formed."""
    space = SPACES[name]
    [(k, k_at)] = _members(space, batch, dim, seed, 1)
    h = torch.randn(*batch, dim, dim, dtype=DTYPE)
    h = h + h.mT
    actual = space.structure.congruence(k_at, space.coordinates(_only_diagonal(h)))
    _close(space, actual, space.project(k.mT @ h @ k))


@each_space
@given(batch=batches, dim=dims, seed=seeds)
def test_border(space, batch, dim, seed):
    """[[block, column], [columnᵀ, corner]], projected onto the space."""
    [(block, block_at)] = _members(space, batch, dim, seed, 1)
    column = torch.randn(*batch, dim, dtype=DTYPE)
    corner = torch.randn(*batch, dtype=DTYPE)
    expected = torch.zeros(*batch, dim + 1, dim + 1, dtype=DTYPE)
    expected[..., :dim, :dim] = block
    expected[..., dim, :dim] = expected[..., :dim, dim] = column
    expected[..., dim, dim] = corner
    given_column = None if space.structure.diagonal_suffices else column
    bordered = space.structure.border(block_at, given_column, corner)
    assert bordered.shape == (*batch, *space.structure.coordinate_shape(dim + 1))
    _close(space, bordered, space.project(expected))


@each_space
@given(batch=batches, dim=dims, seed=seeds)
def test_trace_scale_and_largest(space, batch, dim, seed):
    """One number for each matrix of the batch."""
    [(x, x_at)] = _members(space, batch, dim, seed, 1)
    trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(space.structure.trace(x_at), trace, **TIGHT)
    factors = torch.randn(batch, dtype=DTYPE)
    _close(space, space.structure.scale(x_at, factors), factors[..., None, None] * x)
    torch.testing.assert_close(space.structure.largest(x_at), x.abs().amax((-2, -1)), **TIGHT)


@each_space
@given(batch=batches, dim=dims, seed=seeds, value=st.floats(-3, 3))
def test_add_to_diagonal_is_in_place(space, batch, dim, seed, value):
    """matrix + value · I, written into the coordinates that were given, and returned."""
    [(x, x_at)] = _members(space, batch, dim, seed, 1)
    result = space.structure.add_to_diagonal_(x_at, value)
    assert result is x_at
    _close(space, x_at, x + value * torch.eye(dim, dtype=DTYPE))


@each_space
@given(dim=dims, seed=seeds)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_arguments_are_kept(space, dim, seed, dtype):
    """Every operation stays in the dtype of its operands and leaves them as they are."""
    spec = space.structure
    (_, k), (_, h) = ((d, at.to(dtype)) for d, at in _members(space, (2,), dim, seed, 2))
    dense, ones = torch.ones(2, dim, 3, dtype=dtype), torch.ones(2, dtype=dtype)
    operands = [k, h, dense, ones]
    before = [operand.clone() for operand in operands]
    column = None if spec.diagonal_suffices else torch.ones(2, dim, dtype=dtype)
    results = [
        spec.product(k, h), spec.apply(k, dense), spec.apply_transposed(k, dense),
        spec.congruence(k, h), spec.gram(k), spec.trace(k), spec.scale(k, ones), spec.largest(k),
        spec.border(k, column, ones),
    ]  # fmt: skip
    assert {result.dtype for result in results} == {dtype}
    assert all(map(torch.equal, operands, before))


@each_space
@given(batch=st.integers(2, 3), dim=dims, seed=seeds)
def test_matrices_of_a_batch_are_independent(space, batch, dim, seed):
    """Every operation on a batch is that operation on each of its matrices."""
    spec = space.structure
    (_, k), (_, h) = _members(space, (batch,), dim, seed, 2)
    dense = torch.randn(batch, dim, 2, dtype=DTYPE)
    for at in range(batch):
        one = slice(at, at + 1)
        for whole, part in (
            (spec.product(k, h), spec.product(k[one], h[one])),
            (spec.apply(k, dense), spec.apply(k[one], dense[one])),
            (spec.congruence(k, h), spec.congruence(k[one], h[one])),
            (spec.gram(k), spec.gram(k[one])),
            (spec.largest(k), spec.largest(k[one])),
        ):
            torch.testing.assert_close(whole[one], part, **TIGHT)


@each_space
def test_spec_is_a_value_with_a_name(space):
    """Equal specs are equal and hash alike; the name (and the spec itself) finds them."""
    spec = space.structure
    twin = type(spec)()
    assert spec == twin and hash(spec) == hash(twin)
    assert structure(spec.name) == structure(spec) == spec
    assert len({other.structure for other in SPACES.values()}) == len(SPACES)


def test_every_structure_is_in_the_table():
    """A structure that users can name has an entry above."""
    assert {space.structure.name for space in SPACES.values()} == set(_BY_NAME)


@pytest.mark.parametrize(
    ("spec", "error"), [("wide", ValueError), ("", ValueError), (3, TypeError), (None, TypeError)]
)
def test_unknown_structures_are_named(spec, error):
    with pytest.raises(error, match="structure"):
        structure(spec)
