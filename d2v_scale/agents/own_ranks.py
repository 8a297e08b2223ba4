"""The ranks of this launcher's node, and whether the node could have some."""

import json
import subprocess
import sys
import time
from collections.abc import Collection, Mapping

from d2v_scale.agents.agent import MOST_GONE
from d2v_scale.agents.plan import Plan
from d2v_scale.parallel import local_ranks
from d2v_scale.process.started import EXCLUDED, RESTART, STARTED, started
from d2v_scale.running.restarts import Restarts

CHECK_EVERY_S = 600.0
"""Between two looks at a spare node's devices. At the job's start preflight has looked."""
_CHECK = """
import sys
from d2v_scale.running.preflight import device_problems
print("; ".join(dict.fromkeys(problem for rank in range(int(sys.argv[1])) for problem in device_problems(rank))))
"""


class OwnRanks:
    """The ranks of one node in the rounds that it takes part in."""

    def __init__(self, command: list[str], count: int, environment: Mapping[str, str], restarts: Restarts) -> None:
        """`command`: of each rank; `count`: how many a node has, as on all nodes; `environment`: for them."""
        self.count, self._restarts = count, restarts
        left = (*local_ranks.LEFTOVERS, STARTED)
        self._command, self._environment = command, {k: v for k, v in environment.items() if k not in left}
        self._started = str(environment.get(STARTED, started()))
        self.group = local_ranks.Ranks(restarts=True, is_saving=self._is_saving)
        self._first_rank = 0
        self._gone: Collection[int] = ()

    @property
    def failed(self) -> int:
        """The code of the one that failed first by itself."""
        return self.group.failed

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a signal came that asks for an end."""
        return self.group.is_asked_to_stop

    def free_port(self) -> int:
        """Where ranks could meet on this node."""
        return local_ranks.free_port()

    def start(self, plan: Plan, place: int, address: str, port: int) -> None:
        """Start those of the node at this place of the plan, which meet there."""
        self._first_rank = place * self.count
        common = {**self._environment, **self._restarts.environment}
        common |= {"WORLD_SIZE": str(len(plan.active) * self.count), "LOCAL_WORLD_SIZE": str(self.count)}
        common |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), RESTART: str(plan.number - 1)}
        common |= {STARTED: str(plan.time) if plan.number > 1 else self._started, EXCLUDED: json.dumps(plan.excluded)}
        places = ({"RANK": str(self._first_rank + rank), "LOCAL_RANK": str(rank)} for rank in range(self.count))
        self.group.start([*self._command, *plan.further], ({**common, **own} for own in places))

    def poll(self, elsewhere: int, gone: Collection[int]) -> int | None:
        """None as long as one lives. `elsewhere`: the code for which they are to end, 0: none; `gone`: ranks of all
        nodes that have ended, of very many only some."""
        self._gone = gone
        return self.group.poll(elsewhere)

    def _is_saving(self, ended: Collection[int]) -> bool:
        gone = {*self._gone, *(self._first_rank + rank for rank in ended)}
        return len(gone) < MOST_GONE and self._restarts.is_saving(gone)

    def gone(self) -> tuple[int, ...]:
        """Those that have ended, by their numbers in the world."""
        return tuple(self._first_rank + rank for rank in self.group.ended)

    def forget(self) -> None:
        """Those that have ended."""
        self.group.forget()

    def kill(self) -> None:
        """End them."""
        self.group.kill()


class Devices:
    """Looks now and then, in a process of its own, whether this node's devices compute."""

    def __init__(self, count: int, environment: Mapping[str, str], problem: str = "") -> None:
        """`count`: of ranks on a node. `problem`: what is known already."""
        self._command, self._environment = [sys.executable, "-c", _CHECK, str(count)], environment
        self._process: subprocess.Popen[str] | None = None
        self._next = time.monotonic() + CHECK_EVERY_S
        self._problem = problem

    def end(self) -> None:
        """Look no more."""
        if self._process is not None:
            self._process.kill()

    def problem(self) -> str:
        """What the last look found; "" for nothing."""
        is_due = time.monotonic() >= self._next
        if self._process is not None and self._process.poll() is not None:
            said = self._process.communicate()[0].splitlines()  # libraries may say more before
            self._problem = said[-1] if self._process.returncode == 0 and said else "its devices cannot be asked"
            self._process = None
        elif self._process is not None and is_due:
            self._process.kill()
            self._problem = f"its devices have not answered for {CHECK_EVERY_S:.0f} s"
        elif is_due:
            self._next = time.monotonic() + CHECK_EVERY_S
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=pipe, text=True)
        return self._problem
