"""Second-order optimizers for PyTorch, with curvature from tensor networks."""

from tn_kfac.curvature import kronecker_factors, to_curvlinops
from tn_kfac.optim import KFAC, SINGD
from tn_kfac.summary import RankCosts, Summary, rank_costs, summary

__all__ = [
    "KFAC",
    "SINGD",
    "RankCosts",
    "Summary",
    "kronecker_factors",
    "rank_costs",
    "summary",
    "to_curvlinops",
]
