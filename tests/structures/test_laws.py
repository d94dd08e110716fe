"""Laws of every structure, against dense matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spaces import DTYPE, SPACES, TIGHT, batches, dims, each_space, seeds
from torch import Tensor

from tn_kfac.structures import BlockDiagonal, block_diagonal

GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)
bordered = pytest.mark.parametrize("name", ["dense", "diagonal"])


def _statistic(space, rows: Tensor) -> Tensor:
    """What curvature reads of H = rowsᵀ rows, as the attribute `reads` says."""
    gram = rows.mT @ rows
    return {"gram": gram, "diagonal": gram.diagonal(dim1=-2, dim2=-1)}[space.structure.reads]


@each_space
@given(batch=batches, dim=dims, seed=seeds)
def test_coordinates_have_the_announced_shape(space, batch, dim, seed):
    """(*batch, *coordinate_shape), and `to_dense` gives the matrix back."""
    [(dense, coordinates)] = space.members(batch, dim, seed, 1)
    assert coordinates.shape == (*batch, *space.structure.coordinate_shape(dim))
    assert space.structure.for_dim(dim) is space.structure
    space.check(coordinates, dense)


@each_space
@given(batch=st.integers(1, 3), dim=dims)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_eye_is_the_identity(space, batch, dim, dtype):
    """In the dtype and on the device asked for; a batch is of independent memory."""
    spec = space.structure
    eye = spec.eye(batch, dim, dtype, torch.device("cpu"))
    assert eye.dtype == dtype
    assert torch.equal(eye, space.coordinates(torch.eye(dim, dtype=dtype).repeat(batch, 1, 1)))
    assert torch.equal(spec.to_dense(eye), torch.eye(dim, dtype=dtype).expand(batch, -1, -1))
    spec.add_to_diagonal_(eye[0], 1.0)
    assert spec.trace(eye.double()).tolist() == [2.0 * dim] + [float(dim)] * (batch - 1)
    on_meta = spec.eye(batch, dim, dtype, torch.device("meta"))
    assert (on_meta.device.type, on_meta.shape) == ("meta", eye.shape)
    assert on_meta.dtype == dtype


@each_space
@given(batch=batches, dim=dims, seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_coordinates_are_linear(space, batch, dim, seed, a, b):
    """Adding and scaling tensors of coordinates adds and scales matrices."""
    (x, x_at), (y, y_at) = space.members(batch, dim, seed, 2)
    space.check(a * x_at + b * y_at, a * x + b * y)


@each_space
@given(batch=batches, dim=dims, seed=seeds)
def test_product(space, batch, dim, seed):
    """The space is closed under products, which are those of the matrices."""
    (x, x_at), (y, y_at) = space.members(batch, dim, seed, 2)
    space.check(space.structure.product(x_at, y_at), x @ y)


@each_space
@given(batch=batches, dim=dims, columns=st.integers(0, 4), seed=seeds)
def test_apply(space, batch, dim, columns, seed):
    """Both products with dense matrices (*batch, d, columns), without columns included."""
    [(x, x_at)] = space.members(batch, dim, seed, 1)
    y = torch.randn(*batch, dim, columns, dtype=DTYPE)
    torch.testing.assert_close(space.structure.apply(x_at, y), x @ y, **TIGHT)
    torch.testing.assert_close(space.structure.apply_transposed(x_at, y), x.mT @ y, **TIGHT)


@each_space
@given(batch=batches, dim=dims, seed=seeds)
def test_gram_is_projected(space, batch, dim, seed):
    """Π(MᵀM)."""
    [(x, x_at)] = space.members(batch, dim, seed, 1)
    space.check(space.structure.gram(x_at), space.project(x.mT @ x))


@each_space
@given(batch=batches, count=st.integers(0, 4), dim=dims, seed=seeds)
def test_gram_of_rows_is_projected(space, batch, count, dim, seed):
    """Π(rowsᵀ rows) for any number of rows, none included."""
    rows = torch.randn(
        *batch, count, dim, dtype=DTYPE, generator=torch.Generator().manual_seed(seed)
    )
    space.check(space.structure.project_gram(rows), space.project(rows.mT @ rows))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("groups", "dim"), [(1, 6), (2, 7), (3, 2)])
def test_gram_of_many_rows_in_blocks(groups, dim, device, monkeypatch):
    """Rows may be cut into parts, as they are on a GPU."""
    if device == "cpu":
        monkeypatch.setattr(block_diagonal, "shares", lambda rows, blocks: 4)
    rows = torch.randn(groups, 2048, dim, dtype=DTYPE, device=device)
    space = BlockDiagonal(3)
    assert block_diagonal.shares(rows, 2) > 1
    found = space.to_dense(space.project_gram(rows))
    block = torch.arange(dim, device=device) // 3
    expected = torch.where(block[:, None] == block, rows.mT @ rows, 0)
    torch.testing.assert_close(found, expected)


@each_space
@given(batch=batches, dim=dims, seed=seeds)
def test_projection_carries_mirrored_entries(space, batch, dim, seed):
    """tr(Π(S) M) = tr(S M) for every M that is a member plus its transpose."""
    [(x, _)] = space.members(batch, dim, seed, 1)
    rows = torch.randn(*batch, 3, dim, dtype=DTYPE)
    projected = space.structure.to_dense(space.structure.project_gram(rows))
    inner = ((projected * (x + x.mT)).sum((-2, -1)), (rows @ (x + x.mT) * rows).sum((-2, -1)))
    torch.testing.assert_close(*inner, **TIGHT)


@each_space
@given(batch=batches, dim=dims, count=st.integers(1, 4), seed=seeds)
def test_curvature_is_projected(space, batch, dim, count, seed):
    """Π(Kᵀ H K) of H = rowsᵀ rows, from its diagonal, from itself or from rows · K."""
    spec = space.structure
    [(k, k_at)] = space.members(batch, dim, seed, 1)
    rows = torch.randn(*batch, count, dim, dtype=DTYPE)
    if spec.reads == "rows":
        statistic = spec.project_gram(spec.apply_transposed(k_at, rows.mT).mT)
        assert spec.curvature(k_at, statistic) is statistic
    else:
        statistic = _statistic(space, rows)
    space.check(spec.curvature(k_at, statistic), space.project(k.mT @ rows.mT @ rows @ k))


@bordered
@given(batch=batches, dim=dims, seed=seeds)
def test_border(name, batch, dim, seed):
    """[[block, column], [columnᵀ, corner]], projected onto the space."""
    space = SPACES[name]
    [(block, block_at)] = space.members(batch, dim, seed, 1)
    column = torch.randn(*batch, dim, dtype=DTYPE)
    corner = torch.randn(*batch, dtype=DTYPE)
    expected = torch.zeros(*batch, dim + 1, dim + 1, dtype=DTYPE)
    expected[..., :dim, :dim] = block
    expected[..., dim, :dim] = expected[..., :dim, dim] = column
    expected[..., dim, dim] = corner
    given_column = None if space.structure.reads == "diagonal" else column
    actual = space.structure.border(block_at, given_column, corner)
    assert actual.shape == (*batch, *space.structure.coordinate_shape(dim + 1))
    space.check(actual, space.project(expected))


@each_space
def test_only_what_reads_no_rows_has_a_border(space):
    """Where rows are read, a bias is one more entry of each, and a border is a mistake."""
    spec = space.structure
    assert spec.reads == {"dense": "gram", "diagonal": "diagonal"}.get(spec.name, "rows")
    if spec.reads == "rows":
        with pytest.raises(AssertionError, match=spec.name):
            spec.border(spec.eye(1, 3, DTYPE, torch.device("cpu")), None, torch.ones(1))


@each_space
@given(batch=batches, dim=dims, seed=seeds)
def test_trace_norm_scale_and_largest(space, batch, dim, seed):
    """One number for each matrix of the batch."""
    spec = space.structure
    [(x, x_at)] = space.members(batch, dim, seed, 1)
    trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(spec.trace(x_at), trace, **TIGHT)
    torch.testing.assert_close(spec.norm(x_at), x.square().sum((-2, -1)).sqrt(), **TIGHT)
    factors = torch.randn(batch, dtype=DTYPE)
    space.check(spec.scale(x_at, factors), factors[..., None, None] * x)
    torch.testing.assert_close(spec.largest(x_at), x.abs().amax((-2, -1)), **TIGHT)


@each_space
@given(batch=batches, dim=dims, seed=seeds, value=st.floats(-3, 3))
def test_add_to_diagonal_is_in_place(space, batch, dim, seed, value):
    """matrix + value · I, written into the coordinates that were given, and returned."""
    [(x, x_at)] = space.members(batch, dim, seed, 1)
    result = space.structure.add_to_diagonal_(x_at, value)
    assert result is x_at
    space.check(x_at, x + value * torch.eye(dim, dtype=DTYPE))
