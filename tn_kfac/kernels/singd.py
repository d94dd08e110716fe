"""SINGD's step with diagonal factors for all layers at once, by two kernels.

Their plain-torch reference is what the optimizer does for one layer after another:
`tn_kfac.optim.factor_update` with diagonal structures, and `tn_kfac.optim.rules.sgd`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from tn_kfac.kernels import singd_triton
except ImportError:  # no Triton on this machine
    singd_triton = None

BLOCK, ROWS, COLUMNS = 1024, 32, 128
"""Entries of a factor, and rows and columns of a weight, that a program takes at once."""


class LayerFactors(NamedTuple):
    """The tensors of a layer: statistics (see `diagonals`), K, C and their momenta.

    All of them float32 and contiguous, shapes (groups, dimension) but for the statistics.
    """

    statistic: Tensor
    K: Tensor
    C: Tensor
    m_K: Tensor
    m_C: Tensor


class FactorRule(NamedTuple):
    """How factors move; `terms` says what G is normalised by.

    See `tn_kfac.optim.factor_update.Steps`. G is multiplied (1) by the number of loss terms,
    divided (2), or taken as it is (0).
    """

    damping: float
    alpha: float
    beta: float
    limit: float | None
    normalised: bool
    ikfac: bool
    terms: int


class Weight(NamedTuple):
    """A parameter as matrices (groups, rows, columns) in memory, and the factors of its axes.

    Attributes:
        rows: Of each group.
        across: The factor's entry of the first row; `across_step` is from row to row.
        along: That of the first column; `along_step` is from group to group.
        channels: Columns in memory run over so many channels first, then over pixels; in
            `along` pixels run first.
    """

    groups: int
    rows: int
    columns: int
    across: int
    across_step: int
    along: int
    along_step: int
    channels: int
    pixels: int


class SgdRule(NamedTuple):
    """p ← shrink · p − lr · b, with b ← momentum · b + direction + decay · p.

    `root`: the direction is |C| G |K|, instead of C² G K².
    """

    lr: float
    momentum: float
    decay: float
    shrink: float
    nesterov: bool
    root: bool


class Tables:
    """Tables of addresses and of programs on the device, kept as long as they do not change."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[tuple[int, ...], Tensor, Tensor]] = {}
        self._programs: dict[Hashable, Tensor] = {}
        self._spare: dict[Hashable, Tensor] = {}
        self._captured: list[Any] = []

    def programs(self, key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What each program does; `key` says what it depends on."""
        if key not in self._programs:
            self._programs[key] = make().to(device, torch.int32)
        return self._programs[key]

    def addresses(self, key: Hashable, values: list[int], device: torch.device) -> Tensor:
        """The values on the device. `key` is whose they are: they may differ in every step."""
        known = self._known.get(key)
        wanted = tuple(values)
        if known is not None and known[0] == wanted:
            return known[1]
        if device.type != "cuda":
            table = torch.tensor(values)
            self._known[key] = (wanted, table, table)
            return table
        return self._uploaded(key, wanted, device)

    def _uploaded(self, key: Hashable, values: tuple[int, ...], device: torch.device) -> Tensor:
        """The same, without waiting for the device.

        A CUDA graph that is captured reads the pinned memory whenever it is replayed; so that
        memory is its own, and was allocated before.
        """
        captured = torch.cuda.is_current_stream_capturing()
        host = self._spare.pop(key, None) if captured else None
        if host is None:
            host = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        host.copy_(torch.tensor(values))
        table = host.to(device, non_blocking=True)
        if captured:
            # What was known is kept too: pinned memory that is freed while its stream is captured
            # leaves torch an event that it cannot query.
            self._captured.append((table, host, self._known.pop(key, None)))
        else:
            self._known[key] = (values, table, host)
            if key not in self._spare:
                self._spare[key] = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        return table


def update_factors(
    tables: Tables, layers: Sequence[LayerFactors], rule: FactorRule, scale: Tensor | None
) -> None:
    """Update K, C and their momenta of all layers, in place.

    Args:
        tables: Of the optimizer.
        layers: On one device.
        rule: How.
        scale: By which the loss was multiplied, one number on the device.
    """
    device = layers[0].K.device
    sizes = tuple((*layer.K.shape, layer.C.shape[1]) for layer in layers)
    values = [
        number
        for layer, size in zip(layers, sizes, strict=True)
        for number in (*(tensor.data_ptr() for tensor in layer), *size)
    ]
    key = ("factors", device, sizes)
    programs = tables.programs(key, lambda: _groups([size[0] for size in sizes]), device)
    table = tables.addresses(key, values, device)
    assert singd_triton is not None
    limit = 1.0 if rule.limit is None else rule.limit
    numbers = (rule.damping, rule.alpha, rule.beta, limit)
    with torch.cuda.device_of(table):
        singd_triton.launch_update(
            len(programs), table, programs, table if scale is None else scale, *numbers,
            TERMS=rule.terms, SCALED=scale is not None, IKFAC=rule.ikfac, BLOCK=BLOCK,
            NORMALISED=rule.normalised, MOMENTUM=rule.alpha != 0,
            LIMITED=rule.limit is not None and rule.beta != 0,
        )  # fmt: skip


def step_parameters(
    tables: Tables,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor | None],
    weights: Sequence[Weight],
    rule: SgdRule,
) -> None:
    """Step parameters of one dtype and device along their preconditioned gradients, in place.

    Gradients and buffers (None: no momentum) have the dtype and strides of their parameters.
    """
    device, dtype = parameters[0].device, parameters[0].dtype
    shapes = tuple((w.groups, w.rows, w.columns) for w in weights)
    values: list[int] = []
    for p, buffer, w in zip(parameters, buffers, weights, strict=True):
        assert p.grad is not None
        momentum = 0 if buffer is None else buffer.data_ptr()
        values += (p.data_ptr(), p.grad.data_ptr(), momentum, w.across, w.along, w.rows,
                   w.columns, w.across_step, w.along_step, w.channels, w.pixels)  # fmt: skip
    key = ("parameters", device, dtype, shapes)
    programs = tables.programs(key, lambda: _blocks(shapes), device)
    table = tables.addresses(key, values, device)
    assert singd_triton is not None
    numbers = (rule.lr, rule.momentum, rule.decay, rule.shrink)
    with torch.cuda.device_of(table):
        singd_triton.launch_step(
            len(programs), dtype, table, programs, *numbers, MOMENTUM=buffers[0] is not None,
            NESTEROV=rule.nesterov, ROOT=rule.root, BLOCK_R=ROWS, BLOCK_C=COLUMNS,
        )  # fmt: skip


def _groups(groups: Sequence[int]) -> Tensor:
    """(layer, group) of each program."""
    return torch.cat([_product(layer, (count,)) for layer, count in enumerate(groups)])


def _blocks(shapes: Sequence[tuple[int, int, int]]) -> Tensor:
    """(parameter, group, block of rows, block of columns) of each program."""
    return torch.cat([
        _product(number, (groups, -(-rows // ROWS), -(-columns // COLUMNS)))
        for number, (groups, rows, columns) in enumerate(shapes)
    ])  # fmt: skip


def _product(number: int, counts: Sequence[int]) -> Tensor:
    """All (number, i, j, …) with i, j, … below the counts."""
    axes = [torch.tensor([number]), *map(torch.arange, counts)]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], dim=1)
