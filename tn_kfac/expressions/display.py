"""Explanations and diagrams of operations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tn_kfac.expressions.operation import Expression
from tn_kfac.tensor_network import draw as _draw
from tn_kfac.tensor_network import explain as _explain
from tn_kfac.tensor_network.network import Network

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def explain(expression: Expression | Network) -> str:
    """How an expression is simplified, lowered and contracted, and what it costs.

    >>> print(explain(kfac_reduce.expression(x, kernel_size=3, padding=1)))

    Raises:
        TypeError: If it is no expression.
    """
    if isinstance(expression, Network):
        return _explain.explain(expression)
    _network(expression)
    chosen = expression.plan()
    return _explain.explain(expression.network, chosen, expression.simplify)


def draw(
    expression: Expression | Network,
    path: str | Path | list[str | Path] | None = None,
    title: str | None = None,
    simplified: bool = True,
) -> Figure:
    """The tensor-network diagram, before and (if `simplified`) after simplification.

    Args:
        expression: What to draw, as `operation.expression(...)` gives it.
        path: Where to write it: names ending in .png or .svg.
        title: A line above the diagram.
        simplified: Whether to draw the simplified network beside it.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If it is no expression.
        ValueError: If a path ends in something else.
    """
    return _draw.draw(_network(expression), path, title=title, simplified=simplified)


def _network(expression: Expression | Network) -> Network:
    if not isinstance(expression, (Expression, Network)):
        raise TypeError(
            f"expression must be what `operation.expression(...)` gives, as in "
            f"kfac_reduce.expression(x, kernel_size=3); got {type(expression).__name__}"
        )
    return expression.network if isinstance(expression, Expression) else expression
