"""One rank of a data-parallel run, each case beside one process with the whole batch.

Run as `python ranks.py RANK RANKS FILE`; prints, for each case, how far the two are apart.
"""

import copy
import json
import sys

import torch
from launching import begin, here
from optimizers import OPTIMIZERS, Mixed, factors_of
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tn_kfac.optim.ranks import Sums

PARTS = {2: ((0, 4), (4, 8)), 3: ((0, 1), (1, 4), (4, 8))}
"""Which samples of a batch of eight each rank has; three have batches of different sizes."""
CASES = {
    "plain": {},
    "sum loss": {"loss_average": None},
    "interval": {"T": 2},
    "exact Fisher": {"fisher": "type-2"},
    "blocks": {"structure": "block3diagonal"},
    "optimizer first": {},
    "accumulation": {},
    "small messages": {"T": 2},
    "reduce": {"kfac_approx": "reduce", "norms": True},
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.rand(8, 1, 8, 8, generator=generator, dtype=torch.float64, device="cpu")
    return here(x), here(torch.randint(10, (8,), generator=generator, device="cpu"))


def backward(model: nn.Module, optimizer, x: Tensor, y: Tensor, weight: float, kind: str) -> None:
    loss = nn.CrossEntropyLoss(reduction=kind)
    outputs = model(x)
    optimizer.curvature(outputs, loss, y)
    (loss(outputs, y) * weight).backward()


def apart(first: Tensor, second: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    second = second.to(first.device)
    return ((first - second).abs().max() / second.abs().max().clamp(min=1e-12)).item()


def run(name: str, case: str, rank: int, ranks: int) -> float:
    """How far this rank is from one process after three steps: parameters and factors."""
    torch.manual_seed(0)
    model = Mixed().double().eval()  # each rank has batch statistics of its own
    twin = copy.deepcopy(model)
    options = CASES[case] | {"warn_unsupported": False}
    if case == "optimizer first":
        optimizer = OPTIMIZERS[name](model, **options)
        parallel = DistributedDataParallel(model)
    else:
        parallel = DistributedDataParallel(model)
        optimizer = OPTIMIZERS[name](parallel, **options)
    if case == "small messages":
        optimizer._sums = Sums(1)
    oracle = OPTIMIZERS[name](twin, process_group=False, **options)
    kind = "sum" if case == "sum loss" else "mean"
    first, last = PARTS[ranks][rank]
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        oracle.zero_grad()
        backward(twin, oracle, x, y, 1.0, kind)
        if case == "accumulation":
            half = (last - first) // 2
            with parallel.no_sync():
                backward(parallel, optimizer, x[first : first + half], y[first : first + half],
                         0.5, kind)  # fmt: skip
            backward(parallel, optimizer, x[first + half : last], y[first + half : last], 0.5, kind)
        else:
            backward(parallel, optimizer, x[first:last], y[first:last], 1.0, kind)
        if kind == "sum" or ranks == 3:  # what the wrapper averages is not the whole gradient
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                p.grad.copy_(q.grad)
        optimizer.step()
        oracle.step()
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    off = [apart(p, q) for p, q in pairs]
    for p, q in pairs:
        if oracle.state[q].get("updates"):
            both = zip(factors_of(optimizer.state[p]), factors_of(oracle.state[q]), strict=True)
            off += [apart(ours, theirs) for ours, theirs in both]
    return max(off)


def cases(ranks: int) -> list[tuple[str, str]]:
    """(optimizer, case); batches of one sample cannot be accumulated."""
    return [
        (name, case)
        for name in OPTIMIZERS
        for case in CASES
        if (ranks == 2 or case != "accumulation") and (name, case) != ("EKFAC", "blocks")
    ]


if __name__ == "__main__":
    rank, ranks = int(sys.argv[1]), int(sys.argv[2])
    begin(rank, ranks, sys.argv[3])
    print(json.dumps({f"{n}, {c}": run(n, c, rank, ranks) for n, c in cases(ranks)}))
    distributed.destroy_process_group()
