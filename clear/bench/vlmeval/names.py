"""Names of benchmark files and of the questions in them: which benchmark, corruption and level, and which MMVP pair.

Degraded files are called `<bench>_LOW_LEVEL_{LOW,MID,HIGH}` (one corruption per picture, the authors' names),
`<bench>_<corruption>_{LOW,MID,HIGH}` (ours, protocol `full`) or `<bench>_<their corruption>` (the authors' 96 files of
one corruption each, all at level high; METHOD §6). Predictions have the model's name in front. A name that ends in
anything else (a result of VLMEvalKit, a level that does not exist) is rejected, never treated as a clean benchmark.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from clear.data.records import CLEAN
from clear.degradation.corruptions import CORRUPTIONS
from clear.errors import ClearError, quoted
from clear.sources.lmudata import MMVP, number, pairs
from clear.sources.scenes.words import composed

__all__ = ["number", "pairs"]  # of the source, under the names of the rest

_LISTED = 10

LEVELS = {"low": "LOW", "mid": "MID", "high": "HIGH"}
"""How the levels are written in file names."""

AUTHORS = {name: name for name in CORRUPTIONS} | {
    "jpeg": "jpeg_compression",
    "dark": "dark_illumination",
    "turbulence": "atmospheric_turbulence",
    "sharpness": "sharpness_change",
}
"""The authors' name of each corruption, as in the names of their files and functions."""

_OURS = {theirs: own for own, theirs in AUTHORS.items()}

AUTHORS_LEVEL = "high"
"""The one level of their files of one corruption each."""

CIRCULAR = 1_000_000
"""Rotations of one MMBench question have indices that differ by multiples of this; those below it come first."""

MIXED = "mixed"
"""The corruption of a file in which every picture has its own."""

OWN = "own"
"""The corruption of a benchmark whose pictures are damaged as published."""

FAMILIES = {"mmbench": "MMBench", "mmvet": "MM-?Vet", "mmvp": MMVP, "cvbench": "CV-?Bench"}
"""Benchmarks with a rule of their own, by a pattern for their names; every other one is plain accuracy."""

_KNOWN = (
    r"(?:MMBench(?:_(?:DEV|TEST|CN|EN|V11))*|MM-?Vet(?:_Hard)?|MMVP|CV-?Bench(?:-[23]D)?|MMStar|RealWorldQA"
    r"|R-?Bench(?:-(?:Dis|Ref))?|MME|MathVista)(?:_MINI|_[A-Z]{2})?"
)
"""Names in VLMEvalKit, also the small and the translated sets."""

DAMAGED = re.compile(r"R-?Bench-?Dis", re.IGNORECASE)
"""Benchmarks whose pictures are damaged as published: beside others they count as hard, never as clean."""

_DEGRADED = re.compile(
    rf"(?P<bench>.+?)_(?:(?:(?P<mixed>LOW_LEVEL)|(?P<ours>{'|'.join(CORRUPTIONS)}))_(?P<level>{'|'.join(LEVELS.values())})"
    rf"|(?P<theirs>{'|'.join(AUTHORS.values())}))"
)
_PLAIN_LEVEL = re.compile(rf"(?P<bench>.+?)_(?P<level>{'|'.join(LEVELS.values())})")
_BENCH = re.compile(rf"(?:.*_)?{_KNOWN}", re.IGNORECASE)
_MODEL_AND_BENCH = re.compile(rf"(?P<model>.+?)_(?P<bench>{_KNOWN})", re.IGNORECASE)
_BENCH_AND_MORE = re.compile(rf"(?:.*_)?{_KNOWN}(?P<more>_.*)", re.IGNORECASE)
_MORE = re.compile(
    rf"_(?P<more>(?:low_?level|low|mid|high|hard|{'|'.join([*CORRUPTIONS, *AUTHORS.values()])}"
    r"|(?:openai_)?(?:results?|acc|scores?|ratings?|judged?|eval|checkpoint|supp|prev)"
    r"|(?:exact_matching|chatgpt|gpt|claude|deepseek|qwen|gemini|llama)[^_]*))$",
    re.IGNORECASE,
)
"""What no benchmark's name ends in: parts of our names in another order or case, the names of VLMEvalKit's results."""


def family(bench: str) -> str:
    """mmbench, mmvet, mmvp, cvbench or plain, by a benchmark's name without a model's (`alone`)."""
    return next((name for name, found in FAMILIES.items() if re.search(found, bench, re.IGNORECASE)), "plain")


def is_known(bench: str) -> bool:
    """Whether this is the name of a benchmark in VLMEvalKit, alone or with a model's in front."""
    return bool(_BENCH.fullmatch(bench))


def ours(corruption: str) -> str:
    """This project's name of a corruption that goes by the authors'; any other name as it is."""
    return _OURS.get(corruption, corruption)


def further(corruptions: Iterable[str]) -> str:
    """A note on corruptions that are none of the sixteen: those of a preset, a plugin or another project, or a slip of
    the pen. "" without any."""
    found = sorted(set(corruptions) - {CLEAN, OWN, MIXED, *CORRUPTIONS})
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    listed = ", ".join(map(quoted, found[:_LISTED])) + more
    return f"none of MMD-Bench's sixteen corruptions, but counted at their level: {listed}" if found else ""


def target_name(bench: str, corruption: str, severity: str, authors: bool = False) -> str:
    """The name of a degraded file without its ending; `corruption` "" or MIXED: every picture has its own.

    With `authors`, their name of a file of one corruption. Raises ClearError for a level that their files do not have.
    """
    if corruption in ("", MIXED):
        return f"{bench}_LOW_LEVEL_{LEVELS[severity]}"
    if not authors:
        return f"{bench}_{corruption}_{LEVELS[severity]}"
    if severity != AUTHORS_LEVEL:
        raise ClearError(f"the authors' files of one corruption each are at level {AUTHORS_LEVEL}, not {severity}.")
    return f"{bench}_{AUTHORS[corruption]}"


def parsed(name: str) -> tuple[str, str, str]:
    """(benchmark with the model's name, corruption, severity) by a file's name without its ending.

    Raises ClearError for a name that ends in something that is neither a benchmark's name nor a level.
    """
    levels = {written: level for level, written in LEVELS.items()}
    bench, corruption, severity = name, CLEAN, CLEAN
    if match := _DEGRADED.fullmatch(name):
        corruption = ours(match["theirs"] or match["ours"] or MIXED)
        bench, severity = match["bench"], levels.get(match["level"], AUTHORS_LEVEL)
    elif match := _PLAIN_LEVEL.fullmatch(name):
        bench, corruption, severity = match["bench"], MIXED, levels[match["level"]]
    more = None if _BENCH.fullmatch(bench) else _BENCH_AND_MORE.fullmatch(bench) or _MORE.search(bench)
    if more:
        raise ClearError(
            f"{name}: '{more['more'].strip('_')}' is not a level or corruption of MMD-Bench and in no benchmark's "
            "name (a result of VLMEvalKit?); name a file of predictions, or add columns bench, corruption and severity."
        )
    return bench, corruption, severity


def of_model(bench: str, folder: str) -> tuple[str, str]:
    """(model, benchmark) of a benchmark's name with a model's in front, in a folder of that name or any other.

    The folder's name decides where the file's begins with it, as `clear answer` and VLMEvalKit write them; else a known
    benchmark at the end does. The model is "" where neither says. Both are in one normal form: a disk may keep the
    letters of a folder's name and of a file's in different ones.
    """
    folder, bench = composed(folder), composed(bench)
    if folder and bench.startswith(f"{folder}_") and len(bench) > len(folder) + 1:
        return folder, bench[len(folder) + 1 :]
    match = _MODEL_AND_BENCH.fullmatch(bench)
    return (match["model"], match["bench"]) if match else ("", bench)


def of_file(file: Path) -> tuple[str, str]:
    """(model, benchmark) by the name of a file; the benchmark is "" where the name is none of predictions."""
    try:
        bench, *_ = parsed(file.stem)
    except ClearError:
        bench = file.stem
    model, bench = of_model(bench, file.absolute().parent.name)
    return tidy(model), bench


def alone(bench: str, folder: str, models: Collection[str]) -> str:
    """A benchmark's name without that of a model, if one of `models` (tidy) stands in front, as `of_model` reads it.

    A column `bench` may name the benchmark alone, which then is not a model's name with another one's behind it.
    """
    model, found = of_model(bench, folder)
    return found if tidy(model) in models else bench


def tidy(name: str) -> str:
    """A name in one line and one form, so that two that look alike are one."""
    text = " ".join(composed(name).split())
    return text.encode("utf-8", "backslashreplace").decode()


def is_degraded(name: str) -> bool:
    """Whether a benchmark's file of this name, without its ending, has degraded pictures, as ours or the authors'."""
    try:
        *of, severity = parsed(name)
    except ClearError:  # no name of predictions; that of a benchmark may be anything
        return False
    own = {target_name(*of, severity)} if severity != CLEAN else set()
    return name in own or (severity == AUTHORS_LEVEL and name == target_name(*of, severity, authors=True))
