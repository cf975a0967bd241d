"""The stages as dvc.yaml defines them."""

import yaml

from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def entry_of(stage: str) -> dict:
    """What a stage does; of `evaluate`, with `${key}` for the model."""
    return STAGES[stage].get("do", STAGES[stage])


def made_by(stage: str) -> dict[str, dict]:
    """Path → flags of every output of a stage."""
    entries = [one for kind in ("outs", "metrics", "plots") for one in entry_of(stage).get(kind, [])]
    return dict((one, {}) if isinstance(one, str) else next(iter(one.items())) for one in entries)
