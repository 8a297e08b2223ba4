"""The teacher's update when its fp32 values are in host memory and the student is on a CUDA device.

A thread walks through the shards in chunks: student values come down to pinned memory on a side stream, the host
interpolates, the compute copy goes up again. It runs while the main thread reads the next batch; the teacher's next
forward pass and the student's next optimizer step wait for it.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from d2v_scale.data2vec import ema


class UpdatedShard(Protocol):
    """What the update needs to know of a shard (see `teacher.TeacherShard`)."""

    @property
    def values(self) -> Tensor: ...
    @property
    def compute(self) -> Tensor | None: ...
    @property
    def source(self) -> Tensor | None: ...
    @property
    def averaged(self) -> bool: ...


class HostUpdate:
    """Runs one update at a time, of these shards, in the background.

    `chunk` bounds the pinned memory: for each element 8 bytes and twice the compute copy, whose dtype all shards share.
    """

    def __init__(self, device: torch.device, shards: Sequence[UpdatedShard], chunk: int) -> None:
        self._device = device
        self._shards = shards
        self._chunk = chunk
        self._stream = torch.cuda.Stream(device)
        self._down = [_pinned(chunk, torch.float32) for _ in range(2)]
        dtypes = {shard.compute.dtype for shard in shards if shard.compute is not None}
        assert len(dtypes) <= 1, f"compute copies of several dtypes: {dtypes}"
        self._up = [_pinned(chunk, dtype) for dtype in dtypes for _ in range(2)]
        self._arrived = [torch.cuda.Event() for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in range(2)]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._running: Future[None] | None = None
        self.waited_seconds = 0.0
        """How long callers have waited for the host so far."""

    def start(self, decay: float) -> None:
        """Begin `ema.average_` by `decay` (a plain copy where not averaged) for all shards."""
        self.wait()
        ready = torch.cuda.current_stream(self._device).record_event()
        self._running = self._thread.submit(self._update, decay, ready)

    def wait(self) -> None:
        """Return when the update is done on the host; make the current stream wait for what is still going up."""
        running, self._running = self._running, None
        if running is not None:
            begin = time.perf_counter()
            running.result()
            self.waited_seconds += time.perf_counter() - begin
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @torch.no_grad()
    def _update(self, decay: float, ready: torch.cuda.Event) -> None:
        pieces = [
            (shard, slice(first, min(first + self._chunk, shard.values.numel())))
            for shard in self._shards
            for first in range(0, shard.values.numel(), self._chunk)
        ]
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for index in range(min(1, len(pieces))):
                self._fetch(index, *pieces[index])
            for index, (shard, part) in enumerate(pieces):
                if index + 1 < len(pieces):
                    self._fetch(index + 1, *pieces[index + 1])
                self._arrived[index % 2].synchronize()
                values, source = shard.values[part], self._down[index % 2][: part.stop - part.start]
                if shard.averaged:
                    ema.average_([values], [source], decay)
                else:
                    values.copy_(source)
                if shard.compute is not None:
                    self._sent[index % 2].synchronize()
                    staged = self._up[index % 2][: values.numel()].copy_(values)
                    shard.compute[part].copy_(staged, non_blocking=True)
                    self._sent[index % 2].record(self._stream)

    def _fetch(self, index: int, shard: UpdatedShard, part: slice) -> None:
        # The buffer was last read two pieces ago, by the host, which is done with it.
        down = self._down[index % 2][: part.stop - part.start]
        assert shard.source is not None, "there is nothing to follow"
        down.copy_(shard.source[part].to(torch.float32), non_blocking=True)
        self._arrived[index % 2].record(self._stream)


def _pinned(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, pin_memory=True)
