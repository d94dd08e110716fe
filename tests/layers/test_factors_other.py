"""Factors of embeddings and normalisations equal the definition, example by example."""

import torch
from checking import CHOICES, amounts, check_drawn, check_one_batch
from hypothesis import given
from reference import definition
from reference.cases import LayerCase
from reference.other_cases import (
    bag_cases,
    batch_norm_cases,
    embedding_cases,
    group_norm_cases,
    layer_norm_cases,
    look_up_cases,
    norm_cases,
)

from tn_kfac.layers import layer_of

TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def _off_diagonal(A: torch.Tensor) -> torch.Tensor:
    return A - torch.diag_embed(A.diagonal(0, 1, 2))


def _check_embedding(case: LayerCase, **choices) -> None:
    """With KFAC-expand no approximation is made by keeping the diagonal of A alone."""
    A, _ = definition.factors([definition.rows(case)], "expand", 1, use_bias=False)
    assert torch.equal(_off_diagonal(A), torch.zeros_like(A))
    check_one_batch(case, **choices)


@amounts(80, 600)
def test_embedding(amount):
    """Indices of 0 to 3 dimensions, of either type, with or without a padding index."""
    check_drawn(amount, _check_embedding, case=embedding_cases(), **CHOICES)


@amounts(80, 600)
def test_embedding_bag(amount):
    """Sums and means, of bags of one size or of any, empty ones among them, and weighted."""
    check_drawn(amount, check_one_batch, case=bag_cases(), **CHOICES)


@amounts(80, 600)
def test_layer_norm_and_rms_norm(amount):
    """Any normalised shape after any number of dimensions."""
    check_drawn(amount, check_one_batch, case=layer_norm_cases(), **CHOICES)


@amounts(60, 400)
def test_group_norm(amount):
    """Any groups and spatial dimensions."""
    check_drawn(amount, check_one_batch, case=group_norm_cases(), **CHOICES)


@amounts(60, 600)
def test_batch_norm(amount):
    """Training, and evaluating with running statistics (or without)."""
    check_drawn(amount, check_one_batch, case=batch_norm_cases(), **CHOICES)


@given(case=look_up_cases())
def test_rows_of_the_definition_are_derivatives(case):
    """Of the oracle: y[n, s, d] = Σ_v a[n, s, v] W[v, d], and autograd differentiates it so."""
    rows = definition.rows(case)
    a = rows.a.flatten(0, 2)
    y = case.outputs().reshape(len(a), -1)
    for row, expected in zip(y, a, strict=True):
        gradient = torch.autograd.grad(row[0], case.module.weight, retain_graph=True)[0]
        torch.testing.assert_close(gradient[:, 0], expected, **TIGHT)


@given(case=look_up_cases())
def test_weight_matrix_times_rows_is_the_output(case):
    """y[n, s] = W r[n, s]; a look-up of the padding index is none, whatever is kept for it."""
    with torch.no_grad():
        if case.module.padding_idx is not None:
            case.module.weight[case.module.padding_idx] = 0.0
    (matrix,) = layer_of(case.module).to_matrix(case.module.weight)
    outputs = definition.rows(case).a.flatten(0, 2) @ matrix.T
    torch.testing.assert_close(outputs, case.outputs().reshape(outputs.shape), **TIGHT)


@given(case=norm_cases())
def test_normalised_inputs_of_the_definition(case):
    """Of the oracle: the normalised input, scaled and shifted, is what the module computes."""
    module = case.module
    z = definition.normalised(module, case.x)
    over_channels = module.weight.dim() == 1 and not isinstance(
        module, (torch.nn.LayerNorm, torch.nn.RMSNorm)
    )
    shape = (-1, *(1 for _ in z.shape[2:])) if over_channels else module.weight.shape
    bias = getattr(module, "bias", None)
    shift = 0.0 if bias is None else bias.view(shape)
    y = z * module.weight.view(shape) + shift
    torch.testing.assert_close(y, module(case.x), **TIGHT)
