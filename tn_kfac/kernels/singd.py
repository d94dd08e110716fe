"""SINGD's step with diagonal factors for all layers at once, by a few kernels.

Their plain-torch reference is what the optimizer does for one layer after another:
`tn_kfac.optim.factor_update` with diagonal structures, `tn_kfac.optim.updates` (`smoothed`, and
`lengthened` by `update_rms`), and `tn_kfac.optim.rules.sgd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tn_kfac.kernels.tables import Tables

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

    `root`: the direction is |C| G |K|, instead of C² G K². `first`: G is `fresh` times the momentum
    of gradients, and then p ← shrink · p − lr (direction + decay · p).
    """

    lr: float
    momentum: float
    decay: float
    shrink: float
    nesterov: bool
    root: bool
    first: bool = False
    fresh: float = 1.0


class Parameters(NamedTuple):
    """Parameters of one dtype and device, and how they are stepped.

    Attributes:
        tensors: The parameters, all with gradients.
        buffers: Their momenta, with their dtype and strides; None: no momentum.
        weights: How they lie in memory.
        rule: The same for all.
        places: If directions get the lengths that layers' updates shall have: the addresses of each
            parameter's sums of squares (see `sums`), and of what its layer is multiplied by.
    """

    tensors: Sequence[Tensor]
    buffers: Sequence[Tensor | None]
    weights: Sequence[Weight]
    rule: SgdRule
    places: Sequence[tuple[int, int]] | None = None


class Located(NamedTuple):
    """Such parameters, the table of their addresses, and what each program does."""

    given: Parameters
    table: Tensor
    programs: Tensor


def sums(weight: Weight) -> int:
    """How many sums of squares a parameter has: one of each program."""
    return weight.groups * -(-weight.rows // ROWS) * -(-weight.columns // COLUMNS)


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


def located(tables: Tables, given: Parameters) -> Located:
    """Parameters with the tables that launches need."""
    first = given.tensors[0]
    places = given.places or [(0, 0)] * len(given.tensors)
    values: list[int] = []
    for p, buffer, weight, place in zip(
        given.tensors, given.buffers, given.weights, places, strict=True
    ):
        assert p.grad is not None
        momentum = 0 if buffer is None else buffer.data_ptr()
        values += (p.data_ptr(), p.grad.data_ptr(), momentum, *weight[1:], *place)
    shapes = (tuple([w[0] for w in given.weights]), tuple(values[5::13]), tuple(values[6::13]))
    key = ("parameters", first.device, first.dtype, *shapes)
    programs = tables.programs(key, lambda: _blocks(shapes), first.device)
    return Located(given, tables.addresses(key, values, first.device), programs)


def sum_squares(tables: Tables, found: Located) -> None:
    """Sums of squares of preconditioned gradients; and their momentum, where that comes first."""
    rule = found.given.rule
    _launch(tables, found, "prepared_squares", {}, (rule.momentum, rule.fresh))


def set_lengths(
    tables: Tables, layers: Sequence[tuple[int, ...]], rms: float, device: torch.device
) -> None:
    """What directions are to be multiplied by, so that each layer's has this root mean square.

    Args:
        tables: Of the optimizer.
        layers: Of each the address of its first sum of squares, the number of them, that of entries
            of its weight (with its bias), and the address of the result.
        rms: The root mean square.
        device: Of all of it.
    """
    assert singd_triton is not None
    values = [number for layer in layers for number in layer]
    key = ("lengths", device, rms, len(layers))
    table = tables.addresses(key, values, device)
    kernel = tables.kernel(
        key,
        lambda kernels=singd_triton: kernels.prepared_lengths(len(layers), {"BLOCK": BLOCK}),
    )
    with torch.cuda.device_of(table):
        kernel((table,), (rms,))


def step_parameters(tables: Tables, found: Located) -> None:
    """Step parameters along their preconditioned gradients, in place."""
    rule, lengths = found.given.rule, found.given.places is not None
    constants = {"SMOOTHED": rule.first and lengths, "LENGTHS": lengths}
    numbers = (rule.lr, rule.momentum, rule.decay, rule.shrink, rule.fresh)
    _launch(tables, found, "prepared_step", constants, numbers)


def _launch(tables: Tables, found: Located, name: str, more: dict[str, bool],
            numbers: Sequence[float]) -> None:  # fmt: skip
    """Launch a kernel whose programs take a block of a parameter each."""
    assert singd_triton is not None
    (given, table, programs), first = found, found.given.tensors[0]
    count, dtype, rule = len(programs), first.dtype, given.rule
    constants = {
        "MOMENTUM": given.buffers[0] is not None, "NESTEROV": rule.nesterov, "ROOT": rule.root,
        "FIRST": rule.first, **more, "BLOCK_R": ROWS, "BLOCK_C": COLUMNS,
    }  # fmt: skip
    kernel = tables.kernel(
        (name, first.device, dtype, count, *constants.values()),
        lambda kernels=singd_triton: getattr(kernels, name)(count, dtype, constants),
    )
    with torch.cuda.device_of(table):
        kernel((table, programs), numbers)


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
