"""Which parameters of a model belong to which layer.

A layer's weight and bias share one pair of Kronecker factors. Layers are found by
parameter identity, never by storage address, so a model may move to another device or
dtype afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from tn_kfac.curvature.tap import AutocastInput, LayerTap
from tn_kfac.layers import Layer, Refused, layer_of, overrides


@dataclass(frozen=True)
class Site:
    """Parameters that one pair of Kronecker factors serves, and the modules using them."""

    name: str
    layer: Layer
    modules: tuple[nn.Module, ...]
    weight: Parameter
    bias: Parameter | None

    def attach(self, tap: LayerTap) -> list[RemovableHandle]:
        """Hook the modules."""
        handles = [m.register_forward_hook(tap, with_kwargs=True) for m in self.modules]
        if self.layer.autocast:
            handles += [m.register_forward_pre_hook(AutocastInput()) for m in self.modules]
        return handles

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The weight, and the bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Refusal:
    """A module without factors, though one could think so, and its parameters."""

    name: str
    why: str
    parameters: tuple[Parameter, ...]

    def __str__(self) -> str:
        return f"{self.name!r} {self.why}" if self.name else f"the model itself {self.why}"


def find_sites(model: nn.Module, norms: bool = False) -> tuple[list[Site], list[Refusal]]:
    """All layers of a model with factors, and why some have none.

    Modules that share weight and bias form one site if they have the same geometry. A
    weight (or bias) that is shared in any other way has no Kronecker factor, nor has a
    complex or a parametrised one.

    Args:
        model: The model.
        norms: Whether to include the affine parameters of normalisation layers.

    Raises:
        ValueError: If a lazy module has not seen an input yet.
    """
    users: dict[Parameter, list[str]] = defaultdict(list)
    grouped: dict[tuple[Parameter, Parameter | None, Layer], list[tuple[str, nn.Module]]]
    grouped = defaultdict(list)
    refused = []
    for name, module in model.named_modules():
        direct = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for parameter in direct.values():
            users[parameter].append(name)
        _check_materialised(name, direct)
        layer = layer_of(module)
        if isinstance(layer, Layer) and not norms and _is_norm(layer):
            continue
        why = layer.why if isinstance(layer, Refused) else _why_not(module, layer, direct)
        if why:
            refused.append(Refusal(name, why, tuple(module.parameters())))
        elif isinstance(layer, Layer) and "weight" in direct:
            grouped[direct["weight"], direct.get("bias"), layer].append((name, module))
    sites = []
    for (weight, bias, layer), named in grouped.items():
        names, modules = zip(*named, strict=True)
        site = Site(names[0], layer, modules, weight, bias)
        if all(len(users[p]) == len(names) for p in site.parameters):
            sites.append(site)
        else:
            why = f"shares parameters with {_others(users, site)}"
            refused.append(Refusal(site.name, why, site.parameters))
    return sites, refused


def _check_materialised(name: str, direct: Mapping[str, Parameter]) -> None:
    if any(isinstance(p, UninitializedParameter) for p in direct.values()):
        raise ValueError(
            f"model has a lazy layer {name!r} without parameters yet: run one forward pass "
            "before building the optimizer"
        )


def _is_norm(layer: Layer) -> bool:
    return layer.curvature == "diagonal"


def _why_not(
    module: nn.Module, layer: Layer | Refused | None, direct: Mapping[str, Parameter]
) -> str | None:
    """Why a module of a known kind has no factors; None if it has."""
    if layer is None:
        return None
    if overrides(module):
        return f"has a forward pass of its own ({type(module).__name__}): register it"
    if is_parametrized(module) or (direct and "weight" not in direct):
        return "has parametrised weights"
    if not set(direct) <= {"weight", "bias"}:
        return f"has other parameters than weight and bias: {sorted(direct)}"
    if any(p.is_complex() for p in direct.values()):
        return "has complex parameters"
    return None


def untold(refused: Iterable[Refusal], trained: Collection[Parameter]) -> list[Refusal]:
    """Those that concern trained parameters which no other one before is about."""
    told: set[Parameter] = set()
    concerned = []
    for refusal in refused:
        mine = {p for p in refusal.parameters if p.requires_grad and p in trained}
        if mine - told:
            concerned.append(refusal)
        told |= mine
    return concerned


def _others(users: dict[Parameter, list[str]], site: Site) -> list[str]:
    names: Iterable[str] = (name for p in site.parameters for name in users[p])
    return sorted(set(names) - {site.name})
