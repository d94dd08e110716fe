"""Work beside the training: on a thread of its own and, on GPUs, in streams of their own.

The side streams wait for what the training streams were given before; who takes a result makes
the training streams wait for it. Tensors that cross over are recorded in the stream they cross
to, so that the allocator gives their memory to nobody too early, whenever they are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Job(Generic[T]):
    """What was begun on the thread."""

    def __init__(self, future: Future[T], done: Mapping[torch.device, torch.cuda.Event]) -> None:
        self._future, self._done = future, done

    def result(self) -> T:
        """Once it is known to the host, for the current streams; or raises what the work raised."""
        try:
            result = self._future.result()
        finally:
            for device, event in self._done.items():
                torch.cuda.current_stream(device).wait_event(event)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(torch.cuda.current_stream(leaf.device))
        return result


class Beside:
    """One thread, from the first job until it is closed or garbage; jobs run one by one.

    A pool's thread, since a pool also ends it when the interpreter does, before torch goes.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, work: Callable[[], T], inputs: Sequence[Tensor]) -> Job[T]:
        """Begin work that reads the inputs, which nobody may write to until it is done."""
        streams = {x.device: self._stream(x.device) for x in inputs if x.is_cuda}
        for x in inputs:
            if x.is_cuda:
                x.record_stream(streams[x.device])
        ready, done = ({device: torch.cuda.Event() for device in streams} for _ in range(2))
        for device, event in ready.items():
            event.record(torch.cuda.current_stream(device))
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="tn_kfac")
        return Job(self._pool.submit(_run, work, streams, ready, done), done)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """The side stream of a device.

        torch loads its solvers with their first use, in which two threads must not meet.
        """
        if device not in self._streams:
            torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def close(self) -> None:
        """End the thread when its work is done; results can still be had."""
        if self._pool is not None:
            self._pool.shutdown()


def _run(
    work: Callable[[], T],
    streams: Mapping[torch.device, torch.cuda.Stream],
    ready: Mapping[torch.device, torch.cuda.Event],
    done: Mapping[torch.device, torch.cuda.Event],
) -> T:
    """On the thread: the work, in the side streams."""
    with ExitStack() as stack, torch.no_grad():
        for device, stream in streams.items():
            stream.wait_event(ready[device])
            stack.enter_context(torch.cuda.stream(stream))
        try:
            return work()
        finally:
            for device, stream in streams.items():
                done[device].record(stream)
