"""Measure the operations on convolutions, one layer at a time.

    python -m benchmarks.layer --device cuda --networks peers
    python -m benchmarks.table benchmarks/results/layer-cuda.json

Each operation of `tn_kfac.expressions` is called directly on the layers of whole networks,
beside an implementation with unfold, einconv's and torch's own, in the same run and on the
same tensors. Time, extra memory and error of each go to a JSON file, which
`benchmarks.table` turns into tables and plots. A run that is cut short by --max-seconds,
SIGTERM or Ctrl-C writes what it has.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.convolutions import NETWORKS, Layer, convolutions
from benchmarks.implementations import make_case
from benchmarks.machine import ROOT, machine, set_precision, versions
from benchmarks.measure import Cpu, Cuda, Device, copy_bandwidth, is_out_of_memory, release
from benchmarks.operations import IMPLEMENTATIONS, OPERATIONS, PLANS, Operation
from benchmarks.report import Report
from benchmarks.rows import Settings, measure

SOURCES = ("peers", *NETWORKS)
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = ("float32", "bfloat16", "float16")

DEFAULTS = {"cuda": {"repeats": 50, "seconds": 0.25}, "cpu": {"repeats": 15, "seconds": 0.05}}
DEFAULT_CPU_IMAGES = {"batch": 4, "pixels": 64}
QUICK = {
    "repeats": 3, "seconds": 0.01, "batch": 2, "pixels": 32, "networks": ("peers", "resnet18"),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(prog="layer.py", description=(__doc__ or "").split("\n")[0])
    add = parse.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--networks", nargs="+", choices=SOURCES, help="default: all; peers: PEERS.md's layers")
    add("--operations", nargs="+", choices=OPERATIONS, default=tuple(OPERATIONS))
    add("--implementations", nargs="+", choices=(*IMPLEMENTATIONS, *PLANS),
        default=IMPLEMENTATIONS)  # fmt: skip
    add("--layers", default="", metavar="TEXT", help="only layers with TEXT in their name")
    add("--dtype", choices=DTYPES, default="float32")
    add("--memory-format", choices=MEMORY_FORMATS, default="contiguous")
    add("--tf32", action=argparse.BooleanOptionalAction, default=False,
        help="for matrix products and cuDNN alike (default: neither)")  # fmt: skip
    add("--batch", type=int, help="default: each network's own on a GPU, 4 on a CPU")
    add("--pixels", type=int, help="of an image's side; default: likewise, 64 on a CPU")
    add("--repeats", type=int, help="most samples of an implementation on a layer")
    add("--seconds", type=float, help="most seconds of sampling for the same, but some samples")
    add("--max-seconds", type=float, help="of the run; then stop and write")
    add("--memory-limit", type=float, metavar="GIB", help="skip what would need more")
    add("--threads", type=int, help="on a CPU; default: one, whose own time counts")
    add("--no-errors", action="store_true", help="skip the comparison with a float64 reference")
    add("--quick", action="store_true", help="tiny images, few samples: to see that all works")
    add("--output", type=Path, help="default: benchmarks/results/layer-DEVICE.json")
    return parse


def fill(args: argparse.Namespace) -> argparse.Namespace:
    """Give what was not said its default, which depends on the device and on --quick."""
    defaults = {"networks": SOURCES, "batch": None, "pixels": None, **DEFAULTS[args.device]}
    defaults |= DEFAULT_CPU_IMAGES if args.device == "cpu" else {}
    defaults |= QUICK if args.quick else {}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.output = args.output or ROOT / "benchmarks" / "results" / f"layer-{args.device}.json"
    return args


def cases(args: argparse.Namespace) -> Iterator[tuple[Layer, tuple[Operation, ...]]]:
    """Each layer with the operations to measure on it.

    An operation that reads nothing but the input is measured once for layers that differ
    in their output channels only.
    """
    seen = set()
    for source in args.networks:
        for layer in convolutions(source, args.batch, args.pixels):
            if args.layers not in layer.name:
                continue
            wanted = []
            for operation in (OPERATIONS[name] for name in args.operations):
                out = 0 if operation.inputs == ("x",) else layer.out_channels
                key = (operation.name, source, layer.shape, out, layer.groups, str(layer.window))
                if key not in seen:
                    seen.add(key)
                    wanted.append(operation)
            if wanted:
                yield layer, tuple(wanted)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    args = fill(parser().parse_args(arguments))
    deadline = time.perf_counter() + (args.max_seconds or float("inf"))
    if args.device == "cuda" and not torch.cuda.is_available():
        print("layer.py: error: --device cuda: torch sees no GPU", file=sys.stderr)
        return 2
    if args.device == "cpu":
        torch.set_num_threads(args.threads or 1)
    set_precision(args.device, args.tf32)
    device = Cuda() if args.device == "cuda" else Cpu()
    settings = make_settings(args, device)
    report = make_report(args, settings)
    todo = list(cases(args))
    report.plan(todo)
    stop = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for layer, operations in todo:
            if not measure_layer(args, device, settings, report, layer, operations, deadline):
                report.interrupted = f"stopped after --max-seconds {args.max_seconds:g}"
                break
    except KeyboardInterrupt:
        report.interrupted = "interrupted"
    finally:
        signal.signal(signal.SIGTERM, stop)
        report.write()
    print(f"Written to {args.output}. {report.left()}", file=sys.stderr)
    return 0


def make_settings(args: argparse.Namespace, device: Device) -> Settings:
    """How to measure; takes the copy bandwidth and what memory is free."""
    on_gpu = args.device == "cuda"
    free = device.free_bytes() * (0.9 if on_gpu else 0.5)
    copied = 2**24 if args.quick else 2**30 if on_gpu else 2**27
    return Settings(
        repeats=args.repeats,
        seconds=args.seconds,
        bytes_per_second=copy_bandwidth(device, args.device, copied),
        memory_bytes=args.memory_limit * 2**30 if args.memory_limit else free,
        errors=not args.no_errors,
        implementations=tuple(args.implementations),
    )


def make_report(args: argparse.Namespace, settings: Settings) -> Report:
    """An empty report that knows the circumstances."""
    said = {name: value for name, value in vars(args).items() if name != "output"}
    on_gpu = args.device == "cuda"
    said |= {**asdict(settings), "cudnn_benchmark": on_gpu, "cold_l2": on_gpu}
    return Report(args.output, machine=machine(args.device), versions=versions(), settings=said)


def measure_layer(
    args: argparse.Namespace,
    device: Device,
    settings: Settings,
    report: Report,
    layer: Layer,
    operations: Sequence[Operation],
    deadline: float,
) -> bool:
    """Measure the operations on one layer; whether there was time for all."""
    case = None
    for operation in operations:
        if time.perf_counter() > deadline:
            return False
        try:
            memory_format = MEMORY_FORMATS[args.memory_format]
            case = case or make_case(layer, args.device, getattr(torch, args.dtype), memory_format)
            rows = measure(device, operation, case, settings)
        except RuntimeError as error:  # of the tensors; implementations are caught one by one
            if not is_out_of_memory(error):
                raise
            release()
            rows = [{"operation": operation.name, "status": "inputs out of memory"}]
        report.add(layer, operation, rows)
    return True


if __name__ == "__main__":
    sys.exit(main())
