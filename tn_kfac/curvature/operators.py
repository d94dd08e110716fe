"""Kronecker factors as linear operators of curvlinops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from tn_kfac.curvature.factors import Factors
from tn_kfac.curvature.sites import Site, find_sites

if TYPE_CHECKING:
    from curvlinops._torch_base import PyTorchLinearOperator


def to_curvlinops(
    factors: Mapping[str, Factors], model: nn.Module, params: Sequence[Parameter] | None = None
) -> PyTorchLinearOperator:
    """The block-diagonal matrix of all G ⊗ A as a linear operator of curvlinops.

    >>> curvature = to_curvlinops(kronecker_factors(model, loss_fn, data), model)
    >>> product = curvature @ [torch.ones_like(p) for p in model.parameters()]  # all have factors

    Args:
        factors: Of `kronecker_factors`, with structure="dense".
        model: The same model.
        params: The parameters, in the order in which the operator has them; those of the layers
            with factors, in the model's order, if None.

    Raises:
        ImportError: If curvlinops is not installed.
        ValueError: If a factor belongs to no layer of the model, or a parameter has none.
    """
    from curvlinops._torch_base import PyTorchLinearOperator

    sites = {site.name: site for site in find_sites(model, norms=True)[0]}
    unknown = sorted(set(factors) - set(sites))
    if unknown:
        raise ValueError(f"factors has {unknown[0]!r}, which is no layer of model")
    held = {p for name in factors for p in _trained(sites[name])}
    given = [p for p in model.parameters() if p in held] if params is None else list(params)
    if set(given) != held:
        raise ValueError(
            "params must hold exactly the trained parameters of the layers with factors: leave it "
            "out to see which"
        )

    class KroneckerOperator(PyTorchLinearOperator):  # type: ignore[misc,valid-type]
        """Block-diagonal, one block G ⊗ A for each layer."""

        SELF_ADJOINT = True

        def __init__(self) -> None:
            shapes = [tuple(p.shape) for p in given]
            super().__init__(shapes, shapes)

        @property
        def device(self) -> torch.device:
            return given[0].device

        @property
        def dtype(self) -> torch.dtype:
            return next(iter(factors.values())).A.dtype

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            columns = [dict(zip(given, x, strict=True)) for x in _columns(X)]
            products = [_product(factors, sites, column) for column in columns]
            return [torch.stack([product[p] for product in products], -1) for p in given]

    return KroneckerOperator()


def _trained(site: Site) -> list[Parameter]:
    return [p for p in site.parameters if p.requires_grad]


def _columns(matrix: list[Tensor]) -> list[list[Tensor]]:
    """Vectors, each a list of tensors, of a matrix whose columns are the last dimension."""
    return [list(parts) for parts in zip(*(x.unbind(-1) for x in matrix), strict=True)]


def _product(
    factors: Mapping[str, Factors], sites: Mapping[str, Site], vector: dict[Any, Tensor]
) -> dict[Any, Tensor]:
    """Each layer's G · V · A, with V the joint matrix of weight and bias."""
    product: dict[Any, Tensor] = {}
    for name, (A, G) in factors.items():
        site = sites[name]
        weight, bias = (p if p is not None and p.requires_grad else None
                        for p in (site.weight, site.bias))  # fmt: skip
        joint = site.layer.joined(
            None if weight is None else vector[weight], None if bias is None else vector[bias]
        ).to(A.dtype)
        right = joint * A[:, None, :] if A.dim() == 2 else joint @ A
        result = G[..., None] * right if G.dim() == 2 else G @ right
        shapes = (None if p is None else p.shape for p in (weight, bias))
        parts = site.layer.parted(result, *shapes)
        product |= {p: x for p, x in zip((weight, bias), parts, strict=True) if x is not None}
    return product
