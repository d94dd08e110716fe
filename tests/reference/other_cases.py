"""Hypothesis strategies: embeddings and normalisations with all options, and their inputs."""

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

from reference.cases import LayerCase, normal, with_values

BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _embeddings(draw: DrawFn, kind: type, **options: Any) -> nn.Module:
    """A module of at least two embeddings, so that one is left if another one is padding."""
    embeddings, features = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    padding = draw(st.none() | st.integers(-embeddings, embeddings - 1))
    return with_values(draw, kind(embeddings, features, padding_idx=padding, **options))


def _indices(draw: DrawFn, module: Any, *shape: int) -> Tensor:
    """Indices, repeated ones and the padding index among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return torch.randint(module.num_embeddings, shape, generator=generator).to(dtype)


@st.composite
def embedding_cases(draw: DrawFn) -> LayerCase:
    """An Embedding of indices (batch, any shared dimensions), or of one index."""
    module = _embeddings(draw, nn.Embedding)
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    return LayerCase(module, _indices(draw, module, *shape), module.embedding_dim, bool(shape))


@st.composite
def bag_cases(draw: DrawFn) -> LayerCase:
    """An EmbeddingBag of sums or means."""
    options = {"mode": draw(st.sampled_from(["sum", "mean"]))}
    options["include_last_offset"] = draw(st.booleans())
    return draw(bag_batches(_embeddings(draw, nn.EmbeddingBag, **options)))


@st.composite
def bag_batches(draw: DrawFn, module: Any) -> LayerCase:
    """Bags of one size, or of any sizes, given by offsets; weighted or not."""
    if draw(st.booleans()):
        x, kwargs = _indices(draw, module, *draw(st.tuples(*[st.integers(1, 4)] * 2))), {}
    else:
        sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))
        x = _indices(draw, module, sum(sizes))
        starts = [sum(sizes[:n]) for n in range(len(sizes) + module.include_last_offset)]
        kwargs = {"offsets": torch.tensor(starts, dtype=x.dtype)}
    if module.mode == "sum" and draw(st.booleans()):
        kwargs["per_sample_weights"] = normal(draw, *x.shape)
    return LayerCase(module, x, module.embedding_dim, kwargs=kwargs)


@st.composite
def layer_norm_cases(draw: DrawFn) -> LayerCase:
    """A LayerNorm or RMSNorm over the last dimensions, after any number of others."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    if draw(st.booleans()):
        eps = draw(st.sampled_from([1e-5, 0.1]))
        module: nn.Module = nn.LayerNorm(shape, eps=eps, bias=draw(st.booleans()))
    else:
        module = nn.RMSNorm(shape, eps=draw(st.sampled_from([None, 1e-5, 0.1])))
    leading = draw(st.lists(st.integers(1, 3), max_size=3))
    x = normal(draw, *leading, *shape)
    return LayerCase(with_values(draw, module), x, module.weight.numel(), bool(leading))


@st.composite
def group_norm_cases(draw: DrawFn) -> LayerCase:
    """A GroupNorm with any number of spatial dimensions."""
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels = groups * per_group
    module = nn.GroupNorm(groups, channels, eps=draw(st.sampled_from([1e-5, 0.1])))
    spatial = draw(st.lists(st.integers(1, 3), max_size=3))
    # torch wants several values in all for each group.
    batch = draw(st.integers(1 if per_group > 1 else 2, 3))
    return LayerCase(with_values(draw, module), normal(draw, batch, channels, *spatial), channels)


@st.composite
def batch_norm_cases(draw: DrawFn) -> LayerCase:
    """A BatchNorm of 1, 2 or 3 dimensions that trains, or evaluates with running statistics."""
    dims, channels = draw(st.sampled_from(sorted(BATCH_NORMS))), draw(st.integers(1, 3))
    tracked = draw(st.booleans())
    eps = draw(st.sampled_from([1e-5, 0.1]))
    module = BATCH_NORMS[dims](channels, eps=eps, track_running_stats=tracked)
    module = with_values(draw, module).train(draw(st.booleans()))
    if tracked:
        module.running_mean.copy_(normal(draw, channels))
        module.running_var.copy_(normal(draw, channels).exp())
    spatial = [draw(st.integers(1, 3)) for _ in range(dims)]
    x = normal(draw, draw(st.integers(2, 4)), channels, *spatial)
    return LayerCase(module, x, channels)


def norm_cases() -> SearchStrategy[LayerCase]:
    """Any normalisation."""
    return st.one_of(layer_norm_cases(), group_norm_cases(), batch_norm_cases())


def look_up_cases() -> SearchStrategy[LayerCase]:
    """Any embedding."""
    return st.one_of(embedding_cases(), bag_cases())
