"""What the first of the launchers that live does for all: it sees how a round ends, and plans the next."""

import logging
import re
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace

from d2v_scale.agents.meeting import Word
from d2v_scale.agents.plan import Plan, replaced
from d2v_scale.errors import EXIT_DONE, EXIT_LOST_PEER, EXIT_REQUEUE
from d2v_scale.files import append_line
from d2v_scale.process.status import ATTEMPTS_FILE, STATUS_FILE, write_status
from d2v_scale.running.attempts import STOPPED_BEFORE_START, Attempt, read_attempts
from d2v_scale.running.restarts import Restarts

log = logging.getLogger("d2v_scale.train")

STRIKES = 2
"""So often the hardware of a node may be to blame in one job before a spare takes its place."""
STUCK_S = 90.0
"""A launcher whose ranks are not gone so long after a failure has some that cannot be ended."""
LOST = "its launcher or the node is gone"
_DEATHS = {128 + one for one in (signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV, signal.SIGILL, signal.SIGFPE)}
"""SIGABRT is not among them: NCCL ends healthy ranks so that wait for a lost one."""
_CONSEQUENCES = (EXIT_LOST_PEER, 128 + signal.SIGABRT)
_DEVICE_FAILED = re.compile(r"uncorrectable|\bECC\b|hardware error|fallen off the bus|unspecified launch failure", re.I)


def blamed(failures: Mapping[str, int], attempt: Attempt, active: Collection[str]) -> set[str]:
    """Nodes whose hardware may be to blame for an attempt's end. `failures`: the codes of the nodes whose ranks failed,
    in the order in which that was seen: those after the first have mostly lost a peer."""
    if attempt.exit_code == EXIT_REQUEUE:  # the watchdog names the silent ranks; who lives says so
        silent = attempt.reason.startswith("silent:")
        return {node for node in re.findall(r"process \d+ on ([^\s)]+)\)", attempt.reason) if silent} & {*active}
    first = next(iter(failures), None)
    if first is None or not (failures[first] in _DEATHS or _DEVICE_FAILED.search(attempt.reason)):
        return set()
    return {first}


def named(nodes: Mapping[str, str]) -> str:
    """Nodes and what is wrong with them, in words."""
    return "; ".join(f"{node}: {why}" for node, why in nodes.items())


class Leader:
    """Any launcher may become it, so all that it has to know stands in plans, words and the run directory."""

    def __init__(
        self, nodes: Sequence[str], world: int, restarts: Restarts, unfit: Mapping[str, str], script: str = ""
    ) -> None:
        """`nodes`: all of the job, in order; `world`: how many train; `unfit`: nodes that are not to take part from
        the beginning, and why; `script`: the node of the job's script, without which there is no job."""
        self._nodes, self._world, self._restarts, self._unfit = nodes, world, restarts, unfit
        self._script = script
        self._round = 0
        self._failures: dict[str, int] = {}
        self._since: float | None = None

    def begin(self, words: Mapping[str, Word], silent: Collection[str]) -> Plan | None:
        """The first plan, once all are there that it needs. `silent`: nodes that say nothing (any more)."""
        unfit = {**self._unfit, **self._spares_that_are_bad(Plan(0), words, silent, "it did not come")}
        active = replaced(self._nodes, self._nodes[: self._world], unfit)
        if any(word.asked for word in words.values()):
            return self._end(Plan(0), EXIT_REQUEUE, STOPPED_BEFORE_START, unfit)
        if active is None:
            left = f"{len(self._nodes) - len(unfit)} of {len(self._nodes)} nodes are left, {self._world} are needed"
            return self._end(Plan(0), EXIT_REQUEUE, f"{named(unfit)}; {left}", unfit)
        if any(node not in words for node in active):
            return None
        return Plan(1, active, unfit, time=time.time(), why=named(unfit))

    def follow(self, plan: Plan, words: Mapping[str, Word], silent: Collection[str], now: float) -> Plan | None:
        """The plan after `plan`, once its round is over; else None, and `failing` has what is to be told. `now`: by any
        clock that does not jump."""
        if plan.number != self._round:
            self._round, self._failures, self._since = plan.number, {}, None
        in_round = {node: words[node] for node in plan.active if node in words and words[node].round == plan.number}
        lost = [node for node in plan.active if node in silent]
        new = {node: word.code for node, word in in_round.items() if word.code and node not in self._failures}
        # Of those that were seen at one look a death comes first: peers notice it at once.
        self._failures |= sorted(new.items(), key=lambda one: (one[1] not in _DEATHS, one[1] in _CONSEQUENCES))
        if self._since is None and (lost or self._failures):
            self._since = now
        living = [node for node in plan.active if node not in lost and not (node in in_round and in_round[node].ended)]
        stuck = living if self._since is not None and now - self._since > STUCK_S else []
        if living and not stuck:
            return None
        bad = {**dict.fromkeys(lost, LOST), **dict.fromkeys(stuck, "its ranks cannot be ended")}
        return self._next(plan, words, silent, bad)

    @property
    def failing(self) -> int:
        """The code for which the ranks of this round are ended; 0: they go on."""
        if self._since is None:
            return 0
        # What is a consequence counts for less than a cause.
        codes = sorted(self._failures.values(), key=lambda code: code == EXIT_LOST_PEER)
        return codes[0] if codes else EXIT_LOST_PEER

    def _next(self, plan: Plan, words: Mapping[str, Word], silent: Collection[str], bad: dict[str, str]) -> Plan:
        attempt = self._restarts.attempt(self.failing)
        if self._since is None or (attempt is not None and attempt.exit_code == EXIT_DONE):
            return self._end(plan, EXIT_DONE, "all ranks have ended")
        if attempt is None:
            if not bad:
                return self._end(plan, self.failing, "the ranks ended before they had a run directory")
            attempt = Attempt(EXIT_LOST_PEER, "before the ranks had a run directory", -1, time=time.time())
        if self._script in bad and bad[self._script] == LOST:
            why = f"{named(bad)}; the job's script ran on {self._script}"
            ending = self._end(plan, EXIT_REQUEUE, why, bad)
            return replace(ending, attempts=(asdict(replace(attempt, reason=f"{why}; {attempt.reason}")),))
        if any(word.asked for word in words.values()):
            return self._end(plan, attempt.exit_code, attempt.reason, bad)
        struck = dict(plan.struck)
        if len(self._nodes) > self._world:
            for node in sorted(blamed(self._failures, attempt, plan.active) - {*bad}):
                struck[node] = struck.get(node, 0) + 1
                if struck[node] >= STRIKES:
                    bad[node] = f"its ranks were the first to fail {struck[node]} times: {attempt.reason}"
        if bad:
            attempt = replace(attempt, reason=f"{named(bad)}; {attempt.reason}", nodes=",".join(plan.active))
        earlier = [Attempt(**one) for one in plan.attempts]
        recorded = [] if self._restarts.directory is None else read_attempts(self._restarts.directory)
        history = sorted({one.time: one for one in (*recorded, *earlier, attempt)}.values(), key=lambda one: one.time)
        restart, why = self._restarts.may_follow(history)
        if not restart:
            return self._end(plan, attempt.exit_code, why, bad)
        excluded = {**plan.excluded, **bad, **self._spares_that_are_bad(plan, words, silent, LOST)}
        active = replaced(self._nodes, plan.active, excluded)
        if active is None:
            spares = len(self._nodes) - self._world
            left = f"no spare node is left of {spares}" if spares else "there are no spare nodes (--spares)"
            return self._end(plan, EXIT_REQUEUE, f"{named(bad)}; {left}", excluded)
        kept = [one for one in earlier if one.step == attempt.step]
        return Plan(
            plan.number + 1,
            active,
            excluded,
            tuple(self._restarts.further()),
            why=why,
            time=time.time(),
            attempts=tuple(asdict(one) for one in (*kept, attempt)),
            struck=struck,
        )

    def _spares_that_are_bad(
        self, plan: Plan, words: Mapping[str, Word], silent: Collection[str], gone: str
    ) -> dict[str, str]:
        """Nodes that do not train now and could not."""
        found = {}
        for node in self._nodes:
            if node in plan.active or node in plan.excluded:
                continue
            if node in silent:
                found[node] = gone
            elif node in words and words[node].problem:
                found[node] = words[node].problem
        return found

    def _end(self, plan: Plan, code: int, why: str, bad: Mapping[str, str] | None = None) -> Plan:
        excluded = {**plan.excluded, **(bad or {})}
        return Plan(plan.number + 1, (), excluded, end=code, why=why, time=time.time())

    def record(self, before: Plan | None, plan: Plan) -> None:
        """Say what was decided, where it is looked for: once, by the leader whose plan it is."""
        for node in plan.excluded.keys() - (before.excluded.keys() if before else ()):
            log.warning("%s is excluded: %s", node, plan.excluded[node])
        for old, new in zip(before.active if before else (), plan.active, strict=False):
            if old != new:
                log.warning("%s takes the place of %s", new, old)
        if plan.number > 1 or plan.end:
            log.warning("%s: %s", "The ranks are started again" if plan.end is None else "End", plan.why)
        told, directory = self._restarts.directory, self._restarts.directory_or_given
        if directory is None:
            return
        try:
            if plan.attempts and told is not None:
                append_line(directory / ATTEMPTS_FILE, plan.attempts[-1])
                (directory / STATUS_FILE).unlink(missing_ok=True)  # of the round that is over
            if plan.end and (before is None or plan.excluded.keys() - before.excluded.keys()):
                write_status(directory, plan.end, plan.why)
        except OSError as error:
            log.error("%s takes no line: %s", directory, error)
