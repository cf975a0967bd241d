"""What leaves the house: files and keys that BAGEL's tools and vLLM-Omni read, and a card of what was measured."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clear.bench.models import MODELS
from clear.config import compose, from_dict, load
from clear.data.records import file_sha256
from clear.errors import ClearError
from clear.model import lora, release
from clear.model.bagel import Bagel, BagelConfig
from clear.model.checkpoint import INDEX, MODEL, VAE, fingerprint, load_bagel, read_header, save_bagel
from clear.model.mot import LlmConfig
from clear.model.sequence import SpecialTokens
from clear.model.vae import AutoEncoder, VaeConfig
from clear.model.vit import VitConfig
from clear.project.release import export as exporting
from clear.report import card, data_card
from clear.schema import Source
from tests.conftest import ROOT, git
from tests.helpers.adapters import TEXTS, adapted, qwen_folder
from tests.tiny import save_random_model, tiny_model

GOLDEN = ROOT / "tests/golden"
SEVEN_B = BagelConfig(LlmConfig(), VitConfig(), VaeConfig(), SpecialTokens(151644, 151645, 151652, 151653))


def tensors(file: Path) -> dict[str, tuple[int, ...]]:
    return {key: entry.shape for key, entry in read_header(file).items()}


def test_the_reference_finds_its_own_tensors_and_its_libraries_their_configurations(tmp_path):
    """Golden: the folder that the reference itself wrote. Everything it reads is there again, and nothing more."""
    from transformers import Qwen2Config, SiglipImageProcessor, SiglipVisionConfig

    out = tmp_path / "out"
    release.write(GOLDEN, out)
    for name in (MODEL, VAE):
        assert tensors(out / name) == tensors(GOLDEN / name)
        given, found = load_file(GOLDEN / name), load_file(out / name)
        assert all(torch.equal(given[key], found[key]) for key in given)
    llm, vit = (json.loads((GOLDEN / name).read_text()) for name in ("llm_config.json", "vit_config.json"))
    read = Qwen2Config.from_json_file(out / "llm_config.json")
    assert all(getattr(read, key) == value for key, value in llm.items() if key in ("hidden_size", "vocab_size"))
    assert not read.tie_word_embeddings and read.num_hidden_layers == llm["num_hidden_layers"]
    assert SiglipVisionConfig.from_json_file(out / "vit_config.json").hidden_size == vit["hidden_size"]
    whole = json.loads((out / "config.json").read_text())
    assert whole["architectures"] == ["BagelForConditionalGeneration"] and whole["model_type"] == "bagel"
    assert Qwen2Config(**whole["llm_config"]).hidden_size == llm["hidden_size"], "vLLM reads it from here"
    assert whole["vae_config"]["z_channels"] == 16 and whole["max_latent_size"] == 32
    processor = SiglipImageProcessor.from_pretrained(out, local_files_only=True)
    side = vit["image_size"]
    assert (processor.size["height"], list(processor.image_mean)) == (side, [0.5, 0.5, 0.5])
    model, _, _ = load_bagel(out)
    assert model.config == load_bagel(GOLDEN)[0].config


def test_the_manifest_is_that_of_the_published_model():
    """1,223 and 244 tensors (METHOD §1), under the names and shapes that this project's modules have."""
    with torch.device("meta"):
        model, vae = Bagel(SEVEN_B).state_dict(), AutoEncoder(SEVEN_B.vae).state_dict()
    wanted = release.expected(SEVEN_B)
    assert (len(wanted), len(vae)) == (1223, 244)
    assert wanted == {key: tuple(value.shape) for key, value in model.items()}
    index = release._index(SEVEN_B)["weight_map"]
    assert set(index) == model.keys() | vae.keys() and set(index.values()) == {MODEL, VAE}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", lambda c: c.pop("llm_config"), r"config\.json: key llm_config is missing"),
        ("preprocessor_config.json", lambda c: c.clear(), r"preprocessor_config\.json: 4 problems: key image_proc"),
        (INDEX, lambda c: c["weight_map"].pop("vae2llm.bias"), "does not name the tensors of"),
        (
            MODEL,
            lambda c: c.update({"bridge.fc1.weight": torch.zeros(2)}),
            "key bridge.fc1.weight is not one of BAGEL's",
        ),
        (MODEL, lambda c: c.pop("vae2llm.bias"), "key vae2llm.bias is missing"),
        (MODEL, lambda c: c.update({"vae2llm.bias": torch.zeros(3)}), r"key vae2llm.bias has shape \(3,\), BAGEL's is"),
        (VAE, lambda c: c.update({"loss.logvar": torch.zeros(1)}), "key loss.logvar is not one of BAGEL's"),
    ],
)
def test_a_folder_that_others_could_not_read_is_refused(tmp_path, name, change, said):
    out = tmp_path / "out"
    release.write(GOLDEN, out)
    release.check(out)
    if name.endswith(".json"):
        content = json.loads((out / name).read_text())
        change(content)
        (out / name).write_text(json.dumps(content))
    else:
        content = load_file(out / name)
        change(content)
        save_file(content, out / name)
    with pytest.raises(ClearError, match=said):
        release.check(out)


def test_an_adapter_is_added_and_what_its_base_came_with_is_kept(tmp_path):
    base, folder, out = (tmp_path / name for name in ("base", "adapter", "out"))
    plain, tokenizer = tiny_model("direct")
    save_bagel(base, plain, AutoEncoder(plain.config.vae), tokenizer)
    (base / "generation_config.json").write_text('{"temperature": 0.3, "eos_token_id": [1, 7]}')
    config = json.loads((base / "config.json").read_text()) | {"connector_act": "theirs", "max_latent_size": 4}
    (base / "config.json").write_text(json.dumps(config))
    lora.save_adapter(folder, adapted()[0], base, fingerprint(base), torch.float32)
    lora.merge(folder, tmp_path / "merged", torch.float32)
    release.write(folder, out)
    assert (out / MODEL).read_bytes() == (tmp_path / "merged" / MODEL).read_bytes()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [1, 7], "temperature": 0.3}
    assert json.loads((out / "config.json").read_text())["connector_act"] == "theirs"
    with pytest.raises(ClearError, match="exists and is not empty"):
        release.write(folder, out)


def test_a_tokenizer_is_found_by_its_files(tmp_path):
    from transformers import AutoTokenizer

    qwen_folder(tmp_path / "qwen")
    release.write(tmp_path / "qwen", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert theirs.encode(TEXTS[0]) == AutoTokenizer.from_pretrained(tmp_path / "qwen").encode(TEXTS[0])
    assert not any("tokenizer" in reason for reason in release.foreign(tmp_path / "out"))
    model, tokenizer = tiny_model("mlp")
    save_bagel(tmp_path / "words", model, AutoEncoder(model.config.vae), tokenizer)
    release.write(tmp_path / "words", tmp_path / "words_out", torch.bfloat16)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "words_out", local_files_only=True)
    assert theirs.convert_tokens_to_ids("a") == tokenizer.token_to_id("a")
    reasons = release.foreign(tmp_path / "words_out")
    assert len(reasons) == 3 and any("vocab.json" in reason for reason in reasons)
    loaded, _, again = load_bagel(tmp_path / "words_out", None)
    assert again.get_vocab() == tokenizer.get_vocab() and loaded.vae2llm.weight.dtype == torch.bfloat16
    assert (tmp_path / "words_out/bridge.safetensors").is_file()
    index = json.loads((tmp_path / "words_out" / INDEX).read_text())["weight_map"]
    assert not any("bridge" in name for name in [*index, *index.values()]), "vLLM would not know what to do with it"


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """The committed parameters, metrics and results, in git; a random model in the place of the trained one."""
    for name in ("data/metrics", "data/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    save_random_model(tmp_path / "data/models/grpo", load(ROOT / "params.yaml"))
    (tmp_path / ".gitignore").write_text("data/models\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def relock(workspace: Path) -> None:
    """dvc.lock as if the evaluations had read this model."""
    lock = yaml.safe_load((workspace / "dvc.lock").read_text())
    for stage in lock["stages"].values():
        for dep in stage["deps"]:
            if dep["path"] == "data/models/grpo":
                dep["md5"] = exporting.directory_hash(workspace / "data/models/grpo")
    (workspace / "dvc.lock").write_text(yaml.safe_dump(lock))


def test_export_writes_a_folder_with_a_card_of_the_committed_metrics(workspace, clear):
    from huggingface_hub import ModelCard

    status, _, stderr = clear("export", "data/models/grpo", "out")
    assert status == 1 and "not what evaluate@grpo evaluated" in stderr, "figures of other weights"
    relock(workspace)
    status, stdout, stderr = clear("export", "data/models/grpo", "out", "--name", "my: model", "--language", "en")
    assert status == 0, stderr
    out = workspace / "out"
    assert sorted(map(Path, stdout.split())) == sorted(Path("out") / file.name for file in out.iterdir())
    assert not list(workspace.glob("*.partial"))
    text = (out / "README.md").read_text()
    read = ModelCard.load(out / "README.md").data
    assert (read.license, read.language, read.pipeline_tag) == ("apache-2.0", ["en"], "image-text-to-text")
    assert read.base_model is None and "none: trained from scratch" in text
    metrics = json.loads((ROOT / "data/metrics/evaluate_grpo.json").read_text())
    entries = {entry.dataset_config: entry for entry in read.eval_results}
    assert read.model_name == "my: model" and set(entries) == {"clean", "low", "mid", "high"}
    for level, entry in entries.items():
        assert entry.metric_value == pytest.approx(100 * metrics["accuracy"][level], abs=0.005)
        ends = [entry.metric_args[end] for end in ("low", "high")]
        assert ends == pytest.approx([100 * end for end in metrics["interval"][level]], abs=0.005)
    hard = [100 * value for value in (metrics["accuracy"]["high"], *metrics["interval"]["high"])]
    assert "{:.1f} [{:.1f}, {:.1f}]".format(*hard) in text and "of exactly these weights" in text
    report = json.loads((ROOT / "data/results/report.json").read_text())["claims"]["beats_direct"]
    assert f"| +{100 * report['estimate']:.1f} | +{100 * report['low']:.1f} to" in text
    assert "interleaved GRPO | 20 steps of 64 questions × 8 rollouts" in text
    for file in out.iterdir():
        assert file.name == "README.md" or f"`{file_sha256(file)}`" in text, file.name
    commit = git(workspace, "rev-parse", "HEAD").strip()
    assert f"commit `{commit}, with changes" in text and file_sha256(workspace / "dvc.lock") in text
    assert str(workspace) not in text, "no path of this machine"
    assert "cannot run it" in text and "bridge" in text
    status, _, stderr = clear("export", "data/models/grpo", "out")
    assert status == 1 and "exists and is not empty" in stderr


def test_the_hash_of_a_folder_is_dvcs_own(tmp_path):
    """Of a folder that DVC hashed itself: two files, one below another folder."""
    from dvc.repo import Repo

    (tmp_path / "made/deep").mkdir(parents=True)
    (tmp_path / "made/a.txt").write_text("a")
    (tmp_path / "made/deep/b.txt").write_text("b")
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        repo.add(str(tmp_path / "made"))
    known = yaml.safe_load((tmp_path / "made.dvc").read_text())["outs"][0]["md5"]
    assert exporting.directory_hash(tmp_path / "made") == known


def test_what_is_not_known_is_refused_or_said(workspace):
    grpo, config = Path("data/models/grpo"), load()
    given = ["model.checkpoint=/w", "source.kind=llava_onevision", "source.path=/p", "traces.kind=teacher"]
    bagel = from_dict(compose(["profile=bagel_7b_lora", *given, "teacher.url=http://t/v1"]))
    with pytest.raises(ClearError, match="--license is missing"):
        exporting.gather(grpo, bagel, exporting.Wishes())
    with pytest.raises(ClearError, match="no model of this project's training"):
        exporting.gather(workspace, config, exporting.Wishes())
    with pytest.raises(ClearError, match="is evaluated as grpo"):
        exporting.gather(grpo, config, exporting.Wishes(model="base"))
    (workspace / "dvc.lock").unlink()
    with pytest.raises(ClearError, match="--base-model is missing"):
        exporting.gather(grpo, bagel, exporting.Wishes(license="other"))
    wishes = exporting.Wishes(license="other", base_model="ByteDance-Seed/BAGEL-7B-MoT", datasets=["a/b"])
    facts = exporting.gather(grpo, bagel, wishes)
    text = card.render(card.Facts(**facts))
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "ByteDance-Seed/BAGEL-7B-MoT" and header["license"] == "other"
    assert header["datasets"] == ["a/b", "lmms-lab/LLaVA-OneVision-Data"]
    assert "written by gpt-4.1" in text and "said to be of" in text and "adapters of rank 16" in text
    for name in MODELS:
        (workspace / f"data/metrics/evaluate_{name}.json").unlink()
    text = card.render(card.Facts(**exporting.gather(grpo, config, exporting.Wishes())))
    assert "Not measured: no evaluation" in text and "model-index" not in text
    with pytest.raises(ClearError, match=r"evaluate_grpo\.json is not here"):
        exporting.gather(grpo, config, exporting.Wishes(model="grpo"))


def test_a_leaderboard_row_goes_into_the_card(workspace):
    cells = {"estimate": 0.6527, "low": 0.63, "high": 0.675, "n": 9, "clusters": 9}
    row = {"benchmarks": {"MMStar": cells, "MMVet": cells | {"low": None, "high": None}}, "average": cells}
    ours = {"levels": {"high": row}, "robustness": {"absolute": cells, "relative": None}}
    ours |= {"judge": "gpt-4.1", "protocol": "16 types"}
    board = {"models": {"a|b": ours, "c": ours}, "benchmarks": {"MMStar": {}, "MMVet": {}}, "notes": ["MMStar: *some*"]}
    file = workspace / "s.json"
    file.write_text(json.dumps(board | {"confidence": 0.95}))
    relock(workspace)
    with pytest.raises(ClearError, match=r"has the models a\|b, c; say by --name which"):
        exporting.gather(Path("data/models/grpo"), load(), exporting.Wishes(scores=file))
    facts = exporting.gather(Path("data/models/grpo"), load(), exporting.Wishes(name="a|b", scores=file))
    text = card.render(card.Facts(**facts))
    results = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    found = {entry["dataset"]["name"]: entry["metrics"][0]["value"] for entry in results}
    assert found["MMStar"] == found["average of MMD-Bench"] == 65.27 and "MMVet" not in found
    assert "| hard | 65.27 [63.0, 67.5] | 65.27 | 65.27 [63.0, 67.5] |" in text and r"MMStar: \*some\*" in text
    assert "MM-Vet is for non-commercial research" in text
    file.write_text("{}")
    with pytest.raises(ClearError, match="no leaderboard; make it with"):
        exporting.gather(Path("data/models/grpo"), load(), exporting.Wishes(scores=file))


def one_line(clear, *arguments) -> str:
    status, out, said = clear(*arguments)
    assert status == 1 and not out and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("data/models/grpo/sub/deep", "belongs to data/models/grpo, the model that it is made of"),
        ("data/models/sft", "belongs to data/models/sft, an output of stage sft"),
        ("link/sub", "belongs to data/models/sft, an output of stage sft"),
        ("data/raw/mine/sub", r"belongs to what .*/data/raw/mine\.dvc tracks"),
    ],
)
@pytest.mark.parametrize("command", ["export", "merge", "quantise"])
def test_a_new_folder_is_no_part_of_the_model_nor_of_what_dvc_tracks(workspace, clear, command, out, said):
    (workspace / "link").symlink_to("data/models/sft")
    (workspace / "data/raw").mkdir()
    (workspace / "data/raw/mine.dvc").write_text("outs: []")
    relock(workspace)
    refused = one_line(clear, command, "data/models/grpo", out)
    assert re.search(f"{out} {said}.*; name a folder elsewhere", refused), refused
    assert not (workspace / out).exists() and not list((workspace / "data/models").rglob("*.partial"))


@pytest.mark.parametrize("command", ["export", "quantise"])
def test_a_base_that_is_not_there_is_refused_also_where_none_is_needed(workspace, clear, command):
    relock(workspace)
    assert "--base nope: nothing is there" in one_line(clear, command, "data/models/grpo", "out", "--base", "nope")


@pytest.mark.parametrize("option", ["--name", "--license", "--base-model", "--dataset", "--language"])
@pytest.mark.parametrize("value", ["en\nlicense: mit", "a\x1b[2J", "a\u2028b"])
def test_a_wish_that_would_break_the_header_of_the_card_is_refused(workspace, clear, option, value):
    relock(workspace)
    refused = one_line(clear, "export", "data/models/grpo", "out", option, value)
    assert f"{option} {value!r}: has a line break or another character" in refused and not Path("out").exists()


def test_nothing_half_written_is_left(workspace, monkeypatch):
    relock(workspace)
    monkeypatch.setattr(card, "render", lambda facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exporting.export(Path("data/models/grpo"), Path("out"), load(), exporting.Wishes())
    assert not [path for path in workspace.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("kind", Source.__dataclass_fields__["kind"].metadata["values"])
def test_both_cards_know_every_source_and_count_what_it_writes(kind):
    """Only scenes are counted by task, and pictures that came with their damage have no level."""
    config = from_dict(compose([f"source.kind={kind}", *(["source.path=data/raw/x"] if kind != "scenes" else [])]))
    questions = {"colour": 3, "count": 2} if kind == "scenes" else 5
    metrics = {
        "source": {"images": {"sft": 4}, "questions": {"sft": questions}},
        "degrade": {"images": {"sft": {"dark": {"low": 1, "high": 2}, "fog": {"incoming": 6}}, "rl": {"dark": {}}}},
    }
    text = data_card.render(data_card.DataFacts("grpo@v1.0.0", config, metrics))
    assert f"Source `{kind}`: " in text and "| sft | 4 | 5 |" in text
    assert "| dark | 1 / 0 / 2 | 0 |" in text and "| fog | 6 | 0 |" in text
    assert "training data" in card.render(card.Facts(name="m", config=config, license="other"))
    assert "apart from MMD-Bench" not in text


def test_the_data_card_counts_incoming_sets_where_they_are_taught_and_where_they_are_asked_about():
    came = {"rows": 20, "rejected": 1, "sft": 9, "rl": 3, "bench": 4, "fingerprint": "f", "paired": 0, "questions": 16}
    cells = {"dark": {level: {"images": 7, "questions": 21} for level in ("low", "mid", "high")}}
    metrics = {
        "degrade": {
            "images": {"sft": {"dark": {"low": 1}}, "rl": {}, "validation": {"dark": {"mid": 5}}},
            "incoming": {"sets": {"road": came, "dark": came | {"sft": 0, "rl": 2}}},
        },
        "mmd_bench": {
            "degraded": {"cells": cells},
            "incoming": {"road": {"images": 4, "questions": 8}, "dark": {"images": 0, "questions": 0}},
        },
    }
    text = data_card.render(data_card.DataFacts("grpo@v1.0.0", from_dict(compose([])), metrics))
    assert "| damage | fine-tuning | GRPO | held out | MMD-Bench | apart from MMD-Bench |" in text
    assert "| dark | 1 / 0 / 0 | 0 | 0 / 5 / 0 | 7 / 7 / 7 | 0 |" in text
    assert "| incoming/road | 9 | 3 | 0 | 0 | 4 |" in text and "| incoming/dark | 0 | 2 | 0 | 0 | 0 |" in text
    assert "no figure of MMD-Bench counts it" in text
