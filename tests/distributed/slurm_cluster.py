"""A SLURM cluster of two nodes on this machine: slurmctld, two slurmd and munged, all of it in one folder.

Debian's packages will do (apt-get install slurm-wlm munge): their slurmd takes a node's name, so that several run
on one machine. Nothing of the system's own configuration is read or written. The daemons need root: slurmd starts
jobs as their users.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("node1", "node2")

CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=ALL Default=YES MaxTime=60
"""
# cred_expire is how long a job that is queued again waits, too; the default is two minutes.


def why_not() -> str:
    """Why there can be no cluster here; '' if there can."""
    if missing := [name for name in DAEMONS if not _find(name)]:
        return f"there is no {', '.join(missing)} (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    return ""


@contextlib.contextmanager
def started(folder: Path) -> Iterator[dict[str, str]]:
    """Starts the cluster, and ends it with all its jobs.

    Yields:
        The variables of the environment that SLURM's commands find it by.
    """
    folder.mkdir(mode=0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=_free_ports(3)))
    environment = {"SLURM_CONF": str(conf)}
    try:
        _run(
            *("munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"),
            *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"),
        )
        _run("slurmctld", "-f", conf)
        for node in NODES:
            (folder / node).mkdir()
            _run("slurmd", "-N", node, "-f", conf)
        _wait_for_nodes(environment)
        yield environment
    finally:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            jobs = ["scancel", "--me", "--signal=KILL", "--full"]
            subprocess.run(jobs, env=os.environ | environment, timeout=20)
        for pid_file in [*(folder / f"{node}.pid" for node in NODES), *map(folder.joinpath, _CONTROLLERS)]:
            with contextlib.suppress(OSError, ValueError):
                _end(int(pid_file.read_text()))


_CONTROLLERS = ("slurmctld.pid", "munged.pid")


def _find(name: str) -> str | None:
    """Daemons may lie where only root looks."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _run(daemon: str, *arguments: str | Path) -> None:
    """Starts a daemon, which goes to the background by itself."""
    program = _find(daemon)
    assert program
    # Not in a pipe, which it would keep open.
    subprocess.run(
        [program, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True, timeout=60
    )


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_for_nodes(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        asked = ["sinfo", "--noheader", "--Node", "--format=%T"]
        done = subprocess.run(asked, env=os.environ | environment, capture_output=True, text=True, timeout=60)
        if done.stdout.split() == ["idle"] * len(NODES):
            return
        time.sleep(0.2)
    raise TimeoutError(f"the nodes did not come up: {done.stdout or done.stderr}")


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
