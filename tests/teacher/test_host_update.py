"""The walk through the shards, with CUDA's streams and events replaced by stand-ins that check who waits for whom."""

import contextlib
import time
from dataclasses import dataclass

import pytest
import torch

from d2v_scale.teacher import host_update
from d2v_scale.teacher.host_update import HostUpdate


@dataclass
class Shard:
    values: torch.Tensor
    compute: torch.Tensor | None
    source: torch.Tensor
    averaged: bool = True


class Event:
    def record(self, stream=None) -> None: ...

    def synchronize(self) -> None: ...


class Stream:
    def __init__(self, device=None) -> None: ...

    def wait_event(self, event) -> None: ...

    def wait_stream(self, stream) -> None: ...

    def record_event(self) -> Event:
        return Event()


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "set_device": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(host_update, "_pinned", lambda size, dtype: torch.full((size,), float("nan"), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_chunk_of_every_shard_moves(dtype: torch.dtype) -> None:
    """The compute copy has every bit that its dtype has room for: one in fp32 was rounded to bf16 on its way up."""
    shards, expected = [], []
    for size, averaged, copied in [(1, True, True), (7, True, False), (12, False, True), (40, True, True)]:
        values, source = torch.randn(size), torch.randn(size)
        source = source.bfloat16() if size == 7 else source
        expected.append(torch.lerp(values, source.float(), 0.25) if averaged else source.float().clone())
        shards.append(Shard(values, torch.zeros(size, dtype=dtype) if copied else None, source, averaged))
    update = HostUpdate(torch.device("cpu"), shards, chunk=5)
    update.start(0.75)
    update.wait()
    for shard, wanted in zip(shards, expected, strict=True):
        assert torch.equal(shard.values, wanted)
        if shard.compute is not None:
            assert torch.equal(shard.compute, wanted.to(dtype))


def test_the_wait_for_an_update_in_the_background_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ema_seconds` is the time that its start takes: what a step waits later was in no figure."""
    update = HostUpdate(torch.device("cpu"), [], chunk=5)
    monkeypatch.setattr(update, "_update", lambda *_: time.sleep(0.2))
    update.start(0.5)
    assert update.waited_seconds == 0
    update.wait()
    assert 0.1 < update.waited_seconds < 2


def test_a_failure_in_the_thread_reaches_the_loop() -> None:
    update = HostUpdate(torch.device("cpu"), [Shard(torch.zeros(3), None, torch.zeros(2))], chunk=5)
    update.start(0.5)
    with pytest.raises(RuntimeError):
        update.wait()
    update.wait()
