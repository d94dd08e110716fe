"""Factors of linear layers and convolutions equal the definition, example by example."""

import pytest
import torch
from checking import CHOICES, amounts, check_drawn, check_one_batch
from reference.cases import (
    APPROXIMATIONS,
    LayerCase,
    conv_cases,
    conv_transpose_cases,
    linear_cases,
    transposed_linear_cases,
)

# torch's own advice on even kernels with padding="same".
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@amounts(80, 600)
def test_linear(amount):
    """Linear with any shared dimensions, with or without a batch dimension."""
    check_drawn(amount, check_one_batch, case=linear_cases(), **CHOICES)


@amounts(40, 300)
def test_transposed_linear_of_transformers(amount):
    """The same with HuggingFace's Conv1D."""
    check_drawn(amount, check_one_batch, case=transposed_linear_cases(), **CHOICES)


@pytest.mark.parametrize("dims", [1, 2, 3])
@amounts(80, 600)
def test_convolution(amount, dims):
    """Every hyper-parameter, batched or not: one pair of factors per group."""
    check_drawn(amount, check_one_batch, case=conv_cases(dims), **CHOICES)


@pytest.mark.parametrize("dims", [1, 2, 3])
@amounts(80, 600)
def test_transposed_convolution(amount, dims):
    """Every hyper-parameter, the size of the output asked for in the call or not."""
    check_drawn(amount, check_one_batch, case=conv_transpose_cases(dims), **CHOICES)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same", "valid"])
@pytest.mark.parametrize("kernel", [(2, 2), (3, 4)])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_every_padding_on_every_mode(mode, padding, kernel, approx):
    """The table of paddings, even kernels included; nothing is left to chance."""
    module = torch.nn.Conv2d(2, 2, kernel, padding=padding, padding_mode=mode, groups=2).double()
    case = LayerCase(module, torch.randn(2, 2, 4, 5, dtype=torch.float64), channels=2)
    check_one_batch(case, approx, "batch", ("dense", "dense"), "nothing")


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_rows_come_in_parts(dims, approx, monkeypatch):
    """Few samples at a time, where all rows would not fit."""
    monkeypatch.setattr("tn_kfac.layers.rows.DEFAULT_LIMIT", 40)
    kind = (torch.nn.Conv1d, torch.nn.Conv2d)[dims - 1]
    module = kind(4, 2, 3, stride=2, padding=1, groups=2).double()
    case = LayerCase(module, torch.randn(5, 4, *[6] * dims, dtype=torch.float64), channels=2)
    names = ("block2diagonal", "triltoeplitz")
    check_one_batch(case, approx, "batch", names, "nothing")
