"""Any dtype, memory layout and gradient: what an operation does with its tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expressions import reference
from expressions.calls import CALLS, cases_of
from expressions.strategies import examples
from tn_kfac import expressions

# The largest error of one rounding, and how many of them the small cases add up.
DTYPES = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
ROUNDINGS = 40
few = st.sampled_from([1, 1, 2, 3])
names_of_all = st.sampled_from(sorted(CALLS))


@st.composite
def calls(draw):
    """An operation's name, tensors and hyper-parameters."""
    name = draw(names_of_all)
    return name, *CALLS[name](draw(cases_of(name, few)))


def both_ways(name, tensors, hyper):
    """The value by call, and by equation."""
    operation = getattr(expressions, name)
    equation, operands, shape = operation.einsum_expression(*tensors.values(), **hyper)
    yield operation(*tensors.values(), **hyper)
    yield torch.einsum(equation, *operands).reshape(shape)


@examples(6)
@given(st.sampled_from(list(DTYPES)), calls())
def test_low_precision_keeps_its_dtype_and_is_close(dtype, call):
    name, tensors, hyper = call
    low = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    high = [tensor.double() for tensor in low.values()]
    expected = getattr(reference, name)(*high, **hyper)
    # Errors are relative to the sum of absolute values, not to what may have cancelled.
    size = getattr(reference, name)(*(tensor.abs() for tensor in high), **hyper).max()
    for actual in both_ways(name, low, hyper):
        assert actual.dtype == dtype
        error = (actual.double() - expected).abs().max()
        assert error <= ROUNDINGS * (DTYPES[dtype] * size + torch.finfo(dtype).smallest_normal)


@examples(2)
@given(calls())
def test_complex_numbers_are_linear(call):
    """Polynomials in the tensors, without conjugation: so are the operations."""
    name, tensors, hyper = call
    values = {key: torch.complex(t, t.flip(0).cos()) for key, t in tensors.items()}
    expected = polarised(getattr(reference, name), values, hyper)
    for actual in both_ways(name, values, hyper):
        assert actual.dtype == torch.complex128
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def polarised(function, values, hyper):
    """A polynomial of degree at most 4 at complex tensors, from its values at real ones.

    Along real t the function f(a + t·b) is a polynomial in t, to be read at t = i.
    """
    at = torch.arange(-2, 3, dtype=torch.float64)
    samples = torch.stack(
        [function(*(v.real + t * v.imag for v in values.values()), **hyper) for t in at]
    )
    powers = at[:, None] ** torch.arange(5)
    coefficients = torch.linalg.solve(powers, samples.flatten(1)).to(torch.complex128)
    powers_of_i = torch.tensor([1, 1j, -1, -1j, 1], dtype=torch.complex128)
    return (powers_of_i @ coefficients).reshape(samples.shape[1:])


def laid_out(tensor, layout):
    """The same values at other places in memory."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "strided":
        spaced = torch.empty(*tensor.shape, 3, dtype=tensor.dtype)
        spaced[..., 1] = tensor
        return spaced[..., 1]
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.dim() in formats:
        return tensor.contiguous(memory_format=formats[tensor.dim()])
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


@examples(6)
@given(st.sampled_from(["transposed", "strided", "expanded", "channels last"]), calls())
def test_memory_layout_does_not_matter(layout, call):
    name, tensors, hyper = call
    placed = {key: laid_out(tensor, layout) for key, tensor in tensors.items()}
    values = [tensor.clone(memory_format=torch.contiguous_format) for tensor in placed.values()]
    expected = getattr(reference, name)(*values, **hyper)
    for actual in both_ways(name, placed, hyper):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@examples(2)
@given(calls())
def test_operations_are_differentiable(call):
    """First and second derivatives along random directions, against the reference's."""
    name, tensors, hyper = call
    inputs = [tensor.requires_grad_() for tensor in tensors.values()]
    for actual in both_ways(name, tensors, hyper):
        expected = getattr(reference, name)(*inputs, **hyper)
        v = torch.linspace(-1, 1, actual.numel(), dtype=actual.dtype).reshape(actual.shape)
        pairs = zip(derivatives(actual, inputs, v), derivatives(expected, inputs, v), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def derivatives(y, inputs, v):
    """The gradient of ⟨v, y⟩, and the gradient of the gradient's squared norm."""
    first = torch.autograd.grad(y, inputs, v, create_graph=True, materialize_grads=True)
    norm = sum((gradient**2).sum() for gradient in first)
    if not norm.requires_grad:
        return first
    return *first, *torch.autograd.grad(norm, inputs, materialize_grads=True)


@pytest.mark.parametrize("name", ["kfac_expand", "kfac_reduce", "unfold_input", "ggn_gram"])
def test_numerical_gradient(name):
    """By finite differences too, of the call and the equation."""
    x, v = (torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tensors = {"x": x, "v": v} if name == "ggn_gram" else {"x": x}
    hyper = {"kernel_size": 3, "padding": 1, "groups": 2}
    for way in (0, 1):

        def function(*values, way=way):
            named = dict(zip(tensors, values, strict=True))
            return list(both_ways(name, named, hyper))[way]

        assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@examples(2)
@given(calls())
def test_inputs_are_left_alone(call):
    name, tensors, hyper = call
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    for _ in both_ways(name, tensors, hyper):
        assert all(torch.equal(tensor, before[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("name", ["kfac_expand", "kfac_reduce"])
def test_integers_are_exact_or_refused(name, dtype):
    """A mean of integers is no integer: the scale must not be rounded to zero in silence."""
    x = torch.arange(24).reshape(2, 2, 6).to(dtype)
    expected = getattr(reference, name)(x.double(), 3)
    for way in (0, 1):
        try:
            actual = list(both_ways(name, {"x": x}, {"kernel_size": 3}))[way]
        except (TypeError, ValueError) as error:
            assert "x" in str(error) and str(dtype) in str(error)
        else:
            torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["kfac_expand", "kfac_reduce"])
def test_float16_holds_the_factors_of_large_images(name):
    """Neither do sums overflow (over 65504), nor does their scale 1/O² underflow (under 6e-8)."""
    x = torch.full((2, 1, 112, 112), 0.5)
    expected = getattr(reference, name)(x.double(), 1)
    assert expected.max() < 65504
    for actual in both_ways(name, {"x": x.half()}, {"kernel_size": 1}):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["kfac_expand_diagonal", "kfac_reduce_diagonal"])
def test_float16_holds_a_mean_whose_sum_overflows(name):
    """Of 64 squares of 200, for one window."""
    x = torch.full((64, 2, 5, 5), 200.0).half()
    assert torch.equal(getattr(expressions, name)(x, 5), torch.full((1, 50), 4e4).half())
