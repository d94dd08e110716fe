"""The gram of an operand's windows, from the correlations between its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from tn_kfac.kernels.products import multiplied
from tn_kfac.tensor_network.lower import Autocorrelation
from tn_kfac.tensor_network.pattern import SpatialAxis
from tn_kfac.tensor_network.primitives.arrange import Materialise, Sizes, arranged
from tn_kfac.tensor_network.primitives.correlation import all_windows


def autocorrelate(
    node: Autocorrelation, sizes: Sizes, tensor_of: Materialise, dtype: torch.dtype
) -> Tensor:
    """Σ over windows of their outer products, from offsets between pixels.

    All windows that meet the image are summed first. Those beyond the first and last counted
    one are taken off again; these meet few kernel rows, so their grams are small.
    """
    (operand,) = node.operands
    outer, group, row, spatial = node.roles
    roles = (outer, group + row, *((axis,) for axis in spatial))
    x = arranged(tensor_of(operand), operand.axes, roles)
    groups = prod(sizes[axis] for axis in group)
    factor = all_windows(x, node.spatial, groups, dtype)
    for dim, axis in enumerate(node.spatial):
        for window in axis.uncounted_windows():
            _subtract_windows(factor, x, node.spatial, dim, window, groups)
    return factor.reshape([sizes[axis] for axis in node.axes])


def _subtract_windows(
    factor: Tensor, x: Tensor, spatial: Sequence[SpatialAxis], dim: int, window: int, groups: int
) -> None:
    """Take off the windows with index `window` along `dim`, which is not to be counted.

    Along earlier dimensions only the counted windows are left, along later ones all.
    """
    axis = spatial[dim]
    first = window - axis.padding[0]
    met = axis.met_offsets(window)
    if not met:
        return
    low, high = met.start, met.stop
    pixels = slice(first + low * axis.dilation, first + met[-1] * axis.dilation + 1, axis.dilation)
    strip = x[(slice(None),) * (2 + dim) + (pixels,)]
    strip = strip.movedim(2 + dim, 2).reshape(x.shape[0], groups, -1, high - low, *_rest(x, dim))
    for other, a in enumerate(spatial):
        if other != dim:
            strip = _strip_windows(strip, a, counted=other < dim)
    rows = _strip_rows(strip, len(spatial), dim)
    gram = multiplied(rows.mT, rows, factor.dtype)
    channels = x.shape[1] // groups
    kernels = [high - low if d == dim else a.kernel_size for d, a in enumerate(spatial)]
    gram = gram.reshape(groups, channels, *kernels, channels, *kernels)
    places = [slice(low, high) if d == dim else slice(None) for d in range(len(spatial))]
    factor[(slice(None), slice(None), *places, slice(None), *places)] -= gram


def _rest(x: Tensor, dim: int) -> list[int]:
    return [n for d, n in enumerate(x.shape[2:]) if d != dim]


def _strip_windows(strip: Tensor, axis: SpatialAxis, counted: bool) -> Tensor:
    """Unfold the first remaining spatial dimension (4); its windows go last, (outputs, kernels)."""
    left = axis.padding[0] if counted else axis.reach - 1
    outputs = axis.output_size if counted else axis.input_size + axis.reach - 1
    right = outputs - 1 + axis.reach - left - axis.input_size
    moved = F.pad(strip.movedim(4, -1), (left, right))
    return moved.unfold(-1, axis.reach, 1)[..., :: axis.dilation]


def _strip_rows(strip: Tensor, dims: int, dim: int) -> Tensor:
    """(n, g, c, k_dim, o, k, o', k', …) as matrices (g, n·o…, c·k…), kernels in order."""
    outputs = [4 + 2 * d for d in range(dims - 1)]
    kernels = [5 + 2 * d for d in range(dims - 1)]
    kernels.insert(dim, 3)
    ordered = strip.permute(1, 0, *outputs, 2, *kernels)
    return ordered.flatten(-len(kernels) - 1).flatten(1, -2)
