"""Commands that use a trained model: ask, answer, serve, browse, measure its decision, merge, export."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from clear.data.lock import making
from clear.data.ports import HOST
from clear.errors import ClearError, quoted, say, shown
from clear.schema import QUANTISED

SERVE_KEY = "CLEAR_SERVE_KEY"
RESTORE = ("auto", "always", "never", "plain")
FEEDBACK = ("bridge", "reencode")
Base = Annotated[
    Path | None,
    typer.Option(help="Folder that completes weights alone, or has the weights an adapter adapts."),
]


def _called(model: Path) -> str:
    """What a model is called where no name is given: as its folder, also where one weight file in it is named."""
    return (model.parent if model.is_file() else model).resolve().name


def _found(model: Path, otherwise: str = "name another folder") -> Path:
    """A model's folder, or that of a release by name, fetched if need be. Raises ClearError if it is not here."""
    from clear.project.release.fetch import released

    folder = released(model)
    if not folder.exists():
        raise ClearError(f"{folder}: no model here; run `make repro` (or `dvc pull {folder}`), or {otherwise}.")
    return folder


def _choices(*options: tuple[str, str | None, Sequence[str]]) -> None:
    """Raise ClearError for an option (name, value, values) with another value; None, not given, is none."""
    for option, value, values in options:
        if value is not None and value not in values:
            raise ClearError(f"{option} {value}: choose one of {', '.join(values)}.")


def _check_save(save: Path, image: Path) -> None:
    """Raise ClearError where no picture can be written to `save`, before a model has answered in vain."""
    if save.exists() and save.samefile(image):
        raise ClearError(f"--save {save}: is the picture itself; name another file.")
    if save.is_dir():  # an empty name, too: it is the working directory
        raise ClearError(f"--save {save}: is a folder; name a file in it, such as {save / 'restored.png'}.")
    above = next((folder for folder in save.parents if folder.exists()), Path())
    if not above.is_dir():
        raise ClearError(f"--save {save}: {above} is a file and not a folder; name another file.")


def ask(
    image: Annotated[Path, typer.Argument(help="PNG or JPEG file.")],
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    model: Annotated[Path, typer.Option(help="Model folder or weight file, or @prod.")] = Path("data/models/grpo"),
    save: Annotated[Path | None, typer.Option(help="Write the restored image here (PNG).")] = None,
    restore: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    base: Base = None,
) -> None:
    """Ask a trained model about one image."""
    from clear.config import load
    from clear.data.images import encode_image
    from clear.data.io import replacing
    from clear.model.weights import with_base, with_local_weights

    if restore not in ("auto", "always", "never"):
        raise ClearError(f"--restore {restore}: choose auto, always or never.")
    if not image.is_file():
        raise ClearError(f"{image}: no such file; name a PNG or JPEG image.")
    if not question.strip():
        raise ClearError("the question is empty; ask something.")
    if save is not None:
        _check_save(save, image)
    config = with_base(load(), base)
    model = _found(model, "name one with --model")
    config = with_local_weights(config, "ask")
    answer = importlib.import_module("clear.reasoning.ask").ask(image, question, model, restore, config)
    say(answer.trace)
    say(f"restored: {'yes' if answer.restored else 'no'}")
    say(f"answer: {answer.answer}")
    if save is not None:
        if answer.picture is None:
            raise ClearError(f"--save {save}: nothing was restored, so nothing is saved; try --restore always.")
        with replacing(save, several=True) as partial:
            partial.write_bytes(encode_image(answer.picture))
        say(f"restored image: {save}")


def _check_name(name: str) -> None:
    """Raise ClearError for a model's name after which no folder and file should be called."""
    if name.startswith("."):
        raise ClearError(f"--name {name}: files are called after it; begin it with a letter or a digit.")
    if not name.isprintable() or name != name.strip():
        raise ClearError(
            f"--name {quoted(name)}: files are called after it; write it without line breaks, and without spaces "
            "around it."
        )


def _check_respondent(
    model: Path | None, endpoint: str, name: str, base: Path | None, cluster: str, key_from: str
) -> None:
    """Raise ClearError where it is not clear who answers, or for an option that whoever answers cannot take."""
    if (model is None) == (endpoint == ""):
        raise ClearError("name who answers: either --model FOLDER or --endpoint URL (with --name).")
    if endpoint and not name:
        raise ClearError("--endpoint needs --name: the model's name there, as its /v1/models lists it.")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise ClearError(f"--endpoint {endpoint}: must begin with http:// or https:// (and usually end in /v1).")
    if endpoint and base is not None:
        raise ClearError(f"--base {base}: an endpoint has its own; leave it out.")
    if endpoint and cluster:
        raise ClearError(f"--cluster {cluster}: an endpoint answers where it is; leave it out.")
    if key_from and not endpoint:
        raise ClearError(f"--key-from {key_from}: a model folder takes no key; leave it out.")
    if key_from and not os.environ.get(key_from):
        raise ClearError(f"--key-from {key_from}: this environment variable is not set; export it.")
    if name:
        _check_name(name)


def answer(
    data: Annotated[list[Path], typer.Argument(help="Benchmark tables of VLMEvalKit (TSV), clean or degraded.")],
    out: Annotated[Path, typer.Option(help="Folder for the predictions.")],
    model: Annotated[Path | None, typer.Option(help="Model folder that answers: data/models/grpo, or @prod.")] = None,
    base: Base = None,
    endpoint: Annotated[str, typer.Option(help="URL of an OpenAI-compatible server that answers instead.")] = "",
    name: Annotated[str, typer.Option(help="The model's name in file names, and for an endpoint.")] = "",
    restore: Annotated[
        str | None,
        typer.Option(help="auto, always, never or plain (a model that knows none); default: auto, or the endpoint's."),
    ] = None,
    feedback: Annotated[
        str | None, typer.Option(help="bridge or reencode; default: bridge, or the endpoint's.")
    ] = None,
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
    from clear.data.tables import DELIMITERS
    from clear.llm.endpoint import connect
    from clear.model.weights import with_base, with_local_weights
    from clear.sources.lmudata import Table

    _choices(("--restore", restore, RESTORE), ("--feedback", feedback, FEEDBACK))
    _choices(("--prompt", prompt, STYLES), ("--format", form, FORMATS))
    _check_respondent(model, endpoint, name, base, cluster, key_from)
    for file in data:
        if not file.is_file():
            raise ClearError(f"{file}: no such file; name TSVs of VLMEvalKit's LMUData folder.")
        if file.suffix.lower() not in DELIMITERS:
            Table(file)  # some of what a TSV may have cannot be read from other formats
    config, rejects = load(), []
    if model is not None:
        model = _found(model)
        name = name or _called(model)
        _check_name(name)
        config = with_local_weights(with_base(config, base), "ask")
        respondent = nullcontext(Folder(model, config, restore or "auto", feedback or "bridge", cluster))
    else:
        key = f"${key_from}" if key_from else ""
        there = replace(config.teacher, url=endpoint, model=name, key=key, temperature=0.0)
        wish = {key: value for key, value in (("restore", restore), ("feedback", feedback)) if value is not None}
        respondent = connect(there, "teacher", out / "replies.sqlite")
        if wish:  # for a `clear serve`; another server may refuse the field
            respondent.more["clear"] = wish
    label = name.replace("/", "_")
    with respondent as who:
        for file in data:
            asked = Served(who) if endpoint else who
            alone = making(out / label / file.stem, "clear answer")
            with alone, tqdm(total=count(file), desc=shown(file.stem), unit="row") as bar:
                done = answer_table(file, out, label, asked, prompt, form, bar.update)
            say(str(done.table))
            rejects += done.rejects
    if rejects:
        first = rejects[0]
        raise ClearError(
            f"{len(rejects)} rows have no prediction; all others are written. The first: {first.id} ({first.reason}): "
            f"{first.detail}"
        )


def serve(
    model: Annotated[Path, typer.Argument(help="Model folder or weight file: data/models/grpo; or a release: @prod.")],
    base: Base = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine a key is required.")] = HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = any that is free.")] = 8000,
    name: Annotated[str, typer.Option(help="What clients call the model; default: the folder's name.")] = "",
    key_from: Annotated[
        str, typer.Option(help="Environment variable with the key that clients must send.")
    ] = SERVE_KEY,
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
    from clear.model.weights import with_base, with_local_weights
    from clear.serve import serve as run
    from clear.serve.settings import Settings

    _choices(("--restore", restore, RESTORE), ("--feedback", feedback, FEEDBACK))
    given = os.environ.get(key_from, "")
    key = given.strip()  # a mounted secret ends with a line break
    if not key and (given or key_from != SERVE_KEY):
        wrong = "is blank; put the key into it" if given else "is not set; export it"
        raise ClearError(f"--key-from {key_from}: this environment variable {wrong}.")
    if not key.isprintable():  # said without the key: it is a secret
        raise ClearError(
            f"--key-from {key_from}: this environment variable has a line break, or another character that no client "
            "can send, inside the key; export the key alone."
        )
    model = _found(model)
    config = with_local_weights(with_base(load(), base), "ask")
    sampling = config.sampling
    settings = Settings(
        name=name or _called(model),
        key=key,
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
    run(model, config, settings, host, port, say)


def browse(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on the loopback interface.")] = 8501,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = True,
) -> None:
    """Look at the evaluation in a web page: images, answers and traces; degrade and ask about your own image."""
    from clear.browse import serve

    serve(Path(), port, open_browser)


def decision(
    model: Annotated[str, typer.Argument(help="sft, reencode, bridge or grpo.")] = "grpo",
) -> None:
    """Measure when a model restores: accuracy against the share of pictures restored, on data/development."""
    import json

    from clear.config import load
    from clear.model.weights import with_local_weights
    from clear.report import budget

    with making(budget.place(load(), model), "clear decision"):
        file = budget.run(with_local_weights(load(), "evaluate"), model)
    say(budget.table(json.loads(file.read_text())))
    say(f"figures: {file}\ncurves: {file.with_suffix('.png')}")


def _type(weights: str) -> Any:
    """The torch type that `--weights` names."""
    types = importlib.import_module("clear.training.load").TYPES
    if weights not in types:
        raise ClearError(f"--weights {weights}: choose {' or '.join(types)}.")
    return types[weights]


def _check_places(folder: Path, out: Path, base: Path | None) -> None:
    """Raise ClearError where a new model folder must not be written, or its `--base` is not there, before any work."""
    importlib.import_module("clear.project.release.export").apart(folder, out)
    if base is not None and not base.exists():
        raise ClearError(f"--base {base}: nothing is there; name a folder or a file of weights.")


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
    _check_places(folder, out, base)
    kind = _type(weights) if weights else importlib.import_module("clear.model.runtime").stored(load())[0]
    with making(out, "clear merge"):
        quantised = importlib.import_module("clear.model.lora").merge(folder, out, kind, base)
    say(f"{out} written.")
    if quantised:
        say(
            f"The adapter was trained on {quantised} weights and has been added to those, decoded, not to the exact "
            "ones; the sums are rounded once."
        )


def quantise(
    folder: Annotated[Path, typer.Argument(help="A folder (or file) of exact weights, such as BAGEL-7B-MoT.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    kind: Annotated[str, typer.Option(help="nf4 or int8, for the decoder's linear layers.")] = "nf4",
    base: Annotated[Path | None, typer.Option(help="The model folder that completes weights alone.")] = None,
    weights: Annotated[str, typer.Option(help="float32 or bfloat16 for everything else; default: as stored.")] = "",
) -> None:
    """Write a model folder with quantised weights, which loads at once where `runtime.weights` is of its kind.

    Memory: the new weights once (10 GB for BAGEL-7B as nf4, 16 GB as int8).
    """
    if kind not in QUANTISED:
        raise ClearError(f"--kind {kind}: choose {' or '.join(QUANTISED)}.")
    if importlib.import_module("clear.model.lora").is_adapter(folder):
        raise ClearError(f"{folder} holds an adapter; quantise the weights it adapts, or `clear merge` it first.")
    _check_places(folder, out, base)
    dtype = _type(weights) if weights else None
    with making(out, "clear quantise"):
        importlib.import_module("clear.model.checkpoint").quantise_folder(folder, out, kind, dtype, base)
    say(f"{out} written.")


def export(
    folder: Annotated[Path, typer.Argument(help="A model of this project, weights or adapter: data/models/grpo.")],
    out: Annotated[Path, typer.Argument(help="The new folder: all weights and a model card.")],
    base: Annotated[Path | None, typer.Option(help="The weights (folder or file) an adapter adapts, if moved.")] = None,
    weights: Annotated[str, typer.Option(help="float32 or bfloat16 in the new folder; default: as stored.")] = "",
    name: Annotated[
        str, typer.Option(help="The model's name on the card and in --scores; default: the folder's.")
    ] = "",
    license: Annotated[
        str, typer.Option(help="Its licence, as the hub names it; needed if weights or data were given.")
    ] = "",
    base_model: Annotated[
        str, typer.Option(help="The base model's name on the hub; needed if weights were given.")
    ] = "",
    dataset: Annotated[list[str] | None, typer.Option(help="Names of its training data on the hub.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Languages of its data; default: en.")] = None,
    evaluation: Annotated[
        str, typer.Option(help="Whose metrics: grpo, bridge, …; default: by the folder's name.")
    ] = "",
    scores: Annotated[Path | None, typer.Option(help="JSON of `clear score`: a leaderboard with this model.")] = None,
) -> None:
    """Write a model for others: the files that BAGEL's tools and vLLM-Omni read, and a model card.

    Memory as for merge. docs/LEADERBOARD.md says what the card has.
    """
    from clear.config import load

    if not folder.is_dir():
        raise ClearError(f"{folder}: no folder here; name one that a training stage wrote.")
    _check_places(folder, out, base)
    kind = _type(weights) if weights else None
    release = importlib.import_module("clear.project.release.export")
    wishes = release.Wishes(name, license, base_model, dataset or [], language or ["en"], evaluation, scores)
    with making(out, "clear export"):
        files = release.export(folder, out, load(), wishes, kind, base)
    for file in files:
        say(str(file))
