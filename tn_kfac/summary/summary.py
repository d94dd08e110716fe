"""Which parameter of a model gets which curvature, and what that costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from tn_kfac.curvature import Recipe, Refusal, Site, find_sites
from tn_kfac.layers import Layer, layer_of
from tn_kfac.layers.describe import describe
from tn_kfac.optim import checks
from tn_kfac.optim.binding import check_patterns
from tn_kfac.optim.singd import Structures
from tn_kfac.structures import structure as structure_of
from tn_kfac.summary.example import Calls, Example, Trace, trace
from tn_kfac.summary.table import Table, amount, merged, percent, skeleton
from tn_kfac.tensor_network.rows import Approx

KINDS = {"kronecker": "Kronecker", "diagonal": "diagonal", "fallback": "fallback",
         "frozen": "frozen"}  # fmt: skip
"""Kinds of curvature, and how they are printed."""
HEAD = ("layer", "geometry", "parameters", "curvature", "factors", "structure", "lowering",
        "state", "FLOPs", "of model")  # fmt: skip
NUMBERS = frozenset({"parameters", "state", "FLOPs", "of model"})


@dataclass(frozen=True)
class Row:
    """The parameters of a layer with factors, or those of a module that have none.

    Attributes:
        modules: Names of the modules; several that share parameters share their factors.
        parameters: Names of the parameters.
        geometry: The kind of the module and its sizes.
        size: Elements of the parameters.
        curvature: "kronecker", "diagonal", "fallback", or "frozen" (not trained).
        reason: Why they have no factors, though one could think so.
        factors: (groups, d_in) and (groups, d_out).
        structure: Of the factors.
        lowering: What computes the input's factor; "unused" if the example's output does not
            depend on the parameters, "not called" if it does so past the module.
        state_bytes: Of the factors and their momenta.
        flops: Of the statistics of the example.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    geometry: str
    size: int
    curvature: str
    reason: str = ""
    factors: tuple[tuple[int, int], ...] = ()
    structure: str = ""
    lowering: str = ""
    state_bytes: int = 0
    flops: int = 0

    @property
    def kind(self) -> Row:
        """The row with the numbers in its names left out: equal for repeated layers."""
        modules, parameters = (tuple(map(skeleton, n)) for n in (self.modules, self.parameters))
        return replace(self, modules=modules, parameters=parameters)


@dataclass(frozen=True)
class Summary:
    """What `summary` found; its text is a table that merges repeated layers.

    Attributes:
        rows: One for each layer, or module without factors; each parameter is in one.
        model_flops: Of a forward and backward pass of the example, as torch counts them
            (matrix products, convolutions and attention).
    """

    rows: tuple[Row, ...]
    model_flops: int

    @property
    def shares(self) -> dict[str, float]:
        """The fraction of the parameters that each kind of curvature has."""
        sizes = dict.fromkeys(KINDS, 0)
        for row in self.rows:
            sizes[row.curvature] += row.size
        total = max(1, sum(sizes.values()))
        return {kind: size / total for kind, size in sizes.items()}

    def __str__(self) -> str:
        return str(self._table())

    def print(self) -> None:
        """Print the table: through rich in a terminal, if it is installed."""
        self._table().print()

    def _table(self) -> Table:
        alike: dict[Row, list[Row]] = defaultdict(list)
        for row in self.rows:
            alike[row.kind].append(row)
        reasons = list(dict.fromkeys(row.reason for row in self.rows if row.reason))
        notes = [f"({at + 1}) {reason}" for at, reason in enumerate(reasons)]
        lines = tuple(self._line(rows, reasons) for rows in alike.values())
        return Table(HEAD, lines, NUMBERS, (*notes, self._totals()))

    def _line(self, rows: list[Row], reasons: list[str]) -> tuple[str, ...]:
        row, count = rows[0], len(rows)
        name = merged([", ".join(name or "(model)" for name in row.modules) for row in rows])
        note = f" ({reasons.index(row.reason) + 1})" if row.reason else ""
        flops = count * row.flops
        return (
            f"{name} ×{count}" if count > 1 else name,
            row.geometry,
            f"{count * row.size:,}",
            KINDS[row.curvature] + note,
            ", ".join(f"{groups}x{dim}" for groups, dim in row.factors),
            row.structure,
            row.lowering,
            amount(count * row.state_bytes, "B", 1024) if row.factors else "",
            amount(flops) if row.factors else "",
            self._share(flops) if row.factors else "",
        )

    def _share(self, flops: int) -> str:
        return percent(flops / self.model_flops) if self.model_flops else "-"

    def _totals(self) -> str:
        size, state, flops = (
            sum(getattr(row, name) for row in self.rows)
            for name in ("size", "state_bytes", "flops")
        )
        shares = ", ".join(
            f"{percent(share)} {KINDS[kind]}"
            for kind, share in self.shares.items()
            if share or kind != "frozen"
        )
        return (
            f"total: {size:,} parameters ({shares}); state {amount(state, 'B', 1024)}; statistics "
            f"{amount(flops)} FLOPs, {self._share(flops)} of the model's {amount(self.model_flops)}"
        )


def summary(
    model: nn.Module,
    example_input: Example,
    *,
    structure: Structures | Mapping[str, Structures] = "diagonal",
    kfac_approx: Approx = "expand",
    norms: bool = False,
) -> Summary:
    """Which parameter gets which curvature from `SINGD`, and what its statistics cost.

    Runs the model forward and backward once, in its present mode. Parameters, gradients,
    buffers, hooks and torch's random numbers are afterwards as they were before.

    >>> print(summary(model, torch.randn(8, 3, 32, 32)))

    Args:
        model: The network.
        example_input: A batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        structure: Of the factors, as `SINGD` takes it.
        kfac_approx: "expand" or "reduce".
        norms: Whether normalisation layers get factors.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checks.one_of("kfac_approx", kfac_approx, ("expand", "reduce"))
    checks.flag("norms", norms)
    chosen = checks.structures(structure)
    sites, refused = find_sites(model, norms)
    check_patterns(chosen, [site.name for site in sites])
    seen = trace(model, {m: site.layer for site in sites for m in site.modules}, example_input)
    served = {p: site for site in sites for p in site.parameters}
    reasons = _reasons(model, refused, norms)
    rows = []
    for (name, curvature), named in _grouped(model, served).items():
        module, size = model.get_submodule(name), sum(p.numel() for p in named.values())
        row = Row((name,), tuple(named), describe(module), size, curvature)
        if curvature == "fallback":
            row = replace(row, reason=_why(name, reasons))
        site = served.get(next(iter(named.values())))
        if site is not None and curvature == site.layer.curvature:
            pair = checks.structures_of(site.name, chosen)
            recipe = _recipe(site, named.values(), kfac_approx, pair)
            row = replace(row, modules=_names(model, site), **_costs(recipe, site, seen))
        elif seen.used.isdisjoint(named.values()) and curvature != "frozen":
            row = replace(row, lowering="unused")
        rows.append(row)
    return Summary(tuple(rows), seen.flops)


def _reasons(model: nn.Module, refused: Iterable[Refusal], norms: bool) -> dict[str, str]:
    """Why modules have no factors, by their names."""
    reasons = {refusal.name: refusal.why for refusal in refused}
    for name, module in model.named_modules():
        layer = layer_of(module)
        if isinstance(layer, Layer) and layer.curvature == "diagonal" and not norms:
            reasons[name] = "norms=False"
    return reasons


def _why(name: str, reasons: Mapping[str, str]) -> str:
    """The reason of a module, or that of the next one around it."""
    while name and name not in reasons:
        name = name.rpartition(".")[0]
    return reasons.get(name, "")


def _grouped(
    model: nn.Module, served: Mapping[Parameter, Site]
) -> dict[tuple[str, str], dict[str, Parameter]]:
    """The parameters by the module that they are listed under, and by their curvature."""
    groups: dict[tuple[str, str], dict[str, Parameter]] = defaultdict(dict)
    for name, p in model.named_parameters():
        site, owner = served.get(p), name.rpartition(".")[0]
        if site is not None and p.requires_grad:
            groups[site.name, site.layer.curvature][name] = p
        else:
            groups[owner, "fallback" if p.requires_grad else "frozen"][name] = p
    return groups


def _names(model: nn.Module, site: Site) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if module in site.modules)


def _recipe(
    site: Site, trained: Iterable[Parameter], approx: Approx, structures: tuple[str, str]
) -> Recipe:
    """What `SINGD` measures for a site of which some parameters are trained."""
    kept = set(trained)
    has_bias = site.bias is not None and site.bias in kept
    pair = (structure_of(structures[0]), structure_of(structures[1]))
    return Recipe(site.layer, site.weight in kept, has_bias, approx, "batch", pair)


def _costs(recipe: Recipe, site: Site, seen: Trace) -> dict[str, Any]:
    """What a row says of the factors of a layer."""
    layer, spaces = recipe.layer, (recipe.input_structure.name, recipe.output_structure.name)
    known = {
        "factors": ((layer.groups, recipe.dim_in), (layer.groups, recipe.dim_out)),
        "structure": ", ".join(dict.fromkeys(spaces)),
    }
    if seen.used.isdisjoint(site.parameters):
        return known | {"lowering": "unused"}
    dtype = torch.promote_types(site.weight.dtype, torch.float32)
    elements = sum(map(prod, recipe.shapes()[:2]))
    calls: Calls = Counter()
    for module in site.modules:
        calls.update(seen.calls.get(module, {}))
    costs = [(layer.cost(*shapes, recipe.ask(dtype)), n) for shapes, n in calls.items()]
    lowerings = dict.fromkeys(cost.lowering for cost, _ in costs)
    return known | {
        "lowering": " / ".join(lowerings) or "not called",
        "state_bytes": 2 * elements * dtype.itemsize,
        "flops": sum(cost.flops * n for cost, n in costs),
    }
