"""Launchers without processes, clocks or disks: their ranks fail as a test says, and time passes as it says."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from d2v_scale.agents.agent import Agent
from d2v_scale.agents.leading import Leader
from d2v_scale.agents.meeting import Word
from d2v_scale.agents.plan import Plan
from d2v_scale.process.status import write_status
from d2v_scale.running.restarts import Restarts

LOOK_S = 0.5
"""Between two looks of a launcher."""


class Memory:
    """A meeting that everybody sees at once."""

    def __init__(self) -> None:
        self.words: dict[str, Word] = {}
        self.plans: dict[int, Plan] = {}

    def publish(self, node: str, word: Word) -> None:
        self.words[node] = replace(word)

    def read(self, node: str) -> Word | None:
        return self.words.get(node)

    def plan(self, number: int) -> Plan | None:
        return self.plans.get(number)

    def propose(self, plan: Plan) -> Plan:
        return self.plans.setdefault(plan.number, plan)


class Pretended:
    """A node's two ranks: they live until they are told a code, or that others have failed."""

    count = 2

    def __init__(self) -> None:
        self.failed = 0
        self.is_asked_to_stop = False
        self.rounds: list[tuple[int, int, str, int]] = []
        """Round, place, address and port of each start."""
        self.lives = False
        self.ends_with: int | None = None
        self.is_deaf = False
        """Nothing ends them."""

    def free_port(self) -> int:
        return 1000 + len(self.rounds)

    def start(self, plan: Plan, place: int, address: str, port: int) -> None:
        assert not self.lives, "ranks of two rounds at once"
        self.rounds.append((plan.number, place, address, port))
        self.lives = True

    def poll(self, elsewhere: int, gone: Collection[int]) -> int | None:
        if self.ends_with is not None and not self.is_deaf:
            self.failed = self.ends_with
            self.lives = False
            return self.failed
        if elsewhere and not self.is_deaf:
            self.lives = False
        return None if self.lives else 0

    def gone(self) -> tuple[int, ...]:
        return () if self.lives or not self.rounds else (2 * self.rounds[-1][1],)

    def forget(self) -> None:
        assert not self.lives
        self.failed, self.ends_with = 0, None

    def kill(self) -> None:
        if not self.is_deaf:
            self.lives = False


@dataclass
class Job:
    """The launchers of a job, all in one process."""

    run_dir: Path
    nodes: Sequence[str]
    spares: int
    restarts: int = 2
    unfit: dict[str, str] = field(default_factory=dict)
    script: str = ""
    """The node of the job's script."""

    def __post_init__(self) -> None:
        self.now = 0.0
        self.meeting = Memory()
        self.run_dir.mkdir()
        (self.run_dir / "meet").mkdir()
        self.tell()
        self.ranks = {node: Pretended() for node in self.nodes}
        self.problems = dict.fromkeys(self.nodes, "")
        self.agents = {node: self._agent(node) for node in self.nodes}
        self.codes: dict[str, int] = {}
        self.away: set[str] = set()
        """Launchers that do not live, or are stopped."""

    def tell(self) -> None:
        """Rank 0 says where the run directory is."""
        (self.run_dir / "meet/run_dir").write_text(str(self.run_dir))

    def _agent(self, node: str) -> Agent:
        deciding = Restarts(self.restarts, self.run_dir / "meet", ["--run_dir", str(self.run_dir)])
        leader = Leader(self.nodes, len(self.nodes) - self.spares, deciding, self.unfit, self.script)
        addresses = {name: f"10.0.0.{name[1:]}" for name in self.nodes}
        given = (node, addresses, self.meeting, self.ranks[node], leader)
        return Agent(*given, problem=lambda: self.problems[node], clock=lambda: self.now)

    def passes(self, seconds: float) -> None:
        """Everybody looks, again and again."""
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_S
            for node, agent in self.agents.items():
                if node not in self.away and node not in self.codes and (code := agent.step()) is not None:
                    self.codes[node] = code

    def lose(self, *nodes: str) -> None:
        """Launchers go, and their ranks with them."""
        for node in nodes:
            self.away.add(node)
            self.ranks[node].lives = False

    def saves(self, step: int) -> None:
        """A checkpoint."""
        (self.run_dir / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (self.run_dir / f"checkpoints/step-{step:08d}/COMMITTED").touch()

    def says(self, code: int, reason: str) -> None:
        """A rank writes status.json."""
        write_status(self.run_dir, code, reason)

    @property
    def plan(self) -> Plan:
        """The newest."""
        return self.meeting.plans[max(self.meeting.plans)]

    def training(self) -> dict[str, int]:
        """Nodes whose ranks live, and the round that they are of."""
        return {node: one.rounds[-1][0] for node, one in self.ranks.items() if one.lives}
