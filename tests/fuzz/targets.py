"""What is fuzzed: each reader of something that comes from outside, with valid inputs and inputs made to do harm."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

from clear.errors import ClearError
from clear.serve.errors import ApiError
from tests.fuzz import inputs

REFUSALS = ClearError, ApiError


@dataclass(frozen=True)
class Target:
    """`read(data, folder)` may return or raise one of REFUSALS; `folder` is empty and the only place for files."""

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]
    evil: Callable[[], list[bytes]] = list


_ROWS = [
    {
        "index": 1,
        "question": "q",
        "A": "x",
        "B": "y",
        "answer": "A",
        "prediction": "<answer> A </answer>",
        "image": "aGk=",
    },
    {"index": 2, "question": 'a "b", c', "A": "=1", "B": "", "answer": "B", "prediction": "B", "image": "1"},
]


def _parquet(rows: list[dict]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def _delimited(mark: str) -> Callable[[], list[bytes]]:
    lines = [mark.join(_ROWS[0])] + [
        mark.join('"' + str(v).replace('"', '""') + '"' for v in r.values()) for r in _ROWS
    ]
    bare = [mark.join(_ROWS[0]), mark.join(str(v) for v in _ROWS[0].values())]
    return lambda: ["\n".join(lines).encode(), "\r\n".join(bare).encode(), b"\xef\xbb\xbf" + "\n".join(bare).encode()]


def _lines() -> list[bytes]:
    asked = [{"image": "a.png", "questions": [{"question": "q", "answer": "A", "options": ["x", "y"]}]}]
    return ["".join(json.dumps(row) + "\n" for row in rows).encode() for rows in (_ROWS, asked)]


_FORMATS = {
    "tsv": (_delimited("\t"), lambda: [b'"' * 10**6, b"\t" * 10**6, b"a\n" + b'"\n' * 10**5]),
    "csv": (_delimited(","), lambda: [b'"' * 10**6, b"," * 10**6, b"a\n" + b'"\n' * 10**5]),
    "parquet": (lambda: [_parquet(_ROWS)], lambda: [b"PAR1\xff\xff\xff\x7fPAR1", b"PAR1PAR1"]),
    "xlsx": (lambda: [inputs.sheet(_ROWS)], inputs.evil_sheets),
    "json": (lambda: [json.dumps(_ROWS).encode()], inputs.deep_json),
    "jsonl": (_lines, inputs.deep_json),
}


def _file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """A reader of a path, as a reader of bytes: they are the file `name` of the folder."""

    def of_bytes(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return of_bytes


def _table(path: Path) -> object:
    from clear.data import tables

    return list(tables.read(path)[1])


def _source(kind: str) -> Callable[[Path], object]:
    def rows(path: Path) -> object:
        from importlib import import_module

        module = import_module(f"clear.sources.{kind}")
        return module.count(path), list(module.rows(path))

    return rows


def _image(data: bytes, _: Path) -> object:
    from clear.data.images import decode_image

    return decode_image(data)


def _params(path: Path) -> object:
    from clear.config import load

    return load(path)


def _params_seeds() -> list[bytes]:
    from tests.conftest import ROOT

    return [(ROOT / "params.yaml").read_bytes(), b"seed: 1\nsource: {kind: scenes}\n"]


def _override(data: bytes, _: Path) -> object:
    from clear.config import compose

    return compose([data.decode(errors="replace")])


def _header(path: Path) -> object:
    from clear.model.checkpoint.format import read_header

    return read_header(path)


def _headers() -> list[bytes]:
    import numpy as np
    from safetensors.numpy import save

    return [save({"a.weight": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16)}, {"format": "pt"})]


def _model_config(path: Path) -> object:
    from clear.model.checkpoint.config import read_config

    for name, content in _tiny_files().items():
        if name != path.name:
            path.with_name(name).write_bytes(content)
    return read_config(path.parent)


@cache
def _tiny_files() -> dict[str, bytes]:
    from clear.model.checkpoint.config import config_files
    from tests.tiny import tiny_model

    return {name: json.dumps(file).encode() for name, file in config_files(tiny_model("mlp")[0].config).items()}


def _config_seeds(name: str) -> Callable[[], list[bytes]]:
    return lambda: [_tiny_files()[name]]


def _adapter(path: Path) -> object:
    from clear.model import lora

    return lora.is_adapter(path.parent), lora.quantisation_of(path.parent), lora.base_of(path.parent)


def _adapters() -> list[bytes]:
    files = {"ema.safetensors": {"bytes": 8, "sha256": "0" * 64}}
    own = {"folder": ".", "files": files, "quantised": ""}
    return [json.dumps(own).encode(), json.dumps(own | {"rest": ".", "quantised": "int8"}).encode()]


def _traces(path: Path) -> object:
    from clear.traces.table import read_traces

    return [row.trace() if callable(row.trace) else row.trace for row in read_traces(path.parent)]


def _trace_seeds() -> list[bytes]:
    import tempfile
    from dataclasses import fields

    from clear.traces.table import FILE, TraceRow, write_traces

    values = {f.name: True if f.type in (bool, "bool") else "<think> a </think>" for f in fields(TraceRow)}
    with tempfile.TemporaryDirectory() as folder:
        write_traces(folder, [TraceRow(**values)])
        return [(Path(folder) / FILE).read_bytes()]


def _predictions(path: Path) -> object:
    from clear.bench import predictions

    return predictions.read(path)


def _prediction_seeds() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clear.bench import predictions
    from tests.helpers.predictions import frame_of

    stream = BytesIO()
    pq.write_table(pa.Table.from_pandas(frame_of({}), schema=predictions.SCHEMA, preserve_index=False), stream)
    return [stream.getvalue()]


def _score(path: Path) -> object:
    from clear.bench.vlmeval import scores

    return scores.read_file(path)


def _output(data: bytes, _: Path) -> object:
    from clear.reasoning import grammar, output

    text = data.decode(errors="replace")
    replies = text.split("\0")[:2]
    grammar.asks_restoration(text), grammar.well_formed(replies), grammar.extract_answer(text)
    return (
        output.thinking(replies),
        output.thinking(replies, growing=True, stop=("</", text[:3])),
        output.answer(replies),
    )


def _output_seeds() -> list[bytes]:
    from clear.reasoning import grammar

    both = "\0".join(grammar.restore_trace("q", "e", "a").replies)
    return [both.encode(), grammar.direct_trace("e", "a").replies[0].encode()]


def _output_evil() -> list[bytes]:
    many = 10**4
    return [
        b"<answer>" * many,
        b"<think>" * many + b"</think>",
        b"<answer>" + b" " * many * 3,
        b"<think>" + b"<" * many,
    ]


_HASH = "0123456789abcdef" * 4
NOTES = {
    "requests": {
        "inputs": {
            "stage": "sft",
            "cmd": "python -m clear sft",
            "deps": {"code": "1"},
            "kinds": {"code": "code"},
            "params": {"seed": 1},
            "outs": {"data/metrics/sft.json": False},
        },
        "key": "k",
        "commit": _HASH[:40],
        "bundle": {"name": "bundles/b", "sha256": _HASH},
        "files": {"params.yaml": _HASH},
        "remote": {"url": "s3://b/dvc"},
        "weights": "",
    },
    "results": {
        "stage": "sft",
        "job": "j",
        "lock": {
            "cmd": "python -m clear sft",
            "deps": [{"path": "code", "hash": "md5", "md5": "1", "size": 3}],
            "params": {"params.yaml": {"seed": 1}},
            "outs": [{"path": "data/metrics/sft.json", "hash": "md5", "md5": "2", "size": 3}],
        },
        "files": {"data/metrics/sft.json": _HASH},
        "runs": {"sft": '{"seconds": 1.5}'},
        "seconds": {"sft": 1.5},
    },
    "leases": {"flow_run": None},
    "ledger": {"stage": "sft", "allowed": 36.0, "cost": None, "hourly": 3},
    "checkpoints": {"model.safetensors": {"sha256": _HASH, "bytes": 3}},
}
"""Of each kind of note between flow and job (flows/batch/notes.py), one as it is written."""


def _note(data: bytes, _: Path) -> object:
    """As every kind of note, and a result as far as the entry of dvc.lock that it brings."""
    from flows.batch.execute import refuse_other_inputs
    from flows.batch.notes import FORMS, Inputs, parse

    for kind in FORMS:
        try:
            found = parse(f"{kind}/k.json", data)
        except ClearError as error:
            refused = error
            continue
        if kind == "results":
            refuse_other_inputs(found["lock"], Inputs(**NOTES["requests"]["inputs"]))
        return found
    raise refused


def _request(data: bytes, _: Path) -> object:
    from clear.serve import pictures, protocol

    for message in protocol.parse(data).messages:
        for part in message.content if isinstance(message.content, list) else ():
            if part.image_url is not None:
                pictures.check_pixels(pictures.from_data_url(part.image_url.url, "image"), 2**24, "image")
    return None


def _requests() -> list[bytes]:
    from tests.serving import asking, picture

    return [
        json.dumps(asking(image=picture(), **more)).encode() for more in ({}, {"stream": True, "n": 2, "stop": ["a"]})
    ]


@cache
def _endpoint():
    """A client that asks no server, each request once, and `ask`: what it makes of a status, a header and a body."""
    import tempfile

    import httpx

    from clear.llm.endpoint import Request, connect, messages
    from clear.schema import Endpoint

    settings = Endpoint("http://localhost/v1", "m", "", 0.0, 1024, 60.0, 0, 1, 10**6, 0.0, 0.0)
    client = connect(settings, "teacher", Path(tempfile.mkdtemp()) / "replies.sqlite")
    return client, lambda: Request(messages("q"), draw=client.asked), httpx


def _reply(data: bytes, _: Path) -> object:
    """A server's reply (status, Retry-After and body in lines) to the teacher of the traces, and to the judges."""
    from clear.bench import judge
    from clear.traces import teacher
    from clear.training.rl import judging

    status, wait, body, *_ = [*data.split(b"\n", 2), b"", b""]
    code = int(status) if status.isdigit() and 200 <= int(status[:4]) < 600 else 200
    client, request, httpx = _endpoint()
    answer = httpx.Response(code, headers=[(b"retry-after", wait)], content=body)
    client._http = httpx.Client(transport=httpx.MockTransport(lambda _: answer), verify=False)
    text = client.ask(request()).text
    return (
        teacher.taken_apart(text),
        judge.grade(text),
        judge.letter(text, ["x", "y"]),
        judge.consistent(text),
        judging.score_of(text),
    )


def _replies() -> list[bytes]:
    from clear.reasoning import grammar

    def said(text: str, **more) -> bytes:
        usage = {"prompt_tokens": 3, "completion_tokens": 4}
        whole = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}
        return b"200\n\n" + json.dumps(whole | more).encode()

    texts = [*grammar.restore_trace("q", "e", "a").replies, "0.5", "Grade: 1.", "B", '{"consistent": true}']
    late = b"429\nWed, 21 Oct 2026 07:28:00 GMT\n{}", b"503\n7\nbusy", b"401\n\nno"
    return [*map(said, texts), *late]


def _evil_replies() -> list[bytes]:
    def said(text: str) -> bytes:
        return b"200\n\n" + json.dumps({"choices": [{"message": {"content": text}}]}).encode()

    many = 10**5
    asks = "<think>" + "</think><answer>" * many + "</answer>" * many
    texts = "[" * many, "{" * many, '{"consistent":' * many, asks, "<think>" * many, " " * many, "0." + "9" * many
    return [*map(said, texts), *(b"200\n\n" + data for data in inputs.deep_json()), b"429\n1e999\n", b"429\nnan\n"]


TARGETS = {
    "image": Target(_image, inputs.pictures, inputs.evil_pictures),
    **{name: Target(_file(f"a.{name}", _table), seeds, evil) for name, (seeds, evil) in _FORMATS.items()},
    "folder": Target(_file("a.jsonl", _source("folder")), _lines, inputs.deep_json),
    "lmudata": Target(_file("a.tsv", _source("lmudata")), *_FORMATS["tsv"]),
    "llava": Target(_file("a.parquet", _source("llava_onevision")), *_FORMATS["parquet"]),
    "params": Target(_file("params.yaml", _params), _params_seeds, inputs.evil_yaml),
    "override": Target(_override, lambda: [b"seed=1", b"+a.b=[1,{c: 2}]", b"profile=smoke", b"~seed", b"seed='a b'"]),
    "safetensors": Target(_file("a.safetensors", _header), _headers, inputs.evil_headers),
    "llm_config": Target(_file("llm_config.json", _model_config), _config_seeds("llm_config.json"), inputs.deep_json),
    "config": Target(_file("config.json", _model_config), _config_seeds("config.json"), inputs.deep_json),
    "adapter": Target(_file("base.json", _adapter), _adapters, inputs.deep_json),
    "traces": Target(_file("traces.parquet", _traces), _trace_seeds),
    "output": Target(_output, _output_seeds, _output_evil),
    "predictions": Target(_file("sft.parquet", _predictions), _prediction_seeds),
    "score": Target(_file("m_MMBench.tsv", _score), *_FORMATS["tsv"]),
    "score_xlsx": Target(_file("m_MMBench.xlsx", _score), *_FORMATS["xlsx"]),
    "note": Target(_note, lambda: [json.dumps(note).encode() for note in NOTES.values()], inputs.deep_json),
    "request": Target(_request, _requests, inputs.deep_json),
    "reply": Target(_reply, _replies, _evil_replies),
}
