"""Files that are whole or not there, of one writer and of several."""

import errno
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from clear.data.io import replacing, write_json, write_text
from tests.conftest import ROOT


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_is_not_finished_leaves_the_earlier_one_and_nothing_else(tmp_path, several, error):
    file = tmp_path / "a.json"
    file.write_text("earlier")
    with pytest.raises(error) as raised, replacing(file, several) as partial:
        partial.write_text("half")
        raise error(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and file.read_text() == "earlier"
    assert getattr(raised.value, "filename", str(file)) == str(file)


def test_several_that_write_one_file_at_once_leave_it_whole(tmp_path):
    """They shared one partial file: reports and parameters got mixed, or the second writer had none to rename."""
    files = [tmp_path / "a.json", tmp_path / "params.yaml"]

    def write(number: int) -> None:
        for _ in range(40):
            write_json(files[0], {"number": number, "text": "x" * 10_000 * number})
            write_text(files[1], f"{number}\n" * 1000 * number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(1, 9)))
    found = json.loads(files[0].read_text())
    assert len(found["text"]) == 10_000 * found["number"]
    lines = files[1].read_text().split()
    assert lines == lines[:1] * 1000 * int(lines[0])
    assert sorted(tmp_path.iterdir()) == sorted(files), "nothing is left over"


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from clear.data.io import write_json
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_json(sys.argv[1], {"half": 1})
"""


def test_what_a_killed_writer_has_left_is_written_over(tmp_path):
    """Each left a file of another name beside the output, for ever."""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path / "a.json")], cwd=ROOT, check=False)
        assert [path.name for path in tmp_path.iterdir()] == ["a.json.partial"]
    write_json(tmp_path / "a.json", {"whole": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
