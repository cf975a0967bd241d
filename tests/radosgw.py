"""A throw-away Ceph object gateway on the loopback interface: real S3, with signatures and multipart uploads."""

import contextlib
import os
import shutil
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.helpers.processes import free_port

PROGRAMS = ("ceph-authtool", "monmaptool", "ceph-mon", "ceph", "ceph-osd", "ceph-mgr", "radosgw-admin", "radosgw")
INSTALL = "apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd ceph-mgr"
KEY, SECRET = "TESTKEY", "TESTSECRET"
PATIENCE = 300
"""Seconds for a single command; on a quiet machine all together take about 20."""

CONFIGURATION = """
[global]
fsid = {fsid}
run dir = {folder}/run
admin socket = {folder}/run/$cluster-$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/log/$name.log
keyring = {folder}/keyring
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
mon host = v1:127.0.0.1:{monitor}
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
[mon.0]
mon initial members = 0
mon cluster log file = {folder}/log/mon-cluster.log
chdir = ""
mon data = {folder}/mon
mon data avail crit = 0
mon data avail warn = 0
mon addr = v1:127.0.0.1:{monitor}
auth allow insecure global id reclaim = true
[osd.0]
chdir = ""
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = 4294967296
bluestore block db size = 0
bluestore block wal size = 0
osd memory target = 939524096
osd class load list = *
osd class default list = *
[mgr.x]
mgr data = {folder}/mgr
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
rgw run sync thread = false
rgw thread pool size = 32
"""
ALL, OSD = ["--cap", "osd", "allow *"], ["--cap", "mon", "allow profile osd"]
KEYRING = {
    "mon.": ["--cap", "mon", "allow *"],
    "client.admin": ["--cap", "mon", "allow *", *ALL, "--cap", "mgr", "allow *", "--cap", "mds", "allow *"],
    "osd.0": [*OSD, *ALL, "--cap", "mgr", "allow profile osd"],
    "mgr.x": [*OSD, *ALL, "--cap", "mds", "allow *"],
    "client.rgw": ["--cap", "mon", "allow *", *ALL, "--cap", "mgr", "allow *"],
}


class Gateway:
    """A one-node cluster in `folder`. `url` is the gateway's address; `stop` and `kill` end the gateway alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        for name in ("log", "mon", "mgr", "osd", "rgw", "run"):
            (folder / name).mkdir(parents=True)
        self.fsid, self.monitor = str(uuid.uuid4()), free_port()
        file = folder / "ceph.conf"
        file.write_text(CONFIGURATION.format(folder=folder, fsid=self.fsid, port=port, monitor=self.monitor).lstrip())
        self.environment = os.environ | {"CEPH_CONF": str(file)}

    def run(self, *command: str) -> None:
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, timeout=PATIENCE, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")

    def start(self) -> None:
        """Make the cluster and start everything; the programs put themselves into the background."""
        keyring = str(self.folder / "keyring")
        for number, (name, rights) in enumerate(KEYRING.items()):
            made = [] if number else ["--create-keyring"]
            self.run("ceph-authtool", *made, keyring, "--gen-key", "-n", name, *rights)
        # Without a map the monitor does not find itself at any but the usual port, and waits for others for ever.
        monitors, address = str(self.folder / "monitors"), f"[v1:127.0.0.1:{self.monitor}]"
        self.run("monmaptool", "--create", "--fsid", self.fsid, "--addv", "0", address, monitors)
        self.run("ceph-mon", "--id", "0", "--mkfs", "--keyring", keyring, "--monmap", monitors)
        self.run("ceph-mon", "--id", "0")
        self.run("ceph", "osd", "create")
        self.run("ceph", "osd", "crush", "add", "osd.0", "1", "root=default")
        self.run("ceph-osd", "--id", "0", "--mkfs")
        self.run("ceph-osd", "--id", "0")
        self.run("ceph-mgr", "--id", "x")
        keys = (f"--access-key={KEY}", f"--secret={SECRET}")
        self.run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)
        self.start_gateway()

    def start_gateway(self) -> None:
        self.run("radosgw", "--id", "rgw", "-n", "client.rgw")

    def kill_gateway(self) -> None:
        self._end(self.folder / "run/client.rgw.pid", signal.SIGKILL)

    def end(self) -> None:
        for file in sorted((self.folder / "run").glob("*.pid")):
            self._end(file, signal.SIGKILL)

    def _end(self, file: Path, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
            os.kill(int(file.read_text()), number)
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def running(folder: Path):
    """A started gateway; skips the test, with what to install, where Ceph is not."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"Ceph is not installed ({', '.join(lacking)}): {INSTALL}")
    gateway = Gateway(folder)
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.end()
