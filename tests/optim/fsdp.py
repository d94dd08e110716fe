"""One rank of a run with sharded parameters, each case beside one process with the whole batch.

Run as `python fsdp.py RANK RANKS FOLDER`; prints, for each case, how far the two are apart.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launching import as_rank
from optimizers import OPTIMIZERS, Mixed, factors_of
from ranks import apart, backward, batch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as by_names
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.utils import clip_grad_norm_

CASES = {
    "plain": {},
    "sum loss": {"loss_average": None},
    "interval": {"T": 2},
    "blocks": {"structure": "block3diagonal"},
    "exact Fisher": {"fisher": "type-2"},
    "accumulation": {},
    "norms": {"norms": True, "fallback": "adamw", "warmup": 1},
    "lengths": {"graft": "adamw"},
    "clipped": {"kl_clip": 1e-3, "precondition": "momentum"},
    "scaled": {},
}
"""Options of the optimizer; some cases differ in the training loop."""
RUNS = {
    "SINGD": ("plain", "interval", "accumulation", "norms", "clipped"),
    "SINGD diagonal": tuple(case for case in CASES if case != "blocks"),
    "SINGD dense": ("plain", "sum loss", "blocks", "accumulation", "clipped"),
    "KFAC": ("plain", "sum loss", "interval", "exact Fisher", "accumulation"),
    "EKFAC": ("norms", "lengths"),
}


class Grouped(Mixed):
    """With a convolution in groups, a layer that is called twice, and shards of all sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, 1, groups=3)
        self.twice = nn.Linear(6, 6)
        self.narrow = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.grouped(self.norm(torch.tanh(self.conv(x)))).mean((2, 3))
        features = self.narrow(self.twice(torch.tanh(self.twice(features))))
        tokens = (8 * x[:, 0, 2:4, 2]).long()
        known = self.embedding(tokens).sum(1) + self.table(tokens).sum(1)
        return self.head(self.scale * features + known)


def sharded(model: nn.Module, **options) -> FSDPModule:
    """Some layers in shards of their own, the others with the model's."""
    for layer in (model.conv, model.twice, model.head):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def learn(model, optimizer, step: int, part: slice, case: str) -> None:
    """The gradients of a part of a step's batch, and a step along them."""
    x, y = batch(step)
    x, y = x[part], y[part]
    kind = "sum" if case == "sum loss" else "mean"
    optimizer.zero_grad()
    if case == "scaled" and isinstance(model, FSDPModule):
        scaler = torch.amp.GradScaler(x.device.type, init_scale=1024.0)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        return
    if case == "accumulation" and isinstance(model, FSDPModule):
        half = len(x) // 2
        model.set_requires_gradient_sync(False)
        backward(model, optimizer, x[:half], y[:half], 0.5, kind)
        model.set_requires_gradient_sync(True)
        backward(model, optimizer, x[half:], y[half:], 0.5, kind)
    else:
        backward(model, optimizer, x, y, 1.0, kind)
    if case == "clipped":
        clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def run(name: str, case: str, rank: int, ranks: int, **how) -> float:
    """How far this rank is from one process after three steps: parameters and states."""
    torch.manual_seed(0)
    model = Grouped().double().eval()  # each rank has batch statistics of its own
    twin = copy.deepcopy(model)
    sharded(model, **how)
    if case == "sum loss":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
    options = CASES[case] | {"warn_unsupported": False}
    optimizer = OPTIMIZERS[name](model, **options)
    oracle = OPTIMIZERS[name](twin, process_group=False, **options)
    size = 8 // ranks
    for step in range(3):
        learn(model, optimizer, step, slice(size * rank, size * (rank + 1)), case)
        learn(twin, oracle, step, slice(None), case)
    off = []
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        off.append(apart(full(p), q))
        state, expected = optimizer.state[p], oracle.state[q]
        if "momentum_buffer" in expected:
            assert state["momentum_buffer"].placements == p.placements
            off.append(apart(full(state["momentum_buffer"]), expected["momentum_buffer"]))
        if expected.get("updates"):
            both = zip(factors_of(state), factors_of(expected), strict=True)
            off += [apart(ours, theirs) for ours, theirs in both]
    return max(off)


def trained(name: str, rank: int, seed: int, steps: int, given: Any = None, **how):
    """A model in shards, and its optimizer, after some steps."""
    torch.manual_seed(seed)
    model = Grouped()
    model.norm = nn.GroupNorm(1, 3)  # torch's BatchNorm has no bfloat16 beside float32 buffers
    sharded(model, **how)
    given = {"warn_unsupported": False, "fallback": "adamw"} | (given or {})
    optimizer = OPTIMIZERS[name](model, **given)
    go_on(model, optimizer, rank, range(steps))
    return model, optimizer


def go_on(model, optimizer, rank: int, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        part = slice(4 * rank, 4 * rank + 4)
        optimizer.zero_grad()
        backward(model, optimizer, x[part].float(), y[part], 1.0, "mean")
        optimizer.step()


def resumed(
    name: str, rank: int, full_state: bool, folder: Path | None = None, **given: Any
) -> float:
    """How far a run that goes on from a checkpoint is from the one that was saved."""
    options = by_names.StateDictOptions(full_state_dict=full_state)
    model, optimizer = trained(name, rank, 0, 3, given)
    states = by_names.get_state_dict(model, optimizer, options=options)
    if folder is not None:
        checkpoint.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    else:
        states = copy.deepcopy(states)
    go_on(model, optimizer, rank, range(3, 5))
    other, new = trained(name, rank, 1, 0, given)
    if folder is not None:
        states = by_names.get_state_dict(other, new, options=options)
        loaded = {"model": states[0], "optimizer": states[1]}
        checkpoint.load(loaded, checkpoint_id=folder)
        states = loaded["model"], loaded["optimizer"]
    by_names.set_state_dict(
        other, new, model_state_dict=states[0], optim_state_dict=states[1], options=options
    )
    go_on(other, new, rank, range(3, 5))
    off = []
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        state, expected = new.state[p], optimizer.state[q]
        assert state.keys() == expected.keys()
        off.append(apart(full(p), full(q)))
        for key, value in expected.items():
            if isinstance(value, Tensor):
                assert type(state[key]) is type(value), key
                off.append(apart(full(state[key]).float(), full(value).float()))
            else:
                assert state[key] == value, key
    return max(off)


def in_bfloat16(name: str, rank: int) -> float:
    """Whether lower precision runs, with parameters and factors in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer = trained(name, rank, 0, 3, mp_policy=policy)
    states = [optimizer.state[p] for p in model.parameters() if optimizer.state[p].get("updates")]
    factors = [factor for state in states for factor in factors_of(state)]
    assert {t.dtype for t in (*factors, *model.parameters())} == {torch.float32}
    finite = all(full(t).isfinite().all() for t in (*factors, *model.parameters()))
    return 0.0 if finite else 1.0


def sharded_later(name: str, rank: int) -> float:
    """Whether a step tells that parameters were replaced since the optimizer was built."""
    model = Grouped().double().eval()
    optimizer = OPTIMIZERS[name](model, warn_unsupported=False)
    sharded(model)
    try:
        learn(model, optimizer, 0, slice(4 * rank, 4 * rank + 4), "plain")
    except RuntimeError as error:
        return 0.0 if "call fully_shard(model) first" in str(error) else 1.0
    return 1.0


def tensor_parallel(mesh: DeviceMesh) -> float:
    """Whether parts of layers, which have no curvature of their own, are refused."""
    model = Grouped()
    parallelize_module(model, mesh["shard"], {"head": ColwiseParallel()})
    fully_shard(model, mesh=mesh["replicate"])
    try:
        OPTIMIZERS["KFAC"](model, warn_unsupported=False)
    except ValueError as error:
        return 0.0 if "layer 'head' has a parameter with placements" in str(error) else 1.0
    return 1.0


def gathered(rank: int) -> float:
    """How many messages a step of diagonal factors has, but for that of the statistics."""
    model, optimizer = trained("SINGD diagonal", rank, 0, 1)
    x, y = batch(1)
    backward(model, optimizer, x[:4].float(), y[:4], 1.0, "mean")
    with CommDebugMode() as messages:
        optimizer.step()
    return messages.get_total_counts() - 1.0


def trials(rank: int, ranks: int, folder: Path) -> dict[str, Callable[[], float]]:
    """What is tried with so many ranks."""
    found: dict[str, Callable[[], float]] = {}
    if ranks == 4:
        mesh = init_device_mesh(
            torch.get_default_device().type, (2, 2), mesh_dim_names=("replicate", "shard")
        )
        found["KFAC, empty shards"] = lambda: run("KFAC", "plain", rank, ranks)
        found["SINGD, hybrid"] = lambda: run("SINGD diagonal", "clipped", rank, ranks, mesh=mesh)
        found["lengths, hybrid"] = lambda: run("SINGD", "plain", rank, ranks, mesh=mesh)
        found["lengths, empty shards"] = lambda: run("SINGD", "plain", rank, ranks)
        found["KFAC, tensor parallel"] = lambda: tensor_parallel(mesh)
        return found
    for name, chosen in RUNS.items():
        for case in chosen:
            found[f"{name}, {case}"] = lambda name=name, case=case: run(name, case, rank, ranks)
    for name in ("SINGD", "SINGD diagonal", "KFAC"):
        found[f"{name}, bfloat16"] = lambda name=name: in_bfloat16(name, rank)
        found[f"{name}, resumed"] = lambda name=name: resumed(name, rank, False)
    found["KFAC, resumed from whole"] = lambda: resumed("KFAC", rank, True)
    found["SINGD, resumed from a file"] = lambda: resumed(
        "SINGD dense", rank, False, folder / "saved"
    )
    found["SINGD, resumed from owners"] = lambda: resumed(
        "SINGD dense", rank, False, share_updates="gradients"
    )
    found["KFAC, resumed from owners in a file"] = lambda: resumed(
        "KFAC", rank, False, folder / "owned", share_inverses="gradients"
    )
    found["SINGD, gathered"] = lambda: gathered(rank)
    found["KFAC, sharded later"] = lambda: sharded_later("KFAC", rank)
    return found


if __name__ == "__main__":
    as_rank(trials)
