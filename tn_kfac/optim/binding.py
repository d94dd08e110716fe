"""Which parameters of an optimizer's groups belong to which layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from tn_kfac.curvature import LayerTap, Recipe, Site
from tn_kfac.optim.checks import fraction, structures_of
from tn_kfac.optim.sharded import check_sharding, is_sharded, own, own_part, whole
from tn_kfac.structures import structure


@dataclass(frozen=True)
class Binding:
    """A site whose `weight` and `bias` (those that are trained) the optimizer steps.

    sharded: Whether ranks hold shards of them.
    """

    site: Site
    tap: LayerTap
    weight: Parameter | None
    bias: Parameter | None
    dtypes: tuple[torch.dtype, torch.dtype]
    sharded: bool

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The trained parameters; the first one owns the layer's state."""
        return tuple(p for p in (self.weight, self.bias) if p is not None)

    def attach(self) -> list[RemovableHandle]:
        """Hook the modules. The probes are made now: a compiled model cannot."""
        self.tap.probes_on(self.parameters[0].device)
        return self.site.attach(self.tap)

    def gradient_matrix(self, smooth: Callable[[Parameter, Tensor], Tensor]) -> Tensor:
        """The joint gradient (groups, d_out, d_in [+1]).

        A parameter without a gradient counts as one with gradient zero; the others go
        through `smooth`. Those of sharded parameters are gathered.
        """
        pair = (self.weight, self.bias)
        weight, bias = (
            None if p is None else _zeros(p) if p.grad is None else whole(smooth(p, p.grad))
            for p in pair
        )
        return self.site.layer.joined(weight, bias)

    def directions(self, matrix: Tensor) -> dict[Tensor, Tensor]:
        """The joint matrix split into one direction per parameter with a gradient.

        Of a sharded parameter, it is that of this rank's shard.
        """
        return {p: own_part(d.to(p.dtype), p) for p, d in self._parted(matrix)}

    def scaled(
        self, scales: Tensor, smooth: Callable[[Parameter, Tensor], Tensor]
    ) -> dict[Tensor, Tensor]:
        """Directions that scale each entry of the gradient matrix; nothing is gathered."""
        return {
            p: (own(smooth(p, p.grad)) * own_part(scale, p)).to(p.dtype)
            for p, scale in self._parted(scales)
            if p.grad is not None
        }

    def _parted(self, matrix: Tensor) -> list[tuple[Parameter, Tensor]]:
        """The parameters with a gradient, and what of the joint matrix is theirs."""
        pair = (self.weight, self.bias)
        shapes = (None if p is None else p.shape for p in pair)
        parts = zip(pair, self.site.layer.parted(matrix, *shapes), strict=True)
        return [
            (p, part)
            for p, part in parts
            if part is not None and p is not None and p.grad is not None
        ]

    @property
    def entrywise(self) -> bool:
        """Whether both factors are diagonal, and scale each entry of a gradient for itself."""
        spaces = (self.tap.recipe.input_structure, self.tap.recipe.output_structure)
        return all(space.reads == "diagonal" for space in spaces)


def _zeros(parameter: Parameter) -> Tensor:
    """Zeros in the place of a missing gradient, whole."""
    return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)


class Active(NamedTuple):
    """A layer with gradients in one step.

    Attributes:
        binding: The layer.
        group: Of its first parameter, whose options are the layer's.
        state: Of that parameter: the layer's.
        numbers: Of the groups of all its parameters.
    """

    binding: Binding
    group: dict[str, Any]
    state: dict[str, Any]
    numbers: list[int]


def bind(
    sites: Mapping[Any, Site],
    groups: Mapping[Any, dict[str, Any]],
    bound: Iterable[Binding],
    rule: str,
    options: tuple[str, ...],
) -> list[Binding]:
    """Bindings of all sites with a parameter in a group of the given rule, not yet bound.

    Args:
        sites: The site of each parameter.
        groups: The parameter group of each parameter of the optimizer.
        bound: Existing bindings.
        rule: The rule of groups whose parameters have factors.
        options: Keys on which the groups of one layer must agree.

    Raises:
        ValueError: If a layer's parameters disagree, or one of them was bound before.
    """
    before = {binding.site.name: binding for binding in bound}
    fresh = []
    for site in dict.fromkeys(sites.values()):
        trained = [p for p in site.parameters if p in groups and groups[p]["rule"] == rule]
        if site.name in before and len(trained) > len(before[site.name].parameters):
            raise ValueError(
                f"params holds one parameter of layer {site.name!r} whose other parameter was "
                "added before: add weight and bias of a layer at the same time"
            )
        if trained and site.name not in before:
            _check_agreement(site, [groups[p] for p in trained], options)
            fresh.append(_binding(site, trained, groups[trained[0]]))
    return fresh


def check_patterns(chosen: Any, names: Iterable[str]) -> None:
    """Check that each pattern of a mapping of structures is that of a layer.

    Raises:
        ValueError: If one fits no layer.
    """
    names = list(names)
    for pattern in chosen if isinstance(chosen, dict) else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"structure has the pattern {pattern!r}, which fits no layer: layers are {names}"
            )


def _check_agreement(site: Site, groups: list[dict[str, Any]], options: Iterable[str]) -> None:
    for key in options:
        if any(group[key] != groups[0][key] for group in groups):
            raise ValueError(
                f"weight and bias of layer {site.name!r} share one pair of factors, but their "
                f"groups differ in {key}: give both groups the same {key}"
            )


def _binding(site: Site, trained: list[Parameter], group: dict[str, Any]) -> Binding:
    weight = site.weight if any(p is site.weight for p in trained) else None
    bias = site.bias if any(p is site.bias for p in trained) else None
    input_structure, output_structure = map(structure, structures_of(site.name, group["structure"]))
    recipe = Recipe(
        site.layer,
        weight is not None,
        bias is not None,
        group["kfac_approx"],
        group["loss_average"],
        (input_structure, output_structure),
        group["fisher"],
        fraction("curvature_fraction", group["curvature_fraction"]),
        group.get("ekfac") == "exact" and site.layer.structured and not site.layer.diagonal_input,
    )
    default = torch.promote_types(trained[0].dtype, torch.float32)
    dtypes = [dtype or default for dtype in group["preconditioner_dtype"]]
    tap = LayerTap(recipe, torch.promote_types(torch.promote_types(*dtypes), torch.float32))
    # Of shards, gradients that are not reduced yet are kept elsewhere: that there are none says
    # nothing then.
    tap.trained = tuple(p for p in trained if not is_sharded(p))
    check_sharding(site.name, trained)
    sharded = any(map(is_sharded, trained))
    return Binding(site, tap, weight, bias, (dtypes[0], dtypes[1]), sharded)
