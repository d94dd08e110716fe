"""Which parameters of a model belong to which layer.

A layer's weight and bias share one pair of Kronecker factors. Layers are found by
parameter identity, never by storage address, so a model may move to another device or
dtype afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from tn_kfac.curvature import LayerTap, Recipe
from tn_kfac.curvature.tap import AutocastInput
from tn_kfac.layers import Layer, layer_of
from tn_kfac.structures import structure


@dataclass(frozen=True)
class Site:
    """Parameters that one pair of Kronecker factors serves, and the modules using them."""

    name: str
    layer: Layer
    modules: tuple[nn.Module, ...]
    weight: Parameter
    bias: Parameter | None

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The weight, and the bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Binding:
    """A site whose `weight` and `bias` (those that are trained) the optimizer steps."""

    site: Site
    tap: LayerTap
    weight: Parameter | None
    bias: Parameter | None
    dtypes: tuple[torch.dtype, torch.dtype]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The trained parameters; the first one owns the layer's state."""
        return tuple(p for p in (self.weight, self.bias) if p is not None)

    def attach(self) -> list[RemovableHandle]:
        """Hook the modules."""
        return [
            handle
            for m in self.site.modules
            for handle in (
                m.register_forward_pre_hook(AutocastInput()),
                m.register_forward_hook(self.tap, with_kwargs=True),
            )
        ]

    def gradient_matrix(self) -> Tensor | None:
        """The joint gradient (groups, d_out, d_in [+1]); None if no parameter has one.

        A parameter without a gradient counts as one with gradient zero.
        """
        if all(p.grad is None for p in self.parameters):
            return None
        columns = []
        layer = self.site.layer
        if self.weight is not None:
            columns.append(layer.to_matrix(_gradient(self.weight)))
        if self.bias is not None:
            columns.append(_gradient(self.bias).reshape(layer.groups, layer.features_out, 1))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def directions(self, matrix: Tensor) -> dict[Tensor, Tensor]:
        """The joint matrix split into one direction per parameter with a gradient."""
        split: dict[Tensor, Tensor] = {}
        if self.weight is not None:
            columns = matrix[..., : self.site.layer.features_in]
            split[self.weight] = self.site.layer.from_matrix(columns, self.weight.shape)
        if self.bias is not None:
            split[self.bias] = matrix[..., -1].reshape(self.bias.shape)
        return {p: d.to(p.dtype) for p, d in split.items() if p.grad is not None}


def _gradient(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def find_sites(model: nn.Module) -> tuple[list[Site], list[str]]:
    """All layers of a model with Kronecker factors, and why some have none.

    Modules that share weight and bias form one site if they have the same geometry. A
    weight (or bias) that is shared in any other way has no Kronecker factor, nor has a
    complex one.

    Raises:
        ValueError: If a lazy module has not seen an input yet.
    """
    users: dict[Parameter, list[str]] = defaultdict(list)
    grouped: dict[tuple[Parameter, Parameter | None, Layer], list[tuple[str, nn.Module]]]
    grouped = defaultdict(list)
    for name, module in model.named_modules():
        direct = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for parameter in direct.values():
            users[parameter].append(name)
        layer = layer_of(module)
        weight, bias = direct.get("weight"), direct.get("bias")
        if any(isinstance(p, UninitializedParameter) for p in direct.values()):
            raise ValueError(
                f"model has a lazy layer {name!r} without parameters yet: run one forward pass "
                "before building the optimizer"
            )
        if layer is not None and weight is not None and _is_plain(direct):
            grouped[weight, bias, layer].append((name, module))
    sites, refused = [], []
    for (weight, bias, layer), named in grouped.items():
        names, modules = zip(*named, strict=True)
        site = Site(names[0], layer, modules, weight, bias)
        if all(len(users[p]) == len(names) for p in site.parameters):
            sites.append(site)
        else:
            refused.append(f"{names[0]!r} shares parameters with {_others(users, site)}")
    return sites, refused


def _is_plain(direct: Mapping[str, Parameter]) -> bool:
    """Whether a module's own parameters are a real weight and bias, and nothing else."""
    return set(direct) <= {"weight", "bias"} and not any(p.is_complex() for p in direct.values())


def _others(users: dict[Parameter, list[str]], site: Site) -> list[str]:
    names: Iterable[str] = (name for p in site.parameters for name in users[p])
    return sorted(set(names) - {site.name})


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
    input_structure, output_structure = map(structure, group["structure"])
    recipe = Recipe(
        site.layer,
        weight is not None,
        bias is not None,
        group["kfac_approx"],
        group["loss_average"],
        input_structure,
        output_structure,
    )
    default = torch.promote_types(trained[0].dtype, torch.float32)
    dtypes = [dtype or default for dtype in group["preconditioner_dtype"]]
    tap = LayerTap(recipe, torch.promote_types(torch.promote_types(*dtypes), torch.float32))
    return Binding(site, tap, weight, bias, (dtypes[0], dtypes[1]))
