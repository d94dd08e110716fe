"""SINGD as it was published, for what was chosen, or is compared, with the package `singd`."""

from __future__ import annotations

from typing import Any

PUBLISHED: dict[str, Any] = {
    "lr": 1e-3, "T": 10, "lr_cov": 1e-2, "update_rms": None, "precondition": "gradient",
    "nesterov": False, "fallback": "sgd",
}  # fmt: skip
"""Where `tn_kfac.SINGD` has other defaults."""
