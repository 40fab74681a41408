"""A real Slurm on this machine: a controller, and nodes with addresses of their own, for tests and measurements.

With root the nodes are network namespaces behind a bridge, each with its own address, host name and ports;
without it they are daemons on ports of the loopback interface (SCALEPEFT_CLUSTER=loopback asks for that).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
_SBIN = f"/usr/sbin{os.pathsep}/sbin"

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can be started here; empty when one can."""
    path = f"{os.environ.get('PATH', '')}{os.pathsep}{_SBIN}"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"no Slurm on this machine ({', '.join(absent)}); `make test-cluster` installs it" if absent else ""


class Cluster:
    """One controller and its nodes, node1 and so on, of `cpus` pretended cores each."""

    def __init__(self, folder: Path, *, nodes: int = 2, cpus: int = 4, grace: int = 20) -> None:
        self.folder, self.cpus, self.grace = folder, cpus, grace
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.namespaces = os.geteuid() == 0 and os.environ.get("SCALEPEFT_CLUSTER") != "loopback"
        number = os.getpid()
        self.subnet = f"10.{100 + number // 256 % 100}.{number % 256}"
        self.prefix = f"sp{number % 1_000_000}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}{os.pathsep}{_SBIN}",
        }

    def start(self) -> None:
        """Start all daemons and wait until the nodes are idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        self._configure()
        own = {name: f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        self.run("munged", "--force", f"--socket={self.folder}/munge.socket", *own.values())
        if self.namespaces:
            self._lay_cables()
        self.run("slurmctld", "-f", self.folder / "slurm.conf")
        for name in self.names:
            self.boot(name)
        self.until(lambda: self.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", str(len(self.names))], 60)

    def stop(self) -> None:
        """End all jobs and daemons, and take the network away."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user", str(os.getuid()), timeout=10)
        for name in self.names:
            self.crash(name)
        for name in ("slurmctld", "munge"):
            self._end(self.folder / f"{name}.pid")
        if self.namespaces:
            for name in self.names:
                subprocess.run(["ip", "netns", "del", f"{self.prefix}{name}"], check=False, capture_output=True)
            subprocess.run(["ip", "link", "del", f"{self.prefix}b"], check=False, capture_output=True)

    def boot(self, name: str) -> None:
        """Start a node's daemon."""
        if not self.namespaces:
            self.run("slurmd", "-N", name, "-f", self.folder / "slurm.conf")
            return
        inside = (
            f"hostname {name}; mount --bind {self.folder}/hosts /etc/hosts; exec slurmd -N {name} -f {self.folder}/slurm.conf"
        )
        # not `ip netns exec`, which mounts /sys anew: slurmd stops at that
        self.run("nsenter", f"--net=/run/netns/{self.prefix}{name}", "unshare", "--uts", "--mount", "sh", "-c", inside)

    def crash(self, name: str) -> None:
        """Kill everything on a node, as a power cut does but for the goodbye of its connections."""
        if not self.namespaces:
            self._end(self.folder / f"slurmd-{name}.pid")
            return
        found = subprocess.run(["ip", "netns", "pids", f"{self.prefix}{name}"], capture_output=True, text=True, check=False)
        for pid in map(int, found.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, *words: object, cwd: Path | None = None, timeout: float = 60, check: bool = True, **environment: str) -> str:
        """Run a command as a user of the cluster would; what it printed."""
        done = subprocess.run(
            list(map(str, words)), cwd=cwd, env=self.environment | environment, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def sbatch(self, *words: object, cwd: Path, **environment: str) -> int:
        """Queue a job; its number."""
        return int(self.run("sbatch", "--parsable", *words, cwd=cwd, **environment).split()[0])

    def job(self, number: int | str) -> dict[str, str]:
        """A job as Slurm sees it; empty when there is no such job."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number, check=False)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def state(self, number: int | str) -> str:
        """RUNNING, COMPLETED and so on."""
        return self.job(number).get("JobState", "")

    def ended(self, number: int | str, timeout: float = 300) -> str:
        """Wait for a job's end; its state."""
        self.until(lambda: self.state(number) in ENDED, timeout, lambda: str(self.job(number)))
        return self.state(number)

    @staticmethod
    def until(condition: Callable[[], object], timeout: float, told: Callable[[], str] = str) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not so after {timeout} s: {told()}"
            time.sleep(0.2)

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = []
        for number, name in enumerate(self.names, 1):
            where = f"NodeAddr={self.subnet}.{10 + number} NodeHostname={name} Port=6818"
            if not self.namespaces:
                where = f"NodeAddr=127.0.0.1 NodeHostname={host} Port={_free_port()}"
            nodes.append(f"NodeName={name} {where} CPUs={self.cpus} Gres=gpu:4 State=UNKNOWN")
        import getpass

        text = CONFIGURATION.format(
            host=host, address=f"{self.subnet}.1" if self.namespaces else "127.0.0.1", port=_free_port(), grace=self.grace,
            user=getpass.getuser(), folder=self.folder, nodes="\n".join(nodes),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        for number in range(4):  # GPUs that are none: what a job is told of them is what Slurm tells of real ones
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        gpus = f"NodeName={','.join(self.names)} Name=gpu File={self.folder}/gpu[0-3] Flags=nvidia_gpu_env\n"
        (self.folder / "gres.conf").write_text(gpus)
        known = [f"127.0.0.1 localhost\n{self.subnet}.1 {host}"]
        for number, name in enumerate(self.names, 1):
            known += [f"{self.subnet}.{10 + number} {name}", f"::ffff:{self.subnet}.{10 + number} {name}"]
        (self.folder / "hosts").write_text("\n".join(known) + "\n")

    def _lay_cables(self) -> None:
        bridge = f"{self.prefix}b"
        self.run("ip", "link", "add", bridge, "type", "bridge")
        self.run("ip", "addr", "add", f"{self.subnet}.1/24", "dev", bridge)
        self.run("ip", "link", "set", bridge, "up")
        for number, name in enumerate(self.names, 1):
            space, outer = f"{self.prefix}{name}", f"{self.prefix}v{number}"
            self.run("ip", "netns", "add", space)
            self.run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            self.run("ip", "link", "set", outer, "master", bridge, "up")
            self.run("ip", "-n", space, "addr", "add", f"{self.subnet}.{10 + number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self.run("ip", "-n", space, "link", "set", device, "up")

    @staticmethod
    def _end(file: Path) -> None:
        """End the daemon of a pid file; one that nobody has reaped yet counts as gone."""
        try:
            pid = int(file.read_text())
            os.kill(pid, signal.SIGTERM)
        except (OSError, ValueError):
            return
        for _ in range(50):
            try:
                if re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
                    return
            except OSError:
                return
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def cluster(folder: Path, **options: int) -> Iterator[Cluster]:
    """A cluster for as long as it is needed."""
    made = Cluster(folder, **options)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(words: Sequence[str]) -> int:
    """`python tests/cluster.py COMMAND ...`: run a command, a shell for one, with a cluster of three nodes."""
    import tempfile

    if told := missing():
        print(told, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder), nodes=3) as made:
        return subprocess.run(list(words) or ["bash"], env=made.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
