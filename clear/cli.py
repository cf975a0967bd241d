"""The command line: one command per pipeline stage, named as in dvc.yaml, and the commands a person uses.

Stages are run by DVC (`dvc repro`), which calls `python -m clear <stage>` in the project's folder. Everything heavy
is imported inside the command that needs it, so `clear --help` answers at once. A ClearError is one line on
stderr; Ctrl-C and SIGTERM end with a remedy, because every long stage resumes from its checkpoint.

One file, long as it is: a command is its signature with the help texts and a few lines that call the library, and none
reads another. The list is what one looks for here.
"""

import _thread
import importlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from clear.bench.models import MODELS
from clear.data.ports import HOST, spare_loopback
from clear.errors import ClearError, judging, naming, refusal

INTERRUPTED = 130
STAGES = {
    "source": "Clean samples, split once.",
    "degrade": "Degraded copies for training and validation.",
    "mmd_bench": "The benchmark, clean and degraded.",
    "validate": "Check that the data is what it claims to be.",
    "base": "Train the model that has seen no degraded question, or register a checkpoint.",
    "traces": "Demonstrations: restore and answer, or answer directly.",
    "sft": "Supervised fine-tuning on the traces.",
    "sft_direct": "The baseline without restoration.",
    "bridge": "Train the latent representation bridge.",
    "grpo": "Interleaved GRPO.",
}

app = typer.Typer(
    help="Teach a multimodal model to restore a degraded image when it needs to. Start with `make repro`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
TOOLS, PIPELINE = "Commands", "Pipeline stages (normally run by `dvc repro`)"


def run_stage(name: str, module: str, *args: Any, **kwargs: Any) -> None:
    """Run `clear.stages.<module>.run(config, …)` on the parameters of this folder and record its cost as `name`."""
    from clear.config import load
    from clear.data.workspace import stage_run
    from clear.model.weights import with_local_weights

    config = with_local_weights(load(), module)
    with stage_run(name):
        importlib.import_module(f"clear.stages.{module}").run(config, *args, **kwargs)


@app.command(rich_help_panel=TOOLS)
def results(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The tables of README, from data/metrics.")] = False,
) -> None:
    """Print the result table, beside the committed figures where they differ, and the report's path."""
    from clear.project.results import markdown, render

    typer.echo(markdown(Path()) if as_markdown else render(Path()))


@app.command(rich_help_panel=TOOLS)
def check() -> None:
    """Compare dvc.lock with parameters, code and committed results; needs no data and no cache.

    Exit status 0: they agree. 1: they do not. 2: cannot say, because a file cannot be read.
    """
    from clear.project.check import drifts

    with judging():
        found = drifts(Path())
    for line in found:
        typer.echo(line, err=True)
    if found:
        typer.echo(f"{len(found)} drift{'s' if len(found) > 1 else ''} found.", err=True)
        raise typer.Exit(1)
    typer.echo("dvc.lock, params.yaml, code and committed results agree.")


@app.command(rich_help_panel=TOOLS)
def compare(
    base: Annotated[str, typer.Argument(help="A revision (its merge base with HEAD counts), or a folder with data/.")],
    head: Annotated[str, typer.Argument(help="A revision, or a folder with data/ (`.` is this one).")] = "HEAD",
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: data/report/compare.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="md (printed if --out is not given), html, json or all.")
    ] = "md",
) -> None:
    """Compare the committed predictions, data and parameters of two revisions.

    Exit status 0: the report is made, whatever it says. 2: it cannot be made; a revision or a file cannot be read.
    """
    from clear.project.compare import render
    from clear.project.compare.load import read_sides
    from clear.project.compare.verdict import decide

    if form not in (*render.FORMATS, "all"):
        raise ClearError(f"--format {form}: choose one of {', '.join(render.FORMATS)} or all.")
    with judging():
        found, verdict = decide(*read_sides(Path(), base, head))
    if form == "md" and out is None:
        typer.echo(render.markdown(found, verdict), nl=False)
        return
    formats = render.FORMATS if form == "all" else (form,)
    for file in render.write(found, verdict, out or Path("data/report/compare"), formats):
        typer.echo(str(file))


@app.command(rich_help_panel=TOOLS)
def gate(
    base: Annotated[str, typer.Argument(help="As in compare.")],
    head: Annotated[str, typer.Argument(help="As in compare.")] = "HEAD",
) -> None:
    """Decide by the policy in params.yaml whether a change may pass.

    Exit status 0: yes. 1: no. 2: cannot decide; the sides are not comparable, a revision is not in this clone, or a
    file cannot be read.
    """
    from clear.project.compare.load import read_sides
    from clear.project.compare.verdict import decide, report_lines

    with judging():
        _, verdict = decide(*read_sides(Path(), base, head), detail=False)
    for line in report_lines(verdict):
        typer.echo(line)
    raise typer.Exit(verdict.status)


@app.command(rich_help_panel=TOOLS)
def params(
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in Hydra: profile=smoke, grpo.lr=1e-5.")
    ] = None,
) -> None:
    """Compose clear/conf into params.yaml."""
    from clear.config import PARAMS
    from clear.project.scratch import write_params

    write_params(PARAMS, overrides or [])
    typer.echo(f"{PARAMS} written.")


@app.command(rich_help_panel=TOOLS)
def memory(
    profile: Annotated[str, typer.Option(help="smoke, tiny, bagel_7b_lora or bagel_7b; default: params.yaml.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --profile: sft.traces.batch=1.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices that share weights and batch (FSDP).")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes, machine-readable.")] = False,
) -> None:
    """Estimate the memory each stage needs, before anything is loaded."""
    import json
    from dataclasses import asdict

    from clear.config import compose, from_dict, load

    if overrides and not profile:
        raise ClearError("--set changes a composed profile; name it with --profile, or edit params.yaml.")
    config = from_dict(compose([f"profile={profile}", *(overrides or [])])) if profile else load()
    module = importlib.import_module("clear.training.memory")
    vocab = module.BAGEL_VOCABULARY
    if config.base.joint.steps:  # trained from scratch, on a closed vocabulary
        from clear.model.tokenizer import word_tokenizer
        from clear.training.build import scene_words

        vocab = word_tokenizer(scene_words()).get_vocab_size()
    found = [module.estimate(config, stage, vocab, gpus) for stage in module.STAGES]
    if as_json:
        content = {"profile": config.profile, "gpus": gpus, "stages": [asdict(one) for one in found]}
        typer.echo(json.dumps(content, indent=2))
    else:
        typer.echo(module.report(found, config.profile, gpus))


@app.command(rich_help_panel=TOOLS)
def scratch(
    profile: Annotated[str, typer.Argument(help="smoke, tiny, bagel_7b_lora or bagel_7b.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in Hydra: grpo.group_size=4.")
    ] = None,
) -> None:
    """Run the pipeline under another profile in a copy of this folder; nothing tracked here changes."""
    from clear.project.results import render
    from clear.project.scratch import run

    typer.echo(render(run(Path(), profile, overrides or [])))


@app.command(rich_help_panel=TOOLS)
def ask(
    image: Annotated[Path, typer.Argument(help="PNG or JPEG file.")],
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    model: Annotated[Path, typer.Option(help="Model folder, or a weight file in it.")] = Path("data/models/grpo"),
    save: Annotated[Path | None, typer.Option(help="Write the restored image here (PNG).")] = None,
    restore: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
) -> None:
    """Ask a trained model about one image."""
    from clear.config import load
    from clear.data.images import encode_image
    from clear.model.weights import with_local_weights

    if restore not in ("auto", "always", "never"):
        raise ClearError(f"--restore {restore}: choose auto, always or never.")
    if not image.is_file():
        raise ClearError(f"{image}: no such file; name a PNG or JPEG image.")
    if not model.exists():
        raise ClearError(f"{model}: no model here; run `make repro` (or `dvc pull {model}`), or name one with --model.")
    config = with_local_weights(load(), "ask")
    answer = importlib.import_module("clear.reasoning.ask").ask(image, question, model, restore, config)
    typer.echo(answer.trace)
    typer.echo(f"restored: {'yes' if answer.restored else 'no'}")
    typer.echo(f"answer: {answer.answer}")
    if save is not None:
        if answer.picture is None:
            raise ClearError(f"--save {save}: nothing was restored, so nothing is saved; try --restore always.")
        save.write_bytes(encode_image(answer.picture))
        typer.echo(f"restored image: {save}")


@app.command(rich_help_panel=TOOLS)
def answer(
    data: Annotated[list[Path], typer.Argument(help="Benchmark tables of VLMEvalKit (TSV), clean or degraded.")],
    out: Annotated[Path, typer.Option(help="Folder for the predictions.")],
    model: Annotated[Path | None, typer.Option(help="Model folder that answers, such as data/models/grpo.")] = None,
    endpoint: Annotated[str, typer.Option(help="URL of an OpenAI-compatible server that answers instead.")] = "",
    name: Annotated[str, typer.Option(help="The model's name in file names, and for an endpoint.")] = "",
    restore: Annotated[str, typer.Option(help="auto, always, never or plain (a model that knows none).")] = "auto",
    feedback: Annotated[str, typer.Option(help="bridge or reencode.")] = "bridge",
    prompt: Annotated[str, typer.Option(help="vlmeval: as VLMEvalKit asks; plain: question and options.")] = "vlmeval",
    form: Annotated[str, typer.Option("--format", help="tsv or xlsx.")] = "tsv",
    cluster: Annotated[str, typer.Option(help="Address of a Dask scheduler whose workers answer.")] = "",
    key_from: Annotated[str, typer.Option(help="Environment variable with the endpoint's key.")] = "",
) -> None:
    """Answer benchmark tables: a prediction table for each, which `clear score` reads (docs/SERVE.md).

    The same command again continues after an interruption. Rows without an answer are left out, are listed in
    <model>_<bench>_rejects.parquet and make the exit status 1.
    """
    from contextlib import nullcontext
    from dataclasses import replace

    from tqdm import tqdm

    from clear.bench.vlmeval.answering import FORMATS, answer_table, count
    from clear.bench.vlmeval.prompts import STYLES
    from clear.bench.vlmeval.respond import Folder, Served
    from clear.config import load
    from clear.llm.endpoint import connect
    from clear.model.weights import with_local_weights

    for option, value, values in (
        ("--restore", restore, ("auto", "always", "never", "plain")),
        ("--feedback", feedback, ("bridge", "reencode")),
        ("--prompt", prompt, STYLES),
        ("--format", form, FORMATS),
    ):
        if value not in values:
            raise ClearError(f"{option} {value}: choose one of {', '.join(values)}.")
    if (model is None) == (endpoint == ""):
        raise ClearError("name who answers: either --model FOLDER or --endpoint URL (with --name).")
    if model is not None and not model.exists():
        raise ClearError(f"{model}: no model here; run `make repro` (or `dvc pull {model}`), or name another folder.")
    if endpoint and not name:
        raise ClearError("--endpoint needs --name: the model's name there, as its /v1/models lists it.")
    for file in data:
        if not file.is_file():
            raise ClearError(f"{file}: no such file; name TSVs of VLMEvalKit's LMUData folder.")
    config, rejects = load(), []
    if model is not None:
        name = name or model.resolve().name
        respondent = nullcontext(Folder(model, with_local_weights(config, "ask"), restore, feedback, cluster))
    else:
        key = f"${key_from}" if key_from else ""
        there = replace(config.teacher, url=endpoint, model=name, key=key, temperature=0.0)
        respondent = connect(there, "teacher", out / "replies.sqlite")
    label = name.replace("/", "_")
    with respondent as who:
        for file in data:
            asked = Served(who) if endpoint else who
            with tqdm(total=count(file), desc=file.stem, unit="row") as bar:
                done = answer_table(file, out, label, asked, prompt, form, bar.update)
            typer.echo(str(done.table))
            rejects += done.rejects
    if rejects:
        first = rejects[0]
        raise ClearError(
            f"{len(rejects)} rows have no prediction; all others are written. The first: {first.id} ({first.reason}): "
            f"{first.detail}"
        )


@app.command(rich_help_panel=TOOLS)
def serve(
    model: Annotated[Path, typer.Argument(help="Model folder, or a weight file in it, such as data/models/grpo.")],
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine a key is required.")] = HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = any that is free.")] = 8000,
    name: Annotated[str, typer.Option(help="What clients call the model; default: the folder's name.")] = "",
    key_from: Annotated[
        str, typer.Option(help="Environment variable with the key that clients must send.")
    ] = "CLEAR_SERVE_KEY",
    restore: Annotated[str, typer.Option(help="Unless a request says: auto, always, never or plain.")] = "auto",
    feedback: Annotated[str, typer.Option(help="Unless a request says: bridge or reencode.")] = "bridge",
    rows: Annotated[int, typer.Option(min=0, help="Answered at once; 0 = sampling.batch of params.yaml.")] = 0,
    queue: Annotated[int, typer.Option(min=1, help="Answers that may wait; beyond, status 429.")] = 256,
    max_prompt: Annotated[int, typer.Option(min=1, help="Tokens of a conversation, its picture included.")] = 8192,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of an answer; 0 = what params.yaml allows all its replies.")
    ] = 0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a picture.")] = 50_000_000,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 20 * 2**20,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds of a request.")] = 300.0,
    fetch: Annotated[
        bool, typer.Option("--fetch-pictures", help="Fetch pictures by http(s) URL, from public addresses only.")
    ] = False,
) -> None:
    """Serve a model to OpenAI-compatible clients (docs/SERVE.md)."""
    from clear.config import load
    from clear.model.weights import with_local_weights
    from clear.serve import serve as run
    from clear.serve.settings import Settings

    for option, value, values in (
        ("--restore", restore, ("auto", "always", "never", "plain")),
        ("--feedback", feedback, ("bridge", "reencode")),
    ):
        if value not in values:
            raise ClearError(f"{option} {value}: choose one of {', '.join(values)}.")
    if not model.exists():
        raise ClearError(f"{model}: no model here; run `make repro` (or `dvc pull {model}`), or name another folder.")
    config = with_local_weights(load(), "ask")
    sampling = config.sampling
    settings = Settings(
        name=name or model.resolve().name,
        key=os.environ.get(key_from, ""),
        rows=rows or sampling.batch,
        queue=queue,
        body=max_body,
        pixels=max_pixels,
        prompt=max_prompt,
        tokens=max_tokens or sampling.max_think_tokens * (sampling.max_restorations + 1),
        seconds=timeout,
        fetch=fetch,
        restore=restore,
        feedback=feedback,
    )
    run(model, config, settings, host, port, lambda line: typer.echo(line))


@app.command(rich_help_panel=TOOLS)
def browse(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on the loopback interface.")] = 8501,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = True,
) -> None:
    """Look at the evaluation in a web page: images, answers and traces; degrade and ask about your own image."""
    from clear.browse import serve

    serve(Path(), port, open_browser)


@app.command(rich_help_panel=TOOLS)
def score(
    files: Annotated[
        list[Path], typer.Argument(help="Tables of predictions (TSV, xlsx, CSV, Parquet, JSON), one per set.")
    ],
    out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Write the scored rows here (Parquet).")] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="Grade MM-Vet and unmatched answers by the endpoint `judge` of params.yaml.")
    ] = False,
) -> None:
    """Score prediction files of VLMEvalKit on benchmarks and their degraded copies (docs/DATA.md)."""
    from contextlib import nullcontext

    from tqdm import tqdm

    from clear.bench.vlmeval import scores
    from clear.config import load
    from clear.data.io import write_json
    from clear.data.workspace import replies_file
    from clear.llm.endpoint import connect

    frame = scores.read_predictions(files)
    with connect(load().judge, "judge", replies_file("judge")) if judge else nullcontext() as client:
        with tqdm(desc="judge", unit="question", disable=not judge) as bar:
            frame = scores.score(frame, client, bar.update)
        found = scores.summary(frame)
        if client is not None:
            from clear.bench.judge import prompt_hash

            found["judge"] = client.report() | {"prompts": prompt_hash()}
    typer.echo(scores.table(found))
    if found["rejected"]:
        reason = frame["reject"][frame["reject"] != ""].iloc[0]
        typer.echo(f"{found['rejected']} rows have no verdict and are in no figure; the first: {reason}", err=True)
    if out is not None:
        write_json(out, found)
    if rows is not None:
        rows.parent.mkdir(parents=True, exist_ok=True)
        with naming(rows):
            frame.to_parquet(rows, index=False)


@app.command("mmd-bench", rich_help_panel=TOOLS)
def mmd_bench_files(
    source: Annotated[Path, typer.Option(readable=False, help="VLMEvalKit's LMUData folder, or one TSV of it.")],
    out: Annotated[Path, typer.Option(help="Folder for the degraded TSVs and manifest.parquet.")],
    protocol: Annotated[
        str, typer.Option(help="row: one corruption per picture at three levels; full: all 16, in 48 files.")
    ] = "row",
    names: Annotated[
        str, typer.Option(help="With full: ours, or authors: their names, 16 files at level high.")
    ] = "ours",
    scale: Annotated[float, typer.Option(help="Factor on sizes in pixels; 1 = as published.")] = 1.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 = one per core.")] = 0,
) -> None:
    """Write degraded benchmark files (TSV) that VLMEvalKit reads; the stage `mmd_bench` makes this project's own.

    The same command again continues after an interruption. Files that cannot be read and rows that cannot be degraded
    are left out, are listed in rejects.parquet and make the exit status 1. docs/DATA.md says how to evaluate.
    """
    from clear.bench.vlmeval.tsv import NAMES, PROTOCOLS, REJECTS, write_benchmarks
    from clear.data.rejects import read_rejects
    from clear.sources.lmudata import FILE

    if protocol not in PROTOCOLS:
        raise ClearError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}.")
    if names not in NAMES or (names == "authors" and protocol != "full"):
        raise ClearError(f"--names {names}: choose one of {', '.join(NAMES)}, authors with --protocol full only.")
    if not os.path.lexists(source):
        raise ClearError(f"--source {source}: nothing is there; name a folder with VLMEvalKit's TSV files.")
    for file in write_benchmarks(source, out, protocol, scale, workers, typer.echo, names):
        typer.echo(str(file))
    typer.echo(str(out / "manifest.parquet"))
    if rejects := read_rejects(out / REJECTS):
        files = sum(reject.reason == FILE for reject in rejects)
        counts = {"files that cannot be read": files, "rows that cannot be degraded": len(rejects) - files}
        said = ", ".join(f"{what} and were left out: {number}" for what, number in counts.items() if number)
        raise ClearError(
            f"{said}; all others are written. {out / REJECTS} has them, the first: "
            f"{rejects[0].id} ({rejects[0].reason}): {rejects[0].detail}"
        )


@app.command(rich_help_panel=TOOLS)
def merge(
    folder: Annotated[Path, typer.Argument(help="A folder with an adapter, such as data/models/grpo.")],
    out: Annotated[Path, typer.Argument(help="The new folder, with all weights.")],
    base: Annotated[Path | None, typer.Option(help="The weights (folder or file) it adapts, if moved.")] = None,
    weights: Annotated[str, typer.Option(help="float32 or bfloat16 in the new folder; default: runtime.weights.")] = "",
) -> None:
    """Add an adapter to the weights it was trained on: summed in float32, layer by layer, stored as `--weights` says.

    Memory: the new weights once (29 GB for BAGEL-7B in bfloat16, 58 GB in float32); the old ones are mapped from disk.
    """
    from clear.config import load

    if not folder.is_dir():
        raise ClearError(f"{folder}: no folder here; name one that a training stage wrote with lora.rank > 0.")
    kind = weights or load().runtime.weights
    if kind not in ("float32", "bfloat16"):
        raise ClearError(f"--weights {kind}: choose float32 or bfloat16.")
    types = importlib.import_module("clear.training.load").TYPES
    importlib.import_module("clear.model.lora").merge(folder, out, types[kind], base)
    typer.echo(f"{out} written.")


_incoming = typer.Typer(help="Naturally degraded images: the sets of data/incoming.", no_args_is_help=True)
app.add_typer(_incoming, name="incoming", rich_help_panel=TOOLS)


@_incoming.command("list")
def incoming_list(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """List the sets with a fingerprint of their content."""
    import json
    from dataclasses import asdict

    from clear.sources.incoming import FOLDER, sets

    found = sets()
    if as_json:
        typer.echo(json.dumps({"sets": [asdict(one) for one in found]}, indent=1))
        return
    for one in found:
        state = f"{one.files} files, {one.size / 1e6:.1f} MB, {one.fingerprint[:12]}" if one.present else "not pulled"
        typer.echo(f"{one.name}: {state}")
        for fault in one.faults:
            typer.echo(f"  cannot be read: {fault}")
    if not found:
        typer.echo(f"no set in {FOLDER}; docs/DEGRADATIONS.md says what to put there.")


@_incoming.command("check")
def incoming_check(
    name: Annotated[str, typer.Argument(help="A folder of data/incoming.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Check one set and write a report: exit status 0 if the pipeline can take it in, else 1."""
    import json

    from clear.config import load
    from clear.validation.incoming import check as check_set
    from clear.validation.incoming import lines

    verdict = check_set(name, load())
    typer.echo(json.dumps(verdict.as_json(), indent=1) if as_json else "\n".join(lines(verdict)))
    raise typer.Exit(0 if verdict.success else 1)


def _add_stage(name: str, summary: str) -> None:
    def command() -> None:
        if name == "sft_direct":
            run_stage(name, "sft", direct=True)
        else:
            run_stage(name, name)

    app.command(name, help=summary, rich_help_panel=PIPELINE)(command)


for _name, _summary in STAGES.items():
    _add_stage(_name, _summary)


@app.command(rich_help_panel=PIPELINE)
def evaluate(
    model: Annotated[str, typer.Argument(help=f"{', '.join([*MODELS][:-1])} or {[*MODELS][-1]}.")],
    development: Annotated[
        bool, typer.Option("--development", help="Answer data/development, where recipes are compared, instead.")
    ] = False,
) -> None:
    """Run MMD-Bench for one model."""
    if model not in MODELS:
        raise ClearError(f"evaluate {model}: choose one of {', '.join(MODELS)}.")
    if development:
        from clear.config import load
        from clear.model.weights import with_local_weights
        from clear.stages.evaluate import run_development

        typer.echo(f"figures: {run_development(with_local_weights(load(), 'evaluate'), model)}")
        return
    run_stage(f"evaluate_{model}", "evaluate", model)


@app.command(rich_help_panel=PIPELINE)
def seeds(
    wanted: Annotated[list[int] | None, typer.Argument(help="Seeds to run; none: only render the page again.")] = None,
) -> None:
    """Run the pipeline under several seeds, one after the other, and write docs/RESULTS.md from all there are."""
    from clear.project import seeds as several

    typer.echo(f"results: {several.run(Path.cwd(), wanted or [])}")


@app.command(rich_help_panel=TOOLS)
def decision(
    model: Annotated[str, typer.Argument(help="sft, reencode, bridge or grpo.")] = "grpo",
) -> None:
    """Measure when a model restores: accuracy against the share of pictures restored, on data/development."""
    import json

    from clear.config import load
    from clear.model.weights import with_local_weights
    from clear.report import budget

    file = budget.run(with_local_weights(load(), "evaluate"), model)
    typer.echo(budget.table(json.loads(file.read_text())))
    typer.echo(f"figures: {file}\ncurves: {file.with_suffix('.png')}")


_add_stage("report", "Render tables, statistics and pictures.")


def main() -> None:
    """Run the command line and exit: 0 done, 1 refused with a reason, 2 misused or undecided, 130 interrupted."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.unraisablehook = _again
        spare_loopback()
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file name may not be valid text
        app()
    except ClearError as error:
        _refuse(error)
    except OSError as error:
        if (refused := refusal(error)) is None:
            raise
        _refuse(refused)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's code for KeyboardInterrupt
            _interrupted()
        raise


def _again(lost: Any) -> None:
    """An interruption in the middle of a callback (of the garbage collector, of imports), where Python drops it, comes
    again a moment later; anything else that was dropped is reported as ever."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(0.05, _thread.interrupt_main, [signal.SIGTERM])
    again.daemon = True
    again.start()


def _interrupted() -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not print the interpreter's traceback
        signal.signal(number, signal.SIG_IGN)
    typer.echo("interrupted; run the same command again to resume from the last checkpoint", err=True)
    sys.exit(INTERRUPTED)


def _refuse(error: ClearError) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    sys.exit(error.status)
