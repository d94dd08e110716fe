"""The table that a user prints before training, and what many ranks would take."""

from tn_kfac.summary.ranks import RankCosts, rank_costs
from tn_kfac.summary.summary import Row, Summary, summary

__all__ = ["RankCosts", "Row", "Summary", "rank_costs", "summary"]
