"""Optimizers."""

from tn_kfac.optim.singd import SINGD

__all__ = ["SINGD"]
