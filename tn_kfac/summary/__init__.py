"""The table that a user prints before training."""

from tn_kfac.summary.summary import Row, Summary, summary

__all__ = ["Row", "Summary", "summary"]
