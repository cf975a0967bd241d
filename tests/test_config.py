"""Configuration: what is wrong is refused by its full name; every profile composes; Hydra and DVC agree."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from clear import config as configuration
from clear.config import CONF_DIR, compose, from_dict, load
from clear.errors import ClearError
from clear.project.scratch import write_params
from clear.schema import PROFILES
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tiny():
    return yaml.safe_dump(compose())


def _refused(text, section, key, value):
    raw = yaml.safe_load(text)
    (raw[section] if section else raw)[key] = value
    with pytest.raises(ClearError) as caught:
        from_dict(raw)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("grpo", "grup_size", 4, "grpo.grup_size"),
        ("", "grpoo", 4, "grpoo"),
        ("grpo", "group_size", "many", "grpo.group_size"),
        ("grpo", "lr", [1], "grpo.lr"),
        ("source", "pretrain", 1.5, "source.pretrain"),
        ("grpo", "group_size", 1, "grpo.group_size = 1 is outside [2, 1024]"),
        ("grpo", "temperature", 0.0, "grpo.temperature"),
        ("degrade", "severity_weights", [0.2, 0.3, 1.5], "degrade.severity_weights = 1.5"),
        ("bridge", "kind", "none", "bridge.kind = 'none' is not one of mlp, direct"),
        ("model", "vae_size", 50, "model.vae_size = 50"),
        ("model", "heads", 3, "model.hidden"),
        ("model", "vit_heads", 5, "model.vit_hidden must divide by model.vit_heads"),
        ("model", "vae_groups", 5, "model.vae_channels by vae_groups"),
        ("degrade", "severity_weights", [1.0, 1.0], "degrade.severity_weights must be three"),
        ("degrade", "severity_weights", [0.0, 0.0, 0.0], "and not all 0"),
        ("grpo", "sde_range", [0.9, 0.1], "grpo.sde_range = [0.9, 0.1] must be two shares, the lower one first"),
        ("grpo", "sde_range", [0.5], "grpo.sde_range = [0.5] must be two shares"),
        ("grpo", "sigma", 0.0, "grpo.sigma = 0 makes rollouts without noise"),
        ("grpo", "separate_advantages", True, "leaves the image term nothing to judge by; raise grpo.reward_answer"),
        ("optimiser", "eps", 0.0, "optimiser.eps = 0.0 is outside"),
        ("grpo", "lr", 10**400, "key 'grpo.lr': int too large to convert to float"),
        ("model", "vae_mult", [1, {"2": 4}], "key 'model.vae_mult': {'2': 4} is not a value of a list"),
        ("lora", "targets", ["q_proj", ["k_proj"]], "key 'lora.targets': ['k_proj'] is not a value of a list"),
    ],
)
def test_a_wrong_value_is_refused_by_its_full_name(tiny, section, key, value, named):
    assert named in _refused(tiny, section, key, value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ("grpo.reward_accuracy=0 grpo.reward_format=0 grpo.reward_direct=0", "every reward_… is 0"),
        ("grpo.stop_after=1 grpo.holdout_every=0", "grpo.stop_after = 1 needs measurements; raise holdout_every"),
        ("grpo.restore=always sampling.max_restorations=0", "grpo.restore = always needs sampling.max_restorations"),
        ("lora.rank=2 lora.experts=und grpo.experts=gen", "trains adapters that lora.experts = und does not add"),
    ],
)
def test_settings_that_would_train_nothing_are_refused(changes, named):
    with pytest.raises(ClearError, match=named):
        compose(["profile=smoke", *changes.split()])


@pytest.mark.parametrize("change", ["sft.train_vit=true", "sft.robust_vit.steps=10"])
def test_a_vision_tower_is_not_trained_beside_adapters_which_do_not_hold_it(change):
    from_dict(compose([change]))
    with pytest.raises(ClearError, match=r"train the vision tower, which no adapter holds; set lora\.rank = 0"):
        from_dict(compose([change, "lora.rank=4"]))


def test_a_missing_key_is_refused(tiny):
    raw = yaml.safe_load(tiny)
    del raw["grpo"]["lr"]
    with pytest.raises(ClearError, match="lr"):
        from_dict(raw)


def _without(raw, *keys):
    for key in keys:
        *sections, own = key.split(".")
        place = raw
        for section in sections:
            place = place[section]
        del place[own]


@pytest.fixture
def older(tiny, tmp_path):
    """A params.yaml of a version that had neither these keys nor this section, but one of its own."""
    raw = yaml.safe_load(tiny) | {"compute": {"stack": "clear"}}
    _without(raw, "sft.labelled", "evaluate.votes", "grpo.optimiser.eps", "gate")
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_all_keys_that_an_older_file_lacks_are_named_with_their_values(older):
    with pytest.raises(ClearError) as refused:
        load(older)
    said, now = str(refused.value), compose()
    assert "\n" not in said
    assert said.startswith(f"{older}: unknown keys compute: correct them or take them out; missing keys gate = {{")
    assert f"sft.labelled = {now['sft']['labelled']}, grpo" in said
    assert f"evaluate.votes = {now['evaluate']['votes']}: add them in their sections; or" in said
    assert "gate = {model: grpo, clean_margin: 0.01" in said and "grpo.optimiser.eps = 1.0e-08" in said
    assert "`clear params --set profile=tiny` writes the file anew" in said and "clear/schema.py" in said


def test_the_values_that_are_named_make_an_older_file_whole(older):
    """As YAML, typed from the message; and the command of the message does the same."""
    with pytest.raises(ClearError) as refused:
        load(older)
    raw = yaml.safe_load(older.read_text())
    del raw["compute"]
    for key, value in re.findall(r"([\w.]+) = (\{.*?\}|[^,:]+)", str(refused.value).partition("missing keys ")[2]):
        *sections, own = key.split(".")
        place = raw
        for section in sections:
            place = place[section]
        place[own] = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))["value"]
    older.write_text(yaml.safe_dump(raw))
    assert load(older) == from_dict(compose())
    older.write_text("profile: tiny\n")
    write_params(older, ["profile=tiny"])
    assert load(older) == from_dict(compose())


def test_all_unknown_keys_are_named_with_what_they_may_have_meant(tiny):
    raw = yaml.safe_load(tiny) | {"grpoo": 4, "sft.labelled": 0.5, "sift": "x" * 500}
    raw["grpo"]["grup_size"] = raw["grpo"].pop("group_size")
    raw["degrade"] |= {"workres": 2, 7: 1}
    with pytest.raises(ClearError) as refused:
        from_dict(raw)
    said = str(refused.value)
    assert "grpoo (grpo?), sft.labelled (in YAML labelled below sft), sift" in said
    assert "degrade.workres (degrade.workers?), degrade.7" in said and "grpo.grup_size (grpo.group_size?)" in said
    assert "missing keys grpo.group_size: add them" in said and "x" * 99 not in said


def test_thousands_of_unknown_keys_are_counted(tiny):
    with pytest.raises(ClearError, match=r"unknown keys key0, .*key49 and 9950 more: correct them or take them out"):
        from_dict(yaml.safe_load(tiny) | {f"key{n}": n for n in range(10**4)})


@pytest.mark.parametrize("profile", ["nobody", 3, ["tiny"], None])
def test_a_profile_that_there_is_none_of_has_no_values_to_name(tiny, tmp_path, profile):
    raw = yaml.safe_load(tiny) | {"profile": profile}
    del raw["seed"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ClearError, match=r"missing keys seed: add them in their sections; or `clear params` writes"):
        load(tmp_path / "params.yaml")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_composes_and_passes(profile):
    config = from_dict(compose([f"profile={profile}"]))
    assert config.profile == profile


def test_every_profile_file_is_a_profile():
    assert {file.stem for file in (CONF_DIR / "profile").glob("*.yaml")} == set(PROFILES)


def test_what_is_composed_again_is_nobody_else_s_and_follows_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(configuration, "CONF_DIR", Path(shutil.copytree(CONF_DIR, tmp_path / "conf")))
    first = compose(["profile=smoke"])
    seed = first["seed"]
    first["seed"] = -1
    assert compose(["profile=smoke"])["seed"] == seed
    file = tmp_path / "conf/config.yaml"
    file.write_text(file.read_text().replace(f"seed: {seed}", "seed: 7"))
    assert compose(["profile=smoke"])["seed"] == 7


def test_an_unknown_profile_and_an_unknown_override_are_refused():
    for text in ("profile=" + "9" * 400, "profile='${gone.away}'", "seed='${gone.away}'"):
        with pytest.raises(ClearError, match=r"^clear/conf: [^\n]+$"):
            compose([text])
    with pytest.raises(ClearError, match="nonsense"):
        compose(["profile=nonsense"])
    with pytest.raises(ClearError, match="no_such_key"):
        compose(["grpo.no_such_key=1"])


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_used_where_the_processor_has_it(monkeypatch, native):
    from clear.model import runtime

    monkeypatch.setattr(runtime, "has_bfloat16", lambda where: native)
    chosen = {given: runtime.precision(from_dict(compose([f"runtime.precision={given}", "runtime.device=cpu"])))
              for given in ("auto", "float32", "bfloat16")}  # fmt: skip
    assert chosen == {"auto": "bfloat16" if native else "float32", "float32": "float32", "bfloat16": "bfloat16"}


def _leaves(tree, name=""):
    """(key, value) of every leaf, in order."""
    for key, value in tree.items():
        yield from _leaves(value, f"{name}{key}.") if isinstance(value, dict) and value else [(f"{name}{key}", value)]


def test_dvc_composes_what_we_compose(tmp_path):
    """`dvc exp run -S profile=smoke -S grpo.group_size=4` composes the values that `clear params --set` writes."""
    from dvc.repo import Repo
    from dvc.utils.hydra import compose_and_dump

    with Repo(str(ROOT)) as repo:
        hydra = repo.config["hydra"]
    assert hydra["enabled"]
    overrides = ["profile=smoke", "grpo.group_size=4"]
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    compose_and_dump(theirs, str(ROOT / hydra["config_dir"]), None, hydra["config_name"], str(tmp_path), overrides)
    write_params(ours, overrides)
    assert list(_leaves(yaml.safe_load(ours.read_text()))) == list(_leaves(yaml.safe_load(theirs.read_text())))
    assert len(ours.read_text().splitlines()) <= 200 < len(theirs.read_text().splitlines()), "to be read in two minutes"
    config = load(ours)
    assert (config.profile, config.grpo.group_size) == ("smoke", 4)


def test_the_committed_parameters_are_the_composition():
    from clear.project.check import composition_drifts

    assert composition_drifts(ROOT) == []


def test_nobody_is_told_about_our_runs():
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        assert repo.config["core"]["analytics"] is False
        assert repo.config["core"]["check_update"] is False


@pytest.mark.parametrize(("text", "named"), [("seed: [", "not valid YAML"), ("profile: tiny\n", "params.yaml")])
def test_an_unreadable_file_is_named(tmp_path, text, named):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(ClearError, match=named):
        load(file)


def test_a_folder_without_parameters_says_what_to_do(tmp_path):
    with pytest.raises(ClearError, match="make params"):
        load(tmp_path / "params.yaml")
