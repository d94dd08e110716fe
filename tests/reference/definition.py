"""Factors of a layer of any kind by their definition, in float64 and without tn_kfac.

Layers that multiply a weight with rows are those of `reference.kfac`. An embedding multiplies
it with one-hot rows, an `EmbeddingBag` with sums (or means) of some. Affine parameters of a
normalisation have, for each channel, the Fisher's own block: of the gradients of each
example's loss by the scale and the shift, with the normalised input held fixed.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reference import kfac
from reference.cases import LayerCase, example_loss


@dataclass
class Rows:
    """Rows a of inputs and h of gradients of Σ_n L_n, each (examples, shared, groups, features).

    Attributes:
        positions: Shared positions, over which `a` and `h` of a norm are summed already.
        is_norm: Whether the features of h are the weight and the bias of a channel.
    """

    a: Tensor
    h: Tensor
    positions: int
    is_norm: bool = False


def rows(case: LayerCase, first: int = 0) -> Rows:
    """Rows of a batch, for the losses of its examples, numbered from `first`."""
    if isinstance(case.module, nn.EmbeddingBag):
        return Rows(_bags(case)[:, None, None], _look_up_gradients(case, first), 1)
    if isinstance(case.module, nn.Embedding):
        h = _look_up_gradients(case, first)
        return Rows(_one_hot(case, h.shape[1])[:, :, None], h, h.shape[1])
    if isinstance(case.module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm)):
        return _norm_rows(case, first)
    losses = lambda y, n: example_loss(y, first + n)  # noqa: E731
    a, h = kfac.rows_of_examples(case.module, case.examples, losses, **case.kwargs)
    return Rows(a, h, a.shape[1])


def factors(
    batches: list[Rows], approx: str, terms: int, use_weight: bool = True, use_bias: bool = True
) -> tuple[Tensor, Tensor]:
    """Dense (A, G) of all batches together: every row has the same weight in A."""
    A_sum, G_sum, count = torch.zeros(()), torch.zeros(()), 0
    for batch in batches:
        if batch.is_norm:
            trained = [i for i, use in enumerate((use_weight, use_bias)) if use]
            A, G = kfac.factors(batch.a, batch.h[..., trained], approx, 1, use_bias=False)
        else:
            A, G = kfac.factors(batch.a, batch.h, approx, 1, use_weight, use_bias)
        rows_of_batch = len(batch.a) * (batch.a.shape[1] if approx == "expand" else 1)
        A_sum = A_sum + A * rows_of_batch
        G_sum = G_sum + G
        count += rows_of_batch
    return A_sum / count, G_sum / terms


def _look_up_gradients(case: LayerCase, first: int) -> Tensor:
    y = case.outputs().detach().requires_grad_()
    sum(example_loss(y_n, first + n) for n, y_n in enumerate(y)).backward()
    return y.grad.reshape(len(y), -1, 1, y.shape[-1])


def _one_hot(case: LayerCase, positions: int) -> Tensor:
    """Rows (examples, shared, embeddings); zero at the padding index, which is not trained."""
    indices = (case.x if case.batched else case.x[None]).reshape(-1, positions)
    a = torch.zeros(*indices.shape, case.module.num_embeddings, dtype=torch.float64)
    for n, s in product(range(len(indices)), range(positions)):
        if indices[n, s] != case.module.padding_idx:
            a[n, s, indices[n, s]] = 1.0
    return a


def bag_contents(case: LayerCase) -> list[list[tuple[int, float]]]:
    """(index, weight) of all members of each bag; the padding index is none."""
    module, offsets = case.module, case.kwargs.get("offsets")
    weights = case.kwargs.get("per_sample_weights")
    weights = torch.ones(case.x.shape) if weights is None else weights
    if offsets is None:
        pairs = [list(zip(*both, strict=True)) for both in zip(case.x, weights, strict=True)]
    else:
        ends = [*offsets.tolist()[1:], *([] if module.include_last_offset else [len(case.x)])]
        pairs = [
            [(case.x[i], weights[i]) for i in range(start, end)]
            for start, end in zip(offsets.tolist(), ends, strict=False)
        ]
    bags = [[(int(index), float(weight)) for index, weight in bag] for bag in pairs]
    return [[each for each in bag if each[0] != module.padding_idx] for bag in bags]


def _bags(case: LayerCase) -> Tensor:
    """Rows (bags, embeddings)."""
    bags = bag_contents(case)
    a = torch.zeros(len(bags), case.module.num_embeddings, dtype=torch.float64)
    for n, bag in enumerate(bags):
        for index, weight in bag:
            a[n, index] += weight / (len(bag) if case.module.mode == "mean" else 1)
    return a


def _norm_rows(case: LayerCase, first: int) -> Rows:
    """A is one: the scale multiplies nothing but the normalised input, which is in G."""
    module, x = case.module, case.x if case.batched else case.x[None]
    z = normalised(module, x)
    shape = module.weight.shape
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        shape = (*shape, *(1 for _ in x.shape[2:]))
    h = torch.zeros(len(x), 1, module.weight.numel(), 2, dtype=torch.float64)
    bias = getattr(module, "bias", None)
    for n in range(len(x)):
        scale = module.weight.detach().clone().requires_grad_()
        shift = (
            torch.zeros_like(scale) if bias is None else bias.detach().clone()
        ).requires_grad_()
        example_loss(z[n] * scale.view(shape) + shift.view(shape), first + n).backward()
        h[n, 0] = torch.stack([scale.grad.flatten(), shift.grad.flatten()], dim=1)
    positions = x[0].numel() // module.weight.numel()
    return Rows(torch.ones_like(h[..., :1]), h, positions, is_norm=True)


def normalised(module: Any, x: Tensor) -> Tensor:
    """What the module multiplies its weight with, by the formulas that torch documents."""
    if isinstance(module, nn.GroupNorm):
        grouped = x.reshape(len(x), module.num_groups, -1)
        return _standardised(grouped, (2,), module.eps).view_as(x)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        dims = tuple(range(-module.weight.dim(), 0))
        if isinstance(module, nn.LayerNorm):
            return _standardised(x, dims, module.eps)
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
    if module.training or module.running_mean is None:
        dims = tuple(dim for dim in range(x.dim()) if dim != 1)
        return _standardised(x, dims, module.eps)
    per_channel = (-1, *(1 for _ in x.shape[2:]))
    variance = module.running_var.view(per_channel)
    return (x - module.running_mean.view(per_channel)) / (variance + module.eps).sqrt()


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
