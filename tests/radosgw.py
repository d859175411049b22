"""A real S3 server for tests: Ceph with one monitor, one disk in memory and one gateway.

Needs Debian's radosgw, ceph-mon, ceph-osd and ceph-common. Everything lies in one folder, listens
on 127.0.0.1, and ends by its process id.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOOLS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
ACCESS_KEY = "testing"
SECRET_KEY = "testing-secret"

_CONFIG = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port},v1:127.0.0.1:{old_mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
ms bind port min = {osd_port}
ms bind port max = {last_osd_port}
keyring = {folder}/keyring
run dir = {folder}/run
log file = {folder}/$name.log
admin socket = {folder}/run/$name.asok
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 2
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


def missing_tools() -> list[str]:
    """The programs that are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


class Radosgw:
    """The running server. The gateway alone can be stopped and started: its data stays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("mon", "osd", "rgw", "run"):
            (folder / name).mkdir(parents=True)
        port, mon_port, old_mon_port, osd_port = _free_ports()
        self.endpoint_url = f"http://127.0.0.1:{port}"
        self._fsid = str(uuid.uuid4())
        config = _CONFIG.format(
            fsid=self._fsid,
            folder=folder,
            port=port,
            mon_port=mon_port,
            old_mon_port=old_mon_port,
            osd_port=osd_port,
            last_osd_port=osd_port + 40,
        )
        (folder / "ceph.conf").write_text(config)
        self._mon_address = f"[v2:127.0.0.1:{mon_port},v1:127.0.0.1:{old_mon_port}]"
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all three, and make the user whose keys are above."""
        keyring = str(self._folder / "keyring")
        self._call(
            "ceph-authtool", "-C", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"
        )
        for name in ("client.admin", "osd.0", "client.rgw"):
            caps = [word for part in ("mon", "osd", "mgr") for word in ("--cap", part, "allow *")]
            self._call("ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
        monmap = str(self._folder / "monmap")
        self._call(
            "monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", self._mon_address, monmap
        )
        self._call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._begin("mon", "ceph-mon", "-i", "a", "-f")
        osd = str(uuid.uuid4())
        self._call("ceph", "osd", "new", osd, "0")
        self._call("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=here")
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._begin("osd", "ceph-osd", "-i", "0", "-f")
        self._wait(lambda: "1 up" in self._call("ceph", "osd", "stat"), "the disk")
        self.start_gateway()
        self._call(
            "radosgw-admin", "user", "create", "--uid=t", "--display-name=t",
            f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}",
        )  # fmt: skip

    def start_gateway(self) -> None:
        """Start the gateway and wait until it answers."""
        self._begin("rgw", "radosgw", "-n", "client.rgw", "-f")
        self._wait(self._answers, "the gateway")

    def stop_gateway(self) -> None:
        """Stop the gateway at once, as a crash does."""
        process = self._running.pop("rgw")
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End everything that :meth:`start` started."""
        for process in reversed(self._running.values()):
            process.kill()
            process.wait()
        self._running.clear()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint_url, timeout=2):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _begin(self, name: str, program: str, *arguments: str) -> None:
        with (self._folder / f"{name}.out").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [program, *arguments, "-c", str(self._folder / "ceph.conf")],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _call(self, program: str, *arguments: str) -> str:
        has_config = program not in {"ceph-authtool", "monmaptool"}
        config = ["-c", str(self._folder / "ceph.conf")] if has_config else []
        done = subprocess.run(
            [program, *config, *arguments], capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr[-2000:]}")
        return done.stdout

    def _wait(self, until: object, what: str) -> None:
        assert callable(until)
        for _ in range(300):
            for name, process in self._running.items():
                if process.poll() is not None:
                    log = (self._folder / f"{name}.out").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{name} ended with {process.returncode}: {log}")
            if until():
                return
            time.sleep(0.1)
        raise RuntimeError(f"{what} does not come up")


@contextmanager
def radosgw(folder: Path) -> Iterator[Radosgw]:
    """A server in ``folder`` for as long as it is needed."""
    missing = missing_tools()
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}")
    server = Radosgw(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _free_ports() -> tuple[int, int, int, int]:
    """Four free ports, the last the first of many."""
    sockets = [socket.socket() for _ in range(3)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        first, second, third = (int(item.getsockname()[1]) for item in sockets)
    finally:
        for item in sockets:
            item.close()
    # Below the range from which the system gives ports, and apart for several sessions.
    return first, second, third, 20_000 + os.getpid() % 200 * 50
