"""One rank of a run whose curvature is summed in another dtype, each case beside one process.

Run as `python reducing.py RANK RANKS FOLDER`; prints, for each trial, how far the two are apart.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from fsdp import Grouped, sharded
from launching import as_rank
from optimizers import OPTIMIZERS, factors_of
from ranks import apart
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tn_kfac.optim.ranks import Sums

FEW, MANY = (3, 5), (301, 422)
"""Samples of each rank; no count of many, nor the sum of both, is a bfloat16."""
NAMES = ("SINGD diagonal", "SINGD dense", "KFAC", "EKFAC")
CLOSE = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-6}
"""How far factors may be apart: bfloat16 rounds each part and their sum, by 2^-8 at most."""


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(sum(MANY), 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (sum(MANY),), generator=generator)


def measured(model: nn.Module, part: slice, kind: str = "mean") -> None:
    x, y = batch()
    nn.functional.cross_entropy(model(x[part]), y[part], reduction=kind).backward()


def own(rank: int, sizes: tuple[int, ...] = MANY) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def pair(name: str, dtype: torch.dtype | None, wrap=DistributedDataParallel, **options):
    """A model that sees this rank's samples, and one that sees all, with optimizers.

    Gradients are in float64, so that statistics, in float32, differ by their own rounding alone.
    """
    torch.manual_seed(0)
    model = Grouped().double().eval()
    twin = copy.deepcopy(model)
    given = {"warn_unsupported": False, "preconditioner_dtype": torch.float32}
    wrapped, options = wrap(model), given | options
    optimizer = OPTIMIZERS[name](wrapped, reduce_dtype=dtype, **options)
    oracle = OPTIMIZERS[name](twin, **options | {"process_group": False})
    return wrapped, optimizer, twin, oracle


def stepped(name: str, rank: int, dtype: torch.dtype, most: int | None = None, **how) -> float:
    """How far factors are from those of one process, as a part of what they may be."""
    wrapped, optimizer, twin, oracle = pair(name, dtype, **how)
    if most is not None:
        optimizer._sums = Sums(most, dtype)
    kind = "sum" if how.get("loss_average", "batch") is None else "mean"
    measured(wrapped, own(rank, FEW), kind)
    measured(twin, slice(sum(FEW)), kind)
    optimizer.step()
    oracle.step()
    off = []
    for ours, theirs in zip(optimizer._bindings, oracle._bindings, strict=True):
        both = optimizer.state[ours.parameters[0]], oracle.state[theirs.parameters[0]]
        for factor, expected in zip(*map(factors_of, both), strict=True):
            assert factor.dtype == expected.dtype
            off.append(apart(factor, expected))
    assert (max(off) > 1e-5) == (dtype is torch.bfloat16), max(off)  # it is in use
    return max(off) / CLOSE[dtype]


def sums(rank: int, dtype: torch.dtype | None, alone: bool = False, **options):
    """Statistics of each layer, over ranks and of one process; and the messages that were sent.

    Args:
        rank: This one.
        dtype: Of the sums.
        alone: Whether the second rank measures nothing.
        options: Of the optimizer.
    """
    wrapped, optimizer, twin, oracle = pair("KFAC", dtype, **options)
    measured(wrapped, own(rank))
    measured(twin, own(0) if alone else slice(None))
    if alone and rank == 1:
        optimizer._clear()
    taps, call, sent = [b.tap for b in optimizer._bindings], distributed.all_reduce, []

    def noting(tensor, *args, **kwargs):
        sent.append(tensor.clone())
        return call(tensor, *args, **kwargs)

    with patch.object(distributed, "all_reduce", noting):
        optimizer._sums.begin(taps, None)
    for tap in taps:
        optimizer._sums.arrive(tap)
    optimizer._sums.end()
    return [(tap.parts, b.tap.parts) for tap, b in zip(taps, oracle._bindings, strict=True)], sent


def counts(rank: int, dtype: torch.dtype, **how) -> float:
    """Whether counts of samples and of positions are exact, and the rest has its dtype again."""
    found, _ = sums(rank, dtype, **how)
    exact = all(torch.equal(ours[2], theirs[2]) for ours, theirs in found)
    kinds = {part.dtype for ours, _ in found for part in ours}
    seen = {int(count) for _, theirs in found for count in theirs[2]}
    assert how.get("alone") or sum(MANY) in seen
    return 0.0 if exact and kinds == {found[0][1][0].dtype} else 1.0


def messages(rank: int) -> float:
    """Whether there is one message, and one of the counts where the other would round them."""
    plain, single, double = (
        [(t.dtype, t.numel()) for t in sums(rank, dtype, **options)[1]]
        for dtype, options in (
            (None, {}),
            (torch.bfloat16, {}),
            (torch.float32, {"preconditioner_dtype": torch.float64}),
        )
    )
    layers = len(pair("KFAC", None)[1]._bindings)
    [(_, numbers)] = plain
    small, large = 2 * layers, numbers - 2 * layers
    assert plain == [(torch.float32, numbers)]
    assert single == [(torch.float32, small), (torch.bfloat16, large)]
    assert double == [(torch.float64, small), (torch.float32, large)]
    [wide] = sums(rank, torch.float64)[1]
    [same], [as_ever] = (sums(rank, dtype)[1] for dtype in (torch.float32, None))
    assert wide.dtype == torch.float64
    return 0.0 if torch.equal(same, as_ever) and torch.equal(wide, as_ever.double()) else 1.0


def not_asked_for(rank: int) -> float:
    """How much is still on its way after the end of a step that used nothing of it."""
    wrapped, optimizer, *_ = pair("KFAC", torch.bfloat16)
    measured(wrapped, own(rank))
    optimizer._sums.begin([binding.tap for binding in optimizer._bindings], None)
    optimizer._sums.end()
    return float(len(optimizer._sums._on_way))


def trials(rank: int, ranks: int, _: Path) -> dict[str, Callable[[], float]]:
    """What is tried."""
    found: dict[str, Callable[[], float]] = {}
    for name in NAMES:
        for dtype in CLOSE:
            found[f"{name}, {dtype}"] = lambda name=name, dtype=dtype: stepped(name, rank, dtype)
        found[f"{name}, sharded"] = lambda name=name: stepped(
            name, rank, torch.bfloat16, wrap=sharded
        )
    group = distributed.new_group([0, 1])
    found["small messages"] = lambda: stepped("KFAC", rank, torch.bfloat16, most=1)
    found["a process group"] = lambda: stepped("KFAC", rank, torch.bfloat16, process_group=group)
    found["a sum loss"] = lambda: stepped("KFAC", rank, torch.bfloat16, loss_average=None)
    for dtype in CLOSE:
        found[f"counts, {dtype}"] = lambda dtype=dtype: counts(rank, dtype)
        found[f"counts of one rank, {dtype}"] = lambda dtype=dtype: counts(rank, dtype, alone=True)
    found["counts of float64"] = lambda: counts(
        rank, torch.bfloat16, preconditioner_dtype=torch.float64
    )
    found["messages"] = lambda: messages(rank)
    found["not asked for"] = lambda: not_asked_for(rank)
    return found


if __name__ == "__main__":
    as_rank(trials)
