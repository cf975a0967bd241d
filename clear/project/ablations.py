"""One setting changed at a time, beside the committed run: `make ablations`, in any number of sittings.

An ablation is a name in clear/conf/ablations.yaml: which parameters it changes, and the model that it is about. It runs
in a scratch copy that begins with everything the committed run has made, so that only the stages run again that its
parameters reach. What it leaves is small and tracked, `data/results/ablations/<name>.parquet`: the predictions of its
model. docs/RESULTS.md compares them with those of the committed run, question by question. With another seed it begins
with what `make results` made for that one, and leaves `<name>.<seed>.parquet`.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clear.bench.models import MODELS
from clear.config import CONF_DIR
from clear.data.lock import making
from clear.data.workspace import home
from clear.degradation.corruptions import CORRUPTIONS
from clear.errors import ClearError
from clear.project import check, scratch, seeds

LISTED = CONF_DIR / "ablations.yaml"


@dataclass(frozen=True)
class Ablation:
    """A change of parameters (`changes`, as in Hydra), the model of MODELS that shows it, and what it is in words.

    `against` names others that it is compared with besides the committed run, `kinds` those of damage that alone count.
    """

    name: str
    model: str
    changes: tuple[str, ...]
    what: str
    against: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


def listed(file: Path = LISTED) -> dict[str, Ablation]:
    """The ablations there are, by name. Raises ClearError for an entry that is not of the form."""
    import yaml

    found = {}
    for name, entry in (yaml.safe_load(file.read_text()) or {}).items():
        try:
            more = {key: tuple(entry.get(key, ())) for key in ("against", "kinds")}
            found[name] = Ablation(name, entry["model"], tuple(entry["set"]), entry["what"], **more)
        except (TypeError, KeyError) as error:
            raise ClearError(f"{file}: {name} needs `model`, `set` (a list of KEY=VALUE) and `what`.") from error
        if entry["model"] not in MODELS:
            raise ClearError(f"{file}: {name}: model {entry['model']!r} is not one of {', '.join(MODELS)}.")
    for name, one in found.items():
        if unknown := [other for other in one.against if other not in found]:
            raise ClearError(f"{file}: {name}: {unknown[0]!r}, which it is compared with, is no ablation of this file.")
        if unknown := [kind for kind in one.kinds if kind not in CORRUPTIONS]:
            raise ClearError(f"{file}: {name}: kind {unknown[0]!r}, which is not one of {', '.join(CORRUPTIONS)}.")
    return found


def run(workspace: Path, wanted: Sequence[str], seed: int | None = None) -> Path:
    """Run every ablation that is wanted and not there yet, under the workspace's seed or another; returns the page.

    Raises ClearError for an unknown name, where a run stops, where the workspace's own results are out of date or
    others than at the beginning, and for a seed that was not run here.
    """
    known = listed()
    if unknown := [name for name in wanted if name not in known]:
        raise ClearError(f"ablation {unknown[0]!r} is not one of {', '.join(known)} (clear/conf/{LISTED.name}).")
    if wanted and (stale := check.drifts(workspace)):
        raise ClearError(f"ablations are compared with the committed results, and these are out of date: {stale[0]}")
    params, setting = seeds.parameters(workspace), seeds.setting(workspace) if wanted else ""
    own, end = params["seed"], ""
    if seed in (None, own):
        seed, begin = own, None
    else:
        begin, end = seeds.copy_of(workspace, seed), f".{seed}"
    for name in wanted:
        ablation, file = known[name], workspace / seeds.ABLATIONS / f"{name}{end}.parquet"
        about = {"setting": setting, "changes": " ".join(ablation.changes), "what": ablation.what}
        more = {"against": " ".join(ablation.against), "kinds": " ".join(ablation.kinds)}
        about |= {"seed": str(seed)} | {key: text for key, text in more.items() if text}
        if not _made(ablation, file, about):
            _run(workspace, params["profile"], ablation, file, about, begin)
    return seeds.render(workspace)


def _made(ablation: Ablation, file: Path, about: dict[str, str]) -> bool:
    return seeds.about(file) == about and seeds.models(file) == {ablation.model}


def _run(
    workspace: Path, profile: str, ablation: Ablation, file: Path, about: dict[str, str], begin: Path | None
) -> None:
    """Run an ablation in its copy, keep what it leaves and remove the copy, alone from the first to the last of these:
    the copy that is removed is the one in which another command of that ablation would work."""
    copy = f"{profile}-{file.stem}"
    with making(home() / "scratch" / copy, "make ablations"):
        if _made(ablation, file, about):  # by the command that this one has waited for
            return
        seeds.require_setting(workspace, about["setting"], f"ablation {file.stem}")
        overrides = [f"seed={about['seed']}", *ablation.changes]
        # With nothing changed, nothing is taken over either: it is trained again, as this machine trains.
        targets = [f"evaluate@{ablation.model}"] if ablation.changes else []
        folder = scratch.run(workspace, profile, overrides, copy, targets, begin)
        seeds.collect(folder, file, [ablation.model], about)
        shutil.rmtree(folder)
