"""The result table that ends `make repro`: accuracy on MMD-Bench per model and severity.

Where this run's figures differ from the ones committed at HEAD (another CPU, an edited parameter), both are printed,
one line below the other. Columns: accuracy at clean, low, mid and high severity, their average, and the share of
questions at clean and high for which the model chose to restore. `markdown` gives the tables of README.
"""

import json
from pathlib import Path

from clear.bench.models import MODELS
from clear.data.io import aligned
from clear.data.workspace import profile, report_dir
from clear.errors import ClearError
from clear.project.git import NoGit, git

LEVELS = ("clean", "low", "mid", "high")
HEADER = ("model", *LEVELS, "average", "restores clean", "restores high")


def render(workspace: Path) -> str:
    """The table of the evaluations under `workspace`, and where the report is.

    Raises ClearError if there are none, and for a folder that is no workspace: no training would mend that.
    """
    profile(workspace)
    files = {model: workspace / "data/metrics" / f"evaluate_{model}.json" for model in MODELS}
    files = {model: file for model, file in files.items() if file.exists()}
    if not files:
        raise ClearError(f"{workspace / 'data/metrics'}: no evaluations here; run `make repro`.")
    rows, differ = [HEADER], 0
    for model, file in files.items():
        figures = _cells(parse(file.read_text(), str(file)))
        rows.append((model, *figures))
        committed = _committed(workspace, file.relative_to(workspace))
        if committed is not None and committed != figures:
            differ += 1
            rows.append(("  committed", *committed))
    lines = aligned(rows)
    lines[1:1] = ["-" * max(map(len, lines))]
    if differ:
        lines.append(f"{differ} of {len(files)} models differ from the figures committed at HEAD (shown below each).")
    return "\n".join([*lines, _report_line(workspace)])


def markdown(workspace: Path) -> str:
    """The tables of README: every model at every level, then the paired comparisons, from figures alone.

    A test compares README with them. Raises ClearError where a model was not evaluated or there is no report, and as
    `render`.
    """
    from clear.report.claims import COMPARISONS, NAMES
    from clear.report.claims import LEVELS as SHOWN
    from clear.report.tables import ABOUT, Table

    def figures(name: str, folder: str = "data/metrics") -> dict:
        file = workspace / folder / f"{name}.json"
        if not file.exists():
            raise ClearError(f"{file} is not here; run `make repro`.")
        return parse(file.read_text(), str(file))

    profile(workspace)
    rows = []
    for model in MODELS:
        metrics = figures(f"evaluate_{model}")
        calls = [metrics["call_rate"][level] for level in (LEVELS[0], LEVELS[-1])]
        restores = f"{_share(calls[0])} → {_share(calls[1])}" if any(metrics["call_rate"].values()) else "–"
        cells = [_share(metrics["accuracy"][level]) for level in LEVELS]
        rows.append([f"{NAMES[model]} ({ABOUT[model]})", *cells, restores])
    models = Table(["model", *SHOWN.values(), "restores, clean → hard"], rows)

    report = figures("report", "data/results")
    pairs = []
    for pair in COMPARISONS:
        claim = report["claims"][pair.id]
        pairs.append([f"{NAMES[pair.a]} − {NAMES[pair.b]}, {SHOWN[pair.severity]}", *_points(claim), claim["verdict"]])
    needed, called = report["claims"].get("calls_needed"), report.get("calling", {})
    for level in ("low", "mid"):
        if lead := called.get("levels", {}).get(level):
            pairs.append([f"{NAMES['grpo']} − {NAMES['sft_direct']}, {SHOWN[level]}", *_points(lead), "–"])
    if most := called.get("most_called"):
        kind, share = most["corruption"].replace("_", " "), f"{100 * most['share_of_calls']:.0f} % of the restorations"
        for title, key in ((f"hard, {kind} only ({share})", "minus_direct"), (f"hard, without {kind}", "elsewhere")):
            if most[key]:
                pairs.append([f"{NAMES['grpo']} − {NAMES['sft_direct']}, {title}", *_points(most[key]), "–"])
    if needed and needed["measured"]:
        ends = ("–" if needed[end] is None else f"{needed[end]:.2f}" for end in ("low", "high"))
        estimate = "–" if needed["estimate"] is None else f"× {needed['estimate']:.2f}"
        title = "odds of a restoration where the base fails, within one kind and level of damage"
        pairs.append([title, estimate, " to ".join(ends), needed["verdict"]])
    interval = f"{100 * report['confidence']:g} % interval"
    return f"{models.markdown()}\n\n{Table(['paired, in points', 'estimate', interval, 'claim'], pairs).markdown()}"


def _share(value: float) -> str:
    """`.881`, `1`, `0`."""
    return f"{value:.3f}".removeprefix("0") if 0 < round(value, 3) < 1 else f"{value:.0f}"


def _points(claim: dict) -> list[str]:
    from clear.report.claims import points

    return [points(claim["estimate"], True), f"{points(claim['low'], True)} to {points(claim['high'], True)}"]


def parse(text: str, name: str) -> dict:
    try:
        metrics = json.loads(text)
        if not isinstance(metrics, dict):
            raise ValueError(f"{metrics!r} is not an object")
    except ValueError as error:
        raise ClearError(f"{name}: not valid JSON ({error}); run `dvc repro` for the stage that writes it.") from error
    return metrics


def _cells(metrics: dict) -> tuple[str, ...]:
    accuracy, calls = metrics.get("accuracy", {}), metrics.get("call_rate", {})
    values = [*(accuracy.get(level) for level in LEVELS), metrics.get("average"), calls.get("clean"), calls.get("high")]
    return tuple(f"{value:.3f}" if isinstance(value, int | float) else "–" for value in values)


def _committed(workspace: Path, file: Path) -> tuple[str, ...] | None:
    """The same figures at HEAD, or None where nothing is committed (a scratch copy, a new model, no git)."""
    try:
        shown = git(workspace, "show", f"HEAD:./{file.as_posix()}")
    except NoGit:
        return None
    return _cells(parse(shown.text, f"HEAD:{file}")) if shown.status == 0 else None


def _report_line(workspace: Path) -> str:
    folder = report_dir(profile(workspace), create=False)
    pages = sorted(folder.glob("index.*")) or sorted(folder.glob("*.html"))
    if pages:
        return f"report: {pages[0]}"
    return "report: not rendered on this machine yet; `dvc repro --force --single-item report` does it."
