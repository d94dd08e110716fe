"""Second-order optimizers for PyTorch, with curvature from tensor networks."""

from tn_kfac.curvature import kronecker_factors, to_curvlinops
from tn_kfac.optim import SINGD

__all__ = ["SINGD", "kronecker_factors", "to_curvlinops"]
