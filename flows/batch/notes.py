"""The forms of the JSON notes that flow and job leave each other in S3 (flows/batch/store.py has their names).

A bucket is no database: a note may be cut short, edited by hand, of an older version, or written by whoever else has
the key. So each is read through its form here, and one that lacks it is Damaged, which its reader knows how to take.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import ConfigDict, Field, Json, StringConstraints, TypeAdapter, ValidationError

from clear.data.io import json_values
from clear.errors import ClearError, one_line

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Of money or hours; of NaN no sum is above a budget."""
MOST_VALUES = 2**16
"""The most values (`json_values`) that a note may have: a hundred times what any has. To be told of each wrong one
takes 20 µs and a kilobyte, of ten million the worker's memory."""


class Damaged(ClearError):
    """What came from S3 is not what was put there."""


@dataclass
class _Path:
    path: str
    md5: str = ""
    size: int = 0


@dataclass
class _Entry:
    """A stage's entry of dvc.lock, as far as it is read before it is compared."""

    cmd: str = ""
    deps: list[_Path] = field(default_factory=list)
    params: dict[str, dict[str, Any]] = field(default_factory=dict)
    outs: list[_Path] = field(default_factory=list)


@dataclass
class _Result:
    job: str
    lock: _Entry
    files: dict[str, Digest]
    runs: dict[str, Json[dict[str, Any]]]


@dataclass(frozen=True)
class Inputs:
    """Everything that decides what a stage makes.

    `deps`: path → hash. `kinds`: path → where it comes from, also of what DVC keeps inside a folder of `deps`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    stage: str
    cmd: str
    deps: dict[str, str]
    kinds: dict[str, str]
    params: dict[str, Any]
    outs: dict[str, bool]
    """Path → whether DVC's cache keeps it (else git does)."""

    def key(self, nonce: str = "") -> str:
        """32 hex digits that stand for these inputs; a `nonce` asks for a run of its own."""
        content = [self.stage, self.cmd, self.deps, self.params, self.outs, nonce]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


@dataclass
class _Bundle:
    name: str
    sha256: Digest


@dataclass
class _Request:
    inputs: Inputs
    key: str
    commit: Commit
    bundle: _Bundle
    files: dict[str, Digest]
    remote: dict[str, str | bool]
    weights: str = ""


@dataclass
class _Lease:
    flow_run: str | None


@dataclass
class _Spending:
    allowed: Amount
    cost: Amount | None
    hourly: Amount = 0.0


@dataclass
class _File:
    sha256: Digest


FORMS: Mapping[str, Any] = {
    "requests": _Request,
    "results": _Result,
    "leases": _Lease,
    "ledger": _Spending,
    "checkpoints": dict[str, _File],
}
"""First folder of a note's name → its form."""


@cache
def _form(kind: str) -> TypeAdapter:
    return TypeAdapter(FORMS[kind])


def parse(name: str, data: bytes) -> Any:
    """The note of that name. Raises Damaged, without the place, where it is no JSON or has not the form."""
    kind = name.partition("/")[0]
    if (values := json_values(data)) > MOST_VALUES:
        raise Damaged(f"about {values:,} values, and a note has {MOST_VALUES:,} at most; delete it.")
    try:
        content = json.loads(data)
        _form(kind).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise Damaged(f"not a note of {kind} ({where}: {one_line(first['msg'])}); delete it.") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"not valid JSON ({one_line(error)}); delete it.") from error
    return content
