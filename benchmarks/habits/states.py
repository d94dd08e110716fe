"""Habits with states and frameworks: checkpoints, Lightning, transformers, accelerate, DDP."""

from __future__ import annotations

import copy
import multiprocessing
import sys
import tempfile
from datetime import timedelta
from io import BytesIO
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as by_name
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.habits.peers import (
    Peer,
    Table,
    batch,
    close,
    habits,
    loss_of,
    net,
    same,
    train,
)

STATES: Table = {}


def _through_file(state: Any, weights_only: bool) -> Any:
    torch.save(state, buffer := BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@habits(
    STATES,
    {
        "state_dict loads with torch.load(weights_only=True)": (True,),
        "resumed run is bit-identical (weights_only=False)": (False,),
    },
)
def _(peer: Peer, weights_only: bool) -> None:
    model, resumed = net(), net(seed=1)
    optimizer, other = peer(model, T=2), peer(resumed, T=2)
    train(model, optimizer, range(3))
    saved = _through_file([model.state_dict(), optimizer.state_dict()], weights_only)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    close(train(resumed, other, range(3, 6)), train(model, optimizer, range(3, 6)), "losses", 0)
    same((resumed, other), (model, optimizer), 0)


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "to_dense"):  # the package's structured matrices
        return [value.to_dense()]
    values = value.values() if isinstance(value, dict) else value
    return [*chain.from_iterable(map(_leaves, values))] if isinstance(value, (dict, list)) else []


@habits(STATES, {"state_dict is a snapshot that training does not change": ()})
def _(peer: Peer) -> None:
    model = net()
    optimizer = peer(model)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    before = [value.clone() for value in _leaves(state)]
    train(model, optimizer, range(2, 4))
    close(_leaves(state), before, "the earlier state_dict", 0)


@habits(STATES, {"load_state_dict leaves the caller's dict whole": ()})
def _(peer: Peer) -> None:
    model = net()
    optimizer = peer(model)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    before = set(state)
    optimizer.load_state_dict(state)
    assert before == set(state), f"emptied of {', '.join(sorted(before - set(state)))}"


@habits(STATES, {"distributed.checkpoint's state by names, into a fresh optimizer": ()})
def _(peer: Peer) -> None:
    model, resumed = net(), net(seed=1)
    optimizer, other = peer(model), peer(resumed)
    train(model, optimizer, range(3))
    weights = copy.deepcopy(by_name.get_model_state_dict(model))
    state = copy.deepcopy(by_name.get_optimizer_state_dict(model, optimizer))
    by_name.set_model_state_dict(resumed, weights)
    by_name.set_optimizer_state_dict(resumed, other, state)
    close(train(resumed, other, range(3, 6)), train(model, optimizer, range(3, 6)), "losses", 0)
    same((resumed, other), (model, optimizer), 0)


@habits(STATES, {"refuses the state of another model, with a message": ()})
def _(peer: Peer) -> None:
    wide, model = (nn.Sequential(nn.Flatten(), nn.Linear(64, n), nn.Linear(n, 10)).double()
                   for n in (7, 5))  # fmt: skip
    train(wide, foreign := peer(wide), range(2))
    optimizer = peer(model)
    try:
        optimizer.load_state_dict(foreign.state_dict())
    except (ValueError, RuntimeError) as error:
        assert str(error)
        train(model, optimizer)
        return
    raise AssertionError("loaded without a word")


def _data(batches: int = 4) -> TensorDataset:
    return TensorDataset(*map(torch.cat, zip(*map(batch, range(batches)), strict=True)))


@habits(STATES, {"Lightning Trainer": ()})
def _(peer: Peer) -> None:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any) -> Tensor:
            return loss_of(self.net, *batch)

        def configure_optimizers(self) -> Any:
            return peer(self)

    module, plain = Classifier(), net()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, DataLoader(_data(), 8))
    train(plain, other := peer(plain))
    same((module.net, trainer.optimizers[0]), (plain, other))


class _Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net, x, labels)}


class _Rows(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip(("x", "labels"), _data()[index], strict=True))


@habits(STATES, {"HuggingFace Trainer": ()})
def _(peer: Peer) -> None:
    import transformers

    model, plain = _Labelled(), net()
    optimizer = peer(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=8, num_train_epochs=1, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_strategy="no", max_grad_norm=0.0,
            train_sampling_strategy="sequential", dataloader_pin_memory=False,
        )  # fmt: skip
        schedule = LambdaLR(optimizer, lambda step: 1.0)
        transformers.Trainer(
            model, arguments, train_dataset=_Rows(), optimizers=(optimizer, schedule)
        ).train()
    train(plain, other := peer(plain))
    same((model.net, optimizer), (plain, other))


@habits(STATES, {"accelerate, with accumulation": ()})
def _(peer: Peer) -> None:
    import accelerate

    model, plain = net(), net()
    optimizer, other = peer(model), peer(plain)
    own = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, stepper, loader = own.prepare(model, optimizer, DataLoader(_data(), 8))
    for x, y in loader:
        with own.accumulate(prepared):
            own.backward(loss_of(prepared, x, y))
            stepper.step()
            stepper.zero_grad()
    for step in (0, 2):
        other.zero_grad()
        for micro in (step, step + 1):
            (loss_of(plain, *batch(micro)) / 2).backward()
        other.step()
    same((model, optimizer), (plain, other))


@habits(STATES, {"DistributedDataParallel, two processes (gloo) = one": ()})
def _(peer: Peer) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(peer, r, folder, queue)) for r in range(2)]
        for process in ranks:
            process.start()
        results = [queue.get() for _ in ranks]
        for process in ranks:
            process.join(10)
    for result in results:
        if isinstance(result, str):
            raise RuntimeError(result)
    plain = net()
    train(plain, peer(plain))
    for result in results:
        close(map(torch.tensor, result), plain.parameters(), "parameters")


def _rank(peer: Peer, rank: int, folder: str, queue: Any) -> None:
    """Half of each batch; answers with the parameters, or with what went wrong."""
    try:
        how: Any = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": 2,
                    "timeout": timedelta(seconds=30)}  # fmt: skip
        torch.distributed.init_process_group("gloo", **how)
        model = net()
        optimizer = peer(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        for step in range(4):
            optimizer.zero_grad()
            x, y = (value[4 * rank : 4 * rank + 4] for value in batch(step))
            loss_of(parallel, x, y).backward()
            optimizer.step()
        queue.put([p.tolist() for p in model.parameters()])
    except BaseException as error:
        queue.put(f"{type(error).__name__}: {error}")
    sys.exit()
