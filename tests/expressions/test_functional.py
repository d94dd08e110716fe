"""The namesakes of torch.nn.functional: equal to it where it goes, to the reference beyond."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from expressions import reference
from expressions.strategies import Case, cases, transposed_cases
from tn_kfac import expressions, functional

few, many = st.sampled_from([1, 2, 3]), st.sampled_from([4, 5, 6])
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def symmetric(case: Case) -> bool:
    """Whether torch can do it: without (left, right) pairs."""
    return isinstance(case.padding, (int, str)) or isinstance(case.padding[0], int)


def bias_of(case: Case) -> torch.Tensor:
    return torch.linspace(-1, 1, case.out_channels, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(cases(few).filter(symmetric))
def test_conv_is_that_of_torch(case):
    x, weight, bias = (t.requires_grad_() for t in (case.x(), case.weight(), bias_of(case)))
    arguments = (case.stride, case.padding, case.dilation, case.groups)
    y = functional.conv(x, weight, bias, *arguments)
    expected = CONV[x.dim() - 2](x, weight, bias, *arguments)
    close(y, expected)
    gradients = (torch.autograd.grad(value, (x, weight, bias), case.v()) for value in (y, expected))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


@given(transposed_cases(few).filter(lambda case: isinstance(case.padding, int)))
def test_conv_transpose_is_that_of_torch(case):
    x, weight, bias = (t.requires_grad_() for t in (case.x(), case.weight(), bias_of(case)))
    arguments = (case.stride, case.padding, case.output_padding, case.groups, case.dilation)
    y = functional.conv_transpose(x, weight, bias, *arguments)
    expected = CONV_TRANSPOSE[x.dim() - 2](x, weight, bias, *arguments)
    close(y, expected)
    gradients = (torch.autograd.grad(value, (x, weight, bias), case.v()) for value in (y, expected))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


@given(cases(st.just(2)).filter(lambda case: symmetric(case) and not isinstance(case.padding, str)))
def test_unfold_and_fold_are_those_of_torch(case):
    arguments = (case.kernel_size, case.dilation, case.padding, case.stride)
    columns = functional.unfold(case.x(), *arguments)
    close(columns, F.unfold(case.x(), *arguments))
    close(
        functional.fold(columns, case.input_size, *arguments),
        F.fold(columns, case.input_size, *arguments),
    )


@given(cases(many))
def test_conv_goes_beyond_three_dimensions(case):
    bias = bias_of(case)
    y = functional.conv(case.x(), case.weight(), bias, **case.hyper)
    expected = reference.conv_forward(case.x(), case.weight(), **case.hyper)
    close(y, expected + bias.reshape(-1, *[1] * len(case.input_size)))
    close(functional.conv(case.x(), case.weight(), **case.hyper), expected)


@given(transposed_cases(many))
def test_conv_transpose_goes_beyond_three_dimensions(case):
    bias = bias_of(case)
    y = functional.conv_transpose(case.x(), case.weight(), bias, **case.hyper)
    expected = reference.conv_transpose_forward(case.x(), case.weight(), **case.hyper)
    close(y, expected + bias.reshape(-1, *[1] * len(case.input_size)))


PAIRS = [
    (functional.conv, "input weight bias stride padding dilation groups"),
    (
        functional.conv_transpose,
        "input weight bias stride padding output_padding groups dilation",
    ),
    (functional.unfold, str.join(" ", inspect.signature(F.unfold).parameters)),
    (functional.fold, str.join(" ", inspect.signature(F.fold).parameters)),
]


@pytest.mark.parametrize(("ours", "names"), PAIRS)
def test_arguments_are_in_the_order_of_torch(ours, names):
    assert list(inspect.signature(ours).parameters) == names.split()


@pytest.mark.parametrize("shape", [(), (3,), (1, 2), (2, 1)])
def test_bias_of_wrong_shape(shape):
    x, weight = torch.ones(1, 2, 5), torch.ones(2, 2, 3)
    with pytest.raises(ValueError, match="bias has shape"):
        functional.conv(x, weight, torch.ones(shape))


def test_fold_to_an_integer_size():
    """As in torch it means two dimensions, but for other arguments that say how many."""
    columns = torch.randn(2, 8, 9, dtype=torch.float64)
    close(functional.fold(columns, 4, 2), F.fold(columns, 4, 2))
    once = functional.fold(columns, (18,), 2, stride=2)
    close(functional.fold(columns, 18, 2, stride=(2,)), once)


@pytest.mark.parametrize("wrong", [3, torch.ones(2)])
def test_only_expressions_are_explained_and_drawn(wrong, tmp_path):
    for show in (expressions.explain, lambda x: expressions.draw(x, tmp_path / "x.png")):
        with pytest.raises(TypeError, match="must be what"):
            show(wrong)
