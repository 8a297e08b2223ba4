"""A machine is told by its kernel's boot, whatever its containers call themselves."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from d2v_scale.checkpoint.memory_nodes import Seat
from d2v_scale.files import temporary_name
from d2v_scale.programs import machine


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    machine.this_machine.cache_clear()
    yield
    machine.this_machine.cache_clear()


@pytest.mark.parametrize("seen", [machine.this_machine, machine.this_system, lambda: Seat.find({}).machine])
def test_containers_of_two_machines_with_one_host_name_are_two(
    seen: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "trainer")
    monkeypatch.setattr(machine, "_BOOT", tmp_path / "boot_id")
    found = []
    for boot in ("a", "b", "a"):
        (tmp_path / "boot_id").write_text(f"{boot}\n")
        machine.this_machine.cache_clear()
        found.append(seen())
    assert found[0] == found[2] != found[1]


def test_two_containers_with_one_host_name_and_one_process_number_write_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "trainer")
    monkeypatch.setattr(machine, "_BOOT", tmp_path / "boot_id")
    names = set()
    for boot in ("a", "b"):
        (tmp_path / "boot_id").write_text(boot)
        names.add(temporary_name(tmp_path / "file"))
    assert len(names) == 2


def test_without_a_boot_to_be_read_it_is_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BOOT", tmp_path / "absent")
    assert machine.this_machine() == socket.gethostname()
