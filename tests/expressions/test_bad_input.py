"""Bad input is refused in words: a ValueError or TypeError with the argument and its value."""

from functools import partial

import pytest
import torch

from expressions.calls import CALLS, TRANSPOSED
from expressions.strategies import Case, TransposedCase
from tn_kfac import expressions

# Two dimensions, everything possible: (5, 6) pixels, kernel 3, stride 2, padding 1.
GOOD = Case(2, 2, 4, 2, (5, 6), (3, 3), 3, 2, 1, 1)
GOOD_TRANSPOSED = TransposedCase(2, 2, 4, 2, (5, 6), (9, 11), 3, 2, 1, 1)

NOT_INTEGERS = [2.0, 2.5, "3", b"3", None, True, (3, 2.0), (3, True), (3, None), ((3, 3),)]
NOT_POSITIVE = [0, -1, (3, 0), (-2, 3)]
WRONG_LENGTH = [(), (1, 1, 1), [2, 2, 2, 2]]

BAD = {
    "kernel_size": [*NOT_INTEGERS, *NOT_POSITIVE, *WRONG_LENGTH, 99, (3, 99)],
    "stride": [*NOT_INTEGERS, *NOT_POSITIVE, *WRONG_LENGTH],
    "dilation": [*NOT_INTEGERS, *NOT_POSITIVE, *WRONG_LENGTH],
    "padding": [
        *(value for value in NOT_INTEGERS if value != ((3, 3),)),
        *WRONG_LENGTH,
        *[-1, (1, -1), ((1, 1), (1, -1))],
        *["full", "SAME", "same ", "", "circular"],
        *[((1, 1), 1), ((1,), (1,)), ((1, 1, 1), (1, 1, 1)), ((1, 1),) * 3, ((1, 1.0), (1, 1))],
        *[("same", "same"), ((1, "1"), (1, 1))],
    ],
    "output_padding": [*NOT_INTEGERS, *WRONG_LENGTH, -1, 2, (0, 2), (1, -1)],
    "groups": [2.0, 1.5, "2", b"2", None, True, 0, -1, 3, (2,), (1, 1), [2]],
    "input_size": [*NOT_INTEGERS, *NOT_POSITIVE, *WRONG_LENGTH],
    "output_size": [*NOT_INTEGERS, *NOT_POSITIVE, *WRONG_LENGTH],
}


def good(name):
    return CALLS[name](GOOD_TRANSPOSED if name in TRANSPOSED else GOOD)


def parts(value):
    """A value, its entries, and theirs."""
    yield value
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from parts(entry)


def refusal(call, argument, value):
    """What is wrong with the way in which a call refuses a value; None if nothing is."""
    try:
        call()
    except (ValueError, TypeError) as error:
        message = str(error)
        if argument in message and any(repr(part) in message for part in parts(value)):
            return None
        return f"{argument}={value!r}: {type(error).__name__}: {message}"
    except Exception as error:
        return f"{argument}={value!r}: {error!r}"
    return f"{argument}={value!r} is accepted"


# A transposed convolution may have a kernel of any size; columns say how many axes there are
# only together with one of the sizes, so that a message may name either.
POSSIBLE = {(name, "kernel_size", size) for name in TRANSPOSED for size in ("99", "(3, 99)")} | {
    ("fold", argument, repr(value))
    for argument in ("kernel_size", "stride", "dilation", "output_size")
    for value in (*WRONG_LENGTH, 99, (3, 99))
}
ROWS = [(name, argument) for name in CALLS for argument in good(name)[1] if argument in BAD]


@pytest.mark.parametrize(("name", "argument"), ROWS)
def test_impossible_hyper_parameters(name, argument):
    tensors, hyper = good(name)
    operation = getattr(expressions, name)
    wrong = []
    for value in BAD[argument]:
        if (name, argument, repr(value)) in POSSIBLE:
            continue
        arguments = hyper | {argument: value}
        for call in (operation, operation.einsum_expression):
            wrong.append(refusal(partial(call, *tensors.values(), **arguments), argument, value))
    assert not [complaint for complaint in wrong if complaint]


@pytest.mark.parametrize("argument", [name for name in BAD if name != "output_size"])
def test_values_that_have_no_hash(argument):
    name = "conv_transpose_input_vjp" if argument in ("output_padding", "input_size") else "fold"
    name = "kfac_reduce" if argument == "groups" else name
    tensors, hyper = good(name)
    for value in ({3}, {"pixels": 3}, [{3}, 3]):
        call = partial(getattr(expressions, name), *tensors.values(), **hyper | {argument: value})
        with pytest.raises(TypeError, match=argument):
            call()


@pytest.mark.parametrize("name", CALLS)
def test_values_that_equal_integers_are_no_integers(name):
    """Also when the same call with integers was made, and cached, before: 1 == 1.0 == True."""
    tensors, hyper = good(name)
    operation = getattr(expressions, name)
    wrong = []
    for argument, value in hyper.items():
        operation(*tensors.values(), **hyper)
        entries = [float(value), True] if value == 1 else []
        if argument not in ("groups", "input_size", "output_size"):
            operation(*tensors.values(), **hyper | {argument: (value, value)})
            entries = [float(value), (value, float(value))]
        for entry in entries:
            call = partial(operation, *tensors.values(), **hyper | {argument: entry})
            wrong.append(refusal(call, argument, entry))
    assert not [complaint for complaint in wrong if complaint]


def test_same_padding_needs_stride_one():
    x = torch.ones(2, 4, 5, 6)
    for stride in (2, (1, 2)):
        with pytest.raises(ValueError, match=r"padding='same'.*stride"):
            expressions.kfac_reduce(x, 3, stride=stride, padding="same")


@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_spatial_dimensions(name):
    tensors, hyper = good(name)
    for key, tensor in tensors.items():
        for shape in [(), (4,), (2, 4)]:
            if shape == (2, 4) and name.endswith("_gradient"):
                continue  # one position
            value = torch.ones(shape, dtype=tensor.dtype)
            with pytest.raises(ValueError) as info:
                getattr(expressions, name)(*(tensors | {key: value}).values(), **hyper)
            assert f"{key} has shape {shape}" in str(info.value)


def test_columns_that_no_image_has():
    columns = torch.ones(2, 36, 9)
    for value in (columns[0], columns[..., None], columns[:, :35], columns[..., :8]):
        with pytest.raises(ValueError, match="columns has") as info:
            expressions.fold(value, (5, 6), 3, 2, 1)
        assert str(tuple(value.shape)) in str(info.value) or "35" in str(info.value)


# Dimensions that one tensor alone decides: batch, image, kernel and some channels.
IMAGE, KERNEL = {0, 2, 3}, {2, 3}
FREE = {
    "conv_forward": {"x": IMAGE, "weight": {0}},
    "conv_input_jvp": {"tangent": IMAGE, "weight": {0}},
    "conv_weight_jvp": {"x": IMAGE, "tangent": {0}},
    "conv_input_vjp": {"v": {0}, "weight": {1}},
    "conv_weight_vjp": {"x": {1}, "v": {1}},
    "conv_weight_vjp_per_example": {"x": {1}, "v": {1}},
    "ggn_diagonal": {"x": {1}, "v": {0, 2}},
    "ggn_gram": {"x": {1}, "v": {0, 2}},
    "conv_transpose_forward": {"x": IMAGE, "weight": {1, *KERNEL}},
    "conv_transpose_input_vjp": {"v": {0}, "weight": {0}},
    "conv_transpose_weight_vjp": {"x": {1}, "v": {1}},
}


@pytest.mark.parametrize("name", FREE)
def test_tensors_of_shapes_that_do_not_fit(name):
    """One tensor three times as large in one dimension."""
    tensors, hyper = good(name)
    for key, tensor in tensors.items():
        for dim in range(tensor.dim()):
            wrong = tensors | {key: torch.cat([tensor, tensor, tensor], dim)}
            call = partial(getattr(expressions, name), *wrong.values(), **hyper)
            if dim in FREE[name].get(key, set()):
                call()
                continue
            with pytest.raises(ValueError, match=r"has shape|channels|kernel_size"):
                call()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [None, [[[1.0]]], 3, "x"])
def test_what_is_no_tensor(name, value):
    tensors, hyper = good(name)
    for key in tensors:
        with pytest.raises(
            TypeError, match=rf"{key} must be a torch.Tensor.*{type(value).__name__}"
        ):
            getattr(expressions, name)(*(tensors | {key: value}).values(), **hyper)


@pytest.mark.parametrize("name", [name for name in CALLS if len(good(name)[0]) > 1])
def test_mixed_dtypes_and_devices(name):
    tensors, hyper = good(name)
    first, second = tensors
    for other in (tensors[second].float(), tensors[second].to("meta")):
        for call in (getattr(expressions, name), getattr(expressions, name).einsum_expression):
            with pytest.raises(ValueError) as info:
                call(tensors[first], other, **hyper)
            for part in (first, second, str(other.dtype), str(other.device)):
                assert part in str(info.value)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name):
    """An unknown keyword, a missing argument, one too many: as Python functions say it."""
    tensors, hyper = good(name)
    operation = getattr(expressions, name)
    for colour in (1, torch.float32):
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            operation(*tensors.values(), **hyper, colour=colour)
    with pytest.raises(TypeError, match=next(reversed(tensors))):
        operation(*list(tensors.values())[:-1], **hyper)
    with pytest.raises(TypeError):
        operation(*tensors.values(), *hyper.values(), *[True] * 20)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("kfac")])
def test_no_mean_over_an_empty_batch(name):
    tensors, hyper = good(name)
    ((key, tensor),) = tensors.items()
    if name.endswith("gradient"):  # a sum
        assert not getattr(expressions, name)(tensor[:0], **hyper).any()
        return
    with pytest.raises(ValueError, match=rf"{key} has .*batch"):
        getattr(expressions, name)(tensor[:0], **hyper)


@pytest.mark.parametrize("name", ["conv_forward", "unfold_input", "conv_transpose_forward"])
def test_an_empty_batch_has_an_empty_result(name):
    tensors, hyper = good(name)
    x, *others = tensors.values()
    shape = getattr(expressions, name)(x, *others, **hyper).shape
    assert getattr(expressions, name)(x[:0], *others, **hyper).shape == (0, *shape[1:])
