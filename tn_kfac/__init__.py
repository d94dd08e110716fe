"""Second-order optimizers for PyTorch, with curvature from tensor networks."""

from tn_kfac.curvature import kronecker_factors, to_curvlinops
from tn_kfac.optim import KFAC, SINGD
from tn_kfac.summary import Summary, summary

__all__ = ["KFAC", "SINGD", "Summary", "kronecker_factors", "summary", "to_curvlinops"]
