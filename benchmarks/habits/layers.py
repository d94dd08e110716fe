"""Habits with layers: shared, special, frozen, unused; hooks; other uses of autograd."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

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
    train,
    unchanged,
)

LAYERS: Table = {}


class _Two(nn.Module):
    """Two views of an image through one Linear; `how` this is written makes no difference."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.one, self.head = how, nn.Linear(32, 6, bias=False), nn.Linear(12, 10)
        self.two = nn.Linear(32, 6, bias=False) if how == "tied" else self.one
        self.two.weight = self.one.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        views = x.view(-1, 2, 32)
        if self.how == "once":
            return self.head(torch.tanh(self.one(views)).flatten(1))
        parts = self.one(views[:, 0]), self.two(views[:, 1])
        return self.head(torch.tanh(torch.cat(parts, 1)))


@habits(
    LAYERS,
    {
        "a module used twice = used once on both inputs": (
            lambda: _Two("twice"),
            lambda: _Two("once"),
        ),
        "a weight tied in two modules, likewise": (lambda: _Two("tied"), lambda: _Two("once")),
    },
)
def _(peer: Peer, make: Callable[[], nn.Module], equivalent: Callable[[], nn.Module]) -> None:
    model, plain = make(), equivalent()
    losses = train(model, peer(model)), train(plain, peer(plain))
    close(*losses, "losses")


class _Conv(nn.Module):
    """A convolution in one of two ways, and a head."""

    def __init__(self, kind: str, plainly: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.plainly = kind, plainly
        if kind == "circular":
            conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        else:
            conv = nn.Conv2d(2, 4, 3, groups=2)
        self.head = nn.Linear(64 * 4 if kind == "circular" else 36 * 4, 10)
        if plainly:
            count = 1 if kind == "circular" else 2
            self.convs = nn.ModuleList(nn.Conv2d(2 // count, 4 // count, 3) for _ in range(count))
            for i, part in enumerate(self.convs):
                for mine, whole in zip(part.parameters(), conv.parameters(), strict=True):
                    mine.data.copy_(whole.data.chunk(count)[i])
        else:
            self.convs = nn.ModuleList([conv])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x.flip(2).square()], 1)
        if self.plainly and self.kind == "circular":
            x = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        parts = [conv(z) for conv, z in zip(self.convs, x.chunk(len(self.convs), 1), strict=True)]
        return self.head(torch.tanh(torch.cat(parts, 1)).flatten(1))


@habits(
    LAYERS,
    {
        "circular padding = padded by hand": ("circular",),
        "grouped convolution = its groups as separate layers": ("grouped",),
    },
)
def _(peer: Peer, kind: str) -> None:
    model, plain = _Conv(kind, False), _Conv(kind, True)
    close(train(model, peer(model)), train(plain, peer(plain)), "losses")


@habits(LAYERS, {"factors of a strided convolution = brute force (expand and reduce)": ()})
def _(peer: Peer) -> None:
    peer.need_factors()
    for approx in ("expand", "reduce"):
        model = net()
        optimizer, (x, y) = peer(model, kfac_approx=approx), batch(0)
        conv, inner = model[2], model[:2](x).detach()
        outputs = conv(inner).detach().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(model[3:], outputs, y) * len(x), outputs)
        patches = nn.functional.unfold(inner, 3, stride=2).mT
        a, g = torch.cat([patches, torch.ones_like(patches[..., :1])], 2), g.flatten(2).mT
        if approx == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(1, keepdim=True)
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        loss_of(model, x, y).backward()
        if hasattr(optimizer, "H_Ks"):
            found = optimizer.H_Ks["2"].to_dense(), optimizer.H_Cs["2"].to_dense()
        else:
            taps = {b.parameters[0]: b.tap for b in optimizer._bindings}
            found = tuple(taps[conv.weight].factors())
            found = found[0].squeeze(0), found[1].squeeze(0)
        close(found, (a.T @ a / len(a), g.T @ g / len(x)), approx)


@habits(LAYERS, {"frozen weight, trainable bias": ()})
def _(peer: Peer) -> None:
    model = net()
    model[2].weight.requires_grad_(False)
    before = copied(model)
    train(model, peer(model))
    assert unchanged(model, before) == ["2.weight"]


def _hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@habits(
    LAYERS,
    {"its hooks can be removed": (False,), "a dropped optimizer (del) leaves no hooks": (True,)},
)
def _(peer: Peer, dropped: bool) -> None:
    peer.need_factors()
    model = net()
    optimizer = peer(model)
    train(model, optimizer)
    assert _hooks(model)
    if dropped:
        del optimizer
        gc.collect()
    elif hasattr(optimizer, "close"):
        optimizer.close()
    else:
        for handle in optimizer.hook_handles:
            handle.remove()
    assert not _hooks(model), f"{_hooks(model)} hooks left"


@habits(
    LAYERS,
    {
        "trains every parameter of a TransformerEncoderLayer": (False,),
        "trains every parameter under weight_norm": (True,),
    },
)
def _(peer: Peer, normed: bool) -> None:
    torch.manual_seed(0)
    parts = (
        nn.Flatten(2),
        nn.Linear(64, 8),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    )
    if normed:
        parts = (nn.Flatten(1), nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)))
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(8, 10)).double()
    before = copied(model)
    train(model, peer(model))
    assert not (still := unchanged(model, before)), f"unchanged: {', '.join(still)}"


@habits(LAYERS, {"a layer that a batch does not use (stochastic depth)": ()})
def _(peer: Peer) -> None:
    model = net()
    layer = nn.Conv2d(4, 4, 3, padding=1).double()
    whole = nn.ModuleList([model, layer])
    optimizer = peer(whole)
    for step, used in enumerate((True, False, True)):
        before = copied(whole)
        middle = layer if used else nn.Identity()
        train(nn.Sequential(model[:2], middle, model[2:]), optimizer, [step])
        still = unchanged(whole, before)
        assert still == ([] if used else ["1.weight", "1.bias"]), f"unchanged: {', '.join(still)}"


@habits(LAYERS, {"torch.func (vmap of grad) beside the training": ()})
def _(peer: Peer) -> None:
    model, plain = net(), net()

    def each(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        y_hat = torch.func.functional_call(model, weights, (x[None],))
        return nn.functional.cross_entropy(y_hat, y[None])

    per_example = torch.func.vmap(torch.func.grad(each), (None, 0, 0))
    expected = per_example(copied(model), *batch(9))
    optimizer, other = peer(model), peer(plain)
    close(per_example(copied(model), *batch(9)).values(), expected.values(), "gradients")
    train(model, optimizer, before_step=lambda: per_example(copied(model), *batch(9)))
    train(plain, other)
    same((model, optimizer), (plain, other), 0)


@habits(LAYERS, {"gradient penalty (create_graph=True): gradients unharmed": ()})
def _(peer: Peer) -> None:
    model, plain = net(), net()
    optimizer = peer(model)
    for one in (model, plain):
        x, y = batch(0)
        loss = loss_of(one, x.requires_grad_(), y)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + g.square().sum()).backward()
    close((p.grad for p in model.parameters()), (p.grad for p in plain.parameters()), "gradients")
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
