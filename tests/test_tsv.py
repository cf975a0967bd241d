"""Degraded benchmark files: read back as VLMEvalKit reads them, nothing but pictures changed, resumable, documented."""

import base64
import os
import re
import shutil
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from PIL.ExifTags import Base

from clear.bench.vlmeval.names import LEVELS, is_degraded
from clear.bench.vlmeval.tsv import Target, targets, write_benchmarks
from clear.data.images import decode_image, encode_image
from clear.data.records import sha256
from clear.data.rejects import read_rejects
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import SEVERITIES, degrade, seed_of
from clear.errors import ClearError
from clear.sources import lmudata
from tests.helpers.tables import b64, mmbench, picture, write_tsv


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
    monkeypatch.setattr("clear.bench.vlmeval.tsv.targets", lambda bench, protocol, style: [Target(bench, "", "low")])
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


def test_the_authors_names_are_their_96_files_with_the_pictures_of_ours_at_high(tmp_path):
    mmbench(tmp_path / "in", count=1)
    ours = write_benchmarks(tmp_path / "in", tmp_path / "ours", "full", workers=1)
    theirs = write_benchmarks(tmp_path / "in", tmp_path / "theirs", "full", workers=1, style="authors")
    high = [file for file in ours if file.stem.endswith("_HIGH")]
    assert [file.read_bytes() for file in theirs] == [file.read_bytes() for file in high] and len(theirs) == 16
    renamed = {"jpeg": "jpeg_compression", "dark": "dark_illumination", "turbulence": "atmospheric_turbulence"}
    renamed |= {"sharpness": "sharpness_change"}
    assert [f.stem for f in theirs] == [f"MMBench_DEV_EN_V11_{renamed.get(c, c)}" for c in CORRUPTIONS]
    assert set(pd.read_parquet(tmp_path / "theirs/manifest.parquet").severity) == {"high"}
    with pytest.raises(ClearError, match="choose protocol full"):
        targets("X", "row", "authors")


def test_pairs_of_mmvp_keep_their_corruption_when_a_row_is_left_out(tmp_path):
    rows = [
        {"index": i + 1, "image": b64(picture(i)), "question": f"{i // 2}?", "A": "a", "B": "b", "answer": "A"}
        for i in range(24)
    ]
    drawn = {}
    for name, kept in {"whole": rows, "first": rows[1:], "middle": rows[:7] + rows[8:]}.items():
        write_tsv(tmp_path / name / "MMVP.tsv", kept)
        write_benchmarks(tmp_path / name, tmp_path / f"{name}-out", "row", workers=1)
        manifest = pd.read_parquet(tmp_path / f"{name}-out/manifest.parquet")
        drawn[name] = dict(zip(manifest["index"], manifest.corruption, strict=True))
    whole = drawn["whole"]
    assert all(whole[str(i)] == whole[str(i + 1)] for i in range(1, 25, 2)) and len(set(whole.values())) > 4
    for part in (drawn["first"], drawn["middle"]):
        assert len(part) == 23 and part.items() <= whole.items()


def test_what_this_command_wrote_is_never_its_input(tmp_path):
    mmbench(tmp_path / "in", count=1)
    made = write_benchmarks(tmp_path / "in", tmp_path / "out", "full", workers=1)
    made += write_benchmarks(tmp_path / "in", tmp_path / "row", "row", workers=1)
    made += write_benchmarks(tmp_path / "in", tmp_path / "theirs", "full", workers=1, style="authors")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
    for file in made:
        shutil.copy(file, tmp_path / "in")  # as docs/DATA.md says
    said: list[str] = []
    write_benchmarks(tmp_path / "in", tmp_path / "out", "full", workers=1, say=said.append)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()} == before
    assert sum("degraded already" in line for line in said) == 48 + 3 + 16
    with pytest.raises(ClearError, match=r"X_dark_HIGH\.tsv: is degraded already"):
        write_benchmarks(write_tsv(tmp_path / "X_dark_HIGH.tsv", [{"index": 1}]), tmp_path / "o", "row", workers=1)
    for name in ("MMStar", "R-Bench-Dis", "MMBench_DEV_EN_V11", "a_result", "X_HIGH", "X_LOW_LEVEL_low", "dark"):
        assert not is_degraded(name), name


def test_files_that_cannot_be_read_are_named_and_the_others_are_made(tmp_path):
    """Beside sound ones: a link that leads nowhere or to itself, no row, no text, no permission, no name."""
    lmu = tmp_path / "in"
    row = {"index": 1, "image": b64(picture(1)), "question": "?", "answer": "x"}
    for name in ("A.tsv", "Z.tsv"):
        write_tsv(lmu / name, [row])
    bad = {
        "B.tsv": ("No such file", lambda file: file.symlink_to("../LMUData/B.tsv")),
        "C.tsv": ("Too many levels of symbolic links", lambda file: file.symlink_to("C.tsv")),
        "D.tsv": ("has a header and no row", lambda file: file.write_text("index\timage\tquestion\tanswer\n")),
        "E.tsv": ("not UTF-8", lambda file: file.write_bytes("index\tquestion\n1\té\n".encode("latin-1"))),
        "F.tsv": ("Is a directory", lambda file: file.mkdir()),
        "G.tsv": ("row 2 has 1 cells", lambda file: file.write_text("index\tquestion\tanswer\n1\t?\tx\n2\n")),
        os.fsdecode(b"H\xff.tsv"): ("the name is not UTF-8", lambda file: shutil.copy(lmu / "A.tsv", file)),
    }
    for name, (_, make) in bad.items():
        make(lmu / name)
    said: list[str] = []
    files = write_benchmarks(lmu, tmp_path / "out", "row", workers=1, say=said.append)
    assert [file.name for file in files] == [f"{b}_LOW_LEVEL_{level}.tsv" for b in "AZ" for level in LEVELS.values()]
    rejects = read_rejects(tmp_path / "out/rejects.parquet")
    assert [reject.reason for reject in rejects] == ["file"] * 7
    for reject, (text, _) in zip(rejects, bad.values(), strict=True):
        assert text in reject.detail and reject.id.endswith(".tsv") and "\n" not in reject.detail
    whole = (tmp_path / "out/manifest.parquet").read_bytes()
    for name in bad:
        shutil.rmtree(lmu / name) if name == "F.tsv" else (lmu / name).unlink()
    write_benchmarks(lmu, tmp_path / "sound", "row", workers=1)
    assert whole == (tmp_path / "sound/manifest.parquet").read_bytes()


def test_two_runs_into_one_folder_are_one_over_both(tmp_path):
    for name in "BA":
        row = {"index": 1, "image": b64(picture(ord(name))), "question": "?", "answer": "x"}
        write_tsv(tmp_path / f"in/{name}.tsv", [row, row | {"index": 2, "image": b64(b"no picture" * 9)}])
        write_benchmarks(tmp_path / f"in/{name}.tsv", tmp_path / "one by one", "row", workers=1)
    write_benchmarks(tmp_path / "in", tmp_path / "at once", "row", workers=1)
    for name in ("manifest.parquet", "rejects.parquet"):
        assert (tmp_path / "one by one" / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()
    (tmp_path / "in/B.tsv").unlink()
    for file in (tmp_path / "at once").glob("B*.tsv"):
        file.unlink()
    write_benchmarks(tmp_path / "in", tmp_path / "at once", "row", workers=1)
    assert set(pd.read_parquet(tmp_path / "at once/manifest.parquet").bench) == {"A"}, "what is gone is in no manifest"


def test_a_picture_beside_the_table_that_changed_is_another_source(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encode_image(decode_image(picture(1))))
    write_tsv(tmp_path / "in/X.tsv", [{"index": 1, "image_path": "a.png", "question": "?", "answer": "x"}])
    write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1)
    write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1)
    (tmp_path / "in/a.png").write_bytes(encode_image(decode_image(picture(2))))
    with pytest.raises(ClearError, match="made from other data"):
        write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1)


def test_a_quotation_mark_at_the_start_of_a_cell_swallows_no_row(tmp_path):
    lines = ["index\timage\tquestion\tanswer"]
    lines += [f"{n}\t{b64(picture(n))}\t{text}\tx" for n, text in enumerate(('"Stop" or go?', "b", '"c', 'd "', "e"))]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/X.tsv").write_text("\n".join(lines) + "\n")
    for file in write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1):
        assert as_vlmevalkit(file)["question"].tolist() == ['"Stop" or go?', "b", '"c', 'd "', "e"]


def test_pictures_are_found_by_way_of_several_rows_and_go_with_the_one_that_holds_them(tmp_path):
    common = {"question": "?", "answer": "x"}
    rows = [{"index": 4, "image": "3"}, {"index": 3, "image": "2"}, {"index": 2, "image": b64(picture(2))}]
    rows += [{"index": 7, "image": "6"}, {"index": 6, "image": "5"}, {"index": 5, "image": b64(b"no picture" * 9)}]
    write_tsv(tmp_path / "in/X.tsv", [row | common for row in rows])
    files = write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1)
    manifest = pd.read_parquet(tmp_path / "out/manifest.parquet")
    assert set(zip(manifest["index"], manifest.image_index, strict=True)) == {("4", "2"), ("3", "2"), ("2", "2")}
    assert {r.id: r.detail for r in read_rejects(tmp_path / "out/rejects.parquet")} == {
        "X-5": read_rejects(tmp_path / "out/rejects.parquet")[0].detail,
        "X-7": "it shows the picture of row 5",
        "X-6": "it shows the picture of row 5",
    }
    for file in files:
        cells = pd.read_csv(file, sep="\t", dtype=str)
        assert cells["index"].tolist() == ["4", "3", "2"] and cells["image"].tolist()[:2] == ["3", "2"]


def test_a_picture_is_turned_as_its_exif_data_say_and_comes_out_without_them(tmp_path):
    image = Image.fromarray(decode_image(picture(1)))
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    image.crop((0, 0, 64, 40)).save(tmp_path / "turned.jpg", exif=exif)
    data = (tmp_path / "turned.jpg").read_bytes()
    write_tsv(tmp_path / "in/X.tsv", [{"index": 1, "image": b64(data), "question": "?", "answer": "x"}])
    for file in write_benchmarks(tmp_path / "in", tmp_path / "out", "row", workers=1):
        made = Image.open(BytesIO(next(iter(lmudata.rows(file))).image))
        assert made.size == (40, 64) and Base.Orientation not in made.getexif()


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
