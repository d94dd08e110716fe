"""Habits with models: compiled, recomputed, copied and moved."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from benchmarks.habits.peers import (
    Peer,
    Table,
    batch,
    close,
    habits,
    net,
    same,
    train,
)

MODELS: Table = {}


@habits(
    MODELS,
    {
        "torch.compile(fullgraph=True), then the optimizer": (True,),
        "the optimizer, then torch.compile(fullgraph=True)": (False,),
    },
)
def _(peer: Peer, first: bool) -> None:
    model, plain = net(), net()
    optimizer = None if first else peer(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    if optimizer is None:
        compiled(batch(9)[0])  # a look at the outputs, so it is compiled by now
        optimizer = peer(compiled)
    other = peer(plain)
    close(train(compiled, optimizer), train(plain, other), "losses")
    same((model, optimizer), (plain, other))


@habits(
    MODELS, {"activation checkpointing": (False,), "activation checkpointing, reentrant": (True,)}
)
def _(peer: Peer, reentrant: bool) -> None:
    model, plain = net(), net()
    optimizer, other = peer(model), peer(plain)

    def forward(x: Tensor) -> Any:
        x = model[1](model[0](x))
        return model[5](checkpoint(model[2:5], x, use_reentrant=reentrant))

    train(forward, optimizer)
    train(plain, other)
    same((model, optimizer), (plain, other))


def _saved(model: nn.Module) -> nn.Module:
    torch.save(model, buffer := BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@habits(
    MODELS,
    {
        "deepcopy of the model is inert, and trains by itself": (copy.deepcopy,),
        "pickle of the model, likewise": (lambda model: pickle.loads(pickle.dumps(model)),),
        "torch.save of the model, likewise": (_saved,),
    },
)
def _(peer: Peer, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, plain = net(), net()
    optimizer, other = peer(model), peer(plain)
    train(model, optimizer, range(2))
    double = duplicate(model)
    own = peer(double)
    train(model, optimizer, [2], before_step=lambda: train(double, own, [7]))
    train(plain, other, range(3))
    same((model, optimizer), (plain, other), 0)


@habits(MODELS, {"deepcopy of model and optimizer together": ()})
def _(peer: Peer) -> None:
    model = net()
    optimizer = peer(model)
    train(model, optimizer, range(2))
    fork = copy.deepcopy((model, optimizer))
    train(*fork, range(2, 4))
    train(model, optimizer, range(2, 4))
    same(fork, (model, optimizer), 0)


@habits(MODELS, {"AveragedModel (SWA, EMA) beside the training": ()})
def _(peer: Peer) -> None:
    model, plain = net(), net()
    optimizer, other = peer(model), peer(plain)
    averaged = AveragedModel(model)
    train(model, optimizer, after_step=lambda: averaged.update_parameters(model))
    averaged(batch(0)[0]).sum().backward()
    train(plain, other)
    same((model, optimizer), (plain, other), 0)


@habits(
    MODELS,
    {
        "model.double() after construction": (lambda model: model.double(), torch.float32),
        "channels_last before construction": (None,),
        "channels_last after construction": (
            lambda model: model.to(memory_format=torch.channels_last),
        ),
    },
)
def _(peer: Peer, move: Any, dtype: torch.dtype = torch.float64) -> None:
    model, plain = net(dtype), net(dtype).double()
    if move is None:
        model.to(memory_format=torch.channels_last)
    optimizer, other = peer(model), peer(plain)
    if move is not None:
        move(model)
    train(model, optimizer)
    train(plain, other)
    # The factors of a float32 model may stay in float32.
    tolerance = 1e-7 if dtype == torch.float64 else 1e-4
    close(model.parameters(), plain.parameters(), "parameters", tolerance)
