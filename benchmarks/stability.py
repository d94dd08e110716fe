"""Ten thousand steps with every structure, in bfloat16 and float32, through spikes and NaNs.

    python -m benchmarks.stability --device cuda --processes 16

A small ViT and a small VGG learn noisy images of ten classes. Every hundredth batch is bad: its
images are 10⁴ times too large, or NaN. Gradients are made finite and clipped, as a user's script
would; the curvature meets the batch as it is. Each run reports whether anything in parameters or
factors is not finite, and the loss of its last tenth. On a CPU it is a process of its own; on a GPU
its whole step is a captured graph (one that updates factors, one that does not), and several take
turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import ROOT, machine, versions
from benchmarks.published import PUBLISHED
from benchmarks.tiny_networks import CLASSES, PIXELS, Vit, vgg
from tn_kfac import SINGD

STRUCTURES = (
    "dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz", "triutoeplitz",
    "triltopleftdiag", "trilbottomrightdiag", "triutopleftdiag", "triubottomrightdiag",
)  # fmt: skip
MODELS, DTYPES = ("vit", "vgg"), ("bfloat16", "float32")
BATCH, BAD_EVERY, WARM_UP, NEVER = 64, 100, 3, 10**9


def batches(device: str, generator: torch.Generator, means: Tensor) -> tuple[Tensor, Tensor]:
    """Images of random classes under noise."""
    labels = torch.randint(0, CLASSES, (BATCH,), device=device, generator=generator)
    noise = torch.randn(BATCH, 3, PIXELS, PIXELS, device=device, generator=generator)
    return means[labels] + 2.0 * noise, labels


class Training:
    """A model, its optimizer and a stream of batches; all that a step needs is on the device."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        device = args.device
        self.model = (Vit() if args.model == "vit" else vgg()).to(device)
        chosen = {"structure": args.structure, "T": args.interval, "lr": args.lr, "lr_cov": 0.05}
        self.optimizer = SINGD(self.model, **(PUBLISHED | chosen), damping=1e-2, alpha1=0.5)
        self.generator = torch.Generator(device).manual_seed(1)
        shape = (CLASSES, 3, PIXELS, PIXELS)
        self.means = torch.randn(shape, device=device, generator=self.generator)
        self.spike = torch.ones((), device=device)
        self.losses = torch.zeros(args.steps, device=device)
        self.taken = torch.zeros(1, dtype=torch.int64, device=device)
        self.half, self.device, self.args = args.dtype == "bfloat16", device, args
        self.finite, self.done = torch.ones((), device=device), 0
        self.stream: torch.cuda.Stream | None = None  # set: the step is captured

    def step(self) -> None:
        """One step, on a batch of images times `spike`."""
        x, y = batches(self.device, self.generator, self.means)
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            loss = nn.functional.cross_entropy(self.model(x * self.spike), y)
        loss.backward()
        for p in self.model.parameters():
            assert p.grad is not None
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.index_copy_(0, self.taken, loss.detach().float()[None])
        self.taken += 1

    def capture(self) -> None:
        """Have the step as two CUDA graphs: one that updates the factors, one that does not."""
        stream = self.stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._set_interval(1)
            self.with_update = self._graph()
            self._set_interval(lambda step: NEVER)  # from the step after the next on
            self.without = self._graph()

    def _set_interval(self, interval: int | Callable[[int], int]) -> None:
        for group in self.optimizer.param_groups:
            group["T"] = interval

    def _graph(self) -> Callable[[], None]:
        """A step in a graph, after some that warm up."""
        for _ in range(WARM_UP):
            self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        self.optimizer.zero_grad()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step()
        return graph.replay

    def advance(self, number: int) -> None:
        """The step of this number, on a bad batch if it is its turn."""
        bad = number % BAD_EVERY == BAD_EVERY // 2
        if bad:  # spikes and NaNs take turns
            self.spike.fill_(1e4 if number // BAD_EVERY % 2 else float("nan"))
        if self.stream is None:
            self.step()
        elif number % self.args.interval == 0:
            self.with_update()
        else:
            self.without()
        if bad:
            self.spike.fill_(1.0)
        if number % 500 == 499:
            self.finite *= _all_finite(self.model, self.optimizer)
        self.done = number + 1

    def row(self) -> dict[str, Any]:
        """What came of it."""
        number = torch.arange(self.done)
        losses = self.losses.cpu()[: self.done][number % BAD_EVERY != BAD_EVERY // 2]
        self.finite *= _all_finite(self.model, self.optimizer)
        return {
            "model": self.args.model, "structure": self.args.structure, "dtype": self.args.dtype,
            "T": self.args.interval, "steps": self.done, "finite": bool(self.finite),
            "first_loss": losses[: len(losses) // 100 + 1].mean().item(),
            "last_loss": losses[-len(losses) // 10 :].mean().item(),
            "worst_loss": losses.max().item(),
        }  # fmt: skip


def train(several: Sequence[argparse.Namespace]) -> list[dict[str, Any]]:
    """Runs in turns; on a GPU each is a graph on a stream of its own."""
    runs = [Training(args) for args in several]
    cuda, first, start = several[0].device == "cuda", 0, time.monotonic()
    if cuda:
        for run in runs:
            run.capture()
            passed = time.monotonic() - start
            _say(f"captured {run.args.model} {run.args.structure} after {passed:.1f} s")
        torch.cuda.synchronize()
        first, start = 2 * WARM_UP, time.monotonic()
    for number in range(first, several[0].steps):
        for run in runs:
            with torch.cuda.stream(run.stream):  # no stream: nothing changes
                run.advance(number)
        if cuda and number % 100 == 99:
            torch.cuda.synchronize()
            if number % 1000 == 99:
                _say(f"{number + 1} steps after {time.monotonic() - start:.1f} s")
        if several[0].max_seconds and time.monotonic() - start > several[0].max_seconds:
            break
    if cuda:
        torch.cuda.synchronize()
    return [run.row() for run in runs]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _all_finite(model: nn.Module, optimizer: SINGD) -> Tensor:
    """One if nothing that training keeps is NaN or infinite."""
    kept = [p for p in model.parameters()]
    kept += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return torch.stack([tensor.isfinite().all() for tensor in kept]).all().float()


def main(arguments: Sequence[str] | None = None) -> int:
    """One run if --structure is given, else all, in processes of their own."""
    parse = argparse.ArgumentParser(prog="stability.py", description=(__doc__ or "").split("\n")[0])
    add = parse.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--structure", help="one run; default: all structures, models and dtypes")
    add("--model", choices=MODELS, default="vgg")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--structures", nargs="+", choices=STRUCTURES, default=STRUCTURES, help="of all runs")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of all runs")
    add("--steps", type=int, default=10_000)
    add("--interval", type=int, default=10, help="T: bad batches meet updates if it divides 50")
    add("--lr", type=float, default=3e-3)
    add("--processes", type=int, default=2, help="runs at a time; on CUDA graphs of one process")
    add("--max-seconds", type=float, help="of a run, which then has fewer steps")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "stability.json")
    args = parse.parse_args(arguments)
    if args.structure:
        torch.set_num_threads(1)
        print(json.dumps(train([args])[0]))
        return 0
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    for found in _all_runs(args):
        rows = list({_key(row): row for row in [*rows, *found]}.values())
        _write(rows, args)  # a run that is cut short keeps what it has
    print(args.output.with_suffix(".md").read_text())
    return int(not all(row["finite"] for row in rows))


def _all_runs(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows as they are known."""
    runs = [argparse.Namespace(**(vars(args) | {"dtype": d, "structure": s, "model": m}))
            for d in args.dtypes for s in args.structures for m in MODELS]  # fmt: skip
    if args.device == "cuda":
        for first in range(0, len(runs), args.processes):
            yield train(runs[first : first + args.processes])
        return
    with ThreadPoolExecutor(args.processes) as pool:
        for done in as_completed(pool.submit(_process, run) for run in runs):
            yield [done.result()]


def _write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """All that is known, as JSON and as a table."""
    known = {
        "benchmark": "stability",
        "machine": machine(args.device),
        "versions": versions(),
        "settings": {key: str(value) for key, value in vars(args).items()},
        "rows": rows,
    }
    args.output.write_text(json.dumps(known, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(_table(rows))


def _process(args: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "steps", "lr", "interval", "structure", "model", "dtype")
    given = [text for name in names for text in (f"--{name}", str(getattr(args, name)))]
    if args.max_seconds:
        given += ["--max-seconds", str(args.max_seconds)]
    command = [sys.executable, "-m", "benchmarks.stability", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _key(row: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return row["model"], row["structure"], row["dtype"], row["T"]


def _table(rows: list[dict[str, Any]]) -> str:
    """Losses side by side, and the largest gap between the dtypes where both were run."""
    by = {_key(row): row for row in rows}
    lines = [f"# Training with every {BAD_EVERY}th batch bad", "",
             "| structure | model | T | steps | all finite | loss bf16 | loss fp32 | gap |",
             "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: |"]  # fmt: skip
    gaps = []
    places = [(s, m, T) for T in sorted({row["T"] for row in rows}) for s in STRUCTURES
              for m in MODELS]  # fmt: skip
    for structure, model, T in places:
        found = [by.get((model, structure, dtype, T)) for dtype in DTYPES]
        known = [row for row in found if row]
        if not known:
            continue
        finite = "yes" if all(row["finite"] for row in known) else "NO"
        losses = [row["last_loss"] if row else None for row in found]
        cells = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        if losses[0] is not None and losses[1] is not None:
            gaps.append(abs(losses[0] - losses[1]))
            cells.append(f"{gaps[-1]:.4f}")
        cells += [""] * (3 - len(cells))
        steps = min(row["steps"] for row in known)
        lines.append(f"| {structure} | {model} | {T} | {steps} | {finite} | {' | '.join(cells)} |")
    if gaps:
        lines += ["", f"Mean loss of the last tenth. Largest gap {max(gaps):.4f}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
