"""Saving while the run goes on: the loop waits for a copy in host memory, threads do the rest.

Every rank's thread writes its file and then a small `rank-N.json` that says it is complete (or `rank-N.failed`).
Rank 0's thread waits for all of them, merges the manifest and commits. The ranks meet in the file system only: a
collective in a thread would collide with the training step's.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v_scale.checkpoint.commit import commit, retain, sweep, write_tensors
from d2v_scale.checkpoint.config import CheckpointConfig
from d2v_scale.checkpoint.format import Piece
from d2v_scale.checkpoint.snapshot import Snapshot, manifest_of, named, report_of
from d2v_scale.errors import CheckpointError
from d2v_scale.files import write_whole
from d2v_scale.process import faults
from d2v_scale.run_files.committed import directory_name

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
LONGEST_POLL_SECONDS = 2.0
"""Rank 0 looks for the others' reports in a tenth of the time that it has waited: a thousand ranks' files are listed a
few dozen times, not twenty times a second."""


@dataclass(frozen=True)
class SaveResult:
    """What became of one save, as far as this rank knows: rank 0 knows of the commit, others of their own file."""

    step: int
    error: str | None
    """None: committed (rank 0), or this rank's file is complete (others)."""


class CheckpointWriter:
    """Saves checkpoints of one run, one at a time. Make it with `create`."""

    def __init__(self, root: Path, rank: int, world_size: int, session: str, config: CheckpointConfig) -> None:
        self.root = root
        self.rank = rank
        self.world_size = world_size
        self.config = config
        self._session = session
        self._saves = 0
        self._thread: threading.Thread | None = None
        self._results: list[SaveResult] = []
        self._last: SaveResult | None = None
        self._snapshot = Snapshot()
        self._undeletable: set[int] = set()
        """Old checkpoints that stayed, which was said."""

    @staticmethod
    def create(root: str | Path, config: CheckpointConfig | None = None) -> "CheckpointWriter":
        """A writer for `root` (made if missing). Rank 0 removes what earlier runs left unfinished.

        Collective: all ranks must call.
        """
        import torch.distributed as dist

        root = Path(root)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        session = [uuid.uuid4().hex[:8]]
        if rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            sweep(root)
        if world_size > 1:
            # Also a barrier: no rank writes before the sweep is over.
            dist.broadcast_object_list(session, src=0)
        return CheckpointWriter(root, rank, world_size, session[0], config or CheckpointConfig())

    def save(self, step: int, pieces: list[Piece], state: dict[str, Any], extra: dict[str, Any]) -> float:
        """Copy `pieces` and write them in the background; returns the seconds the caller was blocked.

        Collective: all ranks must call, in the same order, each with its own pieces; `state` and `extra` are rank 0's.
        Waits for the previous save. Failures are reported by `poll` and `finish`, never raised here.
        """
        begin = time.monotonic()
        self._join()
        copies = self._snapshot.take(pieces)
        faults.point("snapshot")
        self._saves += 1
        temporary = self.root / f".tmp-{directory_name(step)}-{self._session}-{self._saves}"
        blocked = time.monotonic() - begin
        self._thread = threading.Thread(
            target=self._run, args=(temporary, step, copies, state, extra), name="checkpoint", daemon=True
        )
        self._thread.start()
        return blocked

    def poll(self) -> list[SaveResult]:
        """Saves that ended since the last call. Local, immediate."""
        results, self._results = self._results, []
        return results

    def finish(self) -> bool:
        """Wait for the last save on every rank; True when rank 0 committed it (or nothing was saved). Collective."""
        import torch.distributed as dist

        self._join()
        committed = [self._last is None or self._last.error is None]
        if self.world_size > 1:
            dist.broadcast_object_list(committed, src=0)
        return committed[0]

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(
        self,
        temporary: Path,
        step: int,
        pieces: list[Piece],
        state: dict[str, Any],
        extra: dict[str, Any],
    ) -> None:
        error = None
        try:
            own_error = self._write_share(temporary, pieces)
            if self.rank == 0:
                self._commit(temporary, step, state, extra, own_error)
            elif own_error is not None:
                raise own_error
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            log.warning("checkpoint of step %d was not saved: %s", step, error)
        result = SaveResult(step, error)
        self._last = result
        self._results.append(result)

    def _write_share(self, temporary: Path, pieces: list[Piece]) -> Exception | None:
        """Write this rank's file, then the report that it is complete, or that it could not be written."""
        share = f"rank-{self.rank:05d}"
        try:
            temporary.mkdir(exist_ok=True)
            entry = write_tensors(temporary / f"{share}.safetensors", named(pieces))
            report = report_of(entry, pieces)
            write_whole(temporary / f"{share}.json", json.dumps(report, separators=(",", ":")))
        except Exception as failure:
            with contextlib.suppress(OSError):
                # An empty file still fits on a full disk; its reason may not.
                (temporary / f"{share}.failed").touch()
                (temporary / f"{share}.failed").write_text(f"{type(failure).__name__}: {failure}")
            return failure
        return None

    def _commit(
        self, temporary: Path, step: int, state: dict[str, Any], extra: dict[str, Any], own_error: Exception | None
    ) -> None:
        try:
            reports = self._collect(temporary, own_error)
            manifest = manifest_of(reports, step, state, extra)
            for path in temporary.glob("rank-*.json"):
                path.unlink()
            commit(temporary, self.root, manifest)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        deleted, stayed = retain(self.root, step, self.config.keep_last, self.config.keep_every)
        log.info("checkpoint of step %d committed%s", step, f", deleted {deleted}" if deleted else "")
        for old, reason in stayed.items():
            if old not in self._undeletable:
                log.warning("checkpoint of step %d could not be deleted: %s", old, reason)
        self._undeletable |= stayed.keys()

    def _collect(self, temporary: Path, own_error: Exception | None) -> list[dict[str, Any]]:
        """Every rank's report, in rank order. Raises CheckpointError when one failed or did not answer in time.

        Waits for all of them also after a failure: their files are about to be removed.
        """
        begin = time.monotonic()
        deadline = begin + self.config.peer_timeout
        while True:
            done, failed = _reported(temporary)
            if own_error is not None:
                failed.setdefault("rank-00000", temporary)
            if len(done) == self.world_size:
                return [
                    json.loads((temporary / f"rank-{rank:05d}.json").read_text()) for rank in range(self.world_size)
                ]
            if failed and len(done) + len(failed) >= self.world_size:
                reasons = {share: path.read_text() for share, path in sorted(failed.items()) if path.is_file()}
                if own_error is not None:
                    reasons["rank-00000"] = f"{type(own_error).__name__}: {own_error}"
                listed = "; ".join(
                    f"{share}: {reason or 'no room for the reason'}" for share, reason in reasons.items()
                )
                raise CheckpointError(f"{len(failed)} of {self.world_size} files could not be written ({listed}).")
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"only {len(done)} of {self.world_size} ranks wrote their file in {self.config.peer_timeout} s."
                )
            time.sleep(min(max(POLL_SECONDS, (time.monotonic() - begin) / 10), LONGEST_POLL_SECONDS))


def _reported(temporary: Path) -> tuple[set[str], dict[str, Path]]:
    """The ranks (`rank-N`) whose file is complete, and the files with the reasons of those that could not write one."""
    done: set[str] = set()
    failed: dict[str, Path] = {}
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(temporary):
            share, _, kind = name.partition(".")
            if share and kind == "json":
                done.add(share)
            elif share and kind == "failed":
                failed[share] = temporary / name
    return done, failed
