"""The reference geometry against torch, where torch has the operation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from expressions import reference
from expressions.strategies import TransposedCase, cases, transposed_cases

few = st.sampled_from([1, 2, 3])
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def spatial(case):
    """Per axis: (kernel, stride, dilation, (left, right))."""
    dims = len(case.input_size)
    return reference.axes_of(dims, case.kernel_size, case.stride, case.padding, case.dilation)


def padded(x, axes):
    """`x` padded by torch, which lists the last dimension first."""
    return F.pad(x, [width for axis in reversed(axes) for width in axis[3]])


def by_torch(case, x, weight):
    """The convolution, with padding put in beforehand since torch has no (left, right)."""
    axes = spatial(case)
    _, stride, dilation, _ = zip(*axes, strict=True)
    return CONV[len(axes)](padded(x, axes), weight, None, stride, 0, dilation, case.groups)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(cases(few))
def test_forward_is_that_of_torch(case):
    x, weight = case.x(), case.weight()
    y = reference.conv_forward(x, weight, **case.hyper)
    assert y.shape == case.v().shape
    close(y, by_torch(case, x, weight))
    if isinstance(case.padding, str | int) or isinstance(case.padding[0], int):
        close(y, CONV[x.dim() - 2](x, weight, None, **case.hyper))


@given(cases(few))
def test_derivatives_are_those_of_torch(case):
    x, weight, v = case.x().requires_grad_(), case.weight().requires_grad_(), case.v()
    dx, dw = torch.autograd.grad(by_torch(case, x, weight), (x, weight), v)
    x, weight = x.detach(), weight.detach()
    close(reference.conv_input_vjp(weight, v, case.input_size, **case.hyper), dx)
    close(reference.conv_weight_vjp(x, v, case.kernel_size, **case.hyper), dw)
    each = reference.conv_weight_vjp_per_example(x, v, case.kernel_size, **case.hyper)
    assert each.shape == (case.batch, *dw.shape)
    close(each.sum(0), dw)
    close(reference.conv_input_jvp(2 * x, weight, **case.hyper), 2 * by_torch(case, x, weight))
    close(reference.conv_weight_jvp(x, 2 * weight, **case.hyper), 2 * by_torch(case, x, weight))


@given(cases(few))
def test_unfolded_kernel_is_the_matrix_of_the_convolution(case):
    x, weight = case.x(), case.weight()
    matrix = reference.unfold_kernel(weight, case.input_size, **case.hyper)
    close(x.flatten(1) @ matrix.T, by_torch(case, x, weight).flatten(1))


@given(cases(st.just(2)))
def test_unfold_and_fold_are_those_of_torch(case):
    axes, x = spatial(case), case.x()
    kernel, stride, dilation, pairs = zip(*axes, strict=True)
    named = {"kernel_size": kernel, "stride": stride, "dilation": dilation}
    columns = reference.unfold_input(x, padding=case.padding, **named)
    close(columns, F.unfold(padded(x, axes), **named))
    (top, _), (left, _) = pairs
    height, width = case.input_size
    folded = F.fold(columns, padded(x, axes).shape[2:], **named)
    expected = folded[:, :, top : top + height, left : left + width]
    close(reference.fold(columns, case.input_size, padding=case.padding, **named), expected)


@given(cases())
def test_fold_is_the_adjoint_of_unfold(case):
    named = {name: value for name, value in case.hyper.items() if name != "groups"}
    x = case.x()
    columns = reference.unfold_input(x, case.kernel_size, **named)
    other = torch.linspace(-1, 1, columns.numel(), dtype=x.dtype).reshape(columns.shape)
    folded = reference.fold(other, case.input_size, case.kernel_size, **named)
    close((other * columns).sum(), (folded * x).sum())


@given(transposed_cases(few))
def test_transposed_forward_is_that_of_torch(case: TransposedCase):
    x, weight = case.x(), case.weight()
    axes = spatial(case)
    _, stride, dilation, pairs = zip(*axes, strict=True)
    whole = CONV_TRANSPOSE[len(axes)](
        x, weight, None, stride, 0, case.output_padding, case.groups, dilation
    )
    sizes = zip(pairs, whole.shape[2:], strict=True)
    cropped = whole[(..., *(slice(left, size - right) for (left, right), size in sizes))]
    y = reference.conv_transpose_forward(x, weight, **case.hyper)
    assert y.shape == case.v().shape
    close(y, cropped)


@given(transposed_cases())
def test_transposed_unfolded_input_times_weight_is_the_forward_pass(case: TransposedCase):
    x, weight = case.x(), case.weight()
    columns = reference.unfold_input_transpose(x, case.kernel_size, **case.hyper)
    columns = columns.reshape(case.batch, case.groups, -1, columns.shape[-1])
    matrix = weight.reshape(case.groups, len(weight) // case.groups, weight.shape[1], -1)
    matrix = matrix.movedim(2, 1).flatten(2)
    y = reference.conv_transpose_forward(x, weight, **case.hyper)
    close((matrix @ columns).reshape(y.shape), y)


@given(cases(few))
def test_factors_are_means_over_samples_of_outer_products(case):
    x = case.x()
    axes = spatial(case)
    columns = reference.unfold_input(x, case.kernel_size, **case.hyper)
    expand, reduce = 0, 0
    for sample in columns.reshape(case.batch, case.groups, -1, columns.shape[-1]):
        for patch in sample.unbind(-1):
            expand = expand + patch[:, :, None] * patch[:, None, :] / case.batch
        mean = sample.sum(-1) / sample.shape[-1]
        reduce = reduce + mean[:, :, None] * mean[:, None, :] / case.batch
    assert expand.shape == (case.groups, case.features, case.features)
    assert len(axes) == x.dim() - 2
    close(reference.kfac_expand(x, case.kernel_size, **case.hyper), expand)
    close(reference.kfac_reduce(x, case.kernel_size, **case.hyper), reduce)
