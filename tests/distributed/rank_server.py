"""A process that has imported what ranks need, and becomes a rank again and again: it forks.

The imports take longer than most of what tests do in a rank. `launch` starts this program once and writes requests to
its standard input, one JSON object a line: `{"script", "arguments", "cwd", "environment", "log", "fresh"}` is answered
with the pid of a fork that goes on as that script; `{"poll": pid}` with its exit code, or null while it runs.
"""

import gc
import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any, TextIO

from d2v_scale.parallel import groups
from d2v_scale.process import faults

PRELOADED = (
    *(
        "d2v_scale.pretraining.engines",
        "d2v_scale.command_line",
        "d2v_scale.pretraining.observing",
        "d2v_scale.running.supervision",
    ),
    *("d2v_scale.evaluation.online", "d2v_scale.finetuning.program", "d2v_scale.pretraining.program"),
    *("d2v_scale.running.loop", "d2v_scale.process.profiling", "d2v_scale.process.watchdog"),
)


def serve(requests: TextIO, answers: TextIO) -> dict[str, Any] | None:
    """Answer until the input ends. Returns in the forks, too: there with the request that they are to carry out."""
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), file=answers, flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Run the script as if the interpreter had been started with it; or start one, where the request says so."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, number)
    os.chdir(request["cwd"])
    if request["fresh"]:
        command = [sys.executable, request["script"], *request["arguments"]]
        os.execve(sys.executable, command, request["environment"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["script"], *request["arguments"]]
    faults.arm(os.environ.get("D2V_FAULT", ""))  # which the environment of the server had none of
    sys.path[0] = str(Path(request["script"]).parent)
    runpy.run_path(request["script"], run_name="__main__")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    groups.prepare_accelerator()
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    gc.freeze()  # a rank does not collect what was made here
    request = serve(sys.stdin, answers)
    answers.close()
    if request is not None:
        become(request)


if __name__ == "__main__":
    main()
