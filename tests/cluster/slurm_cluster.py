"""A real Slurm cluster on this machine, for tests: every node is a set of Linux namespaces with a slurmd of its own.

    python tests/cluster/slurm_cluster.py FOLDER [COMMAND ...]     a shell, or a command, on the cluster's login node

A head (pid, network, host name, mounts and IPC of its own; slurmctld, munged) holds the nodes, each again with its own.
Killing a node's first process is a power cut; taking its link down is a cut cable. When the process that started the
cluster ends, however it ends, the kernel ends everything in it, and nothing else.

Needs root with CAP_SYS_ADMIN and Debian's slurmctld, slurmd, slurm-client, munge and iproute2.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc")
SUBNET = "10.77.0"
START_S = 30.0
PR_SET_PDEATHSIG = 1
SMALL_BYTES = 24 << 20
"""Size of the shared folder `small`, for full disks."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED"}

# cred_expire is also the time before a requeued job starts again; the short SlurmdTimeout makes dead nodes known soon.
# Daemons have a higher priority than jobs: a message that one misses on a busy machine is sent again a minute later,
# and then ends another step of the same number.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=head({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/run/munge.socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd.%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=5
SlurmdTimeout=10
KillWait=20
MessageTimeout=20
TCPTimeout=2
PropagatePrioProcess=1
BatchStartTimeout=5
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PriorityType=priority/basic
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_resolution=60
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
NodeName=node[1-{nodes}] NodeAddr={subnet}.[11-{last}] CPUs={cpus} RealMemory=200000 Gres=gpu:{cpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF State=UP
"""


class NotPermitted(RuntimeError):
    """Slurm or its namespaces cannot be had on this machine; the message says what is missing."""


class Cluster:
    """A running cluster; use as a context. Node names are node1, node2, ...; all see this machine's file systems.

    `folder/local` is a disk that each node has for itself, `folder/small` one of SMALL_BYTES that all share and only
    they see.
    """

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 8) -> None:
        self.folder, self.nodes, self.cpus = folder.resolve(), nodes, cpus
        self._asking = threading.Lock()

    # -- from outside ------------------------------------------------------------------------------------------

    def __enter__(self) -> "Cluster":
        # Debian's daemons lie where only root's PATH leads in every environment.
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        missing = [program for program in PROGRAMS if not shutil.which(program)]
        if missing:
            raise NotPermitted(
                f"no {', '.join(missing)}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge "
                "iproute2"
            )
        probe = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
        if probe.returncode:
            raise NotPermitted(f"namespaces are not permitted here: {probe.stderr.strip()}")
        self._write_configuration()
        with (self.folder / "log" / "head.log").open("ab") as log:
            self._head = subprocess.Popen(
                ["unshare", *NAMESPACES, "--fork", "--kill-child", sys.executable, __file__, "--head", str(self.folder),
                 str(self.nodes)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        try:
            self._ask("hello")
            self.pid = _only_child(self._head.pid)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._head.kill()  # its first process dies with it, and so everything in its namespace
        self._head.wait()

    def run(
        self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node."""
        outside = ("SLURM_", "SBATCH_", "SRUN_", "MASTER_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(outside)}
        environment |= {"SLURM_CONF": str(self.folder / "slurm.conf"), **(env or {})}
        enter = ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", "-p", "-i", "--"]
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd or Path.cwd()), *map(str, command)]
        done = subprocess.run([*enter, *inside], env=environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def job(self, job: int | str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "-o", "show", "job", str(job)).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: int | str, timeout_s: float = 480.0) -> dict[str, str]:
        """Wait until a job has ended, requeues included."""
        return self.wait_for(job, lambda found: found["JobState"] in ENDED, timeout_s)

    def wait_for(self, job: int | str, reached, timeout_s: float = 480.0) -> dict[str, str]:
        """Wait until what `scontrol show job` says satisfies `reached`."""
        deadline = time.monotonic() + timeout_s
        while not reached(found := self.job(job)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} after {timeout_s:g} s: {found['JobState']} {found.get('Reason')}")
            time.sleep(0.2)
        return found

    def wait_for_nodes(self, *names: str) -> None:
        """Wait until these nodes, or all, are idle or in use."""
        wanted = set(names) or {f"node{number}" for number in range(1, self.nodes + 1)}
        deadline = time.monotonic() + START_S
        while True:
            lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).stdout.splitlines()
            states = {name: state for name, state in map(str.split, lines) if name in wanted}
            if states.keys() == wanted and set(states.values()) <= {"idle", "mixed", "allocated"}:
                return
            if time.monotonic() > deadline:
                logs = "".join((self.folder / "log" / name).read_text() for name in ("head.log", "slurmctld.log"))
                raise TimeoutError(f"nodes after {START_S:g} s: {states}\n{logs[-3000:]}")
            time.sleep(0.05)

    def tidy(self, nodes: Sequence[str] = (), job_name: str | None = None) -> None:
        """Cancel all jobs, or those of this name; when they are gone, have these nodes, or all, take new ones."""
        which = (f"--name={job_name}",) if job_name else ()
        self.run("scancel", "--full", "-u", "root", *which, check=False)
        deadline = time.monotonic() + START_S
        while self.run("squeue", "-h", *which).stdout and time.monotonic() < deadline:
            time.sleep(0.1)
        self.run("scontrol", "update", f"NodeName={','.join(nodes) or 'ALL'}", "State=resume", check=False)
        self.wait_for_nodes(*nodes)

    def power_off(self, node: str) -> None:
        """A power cut: every process of the node is gone at once."""
        self._ask(f"kill {node}")

    def power_on(self, node: str) -> None:
        """Start a node again."""
        self._ask(f"start {node}")

    def unplug(self, node: str) -> None:
        """Cut a node's network; its processes live on."""
        self._ask(f"link {node} down")

    def plug_in(self, node: str) -> None:
        """Connect a node again."""
        self._ask(f"link {node} up")

    def on_node(self, node: str, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command among a node's processes and mounts."""
        enter = ["nsenter", "-t", self._ask(f"pid {node}"), "-n", "-u", "-m", "-p", "-i", "--"]
        return self.run(*enter, *command, check=check)

    def _ask(self, request: str) -> str:
        """Have the head do something; its answer."""
        assert self._head.stdin and self._head.stdout
        with self._asking:
            self._head.stdin.write(request + "\n")
            answer = self._head.stdout.readline()
        if not answer.startswith("ok"):
            log = (self.folder / "log" / "head.log").read_text()
            raise RuntimeError(f"{request}: {answer or log[-3000:]}")
        return answer.removeprefix("ok").strip()

    def _write_configuration(self) -> None:
        for name in ("run", "log", "state", "spool", "gpu", "local", "small"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "run" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for gpu in range(self.cpus):  # slurmd wants a character device of each GPU
            (self.folder / "gpu" / str(gpu)).symlink_to("/dev/null")
        names = [("head", 1), *((f"node{i}", 10 + i) for i in range(1, self.nodes + 1))]
        hosts = "".join(f"{SUBNET}.{number} {name}\n" for name, number in names)
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        text = CONFIGURATION.format(
            dir=self.folder, subnet=SUBNET, nodes=self.nodes, last=10 + self.nodes, cpus=self.cpus
        )
        (self.folder / "slurm.conf").write_text(text)
        gpus = f"NodeName=node[1-{self.nodes}] Name=gpu File={self.folder}/gpu/[0-{self.cpus - 1}]\n"
        (self.folder / "gres.conf").write_text("AutoDetect=off\n" + gpus)


# -- inside: the first process of the head's namespaces, and of each node's --------------------------------------------


class Head:
    """Starts the daemons and the nodes, and does what is asked on standard input."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, {}
        _own_machine(folder, "head")
        _run("mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs", folder / "small")
        _run("ip", "link", "add", "bridge", "type", "bridge")
        _run("ip", "address", "add", f"{SUBNET}.1/24", "dev", "bridge")
        _run("ip", "link", "set", "bridge", "up")
        run = folder / "run"
        _run(
            "munged", f"--key-file={run}/munge.key", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
            f"--log-file={folder}/log/munged.log", f"--seed-file={run}/munged.seed", "--force",
        )  # fmt: skip
        _daemon("slurmctld", folder)
        for number in range(1, nodes + 1):
            self.start(f"node{number}")

    def start(self, name: str) -> None:
        first = (sys.executable, __file__, "--node", self.folder, name)
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", *first]
        node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert node.stdin and node.stdout
        node.stdout.readline()  # its namespaces are there
        self.nodes[name] = (node, _only_child(node.pid))
        cable = ("veth", "peer", "name", "eth0", "netns", str(self.nodes[name][1]))
        _run("ip", "link", "add", f"to-{name}", "type", *cable)
        _run("ip", "link", "set", f"to-{name}", "master", "bridge", "up")
        node.stdin.write(b"connected\n")
        node.stdin.flush()

    def kill(self, name: str) -> None:
        node, _ = self.nodes.pop(name)
        node.kill()
        node.wait()
        subprocess.run(["ip", "link", "delete", f"to-{name}"], stderr=subprocess.DEVNULL)

    def link(self, name: str, state: str) -> None:
        _run("ip", "link", "set", f"to-{name}", state)

    def pid(self, name: str) -> str:
        return str(self.nodes[name][1])

    def serve(self) -> None:
        """Answer requests until the other side is gone."""
        actions = {"start": self.start, "kill": self.kill, "link": self.link, "pid": self.pid, "hello": lambda: None}
        for line in sys.stdin:
            name, *arguments = line.split()
            print("ok", actions[name](*arguments) or "", flush=True)


def node(folder: Path, name: str) -> None:
    """A node's first process: waits for its cable, starts slurmd, buries orphans."""
    _own_machine(folder, name)
    _run("mount", "-t", "tmpfs", "tmpfs", folder / "local")
    print("here", flush=True)
    sys.stdin.readline()
    _run("ip", "address", "add", f"{SUBNET}.{10 + int(name.removeprefix('node'))}/24", "dev", "eth0")
    _run("ip", "link", "set", "eth0", "up")
    _daemon("slurmd", folder)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.2)


def _own_machine(folder: Path, name: str) -> None:
    _run("mount", "--make-rprivate", "/")
    _run("mount", "-t", "proc", "proc", "/proc")
    _run("mount", "--bind", folder / "hosts", "/etc/hosts")
    _run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
    _run("hostname", name)
    _run("ip", "link", "set", "lo", "up")


def _daemon(program: str, folder: Path) -> None:
    with (folder / "log" / "daemons.log").open("ab") as log:
        nowhere = subprocess.DEVNULL
        command = ["nice", "-n", "-10", program, "-D", "-f", folder / "slurm.conf"]
        subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=log)


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def _only_child(pid: int) -> int:
    """Process id of what `unshare` forked, as seen here."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """The head's and the nodes' first process, or a person's shell."""
    kind, *rest = sys.argv[1:]
    if kind == "--head":
        Head(Path(rest[0]), int(rest[1])).serve()
    elif kind == "--node":
        node(Path(rest[0]), rest[1])
    else:
        with Cluster(Path(kind)) as cluster:
            print(f"nodes: {cluster.nodes}; logs: {cluster.folder}/log")
            enter = ["nsenter", "-t", str(cluster.pid), "-n", "-u", "-m", "-p", "-i", "--"]
            environment = os.environ | {"SLURM_CONF": str(cluster.folder / "slurm.conf")}
            return subprocess.run([*enter, *(rest or [os.environ.get("SHELL", "sh")])], env=environment).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
