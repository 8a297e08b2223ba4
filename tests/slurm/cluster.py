"""A private Slurm cluster of a few virtual nodes on this machine's loopback, for tests.

Debian's slurmd can pose as several nodes. Everything lives under one directory: own munge key and socket, own
configuration, no service of the system is touched, and /etc/hosts stays as it is. Usable by hand as well:

    python tests/slurm/cluster.py up /tmp/cluster      # prints what to export
    python tests/slurm/cluster.py down /tmp/cluster
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
INSTALL_COMMAND = "bash tests/slurm/install.sh  (apt-get install --no-install-recommends slurm-wlm munge)"

_CONFIGURATION = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/run/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
StateSaveLocation={dir}/state
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdPidFile={dir}/run/slurmd.%n.pid
SlurmdLogFile={dir}/log/slurmd.%n.log
SlurmdSpoolDir={dir}/spool.%n
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
MinJobAge=3600
KillWait=10
InactiveLimit=0
SlurmdTimeout=30
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
"""


def missing() -> list[str]:
    """The programs of a Slurm installation that are not here."""
    return [program for program in NEEDED if _find(program) is None]


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Cluster:
    """Daemons of one private cluster. `gpus` are pretended: Slurm counts them, nothing can be computed on them."""

    def __init__(self, directory: str | Path, *, nodes: int = 2, cpus: int = 8, gpus: int = 8) -> None:
        self.dir = Path(directory).resolve()
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.cpus, self.gpus = cpus, gpus
        self.env = {**os.environ, "SLURM_CONF": str(self.dir / "etc/slurm.conf")}
        for name in [name for name in self.env if name.startswith(("SBATCH_", "SLURM_JOB", "SLURM_STEP"))]:
            del self.env[name]

    def up(self) -> None:
        """Start the daemons and wait until every node is idle."""
        for name in ("etc", "run", "log", "state", "munge", *(f"spool.{node}" for node in self.nodes)):
            (self.dir / name).mkdir(parents=True, exist_ok=True)
        (self.dir / "munge").chmod(0o700)
        key = self.dir / "munge/munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self._configure()
        files = {"key-file": key, "seed-file": self.dir / "munge/seed", "log-file": self.dir / "log/munged.log"}
        files |= {"socket": self.dir / "run/munge.socket", "pid-file": self.dir / "run/munged.pid"}
        self._daemon("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
        self._daemon("slurmctld", "-c")
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: self.idle() == set(self.nodes), 60, f"nodes are not idle; see {self.dir}/log")

    def down(self) -> None:
        """Cancel all jobs and stop the daemons, by their process ids."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", "--full", "--user", getpass.getuser(), timeout=10, check=False)
            wait_until(lambda: not self.run("squeue", "-h", check=False).strip(), 20, "jobs do not end")
        names = [*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"]
        for name in names:
            self._stop(name)

    def __enter__(self) -> "Cluster":
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def run(
        self,
        *command: str,
        check: bool = True,
        timeout: float = 60,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Output of a Slurm client command."""
        done = subprocess.run(
            command,
            env={**self.env, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`; empty if Slurm does not know the job, or has no time to answer."""
        try:
            text = self.run("scontrol", "--oneliner", "show", "job", job_id, check=False)
        except subprocess.TimeoutExpired:  # on a machine that is busy with the job
            return {}
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def state(self, job_id: str) -> str:
        return self.job(job_id).get("JobState", "UNKNOWN")

    def release(self, job_id: str) -> None:
        """End the two minutes for which Slurm holds a requeued job.

        The nodes must have forgotten the job's last run: one that starts within seconds is refused as revoked.
        """
        wait_until(lambda: bool(self.idle()), 60, f"no node becomes idle; see {self.dir}/log")
        time.sleep(3)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)

    def revive(self, node: str) -> None:
        """Bring back a node that was set down. Slurm refuses it while the node completes a job, so more than once."""

        def is_up() -> bool:
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            return "down" not in self.run("sinfo", "-h", "-N", "-n", node, "-o", "%T", check=False)

        wait_until(is_up, 60, f"{node} stays down; see {self.dir}/log", every_s=1)

    def idle(self) -> set[str]:
        """Names of the nodes that wait for work."""
        try:
            return set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False, timeout=10).split())
        except subprocess.TimeoutExpired:
            return set()

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-N", node)

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(1 + len(self.nodes))
        lines = [_CONFIGURATION.format(host=host, port=ports[0], user=getpass.getuser(), dir=self.dir)]
        for node, port in zip(self.nodes, ports[1:], strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} Boards=1 "
                f"SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{self.gpus}\n"
            )
        everything = ",".join(self.nodes)
        lines.append(
            f"PartitionName=work Nodes={everything} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30\n"
        )
        lines.append(f"PartitionName=urgent Nodes={everything} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF\n")
        (self.dir / "etc/slurm.conf").write_text("".join(lines))
        devices = self.dir / "devices"  # a GPU needs a file to be counted; any file will do
        devices.mkdir(exist_ok=True)
        for index in range(self.gpus):
            (devices / f"gpu{index}").touch()
        last = self.gpus - 1
        (self.dir / "etc/gres.conf").write_text(f"Name=gpu File={devices}/gpu[0-{last}]\n" if self.gpus else "")

    def _daemon(self, program: str, *options: str) -> None:
        path = _find(program)
        assert path is not None, f"{program} is not installed"
        log = (self.dir / "log" / f"{program}.start.log").open("a")
        subprocess.run([path, *options], env=self.env, check=True, stdout=log, stderr=log, timeout=60)

    def _stop(self, name: str) -> None:
        pid_file = self.dir / "run" / f"{name}.pid"
        try:
            pid = int(pid_file.read_text())
        except (OSError, ValueError):
            return
        for number, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                end = time.monotonic() + patience_s
                while time.monotonic() < end:
                    os.kill(pid, 0)
                    time.sleep(0.1)
                continue
            break
        pid_file.unlink(missing_ok=True)


def wait_until(condition: Callable[[], bool], timeout_s: float, failure: str, every_s: float = 0.3) -> None:
    """Wait for a condition; AssertionError with `failure` when it does not come true in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, failure
        time.sleep(every_s)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def main() -> None:
    action, directory = sys.argv[1], sys.argv[2]
    cluster = Cluster(directory, nodes=int(os.environ.get("NODES", "2")))
    if action == "up":
        cluster.up()
        print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}")
    elif action == "down":
        cluster.down()
    else:
        sys.exit(f"unknown action {action!r}: up or down")


if __name__ == "__main__":
    main()
