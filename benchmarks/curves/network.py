"""The autoencoder 784-400-200-100-50-25-6 and back, its loss, and its reconstruction error."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTHS = (784, 400, 200, 100, 50, 25, 6)
INCOMING = 15
LOSS = nn.BCEWithLogitsLoss(weight=torch.tensor(float(WIDTHS[0])))
"""A mean over examples of sums over pixels, written as a weighted mean over both, which is the
form from which `optimizer.curvature` can tell what is averaged."""


def autoencoder(seed: int) -> nn.Sequential:
    """Tanh units, a linear code layer, logits out; sparse initialisation."""
    generator = torch.Generator().manual_seed(seed)
    widths = WIDTHS + WIDTHS[-2::-1]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(widths), start=1):
        layers.append(_sparse(nn.Linear(before, after), generator))
        if after != min(WIDTHS) and index < len(widths) - 1:
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


@torch.no_grad()
def _sparse(layer: nn.Linear, generator: torch.Generator) -> nn.Linear:
    """15 standard normal weights into each unit, all other weights and biases 0 (Martens, 2010)."""
    outputs, inputs = layer.weight.shape
    count = min(INCOMING, inputs)
    chosen = torch.rand(outputs, inputs, generator=generator).argsort(dim=1)[:, :count]
    values = torch.randn(outputs, count, generator=generator)
    layer.weight.zero_().scatter_(1, chosen, values)
    layer.bias.zero_()
    return layer


def squared_error(logits: Tensor, images: Tensor) -> Tensor:
    """Of the reconstruction, summed over pixels, averaged over examples."""
    return (logits.sigmoid() - images).square().sum() / len(images)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, part: int = 1000) -> tuple[float, float]:
    """Cross-entropy and squared error of all images."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in images.split(part):
        logits = model(batch)
        found = torch.stack([LOSS(logits, batch), squared_error(logits, batch)])
        sums += len(batch) * found.double()
    loss, error = (sums / len(images)).tolist()
    return loss, error
