"""The command line of a comparison: check, train, report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from comparison.config import Comparison, parse
from comparison.digits import Digits, load
from comparison.plots import draw_curves
from comparison.report import make_table, summarize, write_results
from comparison.training import train_all, try_optimizers

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison that the command line asks for; return the exit code."""
    try:
        config = parse(arguments)
        data = load(config.data)
        torch.set_num_threads(config.training.threads)
        try_optimizers(config, data)
        folder = make_run_folder(config)
    except (ValueError, OSError) as error:
        print("compare.py: error:", *str(error).split(), file=sys.stderr)
        return 2
    try:
        compare(config, data, folder)
    finally:
        if not any(folder.iterdir()):  # nothing came of it
            folder.rmdir()
    return 0


def make_run_folder(config: Comparison) -> Path:
    """Make a folder of this run's own, named by the time.

    Raises:
        OSError: if it cannot be made.
    """
    stem = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 100):
        folder = ROOT / config.output / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue  # another run began in the same second
    raise OSError(f"output: no free name {stem} in {config.output}")


def compare(config: Comparison, data: Digits, folder: Path) -> None:
    """Train, then print the table and write what was measured to `folder`."""
    console = Console()
    with progress(config, console) as on_epoch:
        runs = list(train_all(config, data, on_epoch))
    rows = summarize(config, runs)
    write_results(folder / "results.json", config, runs, rows)
    draw_curves(folder / "curves.png", config, runs)
    console.print(make_table(config, rows))
    console.print(f"Written to {folder}", soft_wrap=True, highlight=False)


@contextmanager
def progress(config: Comparison, console: Console) -> Iterator[Callable[[str, int], None]]:
    """Show a bar on a terminal, else a line a seed; yield what to call after each epoch.

    The bar is redrawn by that call alone, not by a thread that would run
    during the steps being timed.
    """
    per_seed = len(config.optimizers) * config.training.epochs
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("training", total=per_seed * len(config.training.seeds))

        def on_epoch(name: str, seed: int) -> None:
            bar.update(task, advance=1, description=f"seed {seed}, {name}", refresh=True)
            done = round(bar.tasks[0].completed)
            if not console.is_terminal and done % per_seed == 0:
                console.print(f"seed {seed}: {done} of {bar.tasks[0].total:.0f} epochs done")

        yield on_epoch
