"""Between ranks: shards sent to the memory of another node, and read back from there. Plain TCP between two threads.

A collective would have to be the same on all ranks, and would wait for one that has died; a connection fails, at the
latest after `TIMEOUT_S` without a byte. Whoever connects first shows the run's secret, which ranks got from rank 0;
without it nothing further is read. A message is a JSON object behind its length; contents follow as they are. Nothing
is ever unpickled.
"""

import contextlib
import hashlib
import hmac
import json
import logging
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from d2v_scale.checkpoint.memory_files import HELD, MemoryFolder, read_report
from d2v_scale.files import temporary_name, write_whole

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""Without a byte, after which the other side counts as gone."""
_POLL_S = 0.05
_LENGTH = struct.Struct("!I")
_CHUNK = 1 << 22
_Stream = BinaryIO | BufferedIOBase
_LONGEST = 1 << 28
"""Bytes of a message."""
_PROOF = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Address:
    """Where a rank listens."""

    host: str
    port: int


class CopyServer:
    """Takes shards of other nodes' ranks into a folder, and hands out what is offered. Threads of this process."""

    def __init__(self, folder: MemoryFolder, secret: str, host: str) -> None:
        """`host`: the address to listen at; empty for all of the machine's."""
        self.folder, self.secret = folder, secret
        self.offered: dict[int, Path] = {}
        """By rank the verified shards of the step that is restored."""
        self._server = _Server((host, 0), _Connection)
        self._server.copies = self
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="memory copies", daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()

    def take(self, asked: dict[str, Any], stream: _Stream) -> None:
        """Write a shard that follows in `stream`. Raises OSError where it does not come whole or cannot be written."""
        report = read_report(asked["report"])
        if asked["keep"] is not None:
            # Two generations at most: before this one comes, what is older than the last whole one goes.
            self.folder.keep([int(asked["keep"]), int(report["step"])])
        data = self.folder.place(HELD, int(report["step"]), int(report["rank"]))
        data.with_suffix(".json").unlink(missing_ok=True)
        _receive_file(stream, data, report["file"]["size"], report["file"]["sha256"])
        write_whole(data.with_suffix(".json"), asked["report"])


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 512
    copies: CopyServer


class _Connection(socketserver.StreamRequestHandler):
    timeout = TIMEOUT_S
    server: _Server

    def handle(self) -> None:
        """One request."""
        with contextlib.suppress(OSError):
            copies = self.server.copies
            if not hmac.compare_digest(self.rfile.read(_PROOF), _proof(copies.secret)):
                return
            asked = _hear(self.rfile)
            try:
                if asked["op"] == "take":
                    copies.take(asked, self.rfile)
                    _say(self.connection, {})
                elif asked["op"] == "file":
                    path = copies.offered[int(asked["rank"])]
                    with path.open("rb") as file:
                        _say(self.connection, {"report": path.with_suffix(".json").read_text()})
                        self.connection.sendfile(file)
                else:
                    values = _part(copies.offered[int(asked["rank"])], asked["tensor"], asked["low"], asked["high"])
                    _say(self.connection, {"size": len(values), "sha256": hashlib.sha256(values).hexdigest()})
                    self.connection.sendall(values)
            except Exception as error:
                _say(self.connection, {"error": f"{type(error).__name__}: {error}"})


def send(to: Address, secret: str, data: Path, keep: int | None) -> None:
    """Have another node hold a shard, whose report lies beside it. `keep`: the step of the last whole generation, so
    that others there are removed first. Raises OSError."""
    report = data.with_suffix(".json").read_text()
    with _connection(to, secret) as connection, data.open("rb") as file:
        _say(connection, {"op": "take", "report": report, "keep": keep})
        connection.sendfile(file)
        _answer(connection)


def fetch(source: Address, secret: str, rank: int, data: Path, size: int, sha256: str) -> None:
    """Write to `data` the shard of a rank that another node offers, and its report beside it. Raises OSError, also for
    a wrong checksum."""
    with _connection(source, secret) as connection:
        _say(connection, {"op": "file", "rank": rank})
        with connection.makefile("rb") as stream:
            report = _heard(stream)["report"]
            _receive_file(stream, data, size, sha256)
    write_whole(data.with_suffix(".json"), report)


def read(source: Address, secret: str, rank: int, tensor: str, low: int, high: int) -> Tensor:
    """Elements [low, high) of a flat fp32 tensor in the shard of a rank that another node offers. Raises OSError."""
    with _connection(source, secret) as connection:
        _say(connection, {"op": "read", "rank": rank, "tensor": tensor, "low": low, "high": high})
        with connection.makefile("rb") as stream:
            said = _heard(stream)
            values = bytearray(_exactly(stream, said["size"]))
    if hashlib.sha256(values).hexdigest() != said["sha256"] or len(values) != 4 * (high - low):
        raise OSError(f"{tensor} of rank {rank} came damaged from {source.host}")
    return torch.frombuffer(values, dtype=torch.float32) if values else torch.empty(0)


def _part(data: Path, tensor: str, low: int, high: int) -> bytes:
    with safe_open(data, framework="pt") as file:
        found: Tensor = file.get_slice(tensor)[low:high]
    assert found.dtype == torch.float32
    return found.contiguous().numpy().tobytes()


def _receive_file(stream: _Stream, data: Path, size: int, sha256: str) -> None:
    digest, left, temporary = hashlib.sha256(), size, temporary_name(data)
    try:
        with temporary.open("wb") as file:
            while left:
                chunk = stream.read(min(left, _CHUNK))
                if not chunk:
                    raise OSError(f"the connection ended with {left} of {size} bytes missing")
                digest.update(chunk)
                file.write(chunk)
                left -= len(chunk)
        if digest.hexdigest() != sha256:
            raise OSError("its checksum differs from its report's")
        temporary.replace(data)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _proof(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


@contextlib.contextmanager
def _connection(to: Address, secret: str) -> Iterator[socket.socket]:
    with socket.create_connection((to.host, to.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(_proof(secret))
        yield connection


def _answer(connection: socket.socket) -> None:
    with connection.makefile("rb") as stream:
        _heard(stream)


def _say(connection: socket.socket, body: dict[str, Any]) -> None:
    text = json.dumps(body).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def _heard(stream: _Stream) -> dict[str, Any]:
    """What the other side says. Raises OSError where it names an error."""
    said = _hear(stream)
    if "error" in said:
        raise OSError(said["error"])
    return said


def _hear(stream: _Stream) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if length > _LONGEST:
        raise OSError("what came is no message")
    try:
        said = json.loads(_exactly(stream, length))
    except ValueError as error:
        raise OSError(f"what came is no message ({error})") from error
    if not isinstance(said, dict):
        raise OSError("what came is no message")
    return said


def _exactly(stream: _Stream, size: int) -> bytes:
    found = stream.read(size)
    if len(found) != size:
        raise OSError(f"the connection ended with {size - len(found)} of {size} bytes missing")
    return found
