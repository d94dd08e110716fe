"""Curvature captured in the backward pass."""

from tn_kfac.curvature.compiled import forget_compiled
from tn_kfac.curvature.estimate import kronecker_factors
from tn_kfac.curvature.factors import Factors, Measured
from tn_kfac.curvature.operators import to_curvlinops
from tn_kfac.curvature.scope import ForwardScope
from tn_kfac.curvature.sites import Refusal, Site, find_sites, untold
from tn_kfac.curvature.statistics import Recipe, statistics
from tn_kfac.curvature.tap import LayerTap

__all__ = [
    "Factors",
    "ForwardScope",
    "LayerTap",
    "Measured",
    "Recipe",
    "Refusal",
    "Site",
    "find_sites",
    "forget_compiled",
    "kronecker_factors",
    "statistics",
    "to_curvlinops",
    "untold",
]
