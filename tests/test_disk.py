"""A disk that is full, and a machine that crashes: one line that says what and why, and nothing half under its name."""

import ast
import errno
import os
import sqlite3
from pathlib import Path

import pytest
import torch

from clear.data.io import asked_again, replacing, write_json, write_text
from clear.data.records import ShardWriter
from clear.data.rejects import Reject, write_rejects
from clear.errors import ClearError
from clear.llm import ledger
from clear.llm.ledger import ReplyStore
from clear.model.checkpoint import save_tensors, write_folder
from clear.traces.table import TraceRow, write_traces
from tests.conftest import ROOT
from tests.helpers.tables import write_tsv
from tests.kill.disk import PLENTY, mounted

MOVES = {"clear/project/retrain/intake.py", "clear/project/scratch.py", "clear/training/loop/run.py"}
"""What renames folders that are not new, or on their way out."""


@pytest.fixture(scope="module")
def small():
    """A disk of one page to spare."""
    with mounted() as disk:
        if disk is None:
            pytest.skip("only root mounts a small disk")
        disk.leave(4096)
        yield disk.folder


def test_tensors_that_find_no_room_are_refused_as_any_file_is(small):
    with pytest.raises(OSError, match="No space left") as refused:
        save_tensors({"a": torch.zeros(100_000)}, small / "a.safetensors")
    assert (refused.value.errno, refused.value.filename) == (errno.ENOSPC, str(small / "a.safetensors"))
    assert not list(small.iterdir())


def test_a_checkpoint_that_torch_could_not_write_says_that_the_disk_is_full(small):
    with pytest.raises(OSError, match="No space left") as refused, asked_again(small):
        torch.save({"a": torch.zeros(100_000)}, small / "optimizer.pt")
    assert refused.value.filename == str(small) and isinstance(refused.value.__cause__, RuntimeError)
    assert [file.name for file in small.iterdir()] == ["optimizer.pt"], "what asked is gone"
    (small / "optimizer.pt").unlink()


def test_an_error_that_is_not_the_disk_s_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes differ"), asked_again(tmp_path):
        raise RuntimeError("shapes differ")
    assert not list(tmp_path.iterdir())


def test_tables_are_whole_or_not_there(small, clear, tmp_path):
    with pytest.raises(OSError, match="No space left"):
        write_traces(small, [TraceRow(*[os.urandom(2000).hex() for _ in range(9)], False) for _ in range(10)])
    assert not list(small.iterdir())
    said = {"A": "red", "B": "blue", "answer": "A", "prediction": "A"}
    asked = [{"index": n, "question": os.urandom(200).hex(), **said} for n in range(100)]
    table = write_tsv(tmp_path / "MMStar.tsv", asked)
    status, _, stderr = clear("score", table, "--rows", small / "rows.parquet")
    said = f"error: {small / 'rows.parquet'}: No space left on device; free some space there, then run the command "
    assert status == 1 and stderr.endswith(f"{said}again.\n")
    assert not list(small.iterdir())


def test_paid_replies_outlive_a_full_disk_which_is_not_called_a_damaged_file():
    with mounted() as disk:
        if disk is None:
            pytest.skip("only root mounts a small disk")
        store = ReplyStore(disk.folder / "replies.sqlite")
        paid = ("first", 1, 1, False)
        store.settle(store.reserve("a", 0.1, 1.0)[0], 0.1, "a", paid)
        disk.leave(16384)
        full = pytest.raises(ClearError, match=r"replies\.sqlite: No space left on device; free some space there")
        ticket, _ = store.reserve("b", 0.1, 1.0)
        with full:
            store.settle(ticket, 0.1, "b", ("long" * 20_000, 1, 1, False))
        assert store.get("a") == paid and store.get("b") is None
        disk.leave(PLENTY)
        store.settle(ticket, 0.1, "b", ("long" * 20_000, 1, 1, False))
        assert store.totals()["replies"] == 2 and abs(store.totals()["spent_usd"] - 0.2) < 1e-9
        store.close()
        disk.forbid()
        for name, why in (("replies", "Read-only file system"), ("other", "Permission denied")):
            with pytest.raises(ClearError, match=rf"{name}\.sqlite: {why}; check the permissions"):
                ReplyStore(disk.folder / f"{name}.sqlite")


def test_a_cache_that_another_process_holds_is_not_called_damaged(tmp_path, monkeypatch):
    """The remedy for a damaged one, to move it away, pays for everything again."""
    monkeypatch.setattr(ledger, "WAIT", 0.1)
    store, other = (
        ReplyStore(tmp_path / "t.sqlite"),
        sqlite3.connect(tmp_path / "t.sqlite", isolation_level=None),
    )
    other.execute("BEGIN EXCLUSIVE")
    for use in (lambda: store.get("a"), lambda: store.reserve("a", 1.0, 2.0), lambda: ReplyStore(store.path)):
        with pytest.raises(ClearError, match=r"t\.sqlite: another process has held it for 0\.1 s; end that one"):
            use()
    other.execute("COMMIT")
    assert store.reserve("a", 1.0, 2.0)[0] is not None


def test_sqlite_waits_until_a_reservation_is_on_the_disk(tmp_path):
    """NORMAL, a third faster, lets a crash of the machine undo what was committed, or damage the file."""
    assert ReplyStore(tmp_path / "replies.sqlite")._db.execute("PRAGMA synchronous").fetchone()[0] >= 2


@pytest.fixture
def crash(monkeypatch):
    """The names of the files that a crash of the machine could leave empty: renamed before they were on the disk."""
    on_disk, lost, fsync, rename = set(), [], os.fsync, os.rename

    def synced(descriptor: int) -> None:
        on_disk.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        files = [file for file in self.rglob("*") if file.is_file()] if self.is_dir() else [self]
        lost.extend(file.name for file in files if file.stat().st_ino not in on_disk)
        rename(self, target)
        return Path(target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", renamed)
    return lost


def test_a_file_is_on_the_disk_before_it_has_its_name(crash, tmp_path):
    write_json(tmp_path / "metrics.json", {"a": 1})
    write_rejects(tmp_path / "rejects.parquet", [Reject("1", "sft", "broken", "detail")])
    write_folder(tmp_path / "model", {"a.json": lambda path: path.write_text("{}")})
    writer = ShardWriter(tmp_path / "samples")
    writer.close()
    names = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file())
    assert names == ["metrics.json", "model/a.json", "rejects.parquet", "samples/00000.parquet"]
    assert not crash


def test_a_pipe_or_a_device_is_written_and_not_replaced(tmp_path):
    """By a command of root, `--rows /dev/full` had made a file of the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "said")
        assert os.read(reader, 100) == b"said" and pipe.is_fifo()
    finally:
        os.close(reader)
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_text(Path("/dev/full"), "x")
    assert Path("/dev/full").is_char_device()
    with replacing(Path("/dev/stdout")) as place:
        assert place == Path("/dev/stdout")


def test_whatever_gives_a_file_its_name_brings_it_to_the_disk_first():
    found = []
    for file in [*(ROOT / "clear").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        name = file.relative_to(ROOT).as_posix()
        for function in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
            gives = [
                node.func.attr
                for node in calls
                if isinstance(node.func, ast.Attribute)
                and node.func.attr in ("rename", "replace")
                and len(node.args) == 1
                and not node.keywords
            ]
            if gives and "sync" not in called and name not in MOVES:
                found.append(f"{name}: {function.name}")
    assert not found
