"""What curvature costs each of 1 to 1024 ranks, predicted from shapes by `tn_kfac.rank_costs`.

    python -m benchmarks.scaling

Models are on the meta device: nothing is trained. Writes scaling.json and scaling.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet50

from benchmarks.machine import ROOT, versions
from tn_kfac import KFAC, SINGD, rank_costs
from tn_kfac.optim.base import KroneckerOptimizer

RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)
INTERVALS = {"T": 10, "T_inverse": 100}
Row = dict[str, Any]


class Block(nn.Module):
    """The layers of one transformer block; attention itself has no parameters."""

    def __init__(self, width: int, hidden: int, gated: bool) -> None:
        super().__init__()
        bias = not gated
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.norms = nn.ModuleList([norm(width), norm(width)])
        self.attention = nn.ModuleList([nn.Linear(width, width, bias) for _ in range(4)])
        up = [nn.Linear(width, hidden, bias) for _ in range(1 + gated)]
        self.mlp = nn.ModuleList([*up, nn.Linear(hidden, width, bias)])


def vit_large() -> nn.Module:
    """ViT-L/16 for 1,000 classes, with query, key and value as layers of their own."""
    blocks = [Block(1024, 4096, gated=False) for _ in range(24)]
    ends = [nn.Conv2d(3, 1024, 16, stride=16), nn.LayerNorm(1024), nn.Linear(1024, 1000)]
    return nn.Sequential(*blocks, *ends)


def language_model() -> nn.Module:
    """7B parameters: 32 gated blocks of width 4096, 32,000 tokens, embedding and head apart."""
    blocks = [Block(4096, 11008, gated=True) for _ in range(32)]
    ends = [nn.Embedding(32000, 4096), nn.RMSNorm(4096), nn.Linear(4096, 32000, bias=False)]
    return nn.Sequential(*blocks, *ends)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet50": resnet50,
    "ViT-L/16": vit_large,
    "7B transformer": language_model,
}
OPTIMIZERS: dict[str, Callable[[nn.Module], KroneckerOptimizer]] = {
    "SINGD diagonal": lambda model: SINGD(model, T=INTERVALS["T"]),
    "SINGD dense": lambda model: SINGD(model, T=INTERVALS["T"], structure="dense"),
    "SINGD dense, not shared": lambda model: SINGD(
        model, T=INTERVALS["T"], structure="dense", share_updates=False
    ),
    "SINGD dense, gradients sent": lambda model: SINGD(
        model, T=INTERVALS["T"], structure="dense", share_updates="gradients"
    ),
    "SINGD block30diagonal": lambda model: SINGD(
        model, T=INTERVALS["T"], structure="block30diagonal"
    ),
    "KFAC, inverses sent": lambda model: KFAC(model, **INTERVALS),
    "KFAC, gradients sent": lambda model: KFAC(model, share_inverses="gradients", **INTERVALS),
}


def rows(name: str, ranks: Sequence[int]) -> list[Row]:
    """The costs of one model, by optimizer and number of ranks."""
    found = []
    for kind, build in OPTIMIZERS.items():
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of factors beyond max_dim, which the page says
            model = MODELS[name]()
            optimizer = build(model)
        parameters = sum(p.numel() for p in model.parameters())
        for count in ranks:
            costs = asdict(rank_costs(optimizer, count))
            found.append({"model": name, "parameters": parameters, "optimizer": kind} | costs)
        optimizer.close()
    return found


def markdown(found: Sequence[Row]) -> str:
    """The page."""
    parts = [
        "# What curvature costs a rank, predicted from shapes",
        f"Factors in float32, new ones every {INTERVALS['T']} steps, inverses every "
        f"{INTERVALS['T_inverse']}; KFAC's factors beyond 8,192 rows are split into blocks. Bytes "
        "per step are averages over these intervals, of messages as they are handed to the "
        "network. Of owners is what they may keep for themselves, inverses or SINGD's factors; of "
        "the rank that has most. Shared work is what that rank does of what can be shared out, in "
        "FLOPs, whenever it is due: decompositions, by 9 b³ for a block of b rows, or the matrix "
        "products of SINGD's updates. "
        "`benchmarks/scaling.py` wrote this page; bytes and states equal those of real runs on two "
        "processes exactly (`tests/optim/sharing.py`).",
    ]
    head = ("optimizer", "ranks", "statistics a step", "broadcast a step", "factors", "of owners",
            "shared work", "share")  # fmt: skip
    for name in dict.fromkeys(row["model"] for row in found):
        of_model = [row for row in found if row["model"] == name]
        parts.append(f"## {name}, {of_model[0]['parameters'] / 1e6:,.1f} M parameters")
        lines = [head, ("---", *("---:" for _ in head[1:])), *merged(map(cells, of_model))]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def merged(lines: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Lines that differ in the number of ranks alone as one."""
    for (name, *rest), alike in groupby(lines, lambda line: (line[0], *line[2:])):
        ranks = [line[1] for line in alike]
        yield name, ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}", *rest


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    return (
        row["optimizer"],
        str(row["world_size"]),
        size(row["statistics_bytes_per_step"]),
        size(row["broadcast_bytes_per_step"]),
        size(row["factor_bytes"]),
        size(row["owned_bytes"]),
        work(row["owned_flops"]),
        f"{row['owned_share']:.2%}" if row["owned_share"] else "-",
    )


def size(count: float) -> str:
    """Mebibytes, or gibibytes."""
    if not count:
        return "-"
    large = count >= 1000 * 2**20
    return f"{count / 2**30:.3g} GiB" if large else f"{count / 2**20:.3g} MiB"


def work(flops: int) -> str:
    """Tera or giga FLOPs."""
    if not flops:
        return "-"
    return f"{flops / 1e12:.3g} T" if flops >= 1e11 else f"{flops / 1e9:.3g} G"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    default = ROOT / "benchmarks" / "results" / "scaling.json"
    parser.add_argument("--output", type=Path, default=default)
    given = parser.parse_args(arguments)
    found = [row for name in given.models for row in rows(name, given.ranks)]
    document = {"versions": versions(), "intervals": INTERVALS, "rows": found}
    given.output.write_text(json.dumps(document, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(markdown(found))
    print(given.output.with_suffix(".md"))


if __name__ == "__main__":
    main(sys.argv[1:])
