"""SINGD's step with diagonal factors for all layers at once, by two kernels.

Their plain-torch reference is what the optimizer does for one layer after another:
`tn_kfac.optim.factor_update` with diagonal structures, and `tn_kfac.optim.rules.sgd`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

try:
    from tn_kfac.kernels import singd_triton
except ImportError:  # no Triton on this machine
    singd_triton = None

if TYPE_CHECKING:
    from tn_kfac.kernels.launching import Prepared

BLOCK, ROWS, COLUMNS = 1024, 32, 128
"""Entries of a factor, and rows and columns of a weight, that a program takes at once."""
KEPT = 64
"""Sets of layers whose tables are kept: which layers have gradients may differ in every step."""


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
        groups: Matrices.
        across: The address of the factor's entry of the first row.
        along: That of the first column.
        rows: Of each group.
        columns: Of each row.
        across_step: The distance of factors from row to row.
        along_step: That from group to group.
        channels: Columns in memory run over so many channels first, then over pixels; in
            `along` pixels run first.
        pixels: Columns of one channel.
    """

    groups: int
    across: int
    along: int
    rows: int
    columns: int
    across_step: int
    along_step: int
    channels: int
    pixels: int


def unchanged(entries: int, one: Tensor) -> Weight:
    """A parameter without factors, contiguous in memory; `one` is a float32 of value 1."""
    rows, columns = (entries // COLUMNS, COLUMNS) if entries % COLUMNS == 0 else (1, entries)
    return Weight(1, one.data_ptr(), one.data_ptr(), rows, columns, 0, 0, 2**31 - 1, 0)


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
    """What launches need: tables of addresses and of programs on the device, and kernels.

    All of it is kept as long as it does not change, for `KEPT` sets of layers at most; what a
    captured CUDA graph reads, for good.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[list[int], Tensor, Tensor]] = {}
        self._programs: dict[Hashable, Tensor] = {}
        self._kernels: dict[Hashable, Prepared] = {}
        self._spare: dict[Hashable, Tensor] = {}
        self._captured: list[Any] = []

    def programs(self, key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What each program does; `key` says what it depends on."""
        captured = _captures(device)
        if key not in self._programs:
            if len(self._programs) >= KEPT and not captured:
                for kept in (self._programs, self._known, self._kernels, self._spare):
                    kept.clear()
            self._programs[key] = make().to(device, torch.int32)
        programs = self._programs[key]
        if captured:
            self._captured.append(programs)
        return programs

    def kernel(self, key: Hashable, make: Callable[[], Prepared]) -> Prepared:
        """A kernel; `key` says what it depends on."""
        if key not in self._kernels:
            self._kernels[key] = make()
        return self._kernels[key]

    def addresses(self, key: Hashable, values: list[int], device: torch.device) -> Tensor:
        """The values on the device. `key` is whose they are: they may differ in every step."""
        known = self._known.get(key)
        if known is not None and known[0] == values:
            if _captures(device):
                self._captured.append(known)
            return known[1]
        if device.type != "cuda":
            table = _tensor(values)
            self._known[key] = (values, table, table)
            return table
        return self._uploaded(key, values, device)

    def _uploaded(self, key: Hashable, values: list[int], device: torch.device) -> Tensor:
        """The same, without waiting for the device.

        A CUDA graph that is captured reads the pinned memory whenever it is replayed; so that
        memory is its own, and was allocated before.
        """
        captured = _captures(device)
        host = self._spare.pop(key, None) if captured else None
        if host is None:
            host = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        host.copy_(_tensor(values))
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


def _tensor(values: list[int]) -> Tensor:
    """The values, in a quarter of the time that `torch.tensor` takes."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _captures(device: torch.device) -> bool:
    """Whether launches on the device go into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
    assert singd_triton is not None
    device, values = layers[0].K.device, []
    for statistic, K, C, m_K, m_C in layers:
        values += (statistic.data_ptr(), K.data_ptr(), C.data_ptr(), m_K.data_ptr(),
                   m_C.data_ptr(), *K.shape, C.shape[1])  # fmt: skip
    groups = tuple(values[5::8])
    key = ("factors", device, groups, tuple(values[6::8]), tuple(values[7::8]))
    programs = tables.programs(key, lambda: _groups(groups), device)
    table = tables.addresses(key, values, device)
    limit = 1.0 if rule.limit is None else rule.limit
    constants = {
        "TERMS": rule.terms, "SCALED": scale is not None, "IKFAC": rule.ikfac, "BLOCK": BLOCK,
        "NORMALISED": rule.normalised, "MOMENTUM": rule.alpha != 0,
        "LIMITED": rule.limit is not None and rule.beta != 0,
    }  # fmt: skip
    known = ("factors", device, len(programs), scale is None or scale.dtype, *constants.values())
    kernel = tables.kernel(
        known, lambda kernels=singd_triton: kernels.prepared_update(len(programs), constants)
    )
    with torch.cuda.device_of(table):
        numbers = (rule.damping, rule.alpha, rule.beta, limit)
        kernel((table, programs, table if scale is None else scale), numbers)


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
    assert singd_triton is not None
    device, dtype = parameters[0].device, parameters[0].dtype
    values: list[int] = []
    for p, buffer, weight in zip(parameters, buffers, weights, strict=True):
        assert p.grad is not None
        momentum = 0 if buffer is None else buffer.data_ptr()
        values += (p.data_ptr(), p.grad.data_ptr(), momentum, *weight[1:])
    shapes = (tuple([w[0] for w in weights]), tuple(values[5::11]), tuple(values[6::11]))
    key = ("parameters", device, dtype, *shapes)
    programs = tables.programs(key, lambda: _blocks(shapes), device)
    table = tables.addresses(key, values, device)
    constants = {
        "MOMENTUM": buffers[0] is not None, "NESTEROV": rule.nesterov, "ROOT": rule.root,
        "BLOCK_R": ROWS, "BLOCK_C": COLUMNS,
    }  # fmt: skip
    kernel = tables.kernel(
        ("parameters", device, dtype, len(programs), *constants.values()),
        lambda kernels=singd_triton: kernels.prepared_step(len(programs), dtype, constants),
    )
    with torch.cuda.device_of(table):
        kernel((table, programs), (rule.lr, rule.momentum, rule.decay, rule.shrink))


def _groups(groups: Sequence[int]) -> Tensor:
    """(layer, group) of each program."""
    return torch.cat([_product(layer, (count,)) for layer, count in enumerate(groups)])


def _blocks(shapes: Sequence[Sequence[int]]) -> Tensor:
    """(parameter, group, block of rows, block of columns) of each program.

    `shapes`: groups, rows and columns of all parameters.
    """
    return torch.cat([
        _product(number, (groups, -(-rows // ROWS), -(-columns // COLUMNS)))
        for number, (groups, rows, columns) in enumerate(zip(*shapes, strict=True))
    ])  # fmt: skip


def _product(number: int, counts: Sequence[int]) -> Tensor:
    """All (number, i, j, …) with i, j, … below the counts."""
    axes = [torch.tensor([number]), *map(torch.arange, counts)]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], dim=1)
