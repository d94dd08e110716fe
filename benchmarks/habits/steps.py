"""Habits of the training loop: groups, schedules, accumulation, clipping, scaling, closures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler

from benchmarks.habits.peers import (
    Peer,
    Table,
    batch,
    close,
    copied,
    habits,
    loss_of,
    net,
    same,
    state_of,
    train,
    unchanged,
)

STEPS: Table = {}


@habits(STEPS, {"trains every parameter (grouped conv, BatchNorm, Embedding, Linear)": ()})
def _(peer: Peer) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            features = self.norm(self.conv(x.expand(-1, 2, -1, -1))).relu().mean((2, 3))
            return self.head(features + self.embedding(torch.arange(len(x)) % 5))

    model = Mixed().double()
    before = copied(model)
    train(model, peer(model))
    assert not (still := unchanged(model, before)), f"unchanged: {', '.join(still)}"


@habits(STEPS, {"param groups by layer": ()})
def _(peer: Peer) -> None:
    model, plain = net(), net()
    options = peer(model, [{"params": model[0].parameters(), "lr": 0.0},
                           {"params": [*model[2:].parameters()]}])  # fmt: skip
    before = copied(model)
    train(model, options)
    assert unchanged(model, before) == ["0.weight", "0.bias"]
    halves = [{"params": plain[0].parameters()}, {"params": [*plain[2:].parameters()]}]
    optimizer = peer(plain, halves, lr=0.0)
    optimizer.param_groups[-1]["lr"] = 0.02
    train(plain, optimizer)
    same((model, options), (plain, optimizer), 0)


@habits(STEPS, {"no weight decay on biases (groups within a layer)": ()})
def _(peer: Peer) -> None:
    model, plain = net(), net()
    weights, biases = ([p for p in model.parameters() if (p.dim() > 1) == w] for w in (True, False))
    groups = [{"params": weights, "weight_decay": 0.5}, {"params": biases, "weight_decay": 0.0}]
    train(model, peer(model, groups), range(1))
    train(plain, peer(plain), range(1))
    close(biases, [p for p in plain.parameters() if p.dim() == 1], "biases")
    assert weights[0].norm() < next(plain.parameters()).norm(), "no decay"


@habits(STEPS, {"add_param_group later": ()})
def _(peer: Peer) -> None:
    model = net()
    optimizer = peer(model, list(model[5].parameters()))
    before = copied(model)
    train(model, optimizer, range(2))
    assert len(unchanged(model, before)) == 4
    optimizer.add_param_group({"params": [*model[:5].parameters()]})
    train(model, optimizer, range(2, 4))
    assert not (still := unchanged(model, before)), f"unchanged: {', '.join(still)}"


def _one_cycle(optimizer: Any) -> Callable[[], None]:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=8).step


def _plateau(optimizer: Any) -> Callable[[], None]:
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    return lambda: schedule.step(1.0)


@habits(STEPS, {"OneCycleLR": (_one_cycle,), "ReduceLROnPlateau": (_plateau,)})
def _(peer: Peer, make: Callable[[Any], Callable[[], None]]) -> None:
    model, plain = net(), net()
    optimizer, other = peer(model), peer(plain)
    step, seen = make(optimizer), []

    def note() -> None:
        keys = ("lr", "momentum", "betas")
        seen.append({k: v for k, v in optimizer.param_groups[0].items() if k in keys})

    note()
    train(model, optimizer, after_step=lambda: [step(), note()])
    assert len({values["lr"] for values in seen}) >= 4
    for at in range(4):
        other.param_groups[0] |= seen[at]
        train(plain, other, [at])
    same((model, optimizer), (plain, other), 0)


@habits(
    STEPS,
    {
        "accumulation of equal micro-batches, mean loss": ((4, 4),),
        "accumulation of equal micro-batches, sum loss": ((4, 4), "sum"),
        "accumulation of unequal micro-batches, mean loss": ((3, 5),),
        "accumulation of unequal micro-batches, sum loss": ((3, 5), "sum"),
        "accumulation with kfac_like": ((4, 4), "mean", True),
    },
)
def _(peer: Peer, sizes: Sequence[int], reduction: str = "mean", kfac_like: bool = False) -> None:
    if kfac_like:
        peer.need_factors()
    options = {"loss_average": "batch" if reduction == "mean" else None, "kfac_like": kfac_like,
               "lr": 0.02 if reduction == "mean" else 0.001, "lr_cov": 0.01}  # fmt: skip
    model, plain = net(), net()
    optimizer, other = peer(model, **options), peer(plain, **options)
    for step in range(3):
        optimizer.zero_grad()
        parts = (value.split(list(sizes)) for value in batch(step))
        for x, y in zip(*parts, strict=True):
            weight = len(x) / sum(sizes) if reduction == "mean" else 1.0
            (weight * loss_of(model, x, y, reduction)).backward()
        optimizer.step()
    train(plain, other, range(3), reduction=reduction)
    same((model, optimizer), (plain, other))


@habits(STEPS, {"clip_grad_norm_": ()})
def _(peer: Peer) -> None:
    model, plain = net(), net()
    optimizer, other = peer(model), peer(plain)

    def by_hand() -> None:
        grads = [p.grad for p in plain.parameters() if p.grad is not None]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for g in grads:
            g *= 0.1 / (norm + 1e-6)

    train(model, optimizer, before_step=lambda: clip_grad_norm_(model.parameters(), 0.1))
    train(plain, other, before_step=by_hand)
    same((model, optimizer), (plain, other))


@habits(
    STEPS, {"GradScaler, its scale growing": (), "GradScaler with unscale_ and clipping": (True,)}
)
def _(peer: Peer, clips: bool = False) -> None:
    model, plain = net(torch.float32), net(torch.float32)
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    extra = {"init_grad_scale": 2.0**8}  # what the package's documentation asks for
    optimizer, other = peer(model, **extra), peer(plain)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, *batch(step, dtype=torch.float32))).backward()
        if clips:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    clip = (lambda: clip_grad_norm_(plain.parameters(), 0.1)) if clips else (lambda: None)
    train(plain, other, dtype=torch.float32, before_step=clip)
    assert scaler.get_scale() > 2.0**8
    same((model, optimizer), (plain, other), 1e-3)


@habits(STEPS, {"GradScaler skips infinite gradients, nothing changed": ()})
def _(peer: Peer) -> None:
    model, plain = net(torch.float32), net(torch.float32)
    scaler = GradScaler("cpu", init_scale=2.0**8)
    optimizer, other = peer(model, init_grad_scale=2.0**8), peer(plain)
    for step, factor in enumerate((1.0, 1e38, 1.0, 1.0)):
        before, state = copied(model), state_of(optimizer)
        optimizer.zero_grad()
        scaler.scale(factor * loss_of(model, *batch(step, dtype=torch.float32))).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor > 1:
            assert len(unchanged(model, before)) == len(before), "parameters changed"
            close(state_of(optimizer), state, "state", 0)
    train(plain, other, (0, 2, 3), dtype=torch.float32)
    same((model, optimizer), (plain, other), 1e-3)


@habits(STEPS, {"bfloat16 autocast": (False,), "bfloat16 weights": (True,)})
def _(peer: Peer, weights: bool) -> None:
    dtype = torch.bfloat16 if weights else torch.float32
    model = net(dtype)
    optimizer, (x, y) = peer(model, lr_cov=0.01), batch(0, dtype=dtype)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not weights):
            loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters()), "not finite"
    assert losses[-1] < 0.7 * losses[0], f"loss {losses[0]:.2g} became {losses[-1]:.2g}"


@habits(STEPS, {"closure": (1,), "closure that evaluates twice": (2,)})
def _(peer: Peer, evaluations: int) -> None:
    model, plain = net(), net()
    optimizer, other = peer(model), peer(plain)

    def evaluate(step: int) -> Tensor:
        for at in range(evaluations):
            optimizer.zero_grad()
            last = at == evaluations - 1
            loss = loss_of(model, *batch(step if last else step + 10))
            loss.backward()
        return loss

    losses = [optimizer.step(lambda step=step: evaluate(step)).item() for step in range(4)]
    close(losses, train(plain, other), "losses", 0)
    same((model, optimizer), (plain, other), 0)


@habits(STEPS, {"a backward pass dropped by zero_grad leaves no trace": ()})
def _(peer: Peer) -> None:
    model, plain = net(), net()
    optimizer, other = peer(model), peer(plain)
    for step in range(3):
        loss_of(model, *batch(step + 10)).backward()
        train(model, optimizer, [step])
    train(plain, other, range(3))
    same((model, optimizer), (plain, other), 0)


@habits(STEPS, {"evaluation without gradients between forward and backward pass": ()})
def _(peer: Peer) -> None:
    model, plain = net(), net()
    optimizer, other = peer(model), peer(plain)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, *batch(step))
        with torch.no_grad():
            model(batch(step + 10, size=5)[0])
        loss.backward()
        optimizer.step()
    train(plain, other, range(3))
    same((model, optimizer), (plain, other), 0)


@habits(
    STEPS,
    {"gradients by autograd.grad, put into .grad": (False,), "backward(inputs=...)": (True,)},
)
def _(peer: Peer, backward: bool) -> None:
    model, plain = net(), net()
    optimizer, other = peer(model), peer(plain)
    parameters = list(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, *batch(step))
        if backward:
            loss.backward(inputs=parameters)
        else:
            grads = torch.autograd.grad(loss, parameters)
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad
        optimizer.step()
    train(plain, other, range(3))
    same((model, optimizer), (plain, other))


@habits(STEPS, {"GAN: a loss passes through the other optimizer's model": ()})
def _(peer: Peer) -> None:
    judges, optimizers = (net(), net(), net()), []
    for at, judge in enumerate(judges[:2]):  # the second run's generator sees a judge unhooked
        torch.manual_seed(1)
        maker = nn.Sequential(nn.Linear(6, 64), nn.Unflatten(1, (1, 8, 8))).double()
        optimizers.append((peer(judge), peer(maker)))
        for step in range(3):
            x, y = batch(step)
            for optimizer in optimizers[at]:
                optimizer.zero_grad()
            loss_of(judge, torch.cat([x, maker(x[:, 0, 0, :6]).detach()]), y.repeat(2)).backward()
            optimizers[at][0].step()
            judges[2].load_state_dict(judge.state_dict())
            loss_of((judge, judges[2])[at], maker(x[:, 0, 1, :6]), y).backward()
            optimizers[at][1].step()
    same((judges[0], optimizers[0][0]), (judges[1], optimizers[1][0]))
