"""Values on their way to a device, with CUDA's events replaced by stand-ins that say when they are used."""

import pytest
import torch

from d2v_scale.teacher import host_source
from d2v_scale.teacher.host_source import HostSource


def test_a_buffer_is_written_again_only_when_its_copy_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    buffers: list[torch.Tensor] = []
    events: list[object] = []

    class Event:
        def __init__(self) -> None:
            events.append(self)

        def record(self) -> None:
            log.append(("sent", events.index(self)))

        def synchronize(self) -> None:
            index = events.index(self)
            log.append(("free", index))
            buffers[index].fill_(float("nan"))

    def pinned(size: int) -> torch.Tensor:
        buffers.append(torch.empty(size))
        return buffers[-1]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(host_source, "_pinned", pinned)
    source = HostSource(torch.device("cpu"), largest=12)
    groups = [[torch.randn(5), torch.randn(7)], [torch.randn(3).bfloat16()], [torch.randn(12)], [torch.randn(1)]]
    brought = [source.bring(group) for group in groups]
    for group, arrived in zip(groups, brought, strict=True):
        assert all(torch.equal(ours, wanted.float()) for ours, wanted in zip(arrived, group, strict=True))
    assert log == [(what, turn) for turn in (0, 1, 0, 1) for what in ("free", "sent")]
