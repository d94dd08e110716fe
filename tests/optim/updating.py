"""SINGD whose factor updates are shared out over ranks; `sharing.py` runs these trials."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from fsdp import Grouped, full
from optimizers import SINGD_OPTIONS, factors_of
from ranks import apart, backward, batch
from sharing import fewer, from_all, pair, step
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tn_kfac import SINGD
from tn_kfac.optim import singd
from tn_kfac.optim.ranks import Sums

OPTIONS = SINGD_OPTIONS | {"structure": "dense", "warn_unsupported": False}
CASES = {
    "dense": {},
    "blocks": {"structure": ("block3diagonal", "hierarchical1_1"), "T": 2},
    "Toeplitz": {"structure": ("triltoeplitz", "diagonal"), "norms": True},
    "by layer": {"structure": {"*head": "dense", "*": "diagonal"}, "lr_cov": lambda step: 0.1},
    "IKFAC": {"kfac_like": True, "init": "curvature"},
    "lengths": {"graft": "adamw", "warmup": 1, "precondition": "momentum", "T": lambda step: 2},
}


def build(model: nn.Module, **options) -> SINGD:
    return SINGD(model, **(OPTIONS | options))


def run(rank: int, ranks: int, **how) -> float:
    """How far parameters and factors are from one process; 1 if not from ranks without sharing."""
    model, wrapped, optimizer, twin, oracle = pair(rank, build=build, **how)
    other, parallel, unshared, *_ = pair(rank, build=build, **(how | {"share_updates": False}))
    size = 8 // ranks
    for at in range(4):
        step(wrapped, optimizer, at, slice(size * rank, size * (rank + 1)))
        step(parallel, unshared, at, slice(size * rank, size * (rank + 1)))
        step(twin, oracle, at, slice(None))
    off = []
    for p, same, q in zip(*(m.parameters() for m in (model, other, twin)), strict=True):
        off += [apart(full(p), q), float(not torch.equal(full(p), full(same)))]
        if "K" in optimizer.state[p]:
            both = zip(factors_of(optimizer.state[p]), factors_of(oracle.state[q]), strict=True)
            off += [apart(ours, theirs) for ours, theirs in both]
        if how.get("share_updates") != "gradients":
            assert optimizer.state[p].keys() == unshared.state[same].keys()
    return max(off)


def in_groups(rank: int) -> float:
    """How far it is with options by group, and with a group that joins later."""
    torch.manual_seed(0)
    models = [Grouped().double().eval()]
    models.append(copy.deepcopy(models[0]))
    parallel = DistributedDataParallel(models[0])
    ways = ((models[0], None), (models[1], False))
    optimizers = []
    for model, group in ways:
        chosen = [{"params": model.head.parameters(), "damping": 0.1, "T": 2}]
        optimizers.append(build(model, params=chosen, process_group=group))
    for at in range(4):
        if at == 2:
            for (model, _), optimizer in zip(ways, optimizers, strict=True):
                later = [*model.conv.parameters(), *model.twice.parameters()]
                optimizer.add_param_group({"params": later, "lr": 0.02, "alpha1": 0.0})
        step(parallel, optimizers[0], at, slice(4 * rank, 4 * rank + 4))
        step(models[1], optimizers[1], at, slice(None))
    return max(apart(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def shares(rank: int, ranks: int, mode: str) -> float:
    """Whether each layer is updated by one rank, diagonal ones by all, and each rank by some."""
    structure = {"*conv": "diagonal", "*": "dense"}
    _, wrapped, optimizer, *_ = pair(rank, build=build, structure=structure, share_updates=mode)
    done, update = [], singd.update_factor
    singd.update_factor = lambda own, *rest: done.append(own.space.name) or update(own, *rest)
    step(wrapped, optimizer, 0, slice(4 * rank, 4 * rank + 4))
    singd.update_factor = update
    said = from_all(done, ranks)
    spaces = [b.tap.recipe for b in optimizer._bindings]
    alone = [r for r in spaces if r.input_structure.name == r.output_structure.name == "diagonal"]
    once = 2 * (len(spaces) + (ranks - 1) * len(alone))
    kept = from_all(sum("K" in state for state in optimizer.state.values()), ranks)
    fits = sum(kept) == (once // 2 if mode == "gradients" else ranks * len(spaces))
    fits = fits and sum(map(len, said)) == once
    return 0.0 if fits and all("dense" in names for names in said) else 1.0


def spoiled(rank: int, ranks: int) -> float:
    """How far ranks are apart, whose factors or batches were not finite on one of them."""
    warnings.simplefilter("ignore")
    model, wrapped, optimizer, *_ = pair(rank, build=build)
    for at in range(4):
        if at == 1:
            for binding in optimizer._bindings:
                if not optimizer._owners.works(binding, optimizer._bindings):
                    optimizer.state[binding.parameters[0]]["K"].fill_(torch.nan)
        x, y = (part[4 * rank : 4 * rank + 4] for part in batch(at))
        optimizer.zero_grad()
        backward(wrapped, optimizer, x, y, 1.0, "mean")
        if at == 2 and rank == 0:  # as a batch with an overflow leaves it
            for binding in optimizer._bindings:
                binding.tap.probes[0].grad.fill_(torch.nan)
        optimizer.step()
    own = [p.detach() for p in model.parameters()]
    finite = all(p.isfinite().all() for p in own)
    return max(apart(p, q) for p, q in zip(*from_all(own, ranks), strict=True)) if finite else 1.0


def overlapped(rank: int, ranks: int) -> float:
    """Whether factors are updated before the last statistics have arrived, all begun at first."""
    _, wrapped, optimizer, *_ = pair(rank, build=build, share_updates=False)
    optimizer._sums = Sums(1)
    happened, call, update = [], distributed.all_reduce, singd.update_factor

    def noting(*args, **kwargs):
        happened.append("begun")
        work = call(*args, **kwargs)
        return SimpleNamespace(wait=lambda: happened.append("arrived") or work.wait())

    x, y = (part[4 * rank : 4 * rank + 4] for part in batch(0))
    backward(wrapped, optimizer, x, y, 1.0, "mean")
    with patch.object(distributed, "all_reduce", noting):
        singd.update_factor = lambda *given: happened.append("updated") or update(*given)
        optimizer.step()
        singd.update_factor = update
    layers = len(optimizer._bindings)
    expected = ["begun"] * layers + ["arrived", "updated", "updated"] * layers
    return 0.0 if happened == expected else 1.0


def refused(rank: int, ranks: int) -> float:
    """Whether a schedule that fails does so on all ranks, in the same step."""
    _, wrapped, optimizer, *_ = pair(rank, build=build, lr_cov=lambda step: -1.0)
    try:
        step(wrapped, optimizer, 0, slice(4 * rank, 4 * rank + 4))
    except ValueError as error:
        return 0.0 if "lr_cov" in str(error) else 1.0
    return 1.0


def resumed(rank: int, ranks: int, mode: str, **options) -> float:
    """Whether a run from rank 0's checkpoint goes on as the one that was saved, bit for bit."""
    part = slice(4 * rank, 4 * rank + 4)
    model, wrapped, optimizer, *_ = pair(rank, build=build, share_updates=mode)
    for at in range(3):
        step(wrapped, optimizer, at, part)
    weights, state = from_all((model.state_dict(), optimizer.state_dict()), ranks)[0]
    other, parallel, new, *_ = pair(rank, build=build, **options)
    other.load_state_dict(weights)
    new.load_state_dict(state)
    for at in range(3, 5):
        step(wrapped, optimizer, at, part)
        step(parallel, new, at, part)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return float(not all(torch.equal(p, q) for p, q in pairs))


def trials(rank: int, ranks: int, _: Path) -> dict[str, Callable[[], float]]:
    """What is tried with so many ranks."""
    if ranks == 4:
        pairs = [distributed.new_group(members) for members in ([0, 1], [2, 3])]
        return {
            "factors, dense": lambda: run(rank, ranks),
            "factors, fewer ranks": lambda: fewer(rank, pairs, build, share_updates="factors"),
            "gradients, updates, fewer ranks": lambda: fewer(
                rank, pairs, build, share_updates="gradients"
            ),
            "factors, two groups": lambda: run(rank % 2, 2, process_group=pairs[rank // 2]),
        }
    found = {
        f"factors, {case}": lambda options=options: run(rank, ranks, **options)
        for case, options in CASES.items()
    }
    for case in ("dense", "by layer", "IKFAC", "lengths"):
        found[f"gradients, updates, {case}"] = lambda options=CASES[case]: run(
            rank, ranks, share_updates="gradients", **options
        )
    for mode in ("factors", "gradients"):
        found[f"{mode}, updates, sharded parameters"] = lambda mode=mode: run(
            rank, ranks, parameters="sharded", share_updates=mode
        )
        found[f"{mode}, updates, shares"] = lambda mode=mode: shares(rank, ranks, mode)
        for into in ("factors", "gradients", False):
            found[f"{mode}, updates, resumed, {into}"] = lambda mode=mode, into=into: resumed(
                rank, ranks, mode, share_updates=into
            )
    found["factors, param groups"] = lambda: in_groups(rank)
    found["factors, spoiled"] = lambda: spoiled(rank, ranks)
    found["factors, overlapped"] = lambda: overlapped(rank, ranks)
    found["factors, refused"] = lambda: refused(rank, ranks)
    return found
