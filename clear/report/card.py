"""The model card of a release, in Hugging Face's form: a YAML header for machines, then what a reader has to know.

Every figure comes from metrics of the pipeline or from the JSON of `clear score`; nothing is typed in. What was not
measured is said to be so.
"""

from dataclasses import dataclass, field
from typing import Any

from clear.bench.models import MODELS
from clear.bench.scoring import SEVERITIES
from clear.report.claims import COMPARISONS, LEVELS, NAMES, points
from clear.report.leaderboard import interval
from clear.report.markdown import as_text
from clear.report.tables import ABOUT, Table
from clear.schema import Config, Phase

LICENSE = "apache-2.0"
"""Of what this project makes out of nothing but itself: rendered scenes, and models trained on them from scratch."""

SOURCES = {
    "scenes": "rendered by this project's own code, with questions whose answers follow from the drawing; Apache-2.0",
    "llava_onevision": "LLaVA-OneVision-Data, a collection: each of its subsets has a licence of its own, some of them "
    "for research only",
    "lmudata": "benchmark tables in VLMEvalKit's form; their licences are those of the benchmarks",
    "folder": "images with questions of whoever trained this model",
    "clear_train": "the training set of CLEAR's authors with its own degraded copies; its licence is theirs to state",
}
DATASETS = {"llava_onevision": ["lmms-lab/LLaVA-OneVision-Data"]}
"""Names on the Hugging Face hub by kind of source."""

BENCHMARK_LICENCES = (
    "MM-Vet is for non-commercial research; derivatives of RealWorldQA, such as degraded copies, must not be "
    "distributed (CC BY-ND)."
)


@dataclass(frozen=True)
class Facts:
    """What a card says. `metrics` are those of data/metrics by name, `report` is data/results/report.json.

    A release of the registry has a `tag`, whose commit the card is part of, so that no commit is named; `tracked` are
    its files as DVC knows them, path → {size, md5}. `stage` trained it, `model` is the name of its evaluation in
    MODELS, "" without one; `board` is the JSON of a leaderboard, `row` this model's name in it. `files` are name →
    {bytes, sha256} of the release; `foreign` of clear.model.release. `verified`: whether dvc.lock says that the
    evaluation read these weights.
    """

    name: str
    config: Config
    license: str
    base_model: str = ""
    datasets: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=lambda: ["en"])
    stage: str = "grpo"
    model: str = ""
    metrics: dict[str, dict] = field(default_factory=dict)
    report: dict = field(default_factory=dict)
    board: dict = field(default_factory=dict)
    row: str = ""
    files: dict[str, dict] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    bridge: str = "direct"
    commit: str = ""
    lock: str = ""
    verified: bool = False
    tag: str = ""
    tracked: dict[str, dict] = field(default_factory=dict)


def render(facts: Facts) -> str:
    """The card: README.md of a repository on the hub."""
    from huggingface_hub import ModelCardData

    given: dict[str, Any] = {
        "license": facts.license,
        "base_model": facts.base_model or None,
        "datasets": [*facts.datasets, *DATASETS.get(facts.config.source.kind, [])] or None,
        "language": facts.languages,
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmd-bench", "bagel", "robustness", "image-restoration", "visual-question-answering"],
    }
    if results := _results(facts):
        given |= {"model_name": facts.name, "eval_results": results, "metrics": ["accuracy"]}
    header = ModelCardData(**given).to_yaml()
    parts = [f"---\n{header}\n---", f"# {as_text(facts.name)}", *_body(facts)]
    return "\n\n".join(parts) + "\n"


def _results(facts: Facts) -> list:
    """Entries of the model index: accuracy in percent per level, with its interval as arguments of the metric."""
    from huggingface_hub import EvalResult

    def entry(dataset: str, kind: str, level: str, estimate: float, low: Any, high: Any, confidence: float) -> Any:
        arguments = {"confidence": confidence, "low": round(100 * low, 2), "high": round(100 * high, 2)}
        return EvalResult(
            task_type="visual-question-answering",
            dataset_type=kind,
            dataset_name=dataset,
            dataset_config=level,
            metric_type="accuracy",
            metric_name=f"accuracy, {LEVELS[level]}, percent",
            metric_value=round(100 * estimate, 2),
            metric_args=arguments,
        )

    found = []
    if measured := facts.metrics.get(f"evaluate_{facts.model}"):
        name, confidence = f"MMD-Bench on {facts.config.source.kind}", facts.config.evaluate.confidence
        for level in (level for level in SEVERITIES if level in measured["accuracy"]):
            ends = measured["interval"][level]
            found.append(entry(name, "mmd-bench", level, measured["accuracy"][level], *ends, confidence))
    for level, cells in _row(facts).get("levels", {}).items():
        named = {bench: cell for bench, cell in cells["benchmarks"].items() if cell}
        if cells["average"] and len(named) > 1:
            named["average of MMD-Bench"] = cells["average"]
        for bench, cell in named.items():
            if cell.get("low") is not None:
                ends = (cell["estimate"], cell["low"], cell["high"])
                found.append(entry(bench, bench.lower(), level, *ends, facts.board["confidence"]))
    return found


def _row(facts: Facts) -> dict:
    return facts.board.get("models", {}).get(facts.row, {})


def _body(facts: Facts) -> list[str]:
    return [
        "A multimodal model after CLEAR (arXiv 2604.04780): it reads a picture and a question, restores the picture "
        "first where that helps (`<image_restore>`), and answers. This is an independent implementation of the method.",
        *([f"As evaluated: {ABOUT[facts.model]}."] if facts.model else []),
        "## Base, data and their licences",
        _origins(facts).markdown(),
        "## Training",
        _training(facts).markdown(),
        "## MMD-Bench",
        *_measured(facts),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(facts)),
        "## Cost",
        cost(facts),
        "## How to run it",
        *_usage(facts),
        "## How it was made",
        *_made(facts),
    ]


def _origins(facts: Facts) -> Table:
    config = facts.config
    base = facts.base_model or "none: trained from scratch"
    rows = [
        [
            "this model",
            facts.license,
            "as this project's code" if facts.license == LICENSE else "as stated by whoever releases it",
        ],
        ["base model", "its own" if config.model.checkpoint else "–", base],
        ["training data", "its own" if config.source.kind != "scenes" else LICENSE, SOURCES[config.source.kind]],
    ]
    if config.traces.kind == "teacher":
        words = f"demonstrations were written by {config.teacher.model}; the terms of its provider apply"
        rows.append(["demonstrations", "its own", words])
    if facts.board:
        rows.append(["benchmarks", "their own", BENCHMARK_LICENCES])
    return Table(["what", "licence", "which"], [[as_text(cell) for cell in row] for row in rows])


def _training(facts: Facts) -> Table:
    """The stages up to this model, from the parameters."""
    config, last = facts.config, facts.stage

    def phase(name: str, given: Phase) -> list[str]:
        return [name, f"{given.steps} steps of {given.batch}", f"{given.lr:g}"]

    stages = {"base": [], "sft_direct": [], "sft": [], "bridge": [], "grpo": []}
    if not config.model.checkpoint:
        stages["base"] = [phase(f"base, {part}", getattr(config.base, part)) for part in ("vit", "vae", "joint")]
    stages["sft_direct"] = [phase("fine-tuning to answer directly", config.sft.traces)]
    stages["sft"] = [
        phase("restoration, clean and degraded pairs", config.sft.restoration),
        phase("fine-tuning on demonstrations", config.sft.traces),
    ]
    stages["bridge"] = [
        phase(f"bridge ({config.bridge.kind}), {part}", getattr(config.bridge, part))
        for part in ("distill", "answer", "decide")
    ]
    grpo = config.grpo
    steps = f"{grpo.steps} steps of {grpo.prompts} questions × {grpo.group_size} rollouts"
    stages["grpo"] = [["interleaved GRPO", steps, f"{grpo.lr:g}"]]
    before = {"base": ["base"], "sft_direct": ["base", "sft_direct"]}
    chosen = before.get(last) or [name for name in stages if name != "sft_direct"]
    chosen = chosen[: chosen.index(last) + 1]
    rows = [row for name in chosen for row in stages[name] if not row[1].startswith("0 steps")]
    adapter = f"adapters of rank {config.lora.rank}, added to the weights" if config.lora.rank else "all weights"
    counts = []
    if traces := facts.metrics.get("traces", {}).get("traces"):
        counts.append(f"{traces} demonstrations")
    if images := facts.metrics.get("degrade", {}).get("images"):
        number = sum(n for kinds in images.values() for levels in kinds.values() for n in levels.values())
        counts.append(f"{number} degraded training and validation pictures")
    caption = f"Trained: {adapter}. Profile `{config.profile}`, seed {config.seed}."
    return Table(
        ["stage", "steps", "learning rate"], rows, " ".join([caption, *[f"{c.capitalize()}." for c in counts]])
    )


def _measured(facts: Facts) -> list[str]:
    parts = []
    own = {name: facts.metrics[f"evaluate_{name}"] for name in MODELS if f"evaluate_{name}" in facts.metrics}
    if facts.model in own:
        parts.append(_levels(facts, own).markdown())
        parts.append(_paired(facts).markdown() if facts.report else "No paired comparison was made.")
    if row := _row(facts):
        benches = list(facts.board["benchmarks"])
        cells = [
            [LEVELS[level], *(interval(found["benchmarks"].get(b)) for b in benches), interval(found["average"])]
            for level, found in row["levels"].items()
        ]
        caption = f"`clear score`, percent. Judge: {row['judge']}. Damage: {row['protocol']}."
        header = ["level", *map(as_text, benches), "average"]
        parts.append(Table(header, cells, as_text(caption)).markdown())
        relative = interval(row["robustness"]["relative"])
        parts.append(f"Relative robustness (hard / clean): {relative}. {' '.join(map(as_text, facts.board['notes']))}")
    return parts or ["Not measured: no evaluation of this model was given."]


def _levels(facts: Facts, own: dict[str, dict]) -> Table:
    compared = [facts.model, *(name for name in ("base", "sft_direct") if name != facts.model and name in own)]
    rows = []
    for name in compared:
        found = own[name]
        cells = [
            f"{points(found['accuracy'][level])} [{points(found['interval'][level][0])}, "
            f"{points(found['interval'][level][1])}]"
            if level in found["accuracy"]
            else "–"
            for level in SEVERITIES
        ]
        title = f"**{NAMES[name]}**" if name == facts.model else f"{NAMES[name]} ({ABOUT[name]})"
        calls = found["call_rate"]
        restores = " / ".join(points(calls.get(level)) for level in SEVERITIES)
        rows.append([title, *cells, points(found["robustness"]["relative"]), restores])
    asked = ", ".join(f"{LEVELS[level]} {own[facts.model]['questions'].get(level, 0)}" for level in SEVERITIES)
    checked = "of exactly these weights" if facts.verified else "of the training that these weights are said to be of"
    caption = (
        f"This project's own MMD-Bench on {facts.config.source.kind}: right answers in percent with "
        f"{100 * facts.config.evaluate.confidence:g} % bootstrap intervals over images, {checked}. Questions: {asked}. "
        "“Restored”: the share of answers with a restoration first (clean / low / mid / hard)."
    )
    header = ["model", *(LEVELS[level] for level in SEVERITIES), "hard / clean", "restored"]
    return Table(header, rows, caption)


def _paired(facts: Facts) -> Table:
    rows = []
    for pair in COMPARISONS:
        claim = facts.report["claims"].get(pair.id)
        if claim and claim["measured"] and facts.model in (pair.a, pair.b):
            ends = f"{points(claim['low'], True)} to {points(claim['high'], True)}"
            title = f"{NAMES[pair.a]} − {NAMES[pair.b]}, {LEVELS[pair.severity]}"
            rows.append([title, points(claim["estimate"], True), ends, claim["verdict"]])
    interval_of = f"{100 * facts.report['confidence']:g} % interval"
    return Table(["paired, in points", "estimate", interval_of, "claim"], rows)


def _limits(facts: Facts) -> list[str]:
    config, limits = facts.config, []
    if config.source.kind == "scenes":
        limits.append("It knows rendered scenes and the words of their questions, and nothing of photographs.")
    limits.append(
        "Damage is that of MMD-Bench, 16 synthetic types at three levels. Other damage, geometric damage above all, "
        "was not measured."
    )
    limits.append("A restored picture is what the model expects to be there, not evidence of what was there.")
    if facts.model and facts.report:
        failed = [claim["text"] for claim in facts.report["claims"].values() if claim["verdict"] == "does not hold"]
        limits += [f"Does not hold: {as_text(text)}" for text in failed]
    limits.append(f"One training with one seed ({config.seed}); intervals say nothing of another one.")
    if facts.foreign:
        limits.append(f"BAGEL's own tools and vLLM-Omni cannot run it: {'; '.join(facts.foreign)}.")
    if facts.bridge == "mlp":
        limits.append(
            "`bridge.safetensors` is this project's own: other programs load the rest, and answer without what the "
            "model restored."
        )
    return limits


def cost(facts: Facts) -> str:
    """What training and answering took, as far as it is the same on every machine; seconds are in no tracked file."""
    config, parts = facts.config, []
    if facts.stage == "grpo" and (done := facts.metrics.get("grpo", {}).get("steps")) is not None:
        rollouts = done * config.grpo.prompts * config.grpo.group_size
        early = ", stopped early" if facts.metrics["grpo"].get("stopped") else ""
        parts.append(f"GRPO took {done} steps{early}: {rollouts:,} rollouts.")
    if measured := facts.metrics.get(f"evaluate_{facts.model}"):
        calls = measured["call_rate"]
        shares = ", ".join(f"{LEVELS[level]} {points(calls[level])}" for level in SEVERITIES if level in calls)
        parts.append(f"An answer with a restoration first costs a denoising run more; percent of answers: {shares}.")
    if facts.tracked:
        size = sum(out["size"] for out in facts.tracked.values())
        parts.append(f"The files take {size / 2**20:,.1f} MiB.")
    parts.append("Time and money depend on the machine and are not part of a release.")
    return " ".join(parts)


def _usage(facts: Facts) -> list[str]:
    if facts.tag:
        model, version = facts.tag.split("@")
        get = f"dvc artifacts get REPOSITORY {model} --rev {version}"
        return [
            "In a clone of the project, with its DVC remote; the second line gets the files alone, from anywhere:",
            f'```sh\nclear ask picture.png "what is written on the sign ?" --model {facts.tag}\n{get}\n```',
        ]
    parts = [
        "With the code of this project, in a folder whose `params.yaml` has the shapes of this model:",
        '```sh\nclear ask picture.png "what is written on the sign ?" --model .\nclear serve .\n```',
    ]
    if not facts.foreign:
        parts.append(
            "The folder has the layout of BAGEL-7B-MoT: its own tools load it as `model_path`, and vLLM-Omni by the "
            "folder's name. Neither restores while it thinks; that is this project's engine."
        )
    return parts


def _made(facts: Facts) -> list[str]:
    code = f"Code: commit `{facts.commit}`." if facts.commit else "The commit of the code is not known."
    if facts.tag:
        code = f"Code: the commit that tag `{facts.tag}` names, which this card is part of."
    parts = [
        code,
        f"Data, parameters and every stage: `dvc.lock` with SHA-256 `{facts.lock}`." if facts.lock else "",
    ]
    rows = [[f"`{name}`", str(file["bytes"]), f"`{file['sha256']}`"] for name, file in sorted(facts.files.items())]
    table = Table(["file", "bytes", "SHA-256"], rows)
    if facts.tracked:
        rows = [[f"`{name}`", str(out["size"]), f"`{out['md5']}`"] for name, out in sorted(facts.tracked.items())]
        table = Table(["output", "bytes", "MD5 in dvc.lock"], rows)
    return [" ".join(part for part in parts if part), table.markdown()]
