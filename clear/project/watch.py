"""Watch unlabelled pictures: judge those of a night and keep what was found (`clear watch`, docs/DRIFT.md).

    data/watch/<place>/history.csv            a row for each night
    data/watch/<place>/<night>/index.html     the report, with its plots beside it
    data/watch/<place>/<night>/night.json     its figures
    data/watch/<place>/<night>/night.md       its tables, without pictures and names of files

The folder lies beside the private folder of the project, as `data/replies` does, and outlives `make clean`. The
pictures themselves stay where they are: they are read, measured and forgotten, except for a few thumbnails in the
report and for those that `collect` is asked for.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from clear.config import load
from clear.data.images import decode_image
from clear.data.io import replacing, require_new, write_json, write_text
from clear.data.lock import making
from clear.data.records import read_samples
from clear.data.workspace import home
from clear.drift import night as nights
from clear.drift import page, power
from clear.drift.measures import Picture
from clear.drift.night import DRIFTED, HISTORY, Arrived, Night
from clear.drift.place import Place, chosen, contents, s3_parts
from clear.drift.proposal import propose
from clear.drift.reference import DEGRADED, SAMPLES, VALIDATION, Origin, Reference, identity_of, measured
from clear.drift.reference import load as load_reference
from clear.errors import ClearError, one_line, shown
from clear.project.compare.load import lock_at, outputs
from clear.project.git import output
from clear.project.release.fetch import data_of, find
from clear.project.retrain.intake import store

THUMBNAIL = 160
"""px, longest side of a picture in the report."""

INLINE = 200
"""Pictures up to which no further processes are worth their start."""

COLLECTED = 200
"""Pictures that `collect` copies at most, those that are least like training first."""


@dataclass(frozen=True)
class Wishes:
    """How a night is judged. `reference` is "" for the training data of this folder, or a release such as @prod.

    `damaged` is the share of the reference that has training's damage, `since` the hours that count as new (0 =
    always), `night` its name (default: today, UTC), `answers` a table of `clear answer` or a folder with some,
    `pictures` whether the report shows any, `collect` a new folder for a set of the night's pictures.
    """

    reference: str = ""
    damaged: float = 0.0
    alpha: float = 0.01
    since: float = 0.0
    limit: int = nights.MOST_PICTURES
    night: str = ""
    answers: Path | None = None
    pictures: bool = True
    collect: Path | None = None


def watch(root: Path, place: str, wishes: Wishes, say: Callable[[str], Any] = print) -> tuple[Night, Path]:
    """Judge the pictures at `place`, a folder or s3://bucket/prefix, and write the report; returns the page.

    Raises ClearError for a place or reference that is not there, and where another process watches the same place.
    """
    with making(folder_of(place), "clear watch"):  # two would each add a night to the history that both have read
        return _watch(root, place, wishes, say)


def _watch(root: Path, place: str, wishes: Wishes, say: Callable[[str], Any]) -> tuple[Night, Path]:
    config = load(root / "params.yaml")
    if wishes.collect is not None:
        require_new(wishes.collect)
    name = wishes.night or datetime.now(UTC).date().isoformat()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ClearError(f"--night {shown(name)}: a name of letters, digits, dots and dashes, such as 2026-11-29.")
    there, folder = place_of(root, place), folder_of(place)
    former = read_history(folder / "history.csv")
    since = datetime.now(UTC) - timedelta(hours=wishes.since) if wishes.since else None
    new, files = there.listed(since)
    restored = wishes.answers and nights.restorations(wishes.answers, since.timestamp() if since else 0.0)
    reference = load_reference(origin_of(root, wishes.reference, config.degrade.size_scale), config.degrade.workers)
    looked_at = chosen(new, wishes.limit)
    pictures = tuple(_measured(there, looked_at, reference.side, config.degrade.workers))
    figures = power.figures(calibration_file(reference))
    arrived = Arrived(name, shown(there.name), files, len(new), pictures)
    night, counted, values = nights.judge(arrived, reference, wishes.alpha, wishes.damaged, figures)
    if night.verdict == DRIFTED:
        unlike, again = night.strange - night.strange_expected, command(place, wishes)
        proposal = propose(name, night.damage, unlike, config.profile, config.degrade.presets, again)
        night = replace(night, proposal=proposal)
    night = replace(night, restored=restored or None)
    rows = nights.with_night(former, night)
    night = replace(night, begun=nights.begun(rows, night))
    thumbnails = list(_thumbnails(there, night.strangest)) if wishes.pictures else []
    shown_page = page.write(
        folder / name, night, values, reference.baseline(wishes.damaged), reference, rows, figures, thumbnails
    )
    write_json(folder / name / "night.json", night.as_json())
    write_text(folder / name / "night.md", page.markdown(night) + "\n")
    _write_history(folder / "history.csv", rows)
    if wishes.collect is not None:
        say(_collect(there, counted, values, reference, wishes.collect))
    return night, shown_page


def command(place: str, wishes: Wishes) -> list[str]:
    """The words of the command line that judges this night again."""
    words = ["clear", "watch", shown(place)]
    for option, value, usual in (
        ("--reference", wishes.reference, ""),
        ("--damaged", wishes.damaged, 0.0),
        ("--since", wishes.since, 0.0),
        ("--limit", wishes.limit, nights.MOST_PICTURES),
    ):
        words += [option, f"{value:g}" if isinstance(value, float) else str(value)] if value != usual else []
    return words


def place_of(root: Path, place: str) -> Place:
    """The place that is named. Raises ClearError for a URL without a bucket."""
    if not place.startswith("s3://"):
        return Place(place, Path(place))
    bucket, prefix = s3_parts(place)
    return Place(place.rstrip("/"), client=store(root), bucket=bucket, prefix=prefix)


def folder_of(place: str) -> Path:
    """Where reports and history of a place are kept: named by its last part and a hash of the whole."""
    whole = place.rstrip("/") if place.startswith("s3://") else str(Path(place).absolute())
    last = re.sub(r"[^A-Za-z0-9-]+", "_", whole.rsplit("/", 1)[-1]) or "place"
    return home().parent / "data" / "watch" / f"{last}-{hashlib.sha256(whole.encode(errors='replace')).hexdigest()[:8]}"


def origin_of(root: Path, reference: str, scale: float) -> Origin:
    """The training pictures of this folder, whose degrade.size_scale is `scale`, or those of a release.

    Raises ClearError for what is no release, and one whose dvc.lock lacks them.
    """
    if not reference:
        return Origin("the training data of this folder", identity_of(root), lambda: nullcontext(root), scale)
    if (named := find(reference, root)) is None:
        raise ClearError(f"--reference {shown(reference)}: no release; name one as @prod, @v1.2.0 or grpo@prod.")
    entry, version, commit = named
    paths, hashes = (*SAMPLES, *DEGRADED), outputs(lock_at(root, commit))
    if missing := [path for path in paths if not hashes.get(str(path))]:
        raise ClearError(f"{entry.name} {version}: its dvc.lock has no {missing[0]}; name a release of this pipeline.")
    params = yaml.safe_load(output(root, "show", f"{commit}:./params.yaml"))
    identity = " ".join(hashes[str(path)] for path in paths)
    name = f"what {entry.name} {version} was trained on"
    return Origin(
        name, identity, lambda: data_of(root, commit, (*paths, VALIDATION)), float(params["degrade"]["size_scale"])
    )


def calibrated(
    root: Path, reference: str, damaged: float, alpha: float, say: Callable[[str], Any] = print, **simulation: Any
) -> Path:
    """Simulate nights of a reference (clear/drift/power.py, which takes `simulation`) and keep what was measured;
    returns the file."""
    config = load(root / "params.yaml")
    origin = origin_of(root, reference, config.degrade.size_scale)
    known = load_reference(origin, config.degrade.workers)
    with origin.bring() as folder:
        pictures = list(read_samples(folder / VALIDATION, ["id", "image"]))
    copies = power.damaged_columns(known, pictures, origin.scale, config.degrade.workers)
    found = power.calibrate(known.columns(known.baseline(damaged)), copies, alpha, say=say, **simulation)
    write_json(calibration_file(known), found)
    return calibration_file(known)


def calibration_file(reference: Reference) -> Path:
    """Where `clear watch --calibrate` keeps the power that it measured on this reference."""
    return home() / "watch" / f"power-{reference.digest}.json"


def _measured(place: Place, files: Sequence[tuple[str, int]], side: int, workers: int) -> Iterator[Picture]:
    """Every file in turn, measured or with its problem."""
    problems: dict[str, str] = {}

    def readable() -> Iterator[tuple[str, bytes]]:
        for name, data, problem in contents(place, list(files)):
            if problem:
                problems[name] = problem
            else:
                yield name, data

    processes = workers if len(files) > INLINE else 1
    found = {row.name: row for row in measured(readable(), side, processes, len(files), "pictures")}
    yield from (found.get(name) or Picture(name, problem=problems[name]) for name, _ in files)


def _thumbnails(place: Place, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    import cv2

    for name in names:
        try:
            image = decode_image(place.read(name), name)
        except (ClearError, OSError):  # it was there when it was measured; the report does without
            continue
        scale = min(1.0, THUMBNAIL / max(image.shape[:2]))
        size = [max(1, round(length * scale)) for length in image.shape[1::-1]]
        yield shown(name), cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _collect(place: Place, pictures: Sequence[Picture], values: np.ndarray, reference: Reference, folder: Path) -> str:
    """Copy pictures with metrics (n, M) into a new folder with a table to be filled in; returns a line about it."""
    order = np.argsort(-reference.model.strange(values), kind="stable")[:COLLECTED] if len(values) else ()
    rows = []
    for number, name in enumerate(pictures[picture].name for picture in order):
        suffix = Path(name).suffix.lower()
        file = f"{number:04d}{suffix if re.fullmatch(r'[.][a-z0-9]{1,5}', suffix) else ''}"
        with replacing(folder / file) as partial:
            partial.write_bytes(place.read(name))
        rows.append(json.dumps({"image": file, "question": "", "answer": ""}))
    write_text(folder / "pictures.jsonl", "".join(f"{row}\n" for row in rows))
    return f"{len(rows)} pictures in {folder}; write a question and an answer for each into pictures.jsonl."


def read_history(file: Path) -> list[dict[str, str]]:
    """The rows of a history, those of former versions with empty cells for what they lack."""
    if not file.exists():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ClearError(f"{file}: not a table ({one_line(error)}); correct or remove the file.") from error
    if any(not row.get("night") for row in rows):
        raise ClearError(f"{file}: a row has no night; correct or remove the file.")
    return [{name: row.get(name) or "" for name in HISTORY} for row in rows]


def _write_history(file: Path, rows: Sequence[dict[str, str]]) -> None:
    with replacing(file, several=True) as partial, partial.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, HISTORY, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
