"""Gradients of a model's own distribution, whose second moment is the Fisher.

For a loss ℓ(f, y) with Hessian H in the outputs f, the GGN (the Fisher of the distribution
that the loss is the negative log-likelihood of) is Jᵀ H J. It is the second moment of
gradients Jᵀ s for

    "mc":     s = ∂ℓ(f, ŷ)/∂f for labels ŷ drawn from the model, so that E[s sᵀ] = H
    "type-2": s = the columns of a square root of H, one backward pass for each

(https://arxiv.org/abs/1301.3584, Section 9; https://arxiv.org/abs/2106.02624). The empirical
Fisher takes the gradients of the loss itself, and "forward-only" sets them to white noise, so
that G = I (https://arxiv.org/abs/2201.12250).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tn_kfac.curvature.likelihood import likelihood, loss_module
from tn_kfac.curvature.tap import LayerTap


def measure_fisher(
    taps: Sequence[LayerTap],
    outputs: Tensor,
    loss: str | nn.Module,
    targets: Tensor | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> None:
    """Add the curvature of a batch to the taps, which share one kind of Fisher.

    Backward passes from `outputs` to the taps alone; the graph is kept, and no gradient of a
    parameter is computed.

    Raises:
        ValueError: If an argument is out of range, or outputs carry no graph.
        TypeError: If the loss is of an unknown kind.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"outputs must be the tensor that the loss takes, got {type(outputs).__name__}"
        )
    if not outputs.requires_grad:
        raise ValueError("outputs carries no graph: call the model with gradients enabled")
    module = loss_module(loss)
    exact = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
    with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
        model = likelihood(module, exact, None if targets is None else targets.detach())
        if taps[0].recipe.fisher == "type-2":
            vectors = model.columns()
        else:
            vectors = (model.sample(generator) * samples**-0.5 for _ in range(samples))
    held = [[probe.grad for probe in tap.probes] for tap in taps]
    for probe in (probe for tap in taps for probe in tap.probes):
        probe.grad = None
    try:
        _backpropagate(taps, outputs, vectors)
    finally:
        for tap, before in zip(taps, held, strict=True):
            _accumulate(tap, before, model.terms)


def _accumulate(tap: LayerTap, before: list[Tensor | None], terms: Tensor | float) -> None:
    """Add what was measured to what was before.

    A second loss on the same forward pass shares the first one's terms: its G is scaled.
    """
    parts = tap.parts
    if parts is not None:
        A, G, counts, *moments = parts
        earlier = [s for s in tap.met if s.measured_in == tap.epoch]
        if earlier:
            ratio = _ratio(earlier[0].terms, terms, G)
            G, moments = G * ratio, [m * ratio for m in moments]
        for samples in [] if earlier else tap.met:
            samples.measured_in, samples.terms = tap.epoch, terms
        counts[1].fill_(0.0 if earlier else terms)
        tap.replace([A, G, counts, *moments])
    for probe, old in zip(tap.probes, before, strict=True):
        if old is not None:
            probe.grad = old if probe.grad is None else old + probe.grad
    tap.met.clear()


def _ratio(first: Tensor | float, second: Tensor | float, like: Tensor) -> Tensor:
    """first / second, 1 where both losses are sums."""
    pair = [
        torch.as_tensor(terms, dtype=like.dtype, device=like.device) for terms in (first, second)
    ]
    return torch.where(pair[1] > 0, pair[0] / pair[1].clamp(min=1e-30), torch.ones_like(pair[0]))


def _backpropagate(taps: Sequence[LayerTap], outputs: Tensor, vectors: Iterator[Tensor]) -> None:
    """One backward pass for each vector, of which the first measures inputs too."""
    probes = [probe for tap in taps for probe in tap.probes]
    try:
        for tap in taps:
            tap.recording, tap.measures_input = True, True
            tap.met.clear()
        for vector in vectors:
            torch.autograd.backward(
                outputs, vector.to(outputs.dtype), retain_graph=True, inputs=probes
            )
            for tap in taps:
                tap.measures_input = False
    finally:
        for tap in taps:
            tap.recording, tap.measures_input = False, True
