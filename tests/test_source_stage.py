"""The stage `source` on real data: splits follow content, settings and paths are refused by name, DVC sees changes."""

import contextlib
import hashlib
import os
import subprocess
import sys
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clear.data.images import encode_image
from clear.data.records import read_samples
from clear.errors import ClearError
from clear.sources.rows import SPLITS, pixel_hash, split_of
from clear.stages import source
from tests.conftest import ROOT
from tests.helpers.sources import config_of, encoded, metrics, picture, rejects, tsv, write_jsonl
from tests.helpers.tables import b64


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty workspace with data/raw."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    return tmp_path


# --- rules and splits ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1), st.binary(min_size=32, max_size=32))
def test_a_split_depends_on_pixels_and_seed_only_and_a_larger_share_keeps_its_images(seed, pixels):
    first = split_of(pixels, seed, [0.1, 0.2, 0.1, 0.1, 0.1, 0.1])
    assert first == split_of(pixels, seed, [0.1, 0.2, 0.1, 0.1, 0.1, 0.1])
    assert split_of(pixels, seed, [1, 0, 0, 0, 0, 0]) == "pretrain" and split_of(pixels, seed, [0] * 6) == ""
    if first == "pretrain":
        assert split_of(pixels, seed, [0.3, 0.2, 0.1, 0.1, 0.1, 0]) == "pretrain"


def test_shares_are_kept_on_many_images():
    found = Counter(split_of(b"%d" % i, 7, [0.0, 0.5, 0.2, 0.05, 0.05, 0.1]) for i in range(4000))
    shares = {"sft": 0.5, "rl": 0.2, "validation": 0.05, "bench": 0.05, "development": 0.1, "": 0.1, "pretrain": 0}
    for split, share in shares.items():
        assert abs(found[split] / 4000 - share) < 0.03, split


def test_the_same_picture_under_other_names_and_encodings_is_in_one_split(here):
    place = here / "data/raw/mine"
    place.mkdir()
    rows = []
    for i in range(40):
        for name, data in {f"a{i}.png": encoded(i), f"z{i}.bmp": encoded(i, "BMP"), f"m{i}.webp": None}.items():
            if data is None:
                out = BytesIO()
                Image.fromarray(picture(i)).save(out, "WEBP", lossless=True)
                data = out.getvalue()
            (place / name).write_bytes(data)
            rows.append({"image": name, "question": f"What is {name}?", "answer": "x", "id": name})
    write_jsonl(place, rows)
    source.run(config_of("source.kind=folder", "source.path=data/raw/mine", "source.shares=[.2,.2,.2,.1,.1,.1]"))
    where = {s.id: split for split in SPLITS for s in read_samples(f"data/samples/{split}")}
    for i in range(40):
        assert len({where.get(name) for name in (f"a{i}.png", f"z{i}.bmp", f"m{i}.webp")}) == 1
    assert set(where.values()) == set(SPLITS)
    assert metrics()["not_sampled"] == 120 - len(where)


def test_shape_is_part_of_the_pixels():
    flat = np.zeros((4, 9, 3), np.uint8)
    assert pixel_hash(flat) != pixel_hash(flat.reshape(9, 4, 3))


def test_a_repeated_id_and_images_of_the_benchmark_are_rejected(here):
    place = here / "data/raw"
    for i in range(4):
        (place / f"{i}.png").write_bytes(encoded(i))
    names = ["0.png", "1.png", "2.png", "3.png"]
    write_jsonl(
        place, [{"image": n, "question": "?", "answer": "x", "id": n if n != "3.png" else "2.png"} for n in names]
    )
    re_encoded = encode_image(picture(1))
    tsv(place / "lmu/MMStar.tsv", [{"index": 0, "image": b64(re_encoded), "question": "看?", "answer": "x"}])
    source.run(
        config_of("source.kind=folder", "source.path=data/raw", "source.bench_path=data/raw/lmu",
                  "source.shares=[0,1,0,0,0,0]", "source.skip_cjk=true")
    )  # fmt: skip
    assert [s.id for s in read_samples("data/samples/bench")] == ["MMStar-0"], "sampling rules do not touch a benchmark"
    assert [s.id for s in read_samples("data/samples/sft")] == ["0.png", "2.png"]
    assert dict(zip(rejects().id, rejects().reason, strict=True)) == {"1.png": "in bench", "2.png": "id"}
    assert metrics()["images"]["bench"] == 1


def test_a_third_half_of_a_pair_is_rejected(here):
    """Scoring refuses it, after every question has been answered."""
    place = here / "data/raw/mine"
    place.mkdir()
    lines = []
    for i in range(30):
        (place / f"{i}.png").write_bytes(encoded(i))
        lines.append({"image": f"{i}.png", "question": "Is it?", "answer": "yes", "pair": "p", "id": f"r{i}"})
    write_jsonl(place, lines)
    source.run(config_of("source.kind=folder", "source.path=data/raw/mine", "source.shares=[0,1,0,0,0,0]"))
    assert [s.id for s in read_samples("data/samples/sft")] == ["r0", "r1"]
    lost = rejects()
    assert len(lost) == 28 and set(lost.reason) == {"pair"}
    assert set(lost.detail) == {"it would be the third half of pair p; a pair has two"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["source.kind=folder", "source.path=/somewhere"], "cp -rs /somewhere"),
        (["source.kind=folder", "source.path=data/raw/../x"], "not below data/raw"),
        (["source.kind=folder", "source.path=data/raw/none"], "nothing is there"),
        (["source.kind=folder", "source.path=data/raw"], r"no \*.jsonl file here"),
        (["source.kind=lmudata", "source.path=data/raw"], r"no \*.tsv file here"),
        (["source.kind=llava_onevision", "source.path=data/raw"], r"no \*.parquet or \*.arrow"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused(here, overrides, said):
    with pytest.raises(ClearError, match=said):
        source.run(config_of(*overrides))
    assert not list(here.glob("data/samples/*/*.parquet"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["source.kind=folder"],
        ["source.path=data/raw"],
        ["source.shares=[1,1,0,0,0,0]"],
        ["source.shares=[0,.7,.1,.1]"],
        ["source.shares=[1]"],
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides):
    with pytest.raises(ClearError, match=r"source\.(kind|shares)"):
        config_of(*overrides)


def test_five_shares_leave_the_development_split_empty():
    """Parameters from before there was a sixth split keep their meaning, split by split."""
    names = [hashlib.sha256(bytes([n])).digest() for n in range(200)]
    shares = config_of("source.shares=[0,.3,.2,.2,.2]").source.shares
    five = [split_of(name, 1, shares) for name in names]
    assert five == [split_of(name, 1, [0, 0.3, 0.2, 0.2, 0.2, 0]) for name in names]
    assert set(five) == {"sft", "rl", "validation", "bench", ""}


def test_degraded_benchmarks_are_no_clean_samples(here):
    for name in ("X", "X_LOW_LEVEL_LOW", "X_dark_illumination"):
        tsv(here / f"data/raw/lmu/{name}.tsv", [{"index": 1, "image": b64(encoded(0)), "question": "?", "answer": "x"}])
    settings = config_of("source.kind=lmudata", "source.path=data/raw/lmu", "source.shares=[0,1,0,0,0,0]")
    for name in ("X_LOW_LEVEL_LOW", "X_dark_illumination"):
        with pytest.raises(ClearError, match=rf"{name}\.tsv: is degraded already"):
            source.run(settings)
        (here / f"data/raw/lmu/{name}.tsv").unlink()
    source.run(settings)
    assert metrics()["images"]["sft"] == 1


def test_a_split_that_is_asked_for_and_stays_empty_is_refused(here):
    """A training would find no prompt, or nothing to measure, after days."""
    (here / "data/raw/0.png").write_bytes(encoded(0))
    write_jsonl(here / "data/raw", [{"image": "0.png", "question": "?", "answer": "x"}])
    settings = "source.kind=folder", "source.path=data/raw"
    with pytest.raises(
        ClearError, match=r"none of 1 usable rows of data/raw falls to validation, whose share is 0\.001"
    ):
        source.run(config_of(*settings, "source.shares=[0,0.999,0,0.001,0,0]"))
    source.run(config_of(*settings, "source.shares=[0,1,0,0,0,0]"))


def test_where_nothing_can_be_used_the_rejects_say_why(here):
    write_jsonl(here / "data/raw", [{"image": "gone.png", "question": "?", "answer": "x"}])
    with pytest.raises(ClearError, match=r"data/rejects/source\.parquet says why"):
        source.run(config_of("source.kind=folder", "source.path=data/raw"))
    assert rejects().reason.tolist() == ["no image"]


def test_linked_files_are_read_and_linked_folders_refused(here, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "a.png").write_bytes(encoded(0))
    write_jsonl(outside, [{"image": "a.png", "question": "?", "answer": "x"}])
    (here / "data/raw/mine").mkdir()
    for file in outside.iterdir():
        (here / "data/raw/mine" / file.name).symlink_to(file)
    settings = ["source.kind=folder", "source.shares=[0,1,0,0,0,0]"]
    source.run(config_of(*settings, "source.path=data/raw/mine"))
    assert metrics()["images"]["sft"] == 1
    (here / "data/raw/link").symlink_to(outside)
    (here / "data/raw/mine/deep").symlink_to(outside)
    for path, link in {
        "data/raw/link": "link",
        "data/raw/link/data.jsonl": "link",
        "data/raw/mine": "mine/deep",
    }.items():
        with pytest.raises(ClearError, match=f"data/raw/{link} is a link to a folder.*cp -rs {outside}"):
            source.run(config_of(*settings, f"source.path={path}"))


PROGRAM = """
import sys
from clear.config import compose, from_dict
from clear.stages import source
source._SHARD = 2**20
sizes = ["source.kind=lmudata", "source.path=data/raw/" + sys.argv[1], "source.shares=[0,0.5,0,0,0,0]"]
source.run(from_dict(compose(["degrade.workers=1", *sizes])))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_whatever_the_size_of_the_input(here):
    """A file ten times as large, with a reference to a picture in every other row, needs hardly more memory."""
    peaks = {}
    for name, count in {"small": 6, "large": 60}.items():
        rows = []
        for i in range(count):
            rows.append(
                {"index": 2 * i, "image": b64(encoded(i, width=560, height=560)), "question": "?", "answer": "x"}
            )
            rows.append({"index": 2 * i + 1, "image": str(2 * (count - 1 - i)), "question": "?", "answer": "x"})
        tsv(here / f"data/raw/{name}/X.tsv", rows)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, name], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout) * 1024
    size = (here / "data/raw/large/X.tsv").stat().st_size
    assert size > 50 * 2**20 and peaks["large"] - peaks["small"] < 0.5 * size


# --- data/raw and DVC ------------------------------------------------------------------------------------------------


def test_dvc_notices_changed_data_also_behind_a_link_and_a_scratch_copy_sees_it(project, tmp_path):
    """The stage depends on data/raw, whose content is hashed wherever it lies."""
    from dvc.repo import Repo

    from clear.project.scratch import refresh

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert "data/raw" in stages["source"]["deps"]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.jsonl").write_text("1")
    (project / "data/raw/mine").mkdir(parents=True)
    (project / "data/raw/mine/a.jsonl").symlink_to(outside / "a.jsonl")
    stage = {"cmd": "cat data/raw/mine/a.jsonl > data/seen", "deps": ["data/raw"], "outs": ["data/seen"]}
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"source": stage}}))
    with Repo() as repo:
        repo.reproduce()
        assert repo.status() == {}
    (outside / "a.jsonl").write_text("other")
    with Repo() as repo:
        assert "data/raw" in str(repo.status())
        repo.reproduce()
        assert (project / "data/seen").read_text() == "other" and repo.status() == {}
    refresh(project, tmp_path / "copy")
    assert (tmp_path / "copy/data/raw/mine/a.jsonl").read_text() == "other"
    with Repo(str(tmp_path / "copy")) as repo, contextlib.chdir(tmp_path / "copy"):
        repo.reproduce()
    assert (tmp_path / "copy/data/seen").read_text() == "other"
    refresh(project, tmp_path / "copy")
    assert (outside / "a.jsonl").exists()


def test_real_data_needs_a_pretrained_model(tmp_path, monkeypatch):
    from clear.stages import base

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClearError, match=r"source\.kind = folder needs a pretrained model.*model\.checkpoint"):
        base.run(config_of("source.kind=folder", "source.path=data/raw"))
