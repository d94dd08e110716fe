"""Steps of several ranks, one GPU each: DistributedDataParallel and FSDP2, measured.

    python -m benchmarks.ranks --ranks 1 2

Weak scaling: each rank has the same batch, so a step should take as long as that of one process
(which has no wrapper). What `tn_kfac.rank_costs` predicts stands beside what was sent. Then
ViT-B/16 in shards (`fully_shard`) learns the same batches as under DistributedDataParallel, in
float32.
Writes ranks.json and ranks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import ROOT, machine, set_precision, versions
from benchmarks.measure import release
from benchmarks.published import PUBLISHED
from benchmarks.step.measuring import timed
from benchmarks.step.optimizers import OPTIMIZERS, SGD, state_bytes
from benchmarks.step.training import NETWORKS, Network, Training
from tn_kfac import SINGD, rank_costs
from tn_kfac.optim.base import KroneckerOptimizer

Row = dict[str, Any]
CHOSEN = (*SGD, "SINGD", "SINGD expand", "SINGD dense T=10", "KFAC 10/100")
SENT = ("all_reduce", "broadcast")
LESSONS = 10
"""Steps of the comparison of FSDP2 with DistributedDataParallel."""


class Parallel(Training):
    """A training in which each rank has images of its own."""

    def __init__(self, network: Network, mode: str, build: Callable[..., Any], device: str) -> None:
        super().__init__(network, mode, build, device)
        if distributed.get_world_size() > 1:
            places = [torch.cuda.current_device()] if device == "cuda" else None
            self.model = DistributedDataParallel(self.model, device_ids=places)
            self.images = self.images + distributed.get_rank()


def scaling(network: Network, name: str, device: str, steps: int) -> Row:
    """The step of one optimizer, as this rank sees it."""
    entry = OPTIMIZERS[name]
    set_precision(device, tf32=True)
    training = Parallel(network, "amp", entry.build, device)
    for _ in range(entry.warmup(10)):
        training()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    distributed.barrier()
    samples = timed(training, entry.whole(steps), device)
    row: Row = {
        "optimizer": name,
        "ranks": distributed.get_world_size(),
        "seconds": median(samples) if entry.period == 1 else mean(samples),
        "peak": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "state": state_bytes(training.optimizer),
    }
    if isinstance(training.optimizer, KroneckerOptimizer) and row["ranks"] > 1:
        with counted() as sent:
            for _ in range(entry.period):
                training()
        predicted = rank_costs(training.optimizer, row["ranks"])
        row |= {"sent": {key: value / entry.period for key, value in sent.items()}}
        row |= {"predicted": {"all_reduce": predicted.statistics_bytes_per_step,
                              "broadcast": predicted.broadcast_bytes_per_step}}  # fmt: skip
        row["message_seconds"] = message_seconds(predicted.statistics_bytes, device)
    return row


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Bytes of the messages that Python code hands to the network meanwhile: not the wrapper's."""
    sent = dict.fromkeys(SENT, 0.0)

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting_call(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            sent[name] += tensor.nbytes
            return call(tensor, *arguments, **options)

        return counting_call

    with ExitStack() as stack:
        for name in SENT:
            call = counting(name, getattr(distributed, name))
            stack.enter_context(patch.object(distributed, name, call))
        yield sent


def message_seconds(size: int, device: str) -> float:
    """The time of an all-reduce of so many bytes, alone."""
    message = torch.zeros(max(size, 4) // 4, device=device)

    def send() -> None:
        distributed.all_reduce(message)

    return median(timed(send, 12, device)[2:])


def lessons(how: str, device: str) -> list[float]:
    """The losses of all ranks' batches while SINGD trains, "ddp" or "fsdp"."""
    set_precision(device, tf32=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformer(small=device == "cpu")
    wrapped: nn.Module = model
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            fully_shard(block)
        fully_shard(model)
    elif distributed.get_world_size() > 1:
        wrapped = DistributedDataParallel(model)
    options = PUBLISHED | {"T": 1, "structure": "diagonal", "warn_unsupported": False}
    optimizer = SINGD(wrapped, **options)
    torch.manual_seed(1 + distributed.get_rank())
    size = model.patch_embed.img_size  # pyright: ignore[reportAttributeAccessIssue]
    images = torch.randn(16, 3, *size, device=device)
    labels = torch.randint(10, (16,), device=device)
    losses = []
    for _ in range(LESSONS):
        loss = nn.functional.cross_entropy(wrapped(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shared = loss.detach().clone()
        distributed.all_reduce(shared)
        losses.append(shared.item() / distributed.get_world_size())
    return losses


def transformer(small: bool) -> Any:
    """timm's ViT-B/16, whose queries, keys and values are one linear layer."""
    import timm

    options = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2} if small else {}
    return timm.create_model("vit_base_patch16_224", num_classes=10, **options)


def rank_of(rank: int, ranks: int, given: argparse.Namespace, folder: str) -> None:
    """One of the processes: all optimizers, then FSDP2. Rank 0 writes what it found."""
    if given.device == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if given.device == "cuda" else "gloo",
        init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks,
    )  # fmt: skip
    network = replace(NETWORKS[given.model], pixels=given.pixels, batch=given.batch)
    found: Row = {"rows": [], "lessons": {}}
    for name in given.optimizers:
        found["rows"].append(scaling(network, name, given.device, given.steps))
        release()
        _write(rank, folder, ranks, found)
    if ranks > 1 and not given.no_fsdp:
        found["lessons"] = {how: lessons(how, given.device) for how in ("ddp", "fsdp")}
        _write(rank, folder, ranks, found)
    distributed.destroy_process_group()


def _write(rank: int, folder: str, ranks: int, found: Row) -> None:
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(found))


def markdown(document: Row) -> str:
    """The page."""
    rows = document["rows"]
    about, seen = document["settings"], document["machine"]
    parts = [
        "# Steps of several ranks, measured",
        f"{about['model']}, {about['batch']} images of {about['pixels']}² a rank, bfloat16 "
        f"autocast, channels_last, DistributedDataParallel, {seen.get('gpu', 'CPU')}, torch "
        f"{document['versions']['torch']}. Of SGD: of the faster SGD with as many ranks. Weak "
        "scaling: the same optimizer's step on one rank, without a wrapper, over that on so many. "
        "Sent: bytes of statistics and of what owners send, a step; `tn_kfac.rank_costs` predicts "
        "them. Message: an all-reduce of all statistics, alone. `benchmarks/ranks.py` wrote this.",
    ]
    head = ("optimizer", "ranks", "step", "of SGD", "weak scaling", "images a second",
            "peak memory", "sent a step", "predicted", "message")  # fmt: skip
    lines = [head, ("---", *("---:" for _ in head[1:])), *(cells(row, document) for row in rows)]
    parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    for ranks, both in document["lessons"].items():
        if both:
            off = max(abs(a / b - 1) for a, b in zip(both["fsdp"], both["ddp"], strict=True))
            parts.append(
                f"ViT-B/16 on {ranks} ranks with SINGD, float32, {LESSONS} steps: losses from "
                f"{both['ddp'][0]:.4f} to {both['ddp'][-1]:.4f} (DistributedDataParallel), "
                f"{both['fsdp'][-1]:.4f} (fully_shard); at most {off:.1e} apart, relatively."
            )
    return "\n\n".join(parts) + "\n"


def cells(row: Row, document: Row) -> tuple[str, ...]:
    """A line of the table."""
    rows = document["rows"]
    base = [r["seconds"] for r in rows if r["optimizer"] in SGD and r["ranks"] == row["ranks"]]
    alone = [r["seconds"] for r in rows if r["optimizer"] == row["optimizer"] and r["ranks"] == 1]
    batch = document["settings"]["batch"] * row["ranks"]
    sent, said = ("-", "-")
    if "sent" in row:
        sent, said = (mebibytes(sum(row[key].values())) for key in ("sent", "predicted"))
    message = f"{row['message_seconds'] * 1e3:.2f} ms" if sent != "-" else "-"
    return (
        row["optimizer"],
        str(row["ranks"]),
        f"{row['seconds'] * 1e3:.2f} ms",
        f"{row['seconds'] / min(base):.3f}" if base else "-",
        f"{alone[0] / row['seconds']:.1%}" if alone else "-",
        f"{batch / row['seconds']:,.0f}",
        f"{row['peak'] / 2**30:.3f} GiB" if row["peak"] else "-",
        sent,
        said,
        message,
    )


def mebibytes(count: float) -> str:
    """As text."""
    return f"{count / 2**20:.4g} MiB"


def positive(text: str) -> int:
    """A number of something.

    Raises:
        ValueError: If it is not a positive integer.
    """
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main(arguments: Sequence[str]) -> None:
    """Measure, and write both files after each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", choices=NETWORKS, default="resnet50")
    parser.add_argument("--batch", type=positive, default=128)
    parser.add_argument("--pixels", type=positive, default=224)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=CHOSEN)
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--no-fsdp", action="store_true")
    default = ROOT / "benchmarks" / "results" / "ranks.json"
    parser.add_argument("--output", type=Path, default=default)
    given = parser.parse_args(arguments)
    if not given.output.parent.is_dir():
        parser.error(f"--output {given.output}: there is no folder {given.output.parent}")
    settings = {key: value for key, value in vars(given).items() if key != "output"}
    document: Row = {"versions": versions(), "machine": machine(given.device),
                     "settings": settings, "rows": [], "lessons": {}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for ranks in given.ranks:
            torch.multiprocessing.spawn(rank_of, (ranks, given, folder), ranks)
            found = json.loads(Path(folder, f"{ranks}.json").read_text())
            document["rows"] += found["rows"]
            document["lessons"][str(ranks)] = found["lessons"]
            given.output.write_text(json.dumps(document, indent=1) + "\n")
            given.output.with_suffix(".md").write_text(markdown(document))
    print(given.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
