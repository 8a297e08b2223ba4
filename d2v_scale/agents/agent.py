"""A node's launcher among those of the job's other nodes."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol

from d2v_scale.agents.leading import Leader, named
from d2v_scale.agents.meeting import Meeting, Word
from d2v_scale.agents.plan import Plan
from d2v_scale.errors import EXIT_LOST_PEER

log = logging.getLogger("d2v_scale.train")

BEAT_S = 1.0
"""Between two words of a launcher that has nothing new to say."""
LOST_S = 40.0
"""A launcher that was heard before and says nothing for so long is lost, unless `joining.LOST_NODE` says otherwise: a
network file system may stand still for half a minute on one node."""
START_S = 120.0
"""The same for one that was never heard."""
REFUSED_S = 600.0
"""A meeting place that takes no plan for so long ends the job."""
_MOST_S = 2.0
"""No silence counts for more from one look to the next: what this process did not live through, and a file system
that stood still for all, are nobody's silence."""
_WATCHED = 3
"""Launchers before its own that one which does not lead listens to: the leader, and who follows it."""
EXIT_NO_PLAN = 1
"""Of launchers that could not agree any more."""
MOST_GONE = 64
"""Ranks that have ended and are named; where more have, none of the others is completing a checkpoint."""


class Ranks(Protocol):
    """A node's own ranks (`own_ranks`)."""

    count: int
    """How many a node has."""

    @property
    def failed(self) -> int:
        """The code of the one that failed first by itself."""

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a signal came that asks for an end."""

    def free_port(self) -> int:
        """Where ranks could meet on this node."""

    def start(self, plan: Plan, place: int, address: str, port: int) -> None:
        """Start those of the node at this place of the plan, which meet there."""

    def poll(self, elsewhere: int, gone: Collection[int]) -> int | None:
        """None as long as one lives. `elsewhere`: the code for which they are to end, 0: none; `gone`: ranks of all
        nodes that have ended, of very many only some."""

    def gone(self) -> tuple[int, ...]:
        """Those that have ended, by their numbers in the world."""

    def forget(self) -> None:
        """Those that have ended."""

    def kill(self) -> None:
        """End them."""


class Agent:
    """Take part in the job's rounds, by looking again and again (`step`)."""

    def __init__(
        self,
        node: str,
        addresses: Mapping[str, str],
        meeting: Meeting,
        ranks: Ranks,
        leader: Leader,
        *,
        problem: Callable[[], str] = str,
        lost_s: float = LOST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`addresses`: of all nodes, by name and in order. `problem`: why this node cannot train, "" if it can; asked
        while it is a spare. `lost_s`: see `LOST_S`; the same for all launchers of a job."""
        self._node, self._addresses, self._meeting, self._ranks, self._leader = node, addresses, meeting, ranks, leader
        self._problem, self._lost_s, self._clock = problem, lost_s, clock
        self.plan: Plan | None = None
        self._word, self._said = Word(), Word()
        self._words: dict[str, Word] = {}
        self._silent_s: dict[str, float] = {}
        self._looked, self._published = clock(), float("-inf")
        self._runs = False
        self._trouble, self._refused_since = "", 0.0

    @property
    def _excluded(self) -> Collection[str]:
        return self.plan.excluded if self.plan else ()

    def step(self) -> int | None:
        """Look, do what there is to do, and say so; the exit code when all is over. Cheap, many times a second."""
        now = self._clock()
        self._listen(min(now - self._looked, _MOST_S))
        self._looked = now
        newest = max((word.plan for word in self._words.values()), default=0)
        if newest > self._word.plan:
            self._adopt(self._meeting.plan(newest))
        if self.leads:
            self._lead(now)
        self._word.asked = self._ranks.is_asked_to_stop
        code = self._take_part()
        self._publish(now)
        return code

    # ------------------------------------------------------------------------------------------------------- listening

    def _is_silent(self, node: str) -> bool:
        return self._silent_s.get(node, 0.0) > (self._lost_s if node in self._words else START_S)

    @property
    def leads(self) -> bool:
        """Whether all before it are excluded or silent."""
        nodes = [*self._addresses]
        before = [node for node in nodes[: nodes.index(self._node)] if node not in self._excluded]
        return self._node not in self._excluded and all(self._is_silent(node) for node in before)

    def _listen(self, elapsed_s: float) -> None:
        others = [node for node in self._addresses if node != self._node and node not in self._excluded]
        if not self.leads:
            front = [node for node in others if not self._is_silent(node)][:_WATCHED]
            others = [node for node in others if node in front or (self.plan and node in self.plan.active[:1])]
        for node in others:
            word, before = self._meeting.read(node), self._words.get(node)
            if word is None or (before is not None and word.count == before.count):
                self._silent_s[node] = self._silent_s.get(node, 0.0) + elapsed_s
            else:
                self._words[node], self._silent_s[node] = word, 0.0

    def _publish(self, now: float) -> None:
        if self._word != self._said or now - self._published >= BEAT_S:
            self._word.count += 1
            self._meeting.publish(self._node, self._word)
            self._said, self._published = replace(self._word), now

    # ------------------------------------------------------------------------------------------------------ for all

    def _lead(self, now: float) -> None:
        words = {**self._words, self._node: self._word}
        silent = [node for node in self._addresses if node != self._node and self._is_silent(node)]
        if self.plan is None:
            found = self._leader.begin(words, silent)
        elif self.plan.end is None:
            found = self._leader.follow(self.plan, words, silent, now)
            if self._leader.failing:
                self._word.ends, self._word.failed = self.plan.number, self._leader.failing
                places = (place for place, node in enumerate(self.plan.active) if node in silent)
                count = self._ranks.count
                lost = {place * count + rank for place in places for rank in range(count)}
                self._word.gone = tuple(sorted(self._gone(self.plan) | lost))[:MOST_GONE]
        else:
            return
        if found is None:
            return
        try:
            holds = self._meeting.propose(found)
        except OSError as error:
            if not self._trouble:
                self._refused_since = now
            if str(error) != self._trouble:  # many looks a second
                log.error("The launchers' meeting place takes no plan: %s", error)
            self._trouble = str(error)
            if now - self._refused_since > REFUSED_S:
                self._word.gives_up = self._trouble
            return
        self._trouble = ""
        if holds == found:
            self._leader.record(self.plan, holds)
        self._adopt(holds)

    def _adopt(self, plan: Plan | None) -> None:
        if plan is not None and plan.number > self._word.plan:
            self.plan, self._word.plan = plan, plan.number

    # -------------------------------------------------------------------------------------------------------- its own

    def _take_part(self) -> int | None:
        plan = self.plan
        if refusal := next((word.gives_up for word in (self._word, *self._words.values()) if word.gives_up), ""):
            return self._give_up(refusal)
        if plan is not None and self._node in plan.active:
            self._word.problem = ""
            if self._word.round < plan.number:
                self._begin(plan)
            elif self._runs:
                self._tend(plan)
            return None
        if self._runs and not self._are_gone():
            return None
        if plan is not None and plan.end is not None:
            return plan.end
        if plan is not None and self._node in plan.excluded:
            log.error("%s: this node is excluded", named({self._node: plan.excluded[self._node]}))
            return EXIT_LOST_PEER
        self._word.problem = self._problem()
        return None

    def _give_up(self, refusal: str) -> int | None:
        """End without a plan that says so, as there is no place for one."""
        if self._runs and not self._are_gone():
            return None
        self._word.gives_up = refusal
        log.error(
            "The launchers' meeting place has taken no plan for %.0f s (%s): make room there, and start again with "
            "--resume.",
            REFUSED_S,
            refusal,
        )
        return EXIT_NO_PLAN

    def _are_gone(self) -> bool:
        """End ranks of an earlier round; whether the last is gone."""
        self._ranks.kill()
        if self._ranks.poll(EXIT_LOST_PEER, ()) is None:
            return False
        self._ranks.forget()
        self._runs = False
        return True

    def _orders(self, plan: Plan) -> list[Word]:
        """Words of leaders that end this round."""
        return [word for word in (self._word, *self._words.values()) if word.ends == plan.number]

    def _gone(self, plan: Plan) -> set[int]:
        """Ranks of this round that have ended, as far as it was heard."""
        words = (self._word, *self._words.values())
        return {rank for word in words if plan.number in (word.round, word.ends) for rank in word.gone}

    def _begin(self, plan: Plan) -> None:
        """Start this node's ranks of a round, or say that it is over before that."""
        if self._runs and not self._are_gone():
            return
        first, port = plan.active[0], 0
        is_over = bool(self._orders(plan))
        if not is_over:
            if first == self._node:
                port = self._ranks.free_port()
            elif (word := self._words.get(first)) is not None and word.round == plan.number:
                port = word.port
            if not port:
                return
            self._ranks.start(plan, plan.active.index(self._node), self._addresses[first], port)
            self._runs = True
        mine = port if first == self._node else 0
        self._word = replace(self._word, round=plan.number, port=mine, code=0, ended=is_over, gone=())

    def _tend(self, plan: Plan) -> None:
        orders = self._orders(plan)
        gone = self._gone(plan) | {*self._ranks.gone()}
        code = self._ranks.poll(orders[0].failed if orders else 0, gone)
        self._word.code, self._word.gone = self._ranks.failed, tuple(sorted(gone))[:MOST_GONE]
        if code is not None:
            self._word.ended, self._runs = True, False
            self._ranks.forget()
