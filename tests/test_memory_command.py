"""`clear memory`: its table, and the cards that each stage of BAGEL-7B fits."""

import json
import re

import pytest

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.training import cards, memory
from tests.conftest import ROOT


def test_the_smallest_card_leaves_room_for_cudas_context():
    assert cards.smallest(24 * 10**9 - 2**30) == 24 and cards.smallest(24 * 10**9 - 2**30 + 1) == 32
    assert cards.smallest(150 * 10**9) is None


def test_the_documented_table_is_what_the_command_prints():
    from typer.testing import CliRunner

    from clear.cli import app

    shown = CliRunner().invoke(app, ["memory", "--cards"])
    assert shown.exit_code == 0, shown.output
    assert shown.output in (ROOT / "docs/BAGEL.md").read_text()
    found = {(row.profile, row.weights): row.peaks for row in cards.rows()}
    assert len(found) == 3 * 3
    small, full = found["bagel_7b_qlora", "nf4"], found["bagel_7b", "nf4"]
    limits = {"sft": 20, "bridge": 20, "grpo": 22, "evaluate": 12}
    assert all(small[stage] <= limits[stage] * 2**30 for stage in memory.STAGES)
    assert all(cards.smallest(small[stage]) <= 24 for stage in memory.STAGES)
    assert [full[stage] for stage in ("sft", "bridge", "grpo")] == [None] * 3 and full["evaluate"], "it cannot train"
    refused = CliRunner().invoke(app, ["memory", "--cards", "--profile", "tiny"])
    assert isinstance(refused.exception, ClearError) and "--cards lists every profile" in str(refused.exception)


@pytest.mark.parametrize(("profile", "gpus"), [("bagel_7b_lora", 1), ("bagel_7b", 8)])
def test_the_documented_peaks_are_what_the_command_prints(profile, gpus):
    from typer.testing import CliRunner

    from clear.cli import app

    row = re.search(rf"\| `{profile}`, {gpus} GPUs? \| (.+?) GiB \|", (ROOT / "docs/BAGEL.md").read_text())[1]
    documented = dict(re.findall(r"(\w+) (\d+)", row))
    shown = CliRunner().invoke(app, ["memory", "--profile", profile, "--gpus", str(gpus)]).output
    printed = {stage: float(peak) for stage, peak in re.findall(r"(?m)^ *(\w+) .* M .* ([\d.]+)$", shown)}
    assert len(documented) > 2 and documented == {stage: f"{printed[stage]:.0f}" for stage in documented}


def test_a_card_that_is_too_small_is_named_with_what_would_fit():
    config = from_dict(compose(["profile=bagel_7b_lora", "runtime.device=cuda"]))  # a CPU's attention holds its scores
    said = cards.too_small(config, "sft", 24 * 10**9)
    assert "this card has 22.4" in said and "profile bagel_7b_qlora with runtime.weights = nf4 would fit" in said
    assert "no setting of a profile would fit" in cards.too_small(config, "sft", 8 * 10**9)
    assert cards.too_small(config, "sft", 80 * 10**9) == ""


def test_the_command_prints_a_table_or_json(capsys, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from clear.cli import app

    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["memory", "--profile", "bagel_7b", "--gpus", "8"])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == list(memory.STAGES)
    assert "note:" in shown.output and "80 GB" in shown.output
    assert "note:" not in CliRunner().invoke(app, ["memory", "--profile", "tiny"]).output
    plain = CliRunner().invoke(app, ["memory", "--profile", "tiny", "--json", "--set", "sft.traces.batch=1"])
    content = json.loads(plain.output)
    assert content["profile"] == "tiny" and content["gpus"] == 1
    assert [one["stage"] for one in content["stages"]] == list(memory.STAGES)
    assert all(one["peak"] > one["weights"] > 0 for one in content["stages"])


def test_the_command_reads_the_parameters_of_the_folder(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from clear.cli import app
    from clear.project.scratch import write_params

    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["memory"])
    assert isinstance(refused.exception, ClearError) and "params.yaml" in str(refused.exception)
    write_params(tmp_path / "params.yaml", ["profile=smoke"])
    assert "profile smoke" in CliRunner().invoke(app, ["memory"]).output
    refused = CliRunner().invoke(app, ["memory", "--gpus", "0"])
    assert refused.exit_code == 2
