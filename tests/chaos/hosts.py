"""Two hosts on this machine, with a cable between them that can be cut: network namespaces, and in
each of them a Ray node that nobody outside can reach. Disks are shared, so storage stays in reach.

Needs the right to make namespaces, and ``ip`` of iproute2.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.integration.conftest import ROOT, Command

_PORT = 6399
_IPS = {"near": "10.213.77.1", "far": "10.213.77.2"}
_START_S = 60.0


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def can_make_hosts() -> bool:
    """Whether this process may make network namespaces."""
    return shutil.which("ip") is not None and os.geteuid() == 0


class Hosts:
    """The host ``near`` has the cluster's head, ``far`` another node; each can hold a worker."""

    address = f"{_IPS['near']}:{_PORT}"

    def __init__(self, names: Mapping[str, str], folder: Path) -> None:
        self._names = names
        self._folder = folder

    def start_ray(self, system_config: Mapping[str, object]) -> None:
        """Start both nodes."""
        common = ["--num-cpus=1", "--object-store-memory=83886080", "--disable-usage-stats"]
        head = ["--head", f"--port={_PORT}", "--include-dashboard=false"]
        head += [f"--temp-dir={self._folder}", f"--system-config={json.dumps(system_config)}"]
        for host, options in (("near", head), ("far", [f"--address={self.address}"])):
            own = [f"--node-ip-address={_IPS[host]}", "--block"]
            log = self._folder / f"{host}.log"
            with log.open("w") as output:
                self._start(
                    host, "ray.scripts.scripts", "start", *options, *common, *own, output=output
                )
            deadline = time.monotonic() + _START_S
            while "Ray runtime started" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)

    def batchrun(self, *arguments: object) -> Command:
        """The command, on the near host."""
        return Command(
            self._start("near", "batchrun", *map(str, arguments), output=subprocess.PIPE)
        )

    def cut(self) -> None:
        """From now on nothing gets from one host to the other."""
        _ip("-n", self._names["far"], "link", "set", "cable", "down")

    def mend(self) -> None:
        """The cable is whole again."""
        _ip("-n", self._names["far"], "link", "set", "cable", "up")

    def workers(self, host: str) -> set[int]:
        """The batchrun workers of a host."""
        return {pid for pid in self._pids(host) if _title(pid).startswith("ray::Worker")}

    def end(self) -> None:
        """Nobody is left on either host."""
        for host in self._names:
            for pid in self._pids(host):
                os.kill(pid, signal.SIGKILL)

    def _pids(self, host: str) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self._names[host]).split()]

    def _start(
        self, host: str, module: str, *arguments: str, output: object
    ) -> subprocess.Popen[str]:
        enter = ["ip", "netns", "exec", self._names[host]]
        environ = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        return subprocess.Popen(
            [*enter, sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environ,
            text=True,
            stdout=output,  # type: ignore[arg-type]
            stderr=subprocess.STDOUT if output is not subprocess.PIPE else output,
        )


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """The hosts, with a cable between them; all of it is gone at the end."""
    names = {host: f"batchrun-{os.getpid()}-{host}" for host in _IPS}
    # A short name: Ray's sockets lie below it.
    folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))
    hosts = Hosts(names, folder)
    try:
        for name in names.values():
            _ip("netns", "add", name)
        cable = ["link", "add", "cable", "netns", names["near"], "type", "veth"]
        _ip(*cable, "peer", "name", "cable", "netns", names["far"])
        for host, name in names.items():
            _ip("-n", name, "addr", "add", f"{_IPS[host]}/30", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        yield hosts
    finally:
        hosts.end()
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
