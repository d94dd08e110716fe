"""Plans: in which order a network's tensors are contracted.

A plan numbers its values: the leaves first, then one value per step. Equal values
get one number, so a gram `half · half'` computes its half once. Plans are cached
by network, and a network holds its sizes: the second call does no symbolic work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from math import prod
from string import ascii_letters

import opt_einsum

from tn_kfac.tensor_network.lower import Primitive, lower
from tn_kfac.tensor_network.network import Axes, Network, Node, Operand
from tn_kfac.tensor_network.simplify import simplify

THOROUGH_UP_TO = 10
"""Networks of at most so many tensors get opt_einsum's thorough search, others its quick one."""


@dataclass(frozen=True)
class Leaf:
    """A node, with the sizes of its axes: what a tensor is made from."""

    node: Node
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One contraction of numbered values; `frees` are not needed afterwards."""

    inputs: tuple[int, ...]
    equation: str
    frees: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Leaves, steps on them, and how the last value becomes the result.

    `flops` counts multiplications and additions, `traffic` the elements that steps and
    kernels read and write, `peak` the elements of the largest value between operands and
    result. `lowerings` names what kernels compute; nothing: all is einsum.
    """

    leaves: tuple[Leaf, ...]
    steps: tuple[Step, ...]
    shape: tuple[int, ...]
    scale: float
    flops: int
    traffic: int
    peak: int
    lowerings: tuple[str, ...] = ()

    @property
    def copies_windows(self) -> bool:
        """Whether an operand is viewed through windows, which a matrix product copies."""
        return any(_has_windows(leaf.node) for leaf in self.leaves)

    @property
    def owns_result(self) -> bool:
        """Whether the last value is new, not a view of an operand."""
        if self.steps:
            return len(self.steps[-1].inputs) > 1
        return isinstance(self.leaves[-1].node, Primitive)


def einsum_equation(inputs: Sequence[Axes], output: Axes) -> str:
    """The equation in letters, in order of first occurrence.

    Raises:
        ValueError: If there are more axes than the 52 letters that torch accepts.
    """
    names = list(dict.fromkeys(chain(*inputs, output)))
    if len(names) > len(ascii_letters):
        raise ValueError(
            f"the network has {len(names)} axes, more than the {len(ascii_letters)} letters of an "
            "einsum equation: evaluate it through a plan, or with simplify=True"
        )
    letter = dict(zip(names, ascii_letters, strict=False))
    left = ",".join("".join(letter[a] for a in axes) for axes in inputs)
    return f"{left}->{''.join(letter[a] for a in output)}"


def contraction_path(inputs: Sequence[Axes], network: Network) -> list[tuple[int, ...]]:
    """The order of pairwise contractions, as positions in a shrinking list (opt_einsum)."""
    symbols = {axis: opt_einsum.get_symbol(i) for i, (axis, _) in enumerate(network.sizes)}
    left = ",".join("".join(symbols[a] for a in axes) for axes in inputs)
    equation = f"{left}->{''.join(symbols[a] for a in network.output_axes)}"
    shapes = [tuple(network.size[a] for a in axes) for axes in inputs]
    optimize = "auto-hq" if len(shapes) <= THOROUGH_UP_TO else "auto"
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=optimize)
    return [tuple(positions) for positions in path]  # type: ignore[arg-type]


class _Numbering:
    """Builds a plan's values; a value that was built before keeps its number."""

    def __init__(self, network: Network) -> None:
        self.size = network.size
        self.leaves: list[Leaf] = []
        self.steps: list[Step] = []
        self.numbers: dict[object, int] = {}
        self.created: list[int] = []
        self.flops = 0
        self.traffic = 0

    def leaf(self, node: Node) -> int:
        shape = tuple(self.size[a] for a in node.axes)
        key = _anonymous(node, shape)
        if key not in self.numbers:
            self.numbers[key] = len(self.leaves)
            self.leaves.append(Leaf(node, shape))
            if _has_windows(node):
                self.created.append(prod(shape))  # a matrix product will copy the view
            if isinstance(node, Primitive):
                self.flops += node.flops
                self.traffic += node.traffic + prod(shape)
                self.created.append(prod(shape))
        return self.numbers[key]

    def step(self, terms: list[tuple[int, Axes]], output: Axes) -> int:
        terms = sorted(terms, key=lambda term: term[0])
        inputs = tuple(number for number, _ in terms)
        equation = einsum_equation([axes for _, axes in terms], output)
        key = (inputs, equation)
        if key not in self.numbers:
            self.numbers[key] = len(self.leaves) + len(self.steps)
            self.steps.append(Step(inputs, equation))
            axes = set(chain(*(axes for _, axes in terms)))
            self.flops += len(terms) * prod(self.size[a] for a in axes)
            self.created.append(prod(self.size[a] for a in output))
            read = (prod(self.size[a] for a in axes) for _, axes in terms)
            self.traffic += sum(read) + self.created[-1]
        return self.numbers[key]


def _has_windows(node: Node) -> bool:
    return isinstance(node, Operand) and any(any(leg.windows) for leg in node.legs)


def _anonymous(node: Node, shape: tuple[int, ...]) -> object:
    """What makes the tensors of two nodes equal: everything but the axes' names."""
    first = {axis: str(i) for i, axis in enumerate(dict.fromkeys(node.every_axis))}
    return node.renamed(first), shape


@lru_cache(maxsize=4096)
def plan_whole(network: Network, simplified: bool = True, lowered: bool = True) -> Plan:
    """The plan of a network, simplified and lowered first unless told not to."""
    used: tuple[str, ...] = ()
    if simplified and lowered:
        made = lower(network)
        network, used = made.network, made.lowerings
    elif simplified:
        network = simplify(network)
    network = network.closed()
    values = _Numbering(network)
    numbers = [values.leaf(node) for node in network.nodes]
    terms = [
        _presummed(network, values, term)
        for term in zip(numbers, (node.axes for node in network.nodes), strict=True)
    ]
    whole = len(terms) == 1 and terms[0][1] == network.output_axes
    for positions in [] if whole else contraction_path([axes for _, axes in terms], network):
        taken = [terms[p] for p in positions]
        terms = [t for p, t in enumerate(terms) if p not in positions]
        needed = set(chain(network.output_axes, *(axes for _, axes in terms)))
        axes = dict.fromkeys(chain.from_iterable(axes for _, axes in taken))
        output = tuple(a for a in axes if a in needed) if terms else network.output_axes
        terms.append((values.step(taken, output), output))
    return Plan(
        leaves=tuple(values.leaves),
        steps=_with_frees(values.steps, len(values.leaves)),
        shape=network.shape,
        scale=float(network.scale),
        flops=values.flops,
        traffic=values.traffic,
        peak=max(values.created[:-1], default=0),
        lowerings=used,
    )


def _presummed(network: Network, values: _Numbering, term: tuple[int, Axes]) -> tuple[int, Axes]:
    """A leaf, summed over the axes that nothing else has."""
    number, axes = term
    kept = tuple(a for a in dict.fromkeys(axes) if network.occurrences(a) > axes.count(a))
    if kept == axes or (len(network.nodes) == 1 and set(kept) == set(network.output_axes)):
        return number, axes
    return values.step([(number, axes)], kept), kept


def _with_frees(steps: list[Step], leaves: int) -> tuple[Step, ...]:
    """Each step with the values whose last use it is."""
    last = {number: at for at, step in enumerate(steps) for number in step.inputs}
    return tuple(
        replace(step, frees=tuple(n for n in dict.fromkeys(step.inputs) if last[n] == at))
        for at, step in enumerate(steps)
    )
