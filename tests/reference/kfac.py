"""Kronecker factors of one layer by their definition, one example at a time.

With L_n the loss of example n and a mean loss (1/T) Σ_n L_n over T terms (T = 1 for a
sum), rows a[n, s] of the input and gradients h[n, s] = ∂L_n / ∂y[n, s] of the output,

    expand: A = mean of a aᵀ over n and s,   G = (1/T) Σ_{n, s} h hᵀ
    reduce: the same after a is averaged and h summed over s

(https://arxiv.org/abs/2311.00636). A row is what the layer multiplies its weight with:
y[n, s, d] = Σ_f W[d, f] a[n, s, f], so a[..., f] = ∂y[..., d] / ∂W[d, f], which is the
layer's own output for the weight that is 1 at f and 0 elsewhere. No patch is extracted.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

ExampleLoss = Callable[[Tensor, int], Tensor]  # (output of one example, its index) -> scalar


def _as_rows(module: nn.Module, y: Tensor, groups: int) -> Tensor:
    """The output of one example (no batch dimension) as (shared, groups, out per group)."""
    channels_last = y.reshape(y.shape[0], -1).T if isinstance(module, _ConvNd) else y
    return channels_last.reshape(-1, groups, channels_last.shape[-1] // groups)


def _groups(module: nn.Module) -> int:
    return getattr(module, "groups", 1)


def _plain(module: nn.Module) -> nn.Module:
    """A copy without hooks."""
    copied = copy.deepcopy(module)
    copied._forward_hooks.clear()
    copied._forward_pre_hooks.clear()
    return copied


def _by_column(module: nn.Module, weight: Tensor) -> list[Tensor]:
    """For each column of the weight matrices, a view of the entries that stand in it.

    The layouts are those that torch documents: (out, in / groups, *kernel), of transposed
    convolutions (in, out / groups, *kernel), and of HuggingFace's Conv1D (in, out).
    """
    if type(module).__name__ == "Conv1D":
        return list(weight)
    if not getattr(module, "transposed", False):
        return list(weight.view(len(weight), -1).T)
    pixels = weight[0, 0].numel()
    per_group = weight.view(module.groups, -1, weight.shape[1], pixels)
    return [per_group[:, c, :, k] for c in range(per_group.shape[1]) for k in range(pixels)]


@torch.no_grad()
def input_rows(module: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    """Rows of one example (no batch dimension), (shared, groups, in per group)."""
    probe = _plain(module)
    if probe.bias is not None:
        probe.bias.zero_()
    groups = _groups(module)
    columns = []
    for column in _by_column(module, probe.weight.data):
        probe.weight.zero_()
        column.fill_(1.0)
        # Every output channel of a group sees the same row; the first one is as good as any.
        columns.append(_as_rows(module, probe(x, **kwargs), groups)[..., 0])
    return torch.stack(columns, dim=-1)


def output_gradient_rows(
    module: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], **kwargs: Any
) -> Tensor:
    """Gradients of one example's loss, (shared, groups, out per group)."""
    y = _plain(module)(x, **kwargs).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(y), y)
    return _as_rows(module, gradient, _groups(module))


def rows_of_examples(
    module: nn.Module, examples: list[Tensor], loss: ExampleLoss, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """(a, h) of all examples, (examples, shared, groups, features)."""
    a = [input_rows(module, x, **kwargs) for x in examples]
    h = [
        output_gradient_rows(module, x, lambda y, n=n: loss(y, n), **kwargs)
        for n, x in enumerate(examples)
    ]
    return torch.stack(a), torch.stack(h)


def loss_terms(loss_average: str | None, examples: int, shared: int) -> int:
    """How many terms a loss is divided by."""
    return {None: 1, "batch": examples, "batch+sequence": examples * shared}[loss_average]


def factors(
    a: Tensor, h: Tensor, approx: str, terms: int, use_weight: bool = True, use_bias: bool = True
) -> tuple[Tensor, Tensor]:
    """Dense (A, G) from rows (examples, shared, groups, features), one pair per group.

    `use_weight` and `use_bias` say which parameters are trained.
    """
    if approx == "reduce":
        a, h = a.mean(1, keepdim=True), h.sum(1, keepdim=True)
    if not use_weight:
        a = a[..., :0]
    if use_bias:
        a = torch.cat([a, torch.ones_like(h[..., :1])], dim=-1)
    examples, shared, groups, dim_in = a.shape
    dim_out = h.shape[-1]
    A = torch.zeros(groups, dim_in, dim_in, dtype=a.dtype)
    G = torch.zeros(groups, dim_out, dim_out, dtype=a.dtype)
    for n in range(examples):
        for s in range(shared):
            for g in range(groups):
                A[g] += torch.outer(a[n, s, g], a[n, s, g]) / (examples * shared)
                G[g] += torch.outer(h[n, s, g], h[n, s, g]) / terms
    return A, G


def layer_factors(
    module: nn.Module,
    examples: list[Tensor],
    loss: ExampleLoss,
    approx: str,
    loss_average: str | None,
    use_weight: bool = True,
    use_bias: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense (A, G), (groups, d, d), of a layer whose output goes into the examples' losses."""
    a, h = rows_of_examples(module, examples, loss)
    terms = loss_terms(loss_average, len(examples), a.shape[1])
    use_bias = module.bias is not None if use_bias is None else use_bias
    return factors(a, h, approx, terms, use_weight, use_bias)
