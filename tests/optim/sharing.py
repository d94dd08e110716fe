"""One rank of a run whose work is shared out, each case beside one process.

Run as `python sharing.py RANK RANKS FOLDER`; prints, for each trial, how far the two are apart.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from fsdp import Grouped, full, sharded
from launching import as_rank
from ranks import apart, backward, batch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from benchmarks.ranks import counted
from tn_kfac import KFAC, SINGD, rank_costs
from tn_kfac.optim import inverses

OPTIONS = {"lr": 0.05, "damping": 0.02, "kl_clip": None, "T_inverse": 2, "warn_unsupported": False}
CASES = {
    "eigh": {},
    "cholesky": {"inverse": "cholesky"},
    "newton-schulz": {"inverse": "newton-schulz", "T_inverse": 1},
    "blocks": {"structure": ("block3diagonal", "dense")},
    "turns": {"stagger": True, "T_inverse": 3},
    "lengths": {"graft": "adamw", "warmup": 1, "precondition": "momentum"},
}
MODES = ("inverses", "gradients")


def build(model: nn.Module, **options) -> KFAC:
    return KFAC(model, **(OPTIONS | options))


def pair(rank: int, parameters: str = "plain", build=build, **options):
    """A model that trains on this rank's samples, and one that sees all, with optimizers."""
    torch.manual_seed(0)
    model = Grouped().double().eval()
    twin = copy.deepcopy(model)
    group = options.get("process_group")
    wrapped = (
        sharded(model)
        if parameters == "sharded"
        else DistributedDataParallel(model, process_group=group)
    )
    own = ("share_inverses", "share_updates", "process_group")
    alone = {key: value for key, value in options.items() if key not in own}
    return model, wrapped, build(wrapped, **options), twin, build(twin, process_group=False,
                                                                  **alone)  # fmt: skip


def step(model: nn.Module, optimizer: KFAC, at: int, part: slice) -> None:
    x, y = batch(at)
    optimizer.zero_grad()
    backward(model, optimizer, x[part], y[part], 1.0, "mean")
    optimizer.step()


def run(rank: int, ranks: int, **how) -> float:
    """How far this rank's parameters are from those of one process after five steps."""
    model, wrapped, optimizer, twin, oracle = pair(rank, **how)
    size = 8 // ranks
    for at in range(5):
        step(wrapped, optimizer, at, slice(size * rank, size * (rank + 1)))
        step(twin, oracle, at, slice(None))
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return max(apart(full(p), q) for p, q in pairs)


def from_all(value: object, ranks: int) -> list:
    """What each rank says."""
    said = [None] * ranks
    distributed.all_gather_object(said, tree_map(on_host, value))
    return said


def on_host(leaf: object) -> object:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


def shares(rank: int, ranks: int, mode: str) -> float:
    """Whether each dense factor is decomposed by one rank, and kept as the mode says."""
    model, wrapped, optimizer, *_ = pair(rank, share_inverses=mode)
    done, eigh = [], inverses.eigh
    inverses.eigh = lambda stack: done.append(len(stack) * (stack.shape[-1] > 1)) or eigh(stack)
    step(wrapped, optimizer, 0, slice(4 * rank, 4 * rank + 4))
    inverses.eigh = eigh
    states = [optimizer.state[p] for p in model.parameters() if optimizer.state[p].get("updates")]
    dense = sum(len(s[side]) for s in states for side in "AG" if s[side].dim() == 3)
    kept = [id for id, s in enumerate(states) if "A_basis" in s]
    shared = [id for id, s in enumerate(states) if s["A"].dim() == 3 or s["G"].dim() == 3]
    counts, all_kept = from_all(sum(done), ranks), from_all(kept, ranks)
    fair = sum(counts) == dense and min(counts) > 0
    together = [id for kept in all_kept for id in kept]
    copies = ranks if mode == "inverses" else 1
    return 0.0 if fair and all(together.count(id) == copies for id in shared) else 1.0


def spoiled(rank: int, ranks: int, mode: str) -> float:
    """How far ranks are apart if one of them finds a factor that has no inverse."""
    warnings.simplefilter("ignore")
    model, wrapped, optimizer, *_ = pair(rank, share_inverses=mode, T_inverse=1)
    for at in range(3):
        if at == 1 and rank == 0:
            for p in model.parameters():
                if "A" in optimizer.state[p] and optimizer.state[p]["A"].dim() == 3:
                    optimizer.state[p]["A"].fill_(torch.nan)
        step(wrapped, optimizer, at, slice(4 * rank, 4 * rank + 4))
    own = [p.detach() for p in model.parameters()]
    said = from_all(own, ranks)
    finite = all(p.isfinite().all() for p in own)
    return max(apart(p, q) for p, q in zip(*said, strict=True)) if finite else 1.0


def predicted(rank: int, ranks: int, build, **options) -> float:
    """How far bytes of messages and of states are from what `rank_costs` says, relatively."""
    torch.manual_seed(0)
    model = Grouped()
    wrapped = DistributedDataParallel(model)
    optimizer = build(wrapped, warn_unsupported=False, **options)
    expected = rank_costs(optimizer, ranks)
    x, y = batch(0)
    part = slice(4 * rank, 4 * rank + 4)
    backward(wrapped, optimizer, x[part].float(), y[part], 1.0, "mean")
    with counted() as sent:
        optimizer.step()
    states = [s for p in model.parameters() if (s := optimizer.state[p]).get("updates")]
    held = {True: 0, False: 0}
    for state in states:
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "momentum_buffer":
                inverse = key.endswith(("_basis", "_values", "_inverse"))
                factor = key in ("K", "C", "m_K", "m_C")
                held[inverse or (factor and optimizer.sharing == "gradients")] += (
                    value.numel() * value.element_size()
                )
    most = max(from_all(held[True], ranks))
    pairs = [
        (sent["all_reduce"], expected.statistics_bytes),
        (sent["broadcast"], expected.broadcast_bytes),
        (held[False], expected.factor_bytes),
        (most, expected.owned_bytes),
    ]
    return float(max(abs(found - said) / max(said, 1) for found, said in pairs))


def resumed(rank: int, ranks: int, mode: str, into: str, own: bool) -> float:
    """How far a run from a checkpoint, of this rank or of rank 0, is from the one saved.

    Its first step uses the inverses that were saved.
    """
    part = slice(4 * rank, 4 * rank + 4)
    model, wrapped, optimizer, *_ = pair(rank, share_inverses=mode, T_inverse=2)
    for at in range(3):
        step(wrapped, optimizer, at, part)
    said = from_all((optimizer.state_dict(), model.state_dict()), ranks)
    state, weights = said[rank if own else 0]
    other, parallel, new, *_ = pair(rank, share_inverses=into, T_inverse=2)
    other.load_state_dict(weights)
    new.load_state_dict(state)
    for at in range(3, 5):
        step(wrapped, optimizer, at, part)
        step(parallel, new, at, part)
    return max(apart(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))


def fewer(rank: int, pairs: list, build, **options) -> float:
    """How far runs that go on on two ranks and on one are from that of four which was saved."""
    two, one = (rank % 2, 2, pairs[rank // 2]), (0, 1, False)
    model, wrapped, optimizer, *_ = pair(rank, build=build, **options)
    for at in range(3):
        step(wrapped, optimizer, at, slice(2 * rank, 2 * rank + 2))
    weights, state = copy.deepcopy(from_all((model.state_dict(), optimizer.state_dict()), 4)[0])
    for at in range(3, 5):
        step(wrapped, optimizer, at, slice(2 * rank, 2 * rank + 2))
    off = []
    for number, ranks, group in (two, one):
        other = Grouped().double().eval()
        other.load_state_dict(weights)
        parallel = DistributedDataParallel(other, process_group=group) if group else other
        new = build(parallel, process_group=group, **options)
        new.load_state_dict(state)
        size = 8 // ranks
        for at in range(3, 5):
            step(parallel, new, at, slice(size * number, size * (number + 1)))
        off += [apart(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True)]
    return max(off)


def trials(rank: int, ranks: int, _: Path) -> dict[str, Callable[[], float]]:
    """What is tried with so many ranks."""
    found: dict[str, Callable[[], float]] = {}
    if ranks == 2:
        kinds = {
            "SINGD": (SINGD, {"T": 1}),
            "SINGD dense": (SINGD, {"T": 1, "structure": "dense"}),
            "SINGD blocks": (SINGD, {"T": 1, "structure": ("block2diagonal", "triltoeplitz")}),
            "SINGD gradients": (
                SINGD,
                {
                    "T": 1,
                    "share_updates": "gradients",
                    "structure": {"*head": "diagonal", "*": "dense"},
                },
            ),
            "SINGD not shared": (SINGD, {"T": 1, "structure": "dense", "share_updates": False}),
            "IKFAC": (SINGD, {"T": 1, "structure": "dense", "kfac_like": True}),
            "KFAC": (KFAC, {}),
            "KFAC gradients": (KFAC, {"share_inverses": "gradients"}),
            "KFAC cholesky": (KFAC, {"inverse": "cholesky", "structure": "block2diagonal"}),
            "KFAC bfloat16": (KFAC, {"preconditioner_dtype": torch.bfloat16}),
            "KFAC not shared": (KFAC, {"share_inverses": False}),
            "KFAC with a lag": (KFAC, {"lag": 1}),
            "EKFAC": (KFAC, {"ekfac": "exact"}),
            "SINGD sums in bfloat16": (SINGD, {"T": 1, "reduce_dtype": torch.bfloat16}),
            "SINGD sums in float64": (SINGD, {"T": 1, "reduce_dtype": torch.float64}),
            "KFAC sums in bfloat16": (KFAC, {"reduce_dtype": torch.bfloat16}),
            "KFAC sums in float32": (
                KFAC,
                {"preconditioner_dtype": torch.float64, "reduce_dtype": torch.float32},
            ),
            "EKFAC sums in bfloat16": (KFAC, {"ekfac": True, "reduce_dtype": torch.bfloat16}),
        }
        for name, (kind, options) in kinds.items():
            found[f"{name}, predicted"] = lambda kind=kind, options=options: predicted(
                rank, ranks, kind, **options
            )
    else:
        pairs = [distributed.new_group(members) for members in ([0, 1], [2, 3])]
        for mode in MODES:
            found[f"{mode}, fewer ranks"] = lambda mode=mode: fewer(
                rank, pairs, build, share_inverses=mode
            )
            found[f"{mode}, two groups"] = lambda mode=mode: run(
                rank % 2, 2, share_inverses=mode, process_group=pairs[rank // 2]
            )
    for mode in MODES:
        cases = CASES if ranks == 2 else {"eigh": {}}
        for case, options in cases.items():
            found[f"{mode}, {case}"] = lambda mode=mode, options=options: run(
                rank, ranks, share_inverses=mode, **options
            )
        if ranks == 2:
            found[f"{mode}, sharded parameters"] = lambda mode=mode: run(
                rank, ranks, share_inverses=mode, parameters="sharded"
            )
            found[f"{mode}, shares"] = lambda mode=mode: shares(rank, ranks, mode)
            found[f"{mode}, spoiled"] = lambda mode=mode: spoiled(rank, ranks, mode)
            for into, own in ((mode, True), ("gradients", False), ("inverses", False)):
                found[f"{mode}, resumed, {into} {own}"] = lambda mode=mode, into=into, own=own: (
                    resumed(rank, ranks, mode, into, own)
                )
    return found


if __name__ == "__main__":
    from updating import trials as of_updates

    as_rank(lambda *given: trials(*given) | of_updates(*given))
