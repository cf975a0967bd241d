"""`clear watch` on a small world of its own: what it decides, what it writes, and what it refuses."""

import csv
import json
import os
import re
import shlex
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clear.config import compose
from clear.data.records import read_samples, write_samples
from clear.degradation.presets import PRESETS
from clear.drift import reference
from clear.errors import ClearError
from clear.project import watch as watching
from clear.project.release import registry
from clear.project.watch import Wishes, folder_of, origin_of
from clear.sources import folder as folder_source
from tests.cloud import moto_url  # noqa: F401
from tests.conftest import git
from tests.helpers.drifting import SIDE, larger, night, samples, world
from tests.helpers.store import aws_environment


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The world with its reference in the cache, and a preset that it could add."""
    root = world(tmp_path_factory.mktemp("drift") / "project")
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PRESETS", {name: PRESETS[name] for name in ("fog",)})
        patch.setattr(reference, "PRESET_COPIES", 30)
        os.chdir(root)
        try:
            reference.load(origin_of(Path(), "", 0.4), 1)
        finally:
            os.chdir(before)
    return root


@pytest.fixture
def here(project, monkeypatch) -> Path:
    monkeypatch.chdir(project)
    return project


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Without the page, whose plots take longer than all else."""

    def write(folder: Path, *_: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.html").write_text("")
        return folder / "index.html"

    monkeypatch.setattr(watching.page, "write", write)


def watched(place: Path | str, **wishes) -> tuple[dict, str]:
    """Figures and page of a night."""
    found, page = watching.watch(Path(), str(place), Wishes(**wishes), lambda line: None)
    content = json.loads(page.with_name("night.json").read_text())
    assert content["verdict"] == found.verdict
    return content, page.read_text()


@pytest.mark.slow
def test_the_same_world_has_not_changed_and_the_status_says_so(here, undrawn, tmp_path, clear):
    status, out, _ = clear("watch", night(tmp_path / "same"))
    assert status == 0 and out.startswith("NoDrift: 120 pictures show no change (p = ")
    assert Path(out.splitlines()[-1].removeprefix("report: ")).is_file()


def test_a_preset_that_training_lacks_is_recognised_and_proposed_as_a_command(here, undrawn, tmp_path, clear):
    place = night(tmp_path / "fog", damage=("+fog", "high"), share=0.2)
    status, out, _ = clear("watch", place, "--json")
    found = json.loads(out)
    assert status == 1 and found["verdict"] == "Drifted" and found["decision"]["p"] <= 0.01
    fog = sum(share["share"] for share in found["damage"] if share["kind"] == "+fog")
    assert found["damage"][0]["kind"] == "+fog" and 0.1 < fog < 0.3
    proposal = found["proposal"]
    assert proposal["covers"] == "preset"
    program, command, profile, option, wish = shlex.split(proposal["commands"][0])
    assert (program, command, option) == ("clear", "scratch", "--set")
    assert compose([f"profile={profile}", wish])["degrade"]["presets"] == ["fog"]


def test_damage_of_the_training_data_needs_nothing_new_and_the_page_shows_it(here, tmp_path):
    place = night(tmp_path / "noise", damage=("gaussian_noise", "high"), share=0.15)
    found, page = watched(place, night="a")
    assert found["verdict"] == "Drifted" and found["proposal"]["covers"] == "nothing"
    first = found["damage"][0]
    assert first["kind"] == "gaussian_noise" and first["trained"] == 40 and first["low"] < 0.15 < first["high"] + 0.02
    changed = {column["name"] for column in found["decision"]["columns"] if column["p"] <= 0.01}
    assert {"noise", "like gaussian_noise"} <= changed
    assert "in the training data with" in page and "Those least like training" in page
    assert "<figure><img src=" in page and "http" not in page.split("</style>")[1]

    _, without = watched(place, night="a", pictures=False)
    assert "Left out on request" in without
    kept = [file for file in folder_of(str(place)).rglob("*") if file.is_file()]
    assert {file.suffix for file in kept} == {".html", ".json", ".md", ".csv", ".png"}, "no picture is copied"
    assert "pictures.png" not in {file.name for file in kept}, "nor are those of the former report left"
    text = (folder_of(str(place)) / "a/night.md").read_text()
    assert "data:image" not in text and ".jpg" not in text and "Drifted" in text


def test_pictures_of_another_world_are_collected_as_a_set_to_be_labelled(here, undrawn, tmp_path):
    place = tmp_path / "stripes"
    place.mkdir()
    for number in range(40):
        image = np.zeros((SIDE, SIDE, 3), "uint8")
        image[:, number % 5 :: 5] = [255, 40 + number, 90]
        (place / f"{number}.bmp").write_bytes(_bmp(image))
    found, _ = watched(place, collect=(target := tmp_path / "set"))
    assert found["strange"] > 0.9 and found["proposal"]["covers"] == "incoming"
    assert shlex.split(found["proposal"]["commands"][0])[-1].startswith("data/incoming/night_")
    table = [json.loads(line) for line in (target / "pictures.jsonl").read_text().splitlines()]
    assert len(table) == 40 and all((target / row["image"]).is_file() for row in table)
    assert {row.reason for row in folder_source.rows(target)} == {"question"}, "a person has to fill it in"
    with pytest.raises(ClearError, match="exists and is not empty"):
        watched(place, collect=target)


def _bmp(image) -> bytes:
    import cv2

    return cv2.imencode(".bmp", image)[1].tobytes()


def test_too_few_pictures_decide_nothing_and_say_how_many_are_needed(here, undrawn, tmp_path, clear):
    (tmp_path / "empty").mkdir()
    for place, count in ((night(tmp_path / "one", 1), 1), (tmp_path / "empty", 0)):
        status, out, _ = clear("watch", place)
        assert status == 2
        assert out.startswith(
            f"TooFew: {count} usable pictures of {count} files, too few for a decision, which takes 20;"
        )
        assert re.search(
            r"pictures needed to notice, in 80% of nights .*: (more than )?\d+ for 5%, .* for 20%\.\n", out
        )


def test_what_is_not_there_is_one_line(here, tmp_path, clear):
    for arguments, said in (
        ((tmp_path / "gone",), f"{tmp_path}/gone: no such folder; name the one that the pictures are put into."),
        ((tmp_path, "--night", "../up"), "--night ../up: a name of letters"),
        ((tmp_path, "--reference", "grpo"), "--reference grpo: no release; name one as @prod"),
        ((tmp_path, "--answers", tmp_path / "no.parquet"), "no.parquet: no table of answers"),
        ((tmp_path, "--answers", tmp_path), "no answers here"),
        (("s3://",), "s3://: no bucket is named"),
        ((), "name a folder or s3://bucket/prefix to watch"),
    ):
        status, out, err = clear("watch", *arguments)
        assert status == 2 and out == ""
        assert err.startswith("error: ") and said in err and err.count("\n") == 1, err


def test_files_that_are_no_pictures_are_named_and_counted_and_the_others_kept(here, tmp_path):
    place = night(tmp_path / "mixed", 40)
    (place / "notes.txt").write_text("not a picture")
    whole = (place / "0000.png").read_bytes()
    (place / "<img src=x onerror=alert(1)>.png").write_bytes(whole[:300])
    (place / "again.png").write_bytes(whole)
    (place / ".hidden.png").write_bytes(whole)
    (place / "0001.png").rename(os.fsdecode(os.fsencode(place) + b"/\xff.png"))  # a name that is not UTF-8
    found, page = watched(place)
    assert (found["files"], found["looked_at"], found["pictures"], found["repeated"]) == (43, 43, 40, 1)
    assert {name for name, _ in found["unread"]} == {"notes.txt", "<img src=x onerror=alert(1)>.png"}
    assert "<img src=x" not in page and "&lt;img src=x onerror" in page
    assert found["verdict"] == "NoDrift"


def test_pictures_of_another_size_are_measured_at_the_size_of_training(here, undrawn, tmp_path):
    found, _ = watched(larger(tmp_path / "large", 60))
    assert (found["larger"], found["smaller"], found["side"]) == (60, 0, SIDE)
    assert found["strange"] < 0.2, "they are still of this world"


def test_nights_make_a_history_with_the_models_own_share_of_restorations(here, undrawn, tmp_path):
    place = night(tmp_path / "traffic", 30)
    answers = tmp_path / "answers"
    answers.mkdir()
    pq.write_table(pa.table({"restored": [True] * 3 + [False] * 9}), answers / "model_bench.parquet")
    pq.write_table(pa.table({"reason": ["no image"]}), answers / "model_bench_rejects.parquet")
    watched(place, night="2026-01-02", answers=answers)
    watched(place, night="2026-01-01")
    found, _ = watched(place, night="2026-01-02", answers=answers / "model_bench.parquet", limit=25)
    assert found["restored"]["answers"] == 12 and found["restored"]["share"] == 0.25
    assert found["restored"]["low"] < 0.25 < found["restored"]["high"]
    rows = list(csv.DictReader((folder_of(str(place)) / "history.csv").open()))
    assert [(row["night"], row["pictures"], row["restored"]) for row in rows] == [
        ("2026-01-01", "30", ""),
        ("2026-01-02", "25", "0.2500"),
    ]


def test_files_count_from_when_they_came_whatever_dates_they_bring(here, undrawn, tmp_path):
    """As `cp -p`, `rsync -t` and `tar` bring them; a date that is to come would be new every night."""
    place = night(tmp_path / "traffic", 30)
    answers = tmp_path / "answers"
    answers.mkdir()
    pq.write_table(pa.table({"restored": [True] * 3 + [False] * 9}), answers / "model_bench.parquet")
    files = sorted(place.iterdir())
    dated(-400, *files[:9], answers / "model_bench.parquet")
    dated(400, *files[9:12])
    found, _ = watched(place, since=24.0, answers=answers)
    assert (found["files"], found["new"], found["pictures"]) == (30, 30, 30)
    assert found["restored"]["answers"] == 12
    time.sleep(0.1)
    since = datetime.now(UTC)
    time.sleep(0.1)
    shutil.copy2(files[0], place / "copy.png")
    files[1].rename(place / "renamed.png")
    (place / "link.png").symlink_to(files[2])
    there = watching.place_of(here, str(place))
    assert ([name for name, _ in there.listed(since)[0]], there.listed(since)[1]) == (
        ["copy.png", "link.png", "renamed.png"],
        32,
    )


def dated(days: float, *files: Path) -> None:
    for file in files:
        os.utime(file, (time.time() + days * 24 * 3600,) * 2)


def test_a_place_whose_files_are_all_of_before_is_not_called_empty(here, undrawn, tmp_path, clear):
    place = night(tmp_path / "before", 30)
    dated(400, *place.iterdir())
    time.sleep(0.5)
    status, out, _ = clear("watch", place, "--since", "0.0001")  # 0.36 s
    assert status == 2 and out.startswith(
        "TooFew: 0 usable pictures of 0 files, too few for a decision, which takes 20; 30 files are there, none of "
        "them changed in the hours of --since (0 takes all); "
    )


def test_a_damaged_table_in_the_cache_is_made_again(here, monkeypatch):
    origin = origin_of(Path(), "", 0.4)
    made = reference.load(origin, 1)
    file = here / ".clear/watch" / f"reference-{made.digest}.npz"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PK nothing"):
        file.write_bytes(content)
        assert reference._read(file, origin, made.digest) is None
    monkeypatch.setattr(reference, "_make", lambda *given: made)
    reference.load(origin, 1)
    reread = reference._read(file, origin, made.digest)
    for name in ("values", "confusion"):
        np.testing.assert_array_equal(getattr(reread, name), getattr(made, name))
    np.testing.assert_array_equal(reread.model.weights, made.model.weights)
    assert (reread.trained, reread.cells, reread.model.cells) == (made.trained, made.cells, made.model.cells)


def test_a_baseline_has_the_stated_share_of_damage(here):
    known = reference.load(origin_of(Path(), "", 0.4), 1)
    clean = sum(cell == ("clean", "clean") for cell in known.cells)
    assert len(known.baseline(0.0)) == clean
    mixed = known.baseline(0.25)
    at_noise = list(reference.METRICS).index("noise")
    noisy = (mixed[:, at_noise] > known.baseline(0.0)[:, at_noise].max()).mean()
    assert 0.05 < noisy < 0.25, "a third of the damaged quarter is noise"
    assert len(known.baseline(1.0)) == sum(cell[0] in ("gaussian_noise", "lens_blur", "jpeg") for cell in known.cells)


@pytest.mark.slow
def test_a_release_brings_the_pictures_that_its_model_was_trained_on(tmp_path, monkeypatch):
    """They come from DVC's cache at the release's commit, whatever the folder has become since."""
    from dvc.repo import Repo

    root = world(tmp_path / "released", 12)
    monkeypatch.chdir(root)
    git(root, "init", "-q", "-b", "main")
    folders = [*reference.SAMPLES, *reference.DEGRADED, reference.VALIDATION]
    (root / ".gitignore").write_text("/data/\n/code/\n/.clear/\n")
    shutil.move(root / "data", root / "code")
    stage = {"cmd": "cp -r code/. data", "outs": [*map(str, folders), "data/models/grpo"]}
    (root / "code/models/grpo").mkdir(parents=True)
    (root / "code/models/grpo/weights").write_text("w")
    artifacts = {"grpo": {"path": "data/models/grpo", "type": "model"}}
    (root / "dvc.yaml").write_text(json.dumps({"stages": {"all": stage}, "artifacts": artifacts}))
    with Repo.init(".") as repo:
        repo.reproduce()
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "data")
    registry.register(root, "grpo", "v1.0.0", git(root, "rev-parse", "HEAD").strip(), "")
    before = reference.identity_of(root)
    write_samples(root / reference.SAMPLES[0], samples(700, 4))
    assert reference.identity_of(root) != before
    origin = origin_of(Path(), "grpo@v1.0.0", 0.9)
    assert origin.name == "what grpo v1.0.0 was trained on" and origin.scale == 0.4, "the release's own setting"
    with origin.bring() as brought:
        assert reference.identity_of(brought) == before
        assert len(list(read_samples(brought / reference.VALIDATION, ["id"]))) == 10
    assert not brought.exists()
    with pytest.raises(ClearError, match="grpo@prod: no version and no stage with one in it"):
        origin_of(Path(), "@prod", 0.4)


@pytest.mark.slow
def test_a_prefix_of_a_bucket_is_read_where_it_is(here, undrawn, tmp_path, monkeypatch, moto_url):  # noqa: F811
    from clear.data import aws

    aws_environment(monkeypatch, tmp_path, AWS_ENDPOINT_URL=moto_url, AWS_DEFAULT_REGION="us-east-1")
    monkeypatch.setattr(watching, "store", lambda root: aws.client())
    client = aws.client()
    client.create_bucket(Bucket="traffic")
    for file in night(tmp_path / "up", 30).iterdir():
        client.put_object(Bucket="traffic", Key=f"cam/{file.name}", Body=file.read_bytes())
    client.put_object(Bucket="traffic", Key="cam/notes.txt", Body=b"no picture")
    client.put_object(Bucket="traffic", Key="camera2/other.png", Body=b"not below the prefix")
    found, _ = watched("s3://traffic/cam/", pictures=False)
    assert (found["files"], found["pictures"], found["verdict"]) == (31, 30, "NoDrift")
    assert found["unread"][0][0] == "notes.txt"
    with pytest.raises(ClearError, match=r"s3://traffic/night: no such prefix, or nothing below it"):
        watched("s3://traffic/night")
    with pytest.raises(ClearError, match=r"s3://gone/x: NoSuchBucket"):
        watched("s3://gone/x")
