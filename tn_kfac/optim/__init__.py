"""Optimizers."""

from tn_kfac.optim.kfac import KFAC
from tn_kfac.optim.singd import SINGD

__all__ = ["KFAC", "SINGD"]
