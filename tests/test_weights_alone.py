"""Weights without anything beside them, as trainings leave and publish them: completed from a model folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear.bench.answers import digest_of
from clear.config import load
from clear.data.workspace import completing
from clear.errors import ClearError
from clear.model import lora
from clear.model.checkpoint import (
    INDEX,
    MODEL,
    PLAIN,
    TOKENIZER,
    VAE,
    fingerprint,
    load_bagel,
    places,
    read_config,
    save_bagel,
)
from clear.model.vae import AutoEncoder
from clear.model.weights import with_base
from clear.schema import Lora
from tests.helpers.tables import b64, write_tsv
from tests.serving import QUESTION, asking, make_workspace, picture, serving
from tests.tiny import tiny_model

KEY = "vae2llm.bias"
ANSWER = ["--prompt", "plain", "--restore", "never"]


@pytest.fixture(scope="module")
def _whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "BAGEL"
    model, tokenizer = tiny_model("direct")
    torch.manual_seed(1)
    save_bagel(folder, model, AutoEncoder(model.config.vae), tokenizer)
    return folder


@pytest.fixture
def base(_whole, tmp_path) -> Path:
    """A complete model folder."""
    return Path(shutil.copytree(_whole, tmp_path / "BAGEL"))


def save(file: Path, base: Path, added: float) -> Path:
    """Weights of `base` that differ by `added` in one tensor, as `file`."""
    file.parent.mkdir(exist_ok=True)
    state = load_file(base / MODEL)
    save_file(state | {KEY: state[KEY] + added}, file)
    return file


def added(path: Path, base: Path) -> float:
    """Which weights are loaded: by how much they differ from those of `base`."""
    model, vae, tokenizer = load_bagel(path, base=base)
    assert tokenizer is not None and model.config == read_config(base)
    assert torch.equal(vae.encoder.conv_in.weight, load_file(base / VAE)["encoder.conv_in.weight"])
    return round((model.state_dict()[KEY] - load_file(base / MODEL)[KEY]).mean().item(), 4)


@pytest.mark.parametrize("name", [MODEL, PLAIN])
def test_one_file_of_weights_is_a_model_with_a_base(base, tmp_path, name):
    file = save(tmp_path / "CLEAR" / name, base, 1.0)
    assert added(file.parent, base) == added(file, base) == 1.0
    assert places(file, base).file(name) == file and places(file, base).file(VAE) == base / VAE


def test_of_both_files_the_average_counts_and_the_other_can_be_named(base, tmp_path):
    """As METHOD §4 says of the published reinforcement learning; in a whole folder the choice stays a guess."""
    ema, plain = save(tmp_path / "0000500" / MODEL, base, 1.0), save(tmp_path / "0000500" / PLAIN, base, 2.0)
    assert (added(ema.parent, base), added(ema, base), added(plain, base)) == (1.0, 1.0, 2.0)
    assert PLAIN not in fingerprint(ema.parent, base) and MODEL not in fingerprint(plain, base)
    save(base / PLAIN, base, 3.0)
    with pytest.raises(ClearError, match="several models' weights"):
        load_bagel(base)
    assert added(plain, base) == 2.0, "of the base nothing but what the weights lack is read"


def test_shards_with_their_index(base, tmp_path):
    state, folder = load_file(save(tmp_path / "one" / MODEL, base, 1.0)), tmp_path / "sharded"
    folder.mkdir()
    names = {key: f"model-{1 + n % 2:05d}-of-00002.safetensors" for n, key in enumerate(sorted(state))}
    for name in set(names.values()):
        save_file({key: state[key] for key, other in names.items() if other == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert added(folder, base) == added(folder / INDEX, base) == 1.0
    assert {INDEX, *names.values(), VAE, TOKENIZER, "llm_config.json"} <= fingerprint(folder, base).keys()


def test_every_key_and_shape_is_checked_and_named(base, tmp_path):
    file = save(tmp_path / "CLEAR" / PLAIN, base, 1.0)
    state = load_file(file)
    del state["connector.fc1.bias"]
    save_file(state | {"extra.weight": torch.zeros(2), KEY: torch.zeros(3)}, file)
    with pytest.raises(ClearError) as refused:
        load_bagel(file.parent, base=base)
    said = str(refused.value)
    assert "3 problems" in said and all(name in said for name in ("connector.fc1.bias", "extra.weight", KEY, str(file)))
    assert "is missing" in said and "not part of this model" in said and "has shape (3,)" in said


def test_what_the_weights_bring_themselves_is_taken_from_them(base, tmp_path):
    folder = save(tmp_path / "CLEAR" / PLAIN, base, 1.0).parent
    state = load_file(base / VAE)
    save_file({key: value + 1 for key, value in state.items()}, folder / VAE)
    shutil.copy(base / TOKENIZER, folder)
    (base / TOKENIZER).unlink()
    (folder / "config.json").write_text('{"max_latent_size": 999}')  # not without the other config files
    _, vae, tokenizer = load_bagel(folder, base=base)
    assert tokenizer is not None
    assert torch.equal(vae.encoder.conv_in.weight, state["encoder.conv_in.weight"] + 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "llm_config.json is missing.*holds weights alone: name.*--base.*model.base"),
        ("nowhere", "CLEAR has weights alone, and .*nowhere is not the model folder"),
        ("other", "CLEAR has weights alone, and .*other is not the model folder"),
        ("CLEAR", "llm_config.json is missing.*--base"),
    ],
)
def test_without_a_model_folder_to_complete_them_they_are_refused(base, tmp_path, given, said):
    folder = save(tmp_path / "CLEAR" / PLAIN, base, 1.0).parent
    save(tmp_path / "other" / PLAIN, base, 1.0)
    with pytest.raises(ClearError, match=said) as refused:
        load_bagel(folder, base=given and tmp_path / given)
    assert "\n" not in str(refused.value)


def test_a_base_that_is_half_written_or_lacks_a_file_is_refused(base, tmp_path):
    folder = save(tmp_path / "CLEAR" / PLAIN, base, 1.0).parent
    (base / "saving.partial").touch()
    with pytest.raises(ClearError, match="BAGEL is half-written"):
        load_bagel(folder, base=base)
    (base / "saving.partial").unlink()
    (base / VAE).unlink()
    with pytest.raises(ClearError, match=r"BAGEL/ae\.safetensors is missing"):
        load_bagel(folder, base=base)


def test_a_whole_folder_does_not_look_at_the_base(base, tmp_path):
    load_bagel(base, base=tmp_path / "nowhere")
    assert fingerprint(base, tmp_path / "nowhere") == fingerprint(base)
    (base / TOKENIZER).unlink()
    assert load_bagel(base, base=tmp_path / "nowhere")[2] is None


def test_the_digest_covers_what_completes_the_weights_and_no_state_of_a_training(base, tmp_path, monkeypatch):
    make_workspace(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    folder = save(tmp_path / "CLEAR" / PLAIN, base, 1.0).parent
    config = with_base(load(), base)
    before = digest_of(folder, config)
    torch.save({}, folder / "optimizer.00000-of-00008.pt")
    assert digest_of(folder, config) == before
    (base / TOKENIZER).write_text((base / TOKENIZER).read_text() + "\n")
    assert digest_of(folder, config) != before


def test_an_adapter_remembers_what_completes_its_weights(base, tmp_path):
    folder, kept = save(tmp_path / "CLEAR" / PLAIN, base, 1.0).parent, tmp_path / "adapter"
    model, _, _ = load_bagel(folder, base=base)
    settings = Lora(rank=2, alpha=4.0, dropout=0.0, targets=["q_proj"], experts="both")
    lora.attach(model, settings)
    lora.save_adapter(kept, model, folder, fingerprint(folder, base), torch.float32, base)
    assert json.loads((kept / lora.BASE).read_text())["rest"] == str(base)
    again, _, tokenizer = lora.load_model(kept)
    assert tokenizer is not None and torch.equal(again.state_dict()[KEY], model.state_dict()[KEY])
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ClearError, match=r"CLEAR has weights alone, and .*BAGEL is not the model folder"):
        lora.load_model(kept)
    lora.load_model(kept, rest=moved)
    lora.load_model(kept, base=folder, rest=moved)
    (moved / VAE).write_bytes(b"")
    with pytest.raises(ClearError, match=r"moved/ae\.safetensors is not the file that .*adapter was trained on"):
        lora.load_model(kept, rest=moved)


# --- wherever a model folder is taken -------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A workspace with a whole model in `model` and the same weights alone in `CLEAR`."""
    make_workspace(tmp_path, "sampling.max_think_tokens=4")
    (tmp_path / "CLEAR").mkdir()
    shutil.copy(tmp_path / "model" / MODEL, tmp_path / "CLEAR" / PLAIN)
    monkeypatch.chdir(tmp_path)
    Path("p.png").write_bytes(picture())
    return tmp_path


def test_ask_with_a_base(here, clear):
    wanted = clear("ask", "p.png", QUESTION, "--model", "model")
    assert wanted[0] == 0
    for model in ("CLEAR", f"CLEAR/{PLAIN}"):
        assert clear("ask", "p.png", QUESTION, "--model", model, "--base", "model") == wanted
    status, _, said = clear("ask", "p.png", QUESTION, "--model", "CLEAR")
    assert status == 1 and "--base" in said and said.count("\n") == 1
    status, _, said = clear("ask", "p.png", QUESTION, "--model", "CLEAR", "--base", "nowhere")
    assert status == 1 and said.startswith("error: --base nowhere: nothing is there") and said.count("\n") == 1


def test_answer_with_a_base_or_with_that_of_the_parameters(here, clear):
    rows = [{"index": 0, "image": b64(picture()), "question": QUESTION, "answer": "red"}]
    file, out = write_tsv(here / "MMStar.tsv", rows), {}
    params = Path("params.yaml").read_text()
    for name, line in (("given", ""), ("base", "  base: model"), ("checkpoint", "  checkpoint: model")):
        key = line.partition(":")[0] + ":"
        kept = [line if line and old.startswith(key) else old for old in params.splitlines()]
        Path("params.yaml").write_text("\n".join(kept) + "\n")
        more = ["--base", "model"] if not line else []
        status, _, said = clear(
            "answer", file, "--out", f"out-{name}", "--model", "CLEAR", "--name", "M", *ANSWER, *more
        )
        assert status == 0, said
        out[name] = Path(f"out-{name}/M/M_MMStar.tsv").read_bytes()
    assert len(set(out.values())) == 1
    status, out, _ = clear("answer", file, "--out", "file", "--model", f"CLEAR/{PLAIN}", *ANSWER, "--base", "model")
    assert (status, out) == (0, "file/CLEAR/CLEAR_MMStar.tsv\n"), "called as its folder"
    assert completing(replace(load(), model=replace(load().model, base="b", checkpoint="c"))) == Path("b")


@pytest.mark.slow
def test_serve_with_a_base(here):
    (here / "model").rename(here / "BAGEL")
    (here / "CLEAR").rename(here / "model")
    with serving(here, "--base", "BAGEL") as server:
        reply = server.ask(asking(QUESTION, picture(), max_tokens=2))
        assert reply.status_code == 200, reply.text
