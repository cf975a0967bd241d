"""Degraded benchmark files: read back as VLMEvalKit reads them, nothing but pictures changed, resumable, documented."""

import base64
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clear.bench.tsv import LEVELS, Target, targets, write_benchmarks
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import SEVERITIES, degrade, seed_of
from clear.errors import ClearError
from clear.records import decode_image, encode_image, sha256
from clear.rejects import read_rejects
from clear.sources import lmudata
from tests.conftest import ROOT


def picture(number: int, side: int = 64) -> bytes:
    rng = np.random.default_rng(number)
    return encode_image(
        np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((side // 8, side // 8, 1), np.uint8))
    )


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_tsv(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(file, sep="\t", index=False, quoting=csv.QUOTE_NONNUMERIC)
    return file


def mmbench(folder: Path, count: int = 6) -> Path:
    """A small circular benchmark: rotations name the row that holds the picture, one of them before it."""
    rows = []
    for i in range(count):
        common = {"question": f'What "is"\tthat,\nline {i}?', "category": "a", "l2-category": "b", "split": "dev"}
        common |= {"A": "red", "B": "blue", "C": "None" if i % 2 else None, "hint": "one\rreturn" if i == 1 else None}
        rows.append({"index": i, "image": b64(picture(i)), "answer": "A", **common})
        rows.append({"index": i + 1000000, "image": str(i), "answer": "B", **common})
    rows.insert(0, rows.pop())
    return write_tsv(folder / "MMBench_DEV_EN_V11.tsv", rows)


def as_vlmevalkit(file: Path) -> pd.DataFrame:
    """What VLMEvalKit does with a TSV: pandas, indices as text, short images replaced by the row they name."""
    data = pd.read_csv(file, sep="\t")
    data = data[~pd.isna(data["image"])]
    data["index"] = [str(x) for x in data["index"]]
    images = dict(zip(data["index"], (str(x) for x in data["image"]), strict=True))
    for key, value in images.items():
        if len(value) <= 64:
            assert len(images[value]) > 64
            images[key] = images[value]
    data["image"] = [images[key] for key in data["index"]]
    return data


def test_row_protocol_changes_the_pictures_only_and_the_manifest_says_how(tmp_path):
    source = mmbench(tmp_path / "in")
    files = write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1)
    assert [f.name for f in files] == [f"MMBench_DEV_EN_V11_LOW_LEVEL_{level}.tsv" for level in ("LOW", "MID", "HIGH")]
    before, manifest = as_vlmevalkit(source), pd.read_parquet(tmp_path / "out/manifest.parquet")
    assert len(manifest) == 3 * len(before)
    for file, severity in zip(files, SEVERITIES, strict=True):
        after, rows = as_vlmevalkit(file), manifest[manifest.file == file.name]
        pd.testing.assert_frame_equal(before.drop(columns="image"), after.drop(columns="image"))
        assert rows["index"].tolist() == after["index"].tolist()
        for (_, row), old, new in zip(rows.iterrows(), before["image"], after["image"], strict=True):
            clean, bad = base64.b64decode(old), base64.b64decode(new)
            assert (row.clean_sha256, row.degraded_sha256) == (sha256(clean), sha256(bad)) and clean != bad
            id = f"MMBench_DEV_EN_V11-{row.image_index}"
            assert row.severity == severity and row.intensity == SEVERITIES[severity]
            assert row.seed == seed_of(id, row.corruption, severity)
            assert bad == encode_image(degrade(decode_image(clean), row.corruption, severity, id, 1.0), "jpeg")
    by_image = manifest.groupby("image_index").corruption.nunique()
    assert (by_image == 1).all(), "one corruption per picture, the same at all levels and in all rotations"
    assert manifest.corruption.nunique() > 1
    read = list(lmudata.rows(files[0]))
    assert [row.id.split("-", 1)[1] for row in read] == before["index"].tolist(), "our own reader reads it, too"


def test_full_protocol_writes_every_corruption_at_every_level(tmp_path):
    mmbench(tmp_path / "in", count=1)
    files = write_benchmarks(tmp_path / "in", tmp_path / "out", "full", workers=1)
    expected = {f"MMBench_DEV_EN_V11_{c}_{level}.tsv" for c in CORRUPTIONS for level in LEVELS.values()}
    assert {f.name for f in files} == expected and len(files) == 48
    manifest = pd.read_parquet(tmp_path / "out/manifest.parquet")
    assert manifest.groupby(["corruption", "severity"]).size().to_dict() == {
        (c, s): 2 for c in CORRUPTIONS for s in SEVERITIES
    }
    assert manifest.degraded_sha256.nunique() > 40
    with pytest.raises(ClearError, match="'both' is not one of row, full"):
        targets("X", "both")


def test_workers_do_not_change_a_byte_and_halves_of_an_mmvp_pair_share_their_corruption(tmp_path, monkeypatch):
    monkeypatch.setattr("clear.bench.tsv.targets", lambda bench, protocol: [Target(bench, "", "low")])
    common = {"question": "?", "A": "a", "B": "b", "answer": "A"}
    rows = [{"index": i + 1, "image": b64(picture(i)), **common} for i in range(36)]
    write_tsv(tmp_path / "in/MMVP.tsv", rows)
    one = write_benchmarks(tmp_path / "in", tmp_path / "one", "row", workers=1)
    two = write_benchmarks(tmp_path / "in", tmp_path / "two", "row", workers=2)
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two]
    manifest = pd.read_parquet(tmp_path / "one/manifest.parquet")
    low = manifest[manifest.severity == "low"].corruption.tolist()
    assert low[0::2] == low[1::2] and len(set(low)) > 2
    assert (tmp_path / "one/manifest.parquet").read_bytes() == (tmp_path / "two/manifest.parquet").read_bytes()


def test_pictures_beside_the_file_become_base64(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(picture(0))
    write_tsv(tmp_path / "in/X.tsv", [{"index": 0, "image_path": "a.png", "question": "?", "answer": "x"}])
    file = write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1)[0]
    assert next(iter(lmudata.rows(file))).image[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ({"image": b64(picture(0))[:-4] + "!!!!"}, "no image", "the image is not base64"),
        ({"image": b64(b"no picture at all" * 9)}, "image", "X-7.*not a complete image"),
        ({"image": "99"}, "no image", "index 99, and no row"),
        ({"image": ""}, "no image", "the row has no image"),
    ],
)
def test_a_picture_that_cannot_be_used_is_left_out_and_what_was_good_is_kept(tmp_path, row, reason, said):
    rows = [{"index": 6, "image": b64(picture(1)), "question": "?", "answer": "x"}]
    rows += [{"index": 7, "question": "?", "answer": "x"} | row, rows[0] | {"index": 8, "image": "6"}]
    write_tsv(tmp_path / "in/X.tsv", rows)
    files = write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1)
    for file in files:
        assert as_vlmevalkit(file)["index"].tolist() == ["6", "8"]
    (reject,) = read_rejects(tmp_path / "out/rejects.parquet")
    assert (reject.id, reject.subset, reject.reason) == ("X-7", "X", reason) and re.search(said, reject.detail)
    assert len(pd.read_parquet(tmp_path / "out/manifest.parquet")) == 3 * 2
    write_tsv(tmp_path / "sound/X.tsv", [rows[0], rows[2]])
    for good, file in zip(
        write_benchmarks(tmp_path / "sound", tmp_path / "without", "row", workers=1), files, strict=True
    ):
        assert good.read_bytes() == file.read_bytes(), "the other rows are what they are without the bad one"


def test_a_row_is_at_all_levels_or_at_none_and_takes_those_that_show_its_picture_with_it(tmp_path):
    """A picture of 40 px has room for the blocks of low and mid, not for those of high; row 1 names it beforehand."""
    common = {"question": "?", "answer": "x"}
    rows = [
        {"index": 1, "image": "2"},
        {"index": 2, "image": b64(picture(2, 40))},
        {"index": 3, "image": b64(picture(3))},
    ]
    write_tsv(tmp_path / "in/X.tsv", [row | common for row in rows])
    files = write_benchmarks(tmp_path / "in", tmp_path / "out", "full", workers=1)
    found = {file.stem: as_vlmevalkit(file)["index"].tolist() for file in files}
    for level in LEVELS.values():
        assert found[f"X_block_exchange_{level}"] == ["3"]
        assert found[f"X_dark_{level}"] == ["1", "2", "3"]
    rejects = {(r.id, r.subset): r for r in read_rejects(tmp_path / "out/rejects.parquet")}
    assert "needs two blocks of 32 px" in rejects["X-2", "X/block_exchange"].detail
    assert rejects["X-1", "X/block_exchange"].detail == "it shows the picture of row 2"
    assert {subset for _, subset in rejects} == {"X/block_exchange", "X/watermark_damage"}
    manifest = pd.read_parquet(tmp_path / "out/manifest.parquet")
    assert len(manifest) == 3 * (14 * 3 + 2 * 1)
    again = (tmp_path / "out/rejects.parquet").read_bytes()
    write_benchmarks(tmp_path / "in", tmp_path / "out", "full", workers=1)
    assert (tmp_path / "out/rejects.parquet").read_bytes() == again, "a second run knows the rejects of the first"


def test_a_killed_run_leaves_no_file_that_has_to_be_moved_away(tmp_path):
    """The part of the manifest comes first: a TSV that has its name is complete."""
    mmbench(tmp_path / "in", count=1)
    files = write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1)
    whole = [file.read_bytes() for file in files]
    files[1].unlink()  # as if killed between the part and the TSV
    said: list[str] = []
    write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1, say=said.append)
    assert [file.read_bytes() for file in files] == whole and len(said) == 2


def test_files_of_other_data_or_another_hand_are_refused(tmp_path):
    mmbench(tmp_path / "in", count=1)
    out = tmp_path / "out"
    first = write_benchmarks(tmp_path / "in", out, "row", workers=1)[0]
    said: list[str] = []
    write_benchmarks(tmp_path / "in", out, "row", workers=1, say=said.append)
    assert len(said) == 3 and all("already here" in line for line in said)
    with pytest.raises(ClearError, match="another protocol version or scale"):
        write_benchmarks(tmp_path / "in", out, "row", scale=0.5, workers=1)
    text = first.read_text()
    first.write_text(text.replace("red", "rot"))
    with pytest.raises(ClearError, match="was changed"):
        write_benchmarks(tmp_path / "in", out, "row", workers=1)
    shutil.rmtree(out / ".parts")
    with pytest.raises(ClearError, match="not made by this command"):
        write_benchmarks(tmp_path / "in", out, "row", workers=1)
    with pytest.raises(ClearError, match="source's own folder"):
        write_benchmarks(tmp_path / "in", tmp_path / "in", "row", workers=1)


def run_command(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "clear", "mmd-bench", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_the_command_resumes_after_sigkill_with_the_bytes_of_an_uninterrupted_run(tmp_path):
    mmbench(tmp_path / "in", count=5)
    reference = write_benchmarks(tmp_path / "in", tmp_path / "whole", "full", workers=1)
    arguments = ("--source", "in", "--out", "out", "--protocol", "full", "--workers", "1")
    with run_command(tmp_path, *arguments) as process:
        while len(list(tmp_path.glob("out/*.tsv"))) < 5:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    left = {
        f.name: f.stat().st_mtime_ns
        for f in tmp_path.glob("out/*.tsv")
        if (tmp_path / f"out/.parts/{f.stem}.jsonl").exists()
    }
    assert 4 <= len(left) < 48 and not (tmp_path / "out/manifest.parquet").exists()
    with run_command(tmp_path, *arguments) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stdout.count("already here") == len(left) and stdout.endswith("out/manifest.parquet\n")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in left} == left, "nothing is made twice"
    for file in [*reference, tmp_path / "whole/manifest.parquet"]:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_command_counts_what_it_left_out_and_says_so_in_its_status(tmp_path):
    rows = [{"index": n, "image": b64(picture(n)) if n else "", "question": "?", "answer": "x"} for n in range(3)]
    write_tsv(tmp_path / "in/X.tsv", rows)
    for _ in range(2):  # also where all files are there already
        with run_command(tmp_path, "--source", "in", "--out", "out") as process:
            stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 1 and "Traceback" not in stderr
        assert stderr.splitlines()[-1] == (
            "error: rows that cannot be degraded and were left out: 1; all others are written. out/rejects.parquet has "
            "them, the first: X-0 (no image): the row has no image"
        )
        assert stdout.endswith("out/manifest.parquet\n") and stdout.count("out/X_LOW_LEVEL") == 3


def test_the_command_is_not_the_stage_and_refuses_by_name(tmp_path):
    with run_command(tmp_path, "--help") as process:
        stdout, _ = process.communicate(timeout=30)
    assert all(word in stdout for word in ("--source", "--protocol", "--out", "VLMEvalKit", "row", "full"))
    for arguments, said in {
        ("--source", "none", "--out", "o"): "error: --source none: nothing is there",
        ("--source", ".", "--out", "o", "--protocol", "x"): "error: --protocol x: choose one of row, full.",
        ("--source", ".", "--out", "o"): "error: .: no *.tsv file here",
    }.items():
        with run_command(tmp_path, *arguments) as process:
            _, stderr = process.communicate(timeout=30)
        assert process.returncode == 1 and stderr.startswith(said), stderr
