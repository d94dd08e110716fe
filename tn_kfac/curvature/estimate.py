"""Kronecker factors of a model on data, without an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tn_kfac.curvature.factors import Factors
from tn_kfac.curvature.fisher import measure_fisher
from tn_kfac.curvature.likelihood import loss_module
from tn_kfac.curvature.scope import ForwardScope
from tn_kfac.curvature.sites import Site, find_sites, untold
from tn_kfac.curvature.statistics import Fisher, LossAverage, Recipe
from tn_kfac.curvature.tap import OF_THE_LOSS, LayerTap
from tn_kfac.structures import Spec, structure
from tn_kfac.tensor_network.convolution import require_int
from tn_kfac.tensor_network.rows import Approx

Loss = str | nn.Module | Callable[[Tensor, Tensor], Tensor]
CHOICES: dict[str, tuple[Any, ...]] = {
    "approx": ("expand", "reduce"),
    "fisher": ("empirical", "mc", "type-2", "forward-only"),
    "loss_average": (None, "batch", "batch+sequence"),
}


def kronecker_factors(
    model: nn.Module,
    loss_fn: Loss,
    data: Iterable[tuple[Any, Tensor]],
    *,
    approx: Approx = "expand",
    fisher: Fisher = "mc",
    structure: str | Spec | tuple[str | Spec, str | Spec] = "dense",
    loss_average: LossAverage = "batch",
    norms: bool = False,
    samples: int = 1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> dict[str, Factors]:
    """The Kronecker factors of every layer, over all batches of the data.

    The Fisher (or GGN) of the loss over the data is approximated, for each layer, by G ⊗ A
    (https://arxiv.org/abs/1503.05671 and https://arxiv.org/abs/2311.00636): A is the mean
    of the outer products of the rows that multiply the layer's weight, with a one appended for
    a bias, and G the sum of those of output gradients for a loss of sums, 1/N of that for a
    mean over N terms. The model is called as it is (train or eval mode); its parameters and
    their gradients are not touched.

    >>> factors = kronecker_factors(model, nn.CrossEntropyLoss(), loader)
    >>> factors["fc"].A.shape, factors["fc"].G.shape
    (torch.Size([1, 513, 513]), torch.Size([1, 10, 10]))

    Args:
        model: The model.
        loss_fn: A loss module, "cross_entropy", "mse" or "bce_with_logits"; with
            fisher="empirical" any function of (outputs, targets).
        data: Batches (inputs, targets); inputs are a tensor, a tuple of arguments or a
            mapping of keyword arguments.
        approx: "expand" or "reduce".
        fisher: "mc", "type-2" (the GGN exactly, one backward pass for each output), "empirical"
            or "forward-only" (G = I).
        structure: Of A and G, or a pair; "dense" means the matrices themselves.
        loss_average: What the loss averages over; for the empirical Fisher, which cannot know of
            ignored targets or class weights (the others do).
        norms: Whether to include the affine parameters of normalisation layers.
        samples: Labels that are drawn for each example ("mc").
        generator: Of these labels.
        dtype: Of the factors; at least float32 and the parameter's if None.
        progress: Wraps the data, as `tqdm.tqdm` or `rich.progress.track` do.

    Returns:
        For each layer's name (of its module in the model) A, (groups, d_in [+ 1], same), and
        G, (groups, d_out, same), or the coordinates of another structure. An embedding's A
        is diagonal, (1, embeddings).

    Raises:
        ValueError: If an argument is out of range, or no layer of the model was called.
        TypeError: If an argument has the wrong type.
    """
    _check(model, approx=approx, fisher=fisher, loss_average=loss_average)
    if isinstance(loss_fn, str) or fisher in ("mc", "type-2"):
        loss_fn = loss_module(loss_fn)  # type: ignore[arg-type]
    if isinstance(loss_fn, nn.Module) and fisher == "empirical":
        _check_average(loss_fn, loss_average)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    if not isinstance(norms, bool):
        raise TypeError(f"norms must be True or False, got {norms!r}")
    structures = _pair(structure)
    require_int("samples", samples, 1)
    sites, refused = find_sites(model, norms)
    refused = untold(refused, set(model.parameters()))
    if refused:
        said = "; ".join(map(str, refused))
        warnings.warn(f"without Kronecker factors: {said}", stacklevel=2)
    options = (approx, loss_average, structures, fisher)
    taps = {site.name: _tap(site, options, dtype) for site in sites if _trained(site)}
    handles = [h for site in sites if site.name in taps for h in site.attach(taps[site.name])]
    handles += ForwardScope(list(taps.values())).attach(model)
    sums: dict[str, list[Tensor]] = {}
    try:
        for inputs, targets in data if progress is None else progress(data):
            with torch.enable_grad():
                outputs = _call(model, inputs)
                _measure(list(taps.values()), outputs, loss_fn, targets, samples, generator)
            _add(sums, taps, loss_average)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise ValueError(
            "no layer of model was measured: data is empty (an iterator that is used up?), all "
            "parameters are frozen, or no layer was called with gradients enabled"
        )
    return {name: _finished(taps[name].recipe, *sums[name]) for name in taps if name in sums}


def _check(model: object, **choices: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {list(CHOICES[name])}, got {value!r}")


def _check_average(loss_fn: nn.Module, loss_average: LossAverage) -> None:
    reduction = getattr(loss_fn, "reduction", None)
    if (reduction == "sum") != (loss_average is None) and reduction is not None:
        raise ValueError(
            f"loss_average={loss_average!r} does not fit a loss with reduction={reduction!r}: pass "
            "None for a sum, 'batch' or 'batch+sequence' for a mean"
        )


def _pair(spec: Any) -> tuple[Spec, Spec]:
    pair = tuple(spec) if isinstance(spec, (tuple, list)) else (spec, spec)
    if len(pair) != 2:
        raise ValueError(f"structure must be one value or a pair (input, output), got {spec!r}")
    first, second = pair
    return structure(first), structure(second)


def _trained(site: Site) -> bool:
    return any(p.requires_grad for p in site.parameters)


def _tap(site: Site, options: tuple[Any, ...], dtype: torch.dtype | None) -> LayerTap:
    has_bias = site.bias is not None and site.bias.requires_grad
    recipe = Recipe(site.layer, site.weight.requires_grad, has_bias, *options)
    return LayerTap(recipe, dtype or torch.promote_types(site.weight.dtype, torch.float32))


def _call(model: nn.Module, inputs: Any) -> Tensor:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _measure(
    taps: list[LayerTap],
    outputs: Tensor,
    loss_fn: Loss,
    targets: Tensor,
    samples: int,
    generator: torch.Generator | None,
) -> None:
    """One batch: backward passes to the taps alone."""
    probes = [probe for tap in taps for probe in tap.probes]
    if not probes:
        return
    if taps[0].recipe.fisher not in OF_THE_LOSS:
        assert isinstance(loss_fn, nn.Module)
        measure_fisher(taps, outputs, loss_fn, targets, samples, generator)
        return
    assert not isinstance(loss_fn, str)
    torch.autograd.backward(loss_fn(outputs, targets), inputs=probes)


def _add(sums: dict[str, list[Tensor]], taps: Mapping[str, LayerTap], average: LossAverage) -> None:
    """Add a batch's statistics, with gradients of each example's own loss, and clear the taps."""
    for name, tap in taps.items():
        parts = tap.parts
        if parts is not None:
            A, G, counts = parts
            if tap.recipe.fisher == "empirical" and average is not None:
                G = G * counts[1] ** 2  # the loss of the batch is a mean over these terms
            old = sums.get(name)
            new = [A, G, counts]
            sums[name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
        tap.clear()


def _finished(recipe: Recipe, A: Tensor, G: Tensor, counts: Tensor) -> Factors:
    if recipe.fisher == "empirical" and recipe.loss_average is not None:
        G = G / counts[1].clamp(min=1) ** 2
    return recipe.normalise(A, G, counts)
