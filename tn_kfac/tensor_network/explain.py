"""A text that says how a network is evaluated, and what that costs."""

from __future__ import annotations

from math import prod

from tn_kfac.tensor_network.lower import lower
from tn_kfac.tensor_network.network import Network, Node, Operand, operand
from tn_kfac.tensor_network.pattern import Pattern
from tn_kfac.tensor_network.plan import einsum_equation, plan_whole
from tn_kfac.tensor_network.simplify import traced
from tn_kfac.tensor_network.slicing import AnyPlan, Sliced, plan


def explain(
    network: Network, chosen: AnyPlan | None = None, simplified: bool = True, itemsize: int = 4
) -> str:
    """Describe a network's simplification, lowering, contraction path and costs.

    Args:
        network: A derived network, not simplified.
        chosen: The plan that is described; the default one if None.
        simplified: Whether that plan is of the simplified network.
        itemsize: Bytes per element (4 for float32).

    Returns:
        Lines of text: the equation before and after, rules and lowerings, the steps, and
        FLOPs, bytes and peak memory beside those of the implementation that unfolds.
    """
    chosen = chosen or plan(network)
    lines = [f"equation    {_equation(network)}", f"operands    {_operands(network)}"]
    lines += _rewritten(network) if simplified else ["simplified  no: as was asked for"]
    lines += [
        *_path(chosen),
        "",
        *_costs(network, chosen, itemsize),
    ]
    return "\n".join(lines)


def _rewritten(network: Network) -> list[str]:
    """What simplification and lowering make of a network."""
    simplified, rules = traced(network)
    return [
        f"simplified  {_equation(simplified)}",
        f"operands    {_operands(simplified)}",
        f"rules       {_counted(rules) or 'none applies'}",
        f"lowering    {_counted(lower(network).lowerings) or 'none: einsum'}",
    ]


def _equation(network: Network) -> str:
    try:
        equation = einsum_equation([n.axes for n in network.nodes], network.output_axes)
    except ValueError:
        equation = f"({len(network.sizes)} axes: more than an equation has letters)"
    scale = "" if network.scale == 1 else f"{network.scale} × "
    return f"{scale}{equation}  shape {network.shape}"


def _operands(network: Network) -> str:
    return " ".join(f"{_name(node)}[{' '.join(node.axes)}]" for node in network.nodes)


def _name(node: Node) -> str:
    if isinstance(node, Operand):
        return node.name
    if isinstance(node, Pattern):
        return "Π" if node.is_full else "ΣΠ"
    return type(node).__name__


def _counted(names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} ×{names.count(name)}" for name in dict.fromkeys(names))


def _path(chosen: AnyPlan, indent: str = "") -> list[str]:
    """The steps of a plan, inside the slices that they are repeated for."""
    if isinstance(chosen, Sliced):
        how = "added" if chosen.output is None else "concatenated"
        head = f"slices      {indent}{chosen.chunk} of {chosen.size} indices at a time, {how}"
        return [head, *_path(chosen.part, indent + "  ")]
    leaves = ", ".join(
        f"{at}: {_name(leaf.node)}{leaf.shape}" for at, leaf in enumerate(chosen.leaves)
    )
    steps = [
        f"step        {indent}{len(chosen.leaves) + at}: {step.equation}  of {step.inputs}"
        for at, step in enumerate(chosen.steps)
    ]
    return [f"values      {indent}{leaves}", *steps]


def _costs(network: Network, chosen: AnyPlan, itemsize: int) -> list[str]:
    """A table of FLOPs, bytes and peak, ours and those of unfolding."""
    rows = [("this plan", chosen.flops, chosen.traffic * itemsize, chosen.peak * itemsize)]
    unfolded = _unfold(network)
    if unfolded:
        flops, elements = unfolded
        rows.append(("by unfolding", flops, 2 * elements * itemsize, elements * itemsize))
    head = f"{'':12}{'FLOPs':>12}{'bytes moved':>14}{'peak bytes':>14}"
    return [head, *(f"{name:12}{f:12.3g}{b:14.3g}{p:14.3g}" for name, f, b, p in rows)]


def _unfold(network: Network) -> tuple[int, int] | None:
    """FLOPs, and elements of the unfolded operands, when operands are unfolded first.

    None if the network has no patterns on operands.
    """
    nodes: list[Node] = []
    unfolded: dict[str, int] = {}
    for node in network.nodes:
        if isinstance(node, Operand):
            met = [p for p in network.nodes if isinstance(p, Pattern) and p.input in node.axes]
            legs = (a for p in met for a in p.axes)
            axes = dict.fromkeys([*node.axes, *legs])
            kept = [a for a in axes if a not in {p.input for p in met}]
            if met:
                unfolded[node.name] = prod(network.size[a] for a in kept)
            nodes.append(operand(node.name, *kept))
    if not unfolded:
        return None
    return plan_whole(network.rebuilt(nodes=nodes), False).flops, sum(unfolded.values())
