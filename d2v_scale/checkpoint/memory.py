"""The state of a run in the memory of its nodes: copied while training goes on, found again after ranks or a node died.

Every rank's thread writes its shard to the node's memory file system and sends it to the rank at the same place of the
next node. At the beginning of a copy all ranks agree on the last one that is whole; that one stays until another is,
and nothing older does. What a rank says of its shard is as in a checkpoint, and read with the same code.
"""

import logging
import secrets
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_scale.checkpoint.commit import write_tensors
from d2v_scale.checkpoint.config import MemoryConfig
from d2v_scale.checkpoint.find import find_newest_valid
from d2v_scale.checkpoint.format import Manifest, Piece
from d2v_scale.checkpoint.memory_files import OWN, Copy, Identity, MemoryFolder, report_text, run_name
from d2v_scale.checkpoint.memory_nodes import (
    Member,
    Room,
    Seat,
    from_rank_0,
    gather,
    gather_on_rank_0,
    in_words,
    lack_of_room,
    nodes_of,
    own_address,
    peers,
    place,
    place_of,
)
from d2v_scale.checkpoint.memory_wire import Address, CopyServer, fetch, read, send
from d2v_scale.checkpoint.reader import Checkpoint
from d2v_scale.checkpoint.snapshot import Snapshot, manifest_of, named, report_of
from d2v_scale.errors import CheckpointError, ConfigError, NewerFormatError
from d2v_scale.files import write_whole
from d2v_scale.process import faults
from d2v_scale.run_files.committed import committed_steps

log = logging.getLogger(__name__)

NONE = -1
"""The step of a copy that is not there."""


class HeldCheckpoint(Checkpoint):
    """A checkpoint whose files lie in the memory of nodes."""

    def __init__(
        self, path: Path, manifest: Manifest, here: dict[int, Path], far: dict[int, Address], secret: str
    ) -> None:
        """`here`: files of this node by rank; `far`: where the others are offered."""
        super().__init__(path, manifest)
        self._here, self._far, self._secret = here, far, secret

    def _place(self, index: int) -> Path:
        return self._here[index]

    def _file(self, index: int, kind: str, name: str) -> Any:
        if index in self._here:
            return super()._file(index, kind, name)
        return _Far(self._far[index], self._secret, index, f"{kind}/{name}")


@dataclass(frozen=True)
class _Far:
    """A tensor of a shard on another node."""

    address: Address
    secret: str
    rank: int
    tensor: str

    def __getitem__(self, part: slice) -> Tensor:
        return read(self.address, self.secret, self.rank, self.tensor, part.start, part.stop)


class MemoryCopies:
    """Makes and finds the copies of one run. Make it with `create`."""

    def __init__(
        self,
        config: MemoryConfig,
        folder: MemoryFolder,
        identity: Identity,
        session: str,
        server: CopyServer,
        members: Sequence[Member],
    ) -> None:
        self.config, self.folder, self.identity, self.members = config, folder, identity, members
        self.lost = 0
        """Copies that did not become whole, that were due while the last was still under way, and damaged shards."""
        self._session, self._server = session, server
        self._nodes = [member.node for member in members]
        self._rank = place()[0]
        self._peer = peers(self._nodes)[self._rank]
        self._whole = self._begun = self._own = NONE
        """Steps of the last copy that is whole, the last that was begun, and the last of which this rank has done its
        part."""
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None

    @staticmethod
    def create(config: MemoryConfig, root: Path, digest: str, branch: int) -> "MemoryCopies":
        """For the run whose checkpoints are in `root`. Collective: all ranks must call. Raises ConfigError on all of
        them where one cannot use its memory file system.

        `digest`: of the recipe and its division among ranks; `branch`: how often the run has gone back. Of rank 0.
        """
        rank, world_size = place()
        said: dict[str, Any] | ConfigError = {}
        if rank == 0:
            try:
                run = run_name(root, make=True)
                said = {"run": run, "branch": branch, "session": uuid.uuid4().hex, "secret": secrets.token_hex()}
            except OSError as error:
                said = ConfigError("run_dir", f"has {root}, which takes no file ({error})", "Choose another.")
        said = from_rank_0(said)
        if isinstance(said, ConfigError):
            raise said
        folder: MemoryFolder | ConfigError
        try:
            folder = MemoryFolder(config.dir, said["run"])
        except ConfigError as error:
            folder = error
        problem = folder if isinstance(folder, ConfigError) else None
        everyone: list[tuple[Seat, ConfigError | None]] = gather((Seat.find(), problem))
        for _, trouble in everyone:
            if trouble is not None:
                raise trouble
        assert isinstance(folder, MemoryFolder)
        folder.remove_forgotten()
        seats = [seat for seat, _ in everyone]
        alone = len({(seat.machine, seat.network) for seat in seats}) == 1
        server = CopyServer(folder, said["secret"], "127.0.0.1" if alone else "")
        addresses = gather(Address(own_address(alone), server.port))
        members = [Member(*one) for one in zip((s.machine for s in seats), nodes_of(seats), addresses, strict=True)]
        identity = Identity(said["run"], world_size, digest, said["branch"])
        return MemoryCopies(config, folder, identity, said["session"], server, members)

    def describe(self) -> str:
        """Where copies go, in words."""
        nodes = len({*self._nodes})
        where = "this node and the next" if nodes > 1 else "this node, which are lost with it"
        return f"the state every {self.config.every} steps in the memory of {where}"

    # -- before training -----------------------------------------------------------------------------------------

    def lack_of_room(self, shard: int) -> str:
        """Why some node has not the room for its copies, in words; empty if all have. `shard`: bytes of this rank's.
        Collective: all ranks must call."""
        room = Room.find(shard, self.folder.path, self.folder.held_bytes())
        return lack_of_room(self.members, gather(room))

    def newest(self, after: int) -> HeldCheckpoint | None:
        """The newest whole copy of a step behind `after`, every shard of it verified; None if there is none. This
        rank's shard lies on its node then. Collective: all ranks must call."""
        places = self._nodes.count(self._nodes[self._rank])
        mine = self.folder.copies(self.identity, place_of(self._rank, self._nodes), places)
        ranks: dict[tuple[int, str], set[int]] = {}
        for claims in gather([(one.step, one.session, one.rank) for one in mine]):
            for step, session, rank in claims:
                if step > after:
                    ranks.setdefault((step, session), set()).add(rank)
        for key in sorted(ranks, reverse=True):
            found: HeldCheckpoint | str
            if lost := {*range(self.identity.world_size)} - ranks[key]:
                found = f"nobody has the shard of rank {in_words(lost)}"
            else:
                found = self._verified(key, [one for one in mine if (one.step, one.session) == key])
            if isinstance(found, HeldCheckpoint):
                self._whole = key[0]
                return found
            self._say("The copy in memory of step %d is passed over: %s", key[0], found)
        return None

    def _verified(self, key: tuple[int, str], mine: list[Copy]) -> HeldCheckpoint | str:
        """The copy of a step and session, of which `mine` are this rank's to verify; else why it is none. Collective:
        all ranks must call."""
        good: dict[int, Copy] = {}
        damaged = 0
        for one in mine:
            if problem := one.problem():
                log.error("The copy in memory %s is damaged: %s", one.data, problem)
                damaged += 1
            else:
                good[one.rank] = one
        self._server.offered = {rank: one.data for rank, one in good.items()}
        counts, offered = zip(*gather((damaged, {rank: str(one.data) for rank, one in good.items()})), strict=True)
        self.lost += sum(counts)
        holders: dict[int, list[int]] = {}
        for process, held in enumerate(offered):
            for rank in held:
                holders.setdefault(rank, []).append(process)
        if lost := {*range(self.identity.world_size)} - holders.keys():
            return f"nobody has a sound shard of rank {in_words(lost)}"
        reports = gather_on_rank_0({rank: one.report for rank, one in good.items() if holders[rank][0] == self._rank})
        text, trouble = from_rank_0(_merged(reports) if self._rank == 0 else ("", ""))
        if trouble:
            return str(trouble)
        manifest = Manifest.from_json(text, self.folder.path)
        near = {process for process, node in enumerate(self._nodes) if node == self._nodes[self._rank]}
        here = {rank: Path(offered[one][rank]) for rank, all_of in holders.items() for one in all_of if one in near}
        failure = "" if self._rank in here else self._fetch(manifest, key[0], holders[self._rank], here)
        for rank, why in enumerate(gather(failure)):
            if why:
                return f"the shard of rank {rank} did not come ({why})"
        if self._peer is not None and self._nodes[self._peer] not in {self._nodes[one] for one in holders[self._rank]}:
            # The next node is another than before: it may be this one that is lost next.
            self._start(self._send, here[self._rank], None)
        far = {rank: self.members[all_of[self._rank % len(all_of)]].address for rank, all_of in holders.items()}
        return HeldCheckpoint(self.folder.path, manifest, here, far, self._server.secret)

    def _fetch(self, manifest: Manifest, step: int, holders: list[int], here: dict[int, Path]) -> str:
        """Get this rank's shard from one of `holders` to this node, and enter it; why none gave it, in words."""
        entry, failure = manifest.files[self._rank], ""
        for process in holders:
            member = self.members[process]
            try:
                data = self.folder.place(OWN, step, self._rank)
                fetch(member.address, self._server.secret, self._rank, data, entry.size, entry.sha256)
            except OSError as error:
                failure = str(error)
                log.error("The shard of step %d did not come from %s: %s", step, member.node, error)
                continue
            here[self._rank] = data
            log.info("The shard of step %d came from %s", step, member.node)
            return ""
        return failure

    def _say(self, text: str, *values: object) -> None:
        """All ranks know it."""
        if self._rank == 0:
            log.warning(text, *values)

    # -- while training ------------------------------------------------------------------------------------------

    def may_begin(self, step: int, least: Callable[[list[int]], list[int]]) -> bool:
        """Whether a copy of this step is made: not while some rank is still at the last. `least`: the smallest of what
        all ranks hand in, number by number. Collective: all ranks must call."""
        busy = self._thread is not None and self._thread.is_alive()
        idle, whole = least([int(not busy), self._own])
        if not idle:
            self.lost += 1
            self._say("The copy in memory of step %d is left out: the last is still under way", step)
            return False
        if self._begun > whole:
            self.lost += 1
            kept = f"that of step {self._whole} is kept" if self._whole > NONE else "and there is none before"
            self._say(
                "The copy in memory of step %d did not become whole, %s: see logs/ of all ranks", self._begun, kept
            )
        else:
            self._whole = max(self._whole, self._begun)
        return True

    def save(self, step: int, pieces: list[Piece], state: dict[str, Any], extra: dict[str, Any]) -> None:
        """Copy `pieces`, and write and send them in the background. After `may_begin`. `state` and `extra` are rank
        0's. Failures are counted by the next `may_begin`, never raised."""
        self.wait()
        copies = self._snapshot.take(pieces)
        self._begun = step
        self._start(self._run, step, copies, state, extra)

    def _start(self, work: Callable[..., object], *arguments: Any) -> None:
        self.wait()
        self._thread = threading.Thread(target=work, args=arguments, name="copy to memory", daemon=True)
        self._thread.start()

    def go_back(self) -> None:
        """The run goes back to an earlier step and leaves out samples: what was copied is of no use any more."""
        self.wait()
        self.identity = replace(self.identity, branch=self.identity.branch + 1)
        self._whole = self._begun = self._own = NONE

    def close(self, *, keep: bool) -> None:
        """The run is over, and all ranks have waited (`wait`). `keep`: leave what was copied."""
        self.wait()
        self._server.close()
        if not keep:
            self.folder.remove()

    def wait(self) -> None:
        """Until this rank's part of the last copy is done, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, step: int, pieces: list[Piece], state: dict[str, Any], extra: dict[str, Any]) -> None:
        try:
            self.folder.keep([self._whole, step])
            data = self.folder.place(OWN, step, self._rank)
            data.with_suffix(".json").unlink(missing_ok=True)
            faults.point("memory_write")
            entry = write_tensors(data, named(pieces))
            report = report_of(entry, pieces)
            if self._rank == 0:
                report |= {"state": state, "extra": extra}
            text = report_text(self.identity, self._session, step, self._rank, report)
            write_whole(data.with_suffix(".json"), text)
        except Exception as failure:  # training goes on without it
            log.warning("The copy in memory of step %d failed: %s: %s", step, type(failure).__name__, failure)
            return
        if self._peer is None or self._send(data, self._whole):
            self._own = step

    def _send(self, data: Path, keep: int | None) -> bool:
        """Have the next node hold this rank's shard; whether it does."""
        assert self._peer is not None
        to = self.members[self._peer]
        try:
            faults.point("memory_send")
            send(to.address, self._server.secret, data, keep)
        except Exception as failure:
            log.warning("%s does not hold %s: %s: %s", to.node, data, type(failure).__name__, failure)
            return False
        return True


def newest_anywhere(root: Path, copies: MemoryCopies | None) -> tuple[Checkpoint | None, int]:
    """What the run in whose `root` checkpoints are goes on from: a whole copy in memory that is newer than what is on
    disk, else the newest valid checkpoint; None without either. And the step of what is on disk, -1 without any.
    Raises as `find_newest_valid`. Collective: all ranks must call."""
    held: Checkpoint | None
    if copies is None:
        checkpoint, _ = find_newest_valid(root, together=True)
        return checkpoint, NONE if checkpoint is None else checkpoint.step
    committed: int = from_rank_0(max(committed_steps(root), default=NONE))
    if (held := copies.newest(committed)) is not None:
        return held, committed
    try:
        checkpoint, skipped = find_newest_valid(root, together=True)
    except NewerFormatError:
        raise
    except CheckpointError:
        if (held := copies.newest(NONE)) is None:
            raise
        return held, NONE
    on_disk = NONE if checkpoint is None else checkpoint.step
    if skipped and (held := copies.newest(on_disk)) is not None:
        return held, on_disk
    return checkpoint, on_disk


def _merged(reports: Sequence[dict[int, dict[str, Any]]]) -> tuple[str, str]:
    """The manifest of the shards that all ranks report, as its text, and why there is none, in words."""
    by_rank = {rank: report for of_one in reports for rank, report in of_one.items()}
    first, in_order = by_rank[0], [by_rank[rank] for rank in range(len(by_rank))]
    try:
        return manifest_of(in_order, first["step"], first["state"], first["extra"]).to_json(), ""
    except CheckpointError as error:
        return "", str(error)
