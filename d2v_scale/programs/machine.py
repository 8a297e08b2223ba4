"""Which machine a process is on: host names are no proof, since containers of several machines may share one."""

import os
import socket
from functools import cache
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


@cache
def this_machine() -> str:
    """The same for all processes of a machine, in its containers too, and for no other's: the kernel's boot; where
    there is none to be read, the host's name."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def this_network() -> str:
    """What 127.0.0.1 reaches: a container may have a network of its own."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""


def this_system() -> str:
    """The machine with the process namespace, in which a process's number means something; empty: it cannot be told."""
    try:
        return _BOOT.read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
