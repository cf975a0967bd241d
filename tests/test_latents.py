"""Latents are made once for all stages: the same bits with and without a store, whatever happens to its files."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clear.bench.answers import answer
from clear.bench.models import under_test
from clear.config import compose, from_dict
from clear.data.images import encode_image
from clear.data.records import write_samples
from clear.degradation.build import degraded_samples
from clear.errors import ClearError
from clear.model import images, latents
from clear.model.images import AUTOENCODER_IMAGES, ImageBank
from clear.model.latents import LatentStore
from clear.model.vae import AutoEncoder, VaeConfig
from clear.sources.scenes.render import scenes
from clear.stages import bridge, grpo, traces
from clear.traces.table import read_traces, write_traces
from clear.training.load import incoming, labelled, trace_data
from clear.training.loop.run import StageRun
from tests.tiny import save_random_model, trace_workspace

SIZE = from_dict(compose(["profile=smoke"])).model


def autoencoder(seed: int = 0) -> AutoEncoder:
    torch.manual_seed(seed)
    return AutoEncoder(VaeConfig(8, tuple(SIZE.vae_mult), 1, SIZE.vae_z, SIZE.vae_groups)).eval()


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """Pictures of noise in two shapes, so that a bank has two groups."""
    rng = np.random.default_rng(seed)
    shapes = [(48, 48) if n % 3 else (48, 32) for n in range(count)]
    return [encode_image(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of images in each call of the encoder, padding included."""
    calls, encode = [], AutoEncoder.encode
    monkeypatch.setattr(AutoEncoder, "encode", lambda self, x, *rest: (calls.append(len(x)), encode(self, x, *rest))[1])
    return calls


@pytest.fixture
def threads():
    """Sets the number of torch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def alone(tmp_path_factory):
    """Encodes pictures for a store that nobody else has."""

    def encode(shown: list[bytes], vae: AutoEncoder, size=SIZE) -> ImageBank:
        return ImageBank(shown, size).encode(vae, LatentStore(tmp_path_factory.mktemp("latents"), vae))

    return encode


def same(one: ImageBank, two: ImageBank) -> bool:
    """Whether all latents are: their bits, and their order in memory, by which `torch.randn_like` fills noise."""
    pairs = list(zip(one.latents, two.latents, strict=True))
    return all(torch.equal(a, b) and (a.dtype, a.stride()) == (b.dtype, b.stride()) for a, b in pairs)


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_an_empty_store_and_a_full_one_give_the_same_bits(tmp_path, encoded, alone, posterior):
    shown, vae, size = pictures(9), autoencoder(), replace(SIZE, posterior=posterior)
    plain = alone(shown, vae, size)
    empty = ImageBank(shown, size).encode(vae, LatentStore(tmp_path, vae))
    encoded.clear()
    full = ImageBank(shown[::-1], size).encode(vae, LatentStore(tmp_path, vae))
    assert encoded == []
    assert same(plain, empty) and same(plain, ImageBank(shown, size).encode(vae, LatentStore(tmp_path, vae)))
    assert all(torch.equal(a, b) for a, b in zip(plain.latents, list(full.latents)[::-1], strict=True))
    close = ImageBank(shown, size).encode(vae)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain.latents, close.latents, strict=True))


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_a_bank_without_room_reads_the_same_latents_from_the_store_or_makes_them_again(
    tmp_path, encoded, alone, monkeypatch, posterior
):
    shown, vae, size = pictures(9), autoencoder(), replace(SIZE, posterior=posterior)
    plain = alone(shown, vae, size)
    monkeypatch.setattr(images, "KEPT_BYTES", 3 * plain.latents[1].nbytes)
    bank = ImageBank(shown, size).encode(vae, LatentStore(tmp_path, vae))
    encoded.clear()
    assert same(plain, bank) and encoded == []
    assert sum(one.nbytes for one in bank.latents._kept if one is not None) <= images.KEPT_BYTES
    for file in files(tmp_path):
        file.unlink()
    assert same(plain, bank) and encoded == [AUTOENCODER_IMAGES] * sum(one is None for one in bank.latents._kept)
    encoded.clear()
    assert same(plain, bank) and encoded == [], "they are kept again"


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(48, 48), (64, 40)])
def test_what_is_encoded_beside_an_image_does_not_change_its_latent(threads, alone, count, shape):
    """Without full batches this fails: on one thread below 16 images, on two for an image alone (AVX2)."""
    threads(count)
    rng, vae, size = np.random.default_rng(1), autoencoder(), replace(SIZE, vae_size=64, vae_min=32)
    shown = [encode_image(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for _ in range(33)]
    whole = alone(shown, vae, size).latents
    for start, stop in ((7, 8), (7, 9), (3, 14), (2, 18), (0, 17)):
        part = alone(shown[start:stop], vae, size).latents
        assert all(torch.equal(a, b) for a, b in zip(part, whole[start:stop], strict=True)), (start, stop)


def test_only_what_is_missing_is_encoded(tmp_path, encoded, alone):
    shown, vae = pictures(60), autoencoder()
    ImageBank(shown[:30], SIZE).encode(vae, LatentStore(tmp_path, vae))
    plain = alone(shown, vae)
    encoded.clear()
    assert same(plain, ImageBank(shown, SIZE).encode(vae, LatentStore(tmp_path, vae)))
    assert encoded == [AUTOENCODER_IMAGES] * 3, "10 pictures of one shape and 20 of the other, in full batches"


def test_latents_that_may_have_other_bits_are_made_anew(tmp_path, encoded, alone, monkeypatch, threads):
    shown, vae = pictures(4), autoencoder()
    store = tmp_path / "store"
    ImageBank(shown, SIZE).encode(vae, LatentStore(store, vae))

    def made_anew(vae: AutoEncoder = vae, size=SIZE) -> bool:
        encoded.clear()
        found = ImageBank(shown, size).encode(vae, LatentStore(store, vae))
        return bool(encoded) and same(found, alone(shown, vae, size))

    assert not made_anew()
    assert made_anew(autoencoder(1)), "weights"
    assert made_anew(size=replace(SIZE, posterior="sample")), "posterior"
    assert made_anew(size=replace(SIZE, vae_size=32, vae_min=32)), "pixels"
    other = autoencoder()
    other.config = replace(other.config, scale_factor=1.0)
    assert made_anew(other), "scale"
    threads(torch.get_num_threads() + 1)
    assert made_anew(), "threads"
    code = tmp_path / "vae.py"
    code.write_text("another version")
    monkeypatch.setattr(latents, "_MAKERS", (code,))
    assert made_anew(), "code"


# --- files that are lost, damaged or not to be written ---------------------------------------------------------------


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "zeros"])
def test_a_damaged_file_is_noticed_and_made_again(tmp_path, encoded, harm):
    shown, vae = pictures(4), autoencoder()
    plain = ImageBank(shown, SIZE).encode(vae, LatentStore(tmp_path, vae))
    file = files(tmp_path)[0]
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    file.write_bytes({"flipped": bytes(flipped), "cut": whole[:-4], "empty": b"", "zeros": bytes(len(whole))}[harm])
    encoded.clear()
    assert same(plain, ImageBank(shown, SIZE).encode(vae, LatentStore(tmp_path, vae)))
    assert encoded == [AUTOENCODER_IMAGES] and file.read_bytes() == whole


def test_several_at_once_give_the_same_bits_and_leave_whole_files(tmp_path, alone):
    shown, vae = pictures(48), autoencoder()
    plain, found = alone(shown, vae), {}

    def encode(k: int) -> None:
        found[k] = ImageBank(shown, SIZE).encode(vae, LatentStore(tmp_path, vae))

    workers = [threading.Thread(target=encode, args=(k,)) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 3 and all(same(plain, bank) for bank in found.values())
    assert len(files(tmp_path)) == 48 and not [*tmp_path.rglob("*.partial")]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from clear.model.latents import LatentStore
from clear.model.vae import AutoEncoder, VaeConfig
replace, done = Path.replace, []
def interrupted(self, target):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(target)
    return replace(self, target)
Path.replace = interrupted
torch.set_num_threads(1)
torch.manual_seed(0)
store = LatentStore(sys.argv[1], AutoEncoder(VaeConfig(8, (1, 2), 1, 4, 4)))
for name in ("a", "b", "c"):
    store.write(name, torch.full((4, 2, 2), float(ord(name))))
"""


def test_a_process_killed_while_it_writes_leaves_what_it_had_finished(tmp_path, threads):
    threads(1)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    assert [file.suffix for file in files(tmp_path)].count(".partial") == 1 and len(files(tmp_path)) == 3
    torch.manual_seed(0)
    store = LatentStore(tmp_path, AutoEncoder(VaeConfig(8, (1, 2), 1, 4, 4)))
    assert store.read("a").unique().item() == ord("a") and store.read("b").unique().item() == ord("b")
    assert store.read("c") is None


@pytest.mark.parametrize("fault", ["read-only", "a file in its place", "a full disk", "full in the middle"])
def test_what_cannot_be_kept_is_encoded_and_said_once(tmp_path, alone, monkeypatch, capsys, fault):
    shown, vae, folder = pictures(6), autoencoder(), tmp_path / "latents"
    plain = alone(shown, vae)

    def refuse(number: int):
        def refused(self, *_, **__):
            raise OSError(number, os.strerror(number), str(self))

        return refused

    if fault == "read-only":
        monkeypatch.setattr(Path, "mkdir", refuse(30))
    elif fault == "a file in its place":
        folder.write_text("")
    elif fault == "a full disk":
        monkeypatch.setattr(latents.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    else:
        monkeypatch.setattr(Path, "write_bytes", refuse(28))
    store = LatentStore(folder, vae)
    for _ in range(2):
        assert same(plain, ImageBank(shown, SIZE).encode(vae, store))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and str(folder) in said[0] and said[0].endswith("encodes its images itself."), said
    assert sum(file.stat().st_size for file in files(tmp_path)) == 0


def test_what_was_used_longest_ago_leaves_first(tmp_path, monkeypatch):
    shown, vae = pictures(16), autoencoder()
    ImageBank(shown[:8], SIZE).encode(vae, LatentStore(tmp_path, vae))
    kept = files(tmp_path)
    for file in kept:
        os.utime(file, (1, 1))
    partial = kept[0].with_name("killed.partial")
    partial.write_bytes(bytes(99))
    os.utime(partial, (0, 0))
    used = sum(file.stat().st_size for file in kept)
    ImageBank(shown[6:8], SIZE).encode(vae, LatentStore(tmp_path, vae))
    monkeypatch.setattr(latents, "STORED_BYTES", used)
    ImageBank(shown[8:11], SIZE).encode(vae, LatentStore(tmp_path, vae))
    left = set(files(tmp_path))
    assert sum(file.stat().st_size for file in left) <= used
    assert partial not in left and len(left - set(kept)) == 3, "the new ones are there"
    recent = {file for file in kept if file in left and file.stat().st_mtime > 1}
    assert len(recent) == 2, "and those that were read"


# --- the stages ------------------------------------------------------------------------------------------------------


def test_every_stage_reads_what_another_has_encoded(tmp_path, monkeypatch, encoded, alone):
    """Each picture goes through the encoder once, in the stage that comes first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path / "home"))
    base = scenes("sft", 4, 1, 64, 1)
    samples = list(degraded_samples([(sample, "dark", "high") for sample in base], 0.1, 1))
    settings = ["traces.clean_share=1.0", "grpo.clean_share=0.5", "bridge.price=1.0", "sampling.flow_steps=1"]
    config = trace_workspace(tmp_path, [*settings, "sampling.batch=8", "runtime.device=cpu"], samples)
    save_random_model(Path("data/models/bridge"), config)
    save_random_model(Path("data/models/grpo"), config)
    for folder in ("degraded/rl", "degraded/validation", "bench/degraded"):
        write_samples(Path("data") / folder, samples)
    traces.run(config)
    assert encoded == [AUTOENCODER_IMAGES] * 2, "the degraded and the clean pictures"
    start = incoming("data/models/base", config, config)
    data = trace_data(start, config)
    bridge._decisions(start, config, StageRun("bridge", config, (), tmp_path / "checkpoints"))
    with monkeypatch.context() as patched:
        patched.setattr(ImageBank, "patches", None)  # a picture of every question is more than a machine holds
        _, task = grpo.prepare(config)
    assert len(task.prompts) == sum(len(s.questions) for s in samples) and len(task.prompts[0].patches)
    answer(under_test("grpo", config), samples)
    answer(under_test("base", config), samples)
    assert encoded == [AUTOENCODER_IMAGES] * 2
    assert same(data.shown, alone([s.seen for s in samples], start.vae, config.model))
    assert same(data.clean, alone([s.image for s in samples], start.vae, config.model))
    assert json.loads(Path("data/metrics/traces.json").read_text())["traces"] == 8
    # Of one picture's answers nothing is left when another one is drawn.
    few = replace(config, sft=replace(config.sft, labelled=0.0))
    (known,) = labelled(samples, few)
    kept = [row for row in read_traces("data/traces") if row.sample == samples[known].id]
    assert [data.rows[n] for n in trace_data(start, few).learned] == kept != []
    taken = max(map(data.positions, range(len(data))))
    llm = start.model.config.llm
    for most in (taken, taken - 1):
        start.model.config = replace(start.model.config, llm=replace(llm, positions=most))
        if most == taken:
            assert len(trace_data(start, config)) == len(data), "what fits is learned"
            continue
        with pytest.raises(ClearError, match=rf"takes {taken} positions with its replies, this model has {most}"):
            trace_data(start, config)
    start.model.config = replace(start.model.config, llm=llm)
    write_traces(Path("data/traces"), [row for row in data.rows if row not in kept])
    with pytest.raises(ClearError, match=r"sft.labelled = 0.0 leaves no trace with an answer; raise it"):
        trace_data(start, few)
