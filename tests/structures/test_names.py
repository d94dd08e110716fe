"""Structures are values that users name."""

import re
from copy import copy, deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.singd import PROJECTIONS, projection
from spaces import DTYPE, SPACES

from tn_kfac.structures import (
    NAMES,
    Arrow,
    Auto,
    BlockDiagonal,
    Dense,
    Diagonal,
    Hierarchical,
    Limited,
    Spec,
    Structure,
    Toeplitz,
    structure,
)

AUTOS = [Auto(), Auto(1), Auto(64), Auto(10**9)]
LIMITS = [Limited(1), Limited(30), Limited(1, "diagonal"), Limited(30, "diagonal")]
SPECS = [space.structure for space in SPACES.values()] + AUTOS + LIMITS
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


@each_spec
def test_spec_is_a_value_with_a_name(spec):
    """Equal specs are equal and hash alike; the name (and the spec itself) finds them."""
    for twin in (copy(spec), deepcopy(spec), structure(spec.name)):
        assert spec == twin and hash(spec) == hash(twin) and type(spec) is type(twin)
    assert structure(spec) is spec
    assert isinstance(spec, Spec) and isinstance(spec.for_dim(3), Structure)
    with pytest.raises(AttributeError):
        spec.size = 3


def test_specs_and_their_names_differ():
    """No two entries of the table are equal or share a name."""
    assert len(set(SPECS)) == len({spec.name for spec in SPECS}) == len(SPECS)


def test_every_name_is_in_the_table():
    """What users can name is tested here, and has a dense projection to be tested against."""
    tested = {re.sub("[0-9]+", "#", spec.name) for spec in SPECS}
    assert tested == {re.sub("<[a-z]+>", "#", name) for name in NAMES}
    limits = {"dense#blocks", "dense#diagonal"}  # made of structures that are tested
    assert tested - limits == {re.sub(r"\(.*?\)", "#", name) for name in PROJECTIONS}


@given(numbers=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
def test_numbers_in_names(numbers):
    """Of any length, in the order of the arguments."""
    first, second = numbers
    assert structure(f"hierarchical{first}_{second}") == Hierarchical(first, second)
    assert structure(f"block{first + 1}diagonal") == BlockDiagonal(first + 1)
    assert structure(f"auto{first + 1}") == Auto(first + 1)


@given(budget=st.integers(1, 3000), dim=st.integers(1, 200))
def test_auto_uses_its_budget(budget, dim):
    """Dense, else the largest blocks of 8 rows or more, else diagonal."""
    chosen = Auto(budget).for_dim(dim)
    blocks = [b for b in range(8, dim) if dim * b <= budget]
    if dim * dim <= budget:
        assert chosen == Dense()
    else:
        assert chosen == (BlockDiagonal(blocks[-1]) if blocks else Diagonal())
    if chosen != Diagonal():
        assert torch.Size(chosen.coordinate_shape(dim)).numel() <= budget


@given(budget=st.integers(1, 500), dim=st.integers(1, 30))
def test_auto_has_the_projection_of_its_reference(budget, dim):
    rows = torch.randn(1, 4, dim, dtype=DTYPE)
    chosen = Auto(budget).for_dim(dim)
    actual = chosen.to_dense(chosen.project_gram(rows))
    torch.testing.assert_close(actual, projection(f"auto{budget}")(rows.mT @ rows))


@given(most=st.integers(1, 40), dim=st.integers(1, 60))
def test_limited_splits_what_is_larger(most, dim):
    small = dim <= most
    assert Limited(most).for_dim(dim) == (Dense() if small else BlockDiagonal(most))
    assert Limited(most, "diagonal").for_dim(dim) == (Dense() if small else Diagonal())


@pytest.mark.parametrize(("arguments", "error"), [
    ((0,), ValueError), ((True,), TypeError), ((2.5,), TypeError), ((3, "dense"), ValueError),
])  # fmt: skip
def test_limits_are_checked(arguments, error):
    with pytest.raises(error, match=r"Limited|beyond"):
        Limited(*arguments)


def test_auto_as_it_is():
    """A factor of 1024 rows is dense, and one more row is not."""
    assert structure("auto").for_dim(1024) == Dense()
    assert structure("auto").for_dim(1025) == BlockDiagonal(1023)
    assert structure("auto").for_dim(131072) == BlockDiagonal(8)
    assert structure("auto").for_dim(131073) == Diagonal()


@pytest.mark.parametrize(
    "spec",
    [
        "wide", "", "Dense", "dense ", "dense\n", "blockdiagonal", "block-1diagonal",
        "block2.0diagonal", "block<size>diagonal", "block٣diagonal", "hierarchical3",
        "hierarchical1_2_3", "hierarchical_", "toeplitz", "triltoeplitz2", "auto-1", "autodense",
    ],
)  # fmt: skip
def test_unknown_names_are_refused(spec):
    """And the known ones are listed."""
    with pytest.raises(ValueError, match=r"structure=.* is unknown.*block<size>diagonal"):
        structure(spec)


@pytest.mark.parametrize("spec", [3, None, b"dense", Dense, ["dense"], ("dense", "dense")])
def test_wrong_types_are_refused(spec):
    with pytest.raises(TypeError, match="structure must be a string or a Structure"):
        structure(spec)


@pytest.mark.parametrize("name", ["block0diagonal", "auto0"])
def test_numbers_out_of_range_are_refused_in_names(name):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        structure(name)


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (BlockDiagonal, (0,), ValueError, "size of BlockDiagonal must be at least 1, got 0"),
        (BlockDiagonal, (-3,), ValueError, "size of BlockDiagonal must be at least 1, got -3"),
        (BlockDiagonal, (2.0,), TypeError, "size of BlockDiagonal must be an integer, got 2.0"),
        (BlockDiagonal, (True,), TypeError, "size of BlockDiagonal must be an integer, got True"),
        (BlockDiagonal, ("2",), TypeError, "size of BlockDiagonal must be an integer, got '2'"),
        (BlockDiagonal, (None,), TypeError, "size of BlockDiagonal must be an integer"),
        (Toeplitz, ("left",), ValueError, "triangle of Toeplitz must be one of .*got 'left'"),
        (Toeplitz, (None,), ValueError, "triangle of Toeplitz must be one of .*got None"),
        (Hierarchical, (-1, 0), ValueError, "top of Hierarchical must be at least 0, got -1"),
        (Hierarchical, (0, -1), ValueError, "bottom of Hierarchical must be at least 0, got -1"),
        (Hierarchical, (1.0, 0), TypeError, "top of Hierarchical must be an integer, got 1.0"),
        (Hierarchical, (0, True), TypeError, "bottom of Hierarchical must be an integer"),
        (Arrow, ("left", "top-left"), ValueError, "triangle of Arrow must be one of.*'left'"),
        (Arrow, ("lower", "top-right"), ValueError, "diagonal of Arrow must be.*'top-right'"),
        (Arrow, ("top-left", "lower"), ValueError, "triangle of Arrow must be one of"),
        (Arrow, (True, None), ValueError, "triangle of Arrow must be one of.*got True"),
        (Auto, (0,), ValueError, "budget of Auto must be at least 1, got 0"),
        (Auto, (1e6,), TypeError, "budget of Auto must be an integer, got 1000000.0"),
        (Auto, (True,), TypeError, "budget of Auto must be an integer, got True"),
    ],
)
def test_arguments_out_of_range_are_refused(make, arguments, error, message):
    """By the argument's name."""
    with pytest.raises(error, match=message):
        make(*arguments)
