"""A layer's geometry is right if weight matrix times rows is what the layer computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import kfac
from reference.cases import LayerCase, conv_cases, layer_cases
from reference.other_cases import look_up_cases, norm_cases
from torch import Tensor, nn

from tn_kfac.layers import Layer, layer_of
from tn_kfac.tensor_network.execute import einsum_expression
from tn_kfac.tensor_network.rows import Rows

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def _geometry(case: LayerCase) -> Layer:
    layer = layer_of(case.module)
    assert layer is not None
    return layer


def _dense(rows: Rows, **tensors: Tensor) -> Tensor:
    """The network of rows as it is written down, without simplification or plan."""
    equation, operands, shape = einsum_expression(rows.network, tensors, simplified=False)
    return torch.einsum(equation, *operands).reshape(shape)


def _input_rows(case: LayerCase) -> Tensor:
    """Rows by the geometry's network, (n, shared, groups, features)."""
    layer = _geometry(case)
    x = layer.prepare_input(case.x)
    rows = layer.input_rows(x.shape, case.outputs().shape)
    dense = _dense(rows, x=x)
    return dense.reshape(rows.samples, rows.positions, layer.groups, layer.features_in)


def _output_rows(case: LayerCase, y: Tensor) -> Tensor:
    """An output (or its gradient) by the geometry's network, (n, shared, groups, features)."""
    layer = _geometry(case)
    y = layer.prepare_gradient(y)
    rows = layer.gradient_rows(y.shape)
    dense = _dense(rows, v=y)
    return dense.reshape(rows.samples, rows.positions, layer.groups, layer.features_out)


@settings(max_examples=120)
@given(case=layer_cases())
def test_weight_matrix_times_rows_is_the_output(case):
    """y[n, s, g] = W[g] · r[n, s, g] + b[g], for every layer and hyper-parameter."""
    layer, module = _geometry(case), case.module
    matrix = layer.to_matrix(module.weight)
    outputs = torch.einsum("gof,nsgf->nsgo", matrix, _input_rows(case))
    if module.bias is not None:
        outputs = outputs + module.bias.reshape(layer.groups, layer.features_out)
    torch.testing.assert_close(outputs, _output_rows(case, case.outputs()), **TIGHT)


@given(case=layer_cases())
def test_rows_equal_the_definition(case):
    """Rows are the derivatives of the output by the weight, in the weight's own order."""
    expected = [kfac.input_rows(case.module, x, **case.kwargs) for x in case.examples]
    expected = torch.stack(expected)
    torch.testing.assert_close(_input_rows(case), expected, **TIGHT)


@given(case=layer_cases())
def test_from_matrix_inverts_to_matrix(case):
    """The weight as matrices and back is the weight, in any memory layout."""
    layer = _geometry(case)
    weight = case.module.weight
    matrix = layer.to_matrix(weight)
    assert matrix.shape == (layer.groups, layer.features_out, layer.features_in)
    assert torch.equal(layer.from_matrix(matrix, weight.shape), weight)
    assert torch.equal(layer.from_matrix(matrix.mT.contiguous().mT, weight.shape), weight)


@given(
    case=st.one_of(layer_cases(), look_up_cases(), norm_cases()),
    use=st.sampled_from([(True, True), (True, False), (False, True)]),
    contiguous=st.booleans(),
)
def test_parted_inverts_joined(case, use, contiguous):
    """The joint matrix of the trained ones of weight and bias holds them, and nothing else."""
    layer, module = _geometry(case), case.module
    bias = getattr(module, "bias", None)
    use_weight, use_bias = use[0] or bias is None, use[1] and bias is not None
    parts = module.weight if use_weight else None, bias if use_bias else None
    matrix = layer.joined(*parts)
    columns, rows = layer.dims(use_weight, use_bias)
    assert matrix.shape == (layer.groups, rows, columns)
    matrix = matrix.contiguous() if contiguous else matrix.mT.contiguous().mT
    again = layer.parted(matrix, *(None if part is None else part.shape for part in parts))
    for part, expected in zip(again, parts, strict=True):
        assert part is expected is None or torch.equal(part, expected)


@given(case=layer_cases())
def test_geometry_is_a_hashable_value(case):
    """Equal modules share plans: equal geometries are equal, hash alike, and hold no tensor."""
    layer, twin = _geometry(case), _geometry(case)
    assert layer == twin
    assert hash(layer) == hash(twin)
    assert not any(isinstance(value, Tensor) for value in vars(layer).values())


@given(case=conv_cases(2))
def test_padded_input_gives_the_same_convolution(case):
    """Padding that is not zeros is part of the prepared input, and nothing else is."""
    module = case.module
    x = _geometry(case).prepare_input(case.x)
    padding = module.padding if module.padding_mode == "zeros" else 0
    y = nn.functional.conv2d(
        x, module.weight, module.bias, module.stride, padding, module.dilation, module.groups
    )
    torch.testing.assert_close(y, case.outputs(), **TIGHT)
