"""Files and folders of a set: which are found, in what order; one that cannot be read is named and stops no other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clear.errors import ClearError
from clear.sources import folder, incoming, intake, llava_onevision
from clear.sources.fields import look_through
from tests.conftest import ROOT
from tests.helpers.rows import GOOD, PICTURE, read_folder, read_incoming, turns


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "a.png").write_bytes(PICTURE)
    return tmp_path


def test_what_file_managers_leave_is_no_part_of_a_set_and_no_table(place):
    plain = read_incoming(place, [GOOD])
    before = incoming.sets(place)[0].fingerprint
    for inside in (place, place / "road"):
        for name in (
            ".DS_Store",
            "._a.png",
            "._t.jsonl",
            "._x.parquet",
            "Thumbs.db",
            "desktop.ini",
            "__MACOSX/x.jsonl",
        ):
            (inside / name).parent.mkdir(exist_ok=True)
            (inside / name).write_bytes(b"\x00\x05\x16\x07")
    assert incoming.sets(place)[0].fingerprint == before and not incoming.sets(place)[0].faults
    assert [incoming.look(row).questions[0] for row in incoming.rows_of(place / "road")] == plain
    assert len(read_folder(place, [GOOD])) == 1
    rows = [{"image": {"bytes": PICTURE, "path": None}, "conversations": turns("Which?", "red")}]
    pq.write_table(pa.Table.from_pylist(rows), place / "x.parquet")
    (place / "road/t.jsonl").unlink()
    assert len(list(llava_onevision.rows(place))) == 1


NOT_UTF8 = os.fsdecode(b"caf\xe9.png")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def circular(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        (NOT_UTF8, Path.touch, "not UTF-8"),
        ("notes\x07.txt", Path.touch, "control characters"),
        ("b.png", dangling, "a broken link"),
        ("b.png", circular, "a broken link"),
        ("b.png", os.mkfifo, "is not a file"),
    ],
)
def test_a_file_that_cannot_be_read_is_listed_in_its_own_set_and_stops_no_other(place, name, make, said):
    kept = read_incoming(place, [GOOD])
    (place / "other").mkdir()
    make(place / "other" / name)
    road, other = sorted(incoming.sets(place), key=lambda one: one.name != "road")
    assert not road.faults and said in other.faults[0] and other.faults[0].isprintable()
    both = intake.read(place)
    assert both.count(*intake.SLICES) == len(kept) == 1
    (reject,) = both.rejects
    assert (reject.subset, reject.reason) == ("other", "file") and said in reject.detail and reject.id.isprintable()
    assert intake.read(place, "road").rejects == ()


@pytest.mark.parametrize("make", [dangling, circular])
def test_a_set_that_is_a_link_to_nowhere_is_listed_and_stops_no_other(place, make):
    read_incoming(place, [GOOD])
    make(place / "far")
    far, road = incoming.sets(place)
    assert far.faults == ("far: a broken link; correct or remove it",) and not road.faults
    with pytest.raises(ClearError, match="far: a broken link"):
        intake.read(place)
    assert intake.read(place, "road").count(*intake.SLICES) == 1


@pytest.mark.parametrize("make", [dangling, circular])
def test_a_row_that_names_a_link_to_nothing_is_rejected_once(place, make):
    read_incoming(place, [GOOD])
    make(place / "road/b.png")
    (place / "road/t.jsonl").write_text("".join(json.dumps(GOOD | {"image": n}) + "\n" for n in ("a.png", "b.png")))
    (reject,) = intake.read(place).rejects
    assert reject.id == "road/t.jsonl:2" and "a broken link" in reject.detail


@pytest.mark.parametrize("name", ["t.jsonl", "T.PARQUET", NOT_UTF8.replace("png", "jsonl")])
def test_a_table_that_cannot_be_opened_refuses_its_own_set_alone(place, name):
    read_incoming(place, [GOOD])
    (place / "other").mkdir()
    dangling(place / "other" / name)
    with pytest.raises(ClearError, match=r"other/.*(broken link|not UTF-8)"):
        intake.read(place)
    assert intake.read(place, "road").count(*intake.SLICES) == 1
    if name != "T.PARQUET":
        with pytest.raises(ClearError, match=r"broken link|not UTF-8"):
            list(folder.rows(place / "other"))


PERMISSIONS = """
import sys
from pathlib import Path
from clear.errors import ClearError
from clear.sources import folder, incoming, intake
place = Path(sys.argv[1])
for one in incoming.sets(place):
    print(one.name, one.files, *one.faults)
came = intake.read(place, "good")
print(came.count(*intake.SLICES), *(f"{r.id}: {r.reason}: {r.detail}" for r in came.rejects))
for read in (lambda: intake.read(place), lambda: list(folder.rows(place / "shut"))):
    try:
        print("read", read())
    except ClearError as error:
        print("refused", error)
"""


def test_files_and_folders_without_permission_are_named(place):
    """In a process that may not override permissions, as root may."""
    read_incoming(place, [GOOD])
    (place / "road").rename(place / "good")
    (place / "good/b.png").write_bytes(PICTURE)
    (place / "shut/more").mkdir(parents=True)
    (place / "shut/t.jsonl").write_text(json.dumps(GOOD) + "\n")
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.getuid() == 0 else []
    (place / "good/b.png").chmod(0)
    (place / "shut/more").chmod(0)
    try:
        command = [*drop, sys.executable, "-c", PERMISSIONS, str(place)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    finally:
        (place / "shut/more").chmod(0o755)
    assert done.returncode == 0, done.stderr
    good, shut, kept, all_sets, source = done.stdout.splitlines()
    assert good == "good 2 good/b.png: Permission denied; repair or remove it"
    assert shut == "shut 1 shut/more: Permission denied; make the folder readable or remove it"
    assert kept == "1 good/b.png: file: Permission denied; repair or remove it"
    assert "refused" in all_sets and "shut/more: Permission denied" in all_sets
    assert "refused" in source and "shut/more: Permission denied" in source


def test_files_are_found_in_one_order(tmp_path):
    for name in ("b/1.png", "a/2.png", "a.png", "B.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in look_through(tmp_path).files]
    assert found == ["B.png", "a.png", "a/2.png", "b/1.png"]
