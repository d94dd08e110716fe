"""Time, memory, bandwidth and error of a function on one device.

CUDA: a sample empties the L2 cache (by writing a buffer of twice its size), lets the GPU
idle while the host queues the work, and times that work with events. So it is the GPU's
time for inputs in memory, without gaps that the host leaves, unless the function itself
waits for the GPU or queues more launches than the queue holds (about a thousand). What the
host needs for one call is measured apart.

CPU: with one thread a sample is the time for which that thread ran, so that other programs
on the machine disturb little; with more it is the wall time of a call. Candidates take turns,
so each finds the caches as another left them.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[[], Any]
FEWEST = 3
LONG_SECONDS = 1.0
"""A call so long is not repeated `FEWEST` times."""
WAKE_SECONDS = 0.5
LONGEST_LEAD_SECONDS = 0.1


class Device(Protocol):
    """What is measured differently on each kind of device."""

    def seconds(self, run: Run, lead: float) -> float:
        """The time of one call; the host may need `lead` seconds to queue its work."""
        ...

    def extra_bytes(self, run: Callable[[], Tensor]) -> int:
        """The peak of what one call allocates, less its result."""
        ...

    def synchronize(self) -> None:
        """Wait until all work is done."""
        ...

    def free_bytes(self) -> int:
        """What may still be allocated."""
        ...


class Cpu:
    """The host. Its memory is that of tensors: what operators use inside is not seen."""

    def seconds(self, run: Run, lead: float) -> float:
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        result = run()
        elapsed = clock() - start
        del result  # giving its memory back is not timed
        return elapsed

    def extra_bytes(self, run: Callable[[], Tensor]) -> int:
        with LiveBytes() as live:
            result = run()
        return max(0, live.peak - result.untyped_storage().nbytes())

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024


class Cuda:
    """A GPU; its memory is what torch's caching allocator hands out, work space included."""

    def __init__(self) -> None:
        self.l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(2 * self.l2_bytes, dtype=torch.uint8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._wake()
        self._cycles = 1e7 / self._events(lambda: torch.cuda._sleep(10_000_000))

    def _wake(self) -> None:
        """Work until the clocks are up: an idle GPU's cycles are several times as long."""
        square = torch.ones(4096, 4096, device="cuda")
        end = time.perf_counter() + WAKE_SECONDS
        while time.perf_counter() < end:
            torch.mm(square, square)
            self.synchronize()

    def _events(self, run: Run) -> float:
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def seconds(self, run: Run, lead: float) -> float:
        self._flush.zero_()
        wait = min(3 * lead + 2e-4, LONGEST_LEAD_SECONDS)  # the host's time varies
        torch.cuda._sleep(int(wait * self._cycles))
        return self._events(run)

    def extra_bytes(self, run: Callable[[], Tensor]) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return max(0, peak - result.untyped_storage().nbytes())

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators returned and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in known:
                known.add(_storage(leaf))
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, freed: int) -> None:
        self.live -= freed


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def host_seconds(device: Device, run: Run, calls: int = 3) -> float:
    """Median time until a call returns, whether or not its work is done."""
    times = []
    for _ in range(calls):
        device.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    device.synchronize()
    return median(times)


def sample(
    device: Device, runs: Mapping[str, tuple[Run, float]], repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Times of several functions that take turns, forwards and backwards.

    Each comes with the seconds that the host needs for it, and is called `repeats` times,
    or as often as `seconds` allow, but a few times even then.
    """
    times = {name: [device.seconds(*run)] for name, run in runs.items()}
    wanted = {}
    for name, (first,) in times.items():
        fewest = 1 if first > LONG_SECONDS else FEWEST
        wanted[name] = max(fewest, min(repeats, int(seconds / max(first, runs[name][1]))))
    for turn in range(1, max(wanted.values(), default=0)):
        for name in reversed(runs) if turn % 2 else runs:  # none is always the first
            if turn < wanted[name]:
                times[name].append(device.seconds(*runs[name]))
    return times


def spread(times: list[float]) -> tuple[float, float]:
    """The 10th and 90th percentiles."""
    if len(times) == 1:
        return times[0], times[0]
    deciles = quantiles(times, n=10, method="inclusive")
    return deciles[0], deciles[-1]


def copy_bandwidth(device: Device, name: str, size: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes, median of ten."""
    source = torch.ones(size, dtype=torch.uint8, device=name)
    target = torch.empty_like(source)
    times = [device.seconds(lambda: target.copy_(source), 1e-4) for _ in range(12)]
    return 2 * size / median(times[2:])


def largest_error(result: Tensor, reference: Tensor, part: int = 2**26) -> float:
    """max |result − reference| / max |reference|; NaN if any entry is."""
    rows = max(1, part * len(reference) // reference.numel())
    worst = scale = torch.zeros((), dtype=torch.float64, device=reference.device)
    for got, want in zip(result.split(rows), reference.split(rows), strict=True):
        worst = torch.maximum(worst, (got.double() - want).abs().amax())
        scale = torch.maximum(scale, want.abs().amax())
    return (worst / scale).item()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the host."""
    said = str(error).lower()
    phrases = ("out of memory", "can't allocate memory", "not enough memory", "_alloc_failed")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(phrase in said for phrase in phrases)


def release() -> None:
    """Give unused memory back, after an allocation failed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
