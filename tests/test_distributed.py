"""Two processes train as one does: same numbers, exact resume, another number of processes, sharded weights.

Processes are forked from one interpreter that has imported everything (this file as a program), on the CPU with gloo.
"""

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from clear.config import compose, from_dict
from clear.model import flow, lora
from clear.model.bagel import Bagel, Contents
from clear.model.sequence import IGNORE, LATENT, VIT, Image, Layout, Text, layout
from clear.schema import Lora, Phase
from clear.training.load import trainable
from clear.training.loop import parallel
from clear.training.loop.parallel import share_batch
from clear.training.loop.run import StageRun
from clear.training.loop.trainer import optimise
from tests.helpers.ranks import Interrupted, forget, fork, fsdp_environment, join, run_jobs, shard_on_cpu
from tests.tiny import tiny_model, tiny_prompts

SAMPLES, PHASE = 11, Phase(steps=9, batch=5, lr=0.01, warmup=2)
"""11 samples in batches of 5, 5 and 1: rows of different length, uneven shares, and a process without a row."""


def _rows(tokenizer, index: list[int], prompts, special, direct: int = 2):
    """A batch as the stages build it, drawn row by row: every `direct`-th restores not; others may lose the ViT."""
    rows, contents, targets = [], Contents(vit=[], latent=[], time=[], bridge=[]), []
    for n, drop in zip(index, torch.rand(len(index)).tolist(), strict=True):
        prompt = prompts[n]
        contents.latent.append(prompt.latent)
        contents.time.append(0.0)
        lost = drop <= 0.3 and direct <= SAMPLES
        if not lost:
            contents.vit.append(prompt.patches)
        row = [*prompt.segments(lost), Text(prompt.question, scored=True)]
        if (n + 1) % direct:
            t, noise = flow.draw_times(1), torch.randn_like(prompt.latent)
            contents.latent += [flow.interpolate(prompt.latent[None], noise[None], t)[0], prompt.latent]
            contents.time += [t.item(), 0.0]
            targets.append(noise - prompt.latent)
            row += [Image(LATENT, (3, 3), noise=True), Image(LATENT, (3, 3)), Text([7, 8, 9][: 1 + n % 3], scored=True)]
        rows.append(row)
    return rows, contents, targets


def _loss(model: Bagel, tokenizer, stop_after: int | None, direct: int):
    prompts, calls = tiny_prompts(tokenizer, SAMPLES), 0

    def loss(index):
        nonlocal calls
        calls += 1
        if stop_after is not None and calls > stop_after:
            raise Interrupted
        rows, contents, targets = _rows(tokenizer, index, prompts, model.config.special, direct)
        built, contents, share = share_batch(rows, contents, model.config.special)
        hidden = model(built, contents)
        logits, target = model.scored_logits(hidden, built)
        ce = F.cross_entropy(logits, target) * share.weight(lambda b: b.target != IGNORE)
        mse = ce.new_zeros(())
        if share.noise:
            mse = F.mse_loss(model.velocities(hidden, built), torch.cat(share.targets(targets)))
            mse = mse * share.weight(lambda b: b.noisy)
        return ce + mse, {"ce": ce.item(), "mse": mse.item(), "rows": float(len(share.samples))}

    return loss


def _train(
    folder: Path, rank: int, adapters: bool, ema: float, stop_after: int | None, direct: int, budget: int
) -> None:
    torch.set_num_threads(1)
    overrides = ["profile=smoke", "runtime.checkpoint_every=3", "runtime.device=cpu", "runtime.log_every=1"]
    config = from_dict(compose([*overrides, "runtime.precision=float32"]))
    config.runtime.gradient_checkpointing = adapters
    config.runtime.token_budget, config.runtime.rows_per_pass = budget, 1 if budget else 0
    model, tokenizer = tiny_model("direct")
    if adapters:
        torch.manual_seed(4)
        lora.attach(model, Lora(2, 4.0, 0.0, ["q_proj", "v_proj", "down_proj"], "both"))
        model.language_model.gradient_checkpointing = True
    forget(model, rank)
    trainable(model)
    torch.manual_seed(5)
    inputs = Path(folder).parent / "input.txt"
    run = StageRun("test", config, [inputs], folder / "runs")
    try:
        optimise(run, "phase", model, _loss(model, tokenizer, stop_after, direct), SAMPLES, PHASE, ema)
    except Interrupted:
        return
    left = sorted(str(p.relative_to(run.folder)) for p in run.folder.rglob("*"))
    (folder / f"left_{rank}.json").write_text(json.dumps(left))
    if rank == 0:
        (folder / "curve.json").write_text(json.dumps(run.curve))
        wrapped = [name for name, part in model.named_modules() if hasattr(part, "unshard")]
        (folder / "wrapped.json").write_text(json.dumps(wrapped))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    run.finish(folder / f"curve_{rank}.csv")


def _worker(rank: int, world: int, port: int, sharded: bool, job: tuple) -> None:
    if world > 1 or sharded:
        join(rank, world, port)
    if sharded:
        os.environ.update(fsdp_environment())
        shard_on_cpu()
    _train(job[0], rank, *job[1:])


def main() -> None:
    """Run jobs {folder, world, sharded, adapters, ema, stop_after, direct, budget, copy}, given as JSON, in turn."""
    for number, line in enumerate(json.loads(sys.argv[1])):
        folder = Path(line["folder"])
        if line.get("copy"):
            shutil.copytree(line["copy"], folder)
        folder.mkdir(parents=True, exist_ok=True)
        job = (folder, line.get("adapters", False), line.get("ema", 0.0), line.get("stop_after"), line.get("direct", 2))
        job += (line.get("budget", 0),)
        world, port = line["world"], 29000 + (os.getpid() * 7 + number) % 2000
        arguments = [(rank, world, port, line.get("sharded", False), job) for rank in range(world)]
        fork(_worker, arguments, f"job {number}")


def _run(jobs: list[dict]) -> None:
    run_jobs("tests.test_distributed", jobs)


def _result(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return json.loads((folder / "curve.json").read_text()), load_file(folder / "weights.safetensors")


def _close(found: Path, expected: Path, figures=("loss", "ce", "mse", "grad_norm"), limit: float = 1e-4) -> None:
    curve, weights = _result(found)
    wanted, other = _result(expected)
    assert len(curve) == len(wanted) == PHASE.steps, "the run stops at its last step"
    for row, reference in zip(curve, wanted, strict=True):
        for name in figures:
            assert row[name] == pytest.approx(reference[name], rel=limit, abs=1e-6), (name, row, reference)
    for name, value in other.items():
        torch.testing.assert_close(weights[name], value, atol=1e-4, rtol=1e-3, msg=name)


def _same(found: Path, expected: Path) -> None:
    curve, weights = _result(found)
    wanted, other = _result(expected)
    assert curve == wanted
    assert all(torch.equal(weights[name], value) for name, value in other.items())


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Whole runs of one and of two processes, one sample per row, and of two that pack theirs."""
    home = tmp_path_factory.mktemp("plain")
    (home / "input.txt").write_text("data")
    jobs = [{"folder": str(home / f"whole_{n}"), "world": n, "ema": 0.9} for n in (1, 2)]
    _run([*jobs, {"folder": str(home / "packed_2"), "world": 2, "ema": 0.9, "budget": 100}])
    return home


@pytest.fixture(scope="module")
def resumed(plain) -> Path:
    """Killed runs of one and two processes, resumed on as many and on the other number."""
    killed = [{"folder": str(plain / f"killed_{n}"), "world": n, "stop_after": 7, "ema": 0.9} for n in (1, 2)]
    again = [
        {"folder": str(plain / f"from_{a}_on_{b}"), "copy": str(plain / f"killed_{a}"), "world": b, "ema": 0.9}
        for a, b in ((2, 2), (2, 1), (1, 2))
    ]
    _run([*killed, *again])
    return plain


@pytest.mark.slow
def test_two_processes_train_as_one(plain):
    _close(plain / "whole_2", plain / "whole_1")
    rows = [row["rows"] for row in _result(plain / "whole_2")[0]]
    assert min(rows) == 1 and max(rows) == 2.5, "each computed its own rows"


@pytest.mark.slow
def test_two_processes_that_pack_train_as_one(plain):
    _close(plain / "packed_2", plain / "whole_1", ("loss", "grad_norm"))
    curve = _result(plain / "packed_2")[0]
    assert {row["passes"] for row in curve} == {1, 2}
    assert [row["real_tokens"] for row in curve[2::3]] == [0.5] * 3, "of one sample one of the two computes nothing"


@pytest.mark.slow
def test_a_killed_run_of_two_processes_resumes_exactly(resumed):
    assert not (resumed / "killed_2" / "curve.json").exists()
    _same(resumed / "from_2_on_2", resumed / "whole_2")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_checkpoint_resumes_on_another_number_of_processes(resumed, first, second):
    _close(resumed / f"from_{first}_on_{second}", resumed / "whole_1")


@pytest.mark.slow
def test_only_the_first_process_writes(plain):
    assert (plain / "whole_2" / "curve_0.csv").exists() and not (plain / "whole_2" / "curve_1.csv").exists()
    left = [json.loads((plain / "whole_2" / f"left_{rank}.json").read_text()) for rank in range(2)]
    assert left[0] == left[1] == ["phase.json", "phase.safetensors"]


@pytest.fixture
def second_of_two(monkeypatch):
    """This process as the second of two, without the other."""
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 1)


def test_a_share_has_the_contents_of_its_rows(second_of_two):
    model, tokenizer = tiny_model("direct")
    prompts = tiny_prompts(tokenizer, 6)
    rows, contents, targets = _rows(tokenizer, [0, 1, 2, 3, 4], prompts, model.config.special)
    built, own, share = share_batch(rows, contents, model.config.special)
    expected, _ = layout(rows[2:], model.config.special)
    assert share.samples == [2, 3, 4] and torch.equal(built.ids, expected.ids)
    assert len(own.vit) == sum(isinstance(s, Image) and s.kind == VIT for row in rows[2:] for s in row)
    assert len(own.latent) == len(own.time) == len(contents.latent) - 3 - 1
    assert all(a is b for a, b in zip(own.latent, contents.latent[4:], strict=True))
    assert all(a is b for a, b in zip(share.targets(targets), targets[1:], strict=True))
    whole, _ = layout(rows, model.config.special)

    def scored(b: Layout) -> torch.Tensor:
        return b.target != IGNORE

    assert share.weight(scored) == pytest.approx(2 * int(scored(built).sum()) / int(scored(whole).sum()))


def test_a_share_without_rows_weighs_nothing(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    model, tokenizer = tiny_model("direct")
    rows, contents, _ = _rows(tokenizer, [0], tiny_prompts(tokenizer, 2), model.config.special)
    built, _, share = share_batch(rows, contents, model.config.special)
    assert len(built.ids) == 1 and share.weight(lambda b: b.target != IGNORE) == 0.0


def test_what_the_first_process_makes_is_what_all_have_also_after_an_interruption(tmp_path, monkeypatch):
    made = {"7": torch.arange(6.0).reshape(2, 3).T, "12": torch.ones(2, dtype=torch.bfloat16)}
    file, found = tmp_path / "own.safetensors", []
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = threading.Thread(target=lambda: found.append(parallel.made_once(file, lambda: pytest.fail("the second"))))
    second.start()
    time.sleep(0.5)
    assert second.is_alive()  # it waits
    monkeypatch.setenv("LOCAL_RANK", "0")
    found.append(parallel.made_once(file, lambda: made))
    second.join(10)
    found.append(parallel.made_once(file, lambda: pytest.fail("made twice")))
    assert len(found) == 3 and not list(tmp_path.glob("*.partial"))
    for one in found:
        assert set(one) == set(made)
        assert all(torch.equal(one[name], value) and one[name].dtype == value.dtype for name, value in made.items())


@pytest.mark.parametrize(("here", "all_", "expected"), [(None, None, True), (None, "2", True), ("4", "8", False)])
def test_a_run_on_several_machines_is_told_apart(monkeypatch, here, all_, expected):
    for name, value in (("LOCAL_WORLD_SIZE", here), ("WORLD_SIZE", all_)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert parallel.one_machine() is expected


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """FSDP2 by the shipped settings, on two processes and one, with most weights frozen (adapters) and with all.

    Every row has all kinds of tokens: weights that no row of a batch uses get a zero gradient when sharded, and none
    otherwise.
    """
    home = tmp_path_factory.mktemp("sharded")
    (home / "input.txt").write_text("data")
    jobs = []
    for name, adapters in (("full", False), ("lora", True)):
        shape = {"adapters": adapters, "ema": 0.9, "direct": SAMPLES + 1}
        jobs += [
            shape | {"folder": str(home / f"{name}_plain"), "world": 1},
            shape | {"folder": str(home / f"{name}_2"), "world": 2, "sharded": True},
            shape | {"folder": str(home / f"{name}_killed"), "world": 2, "sharded": True, "stop_after": 7},
            shape
            | {"folder": str(home / f"{name}_on_2"), "world": 2, "sharded": True, "copy": str(home / f"{name}_killed")},
            shape
            | {"folder": str(home / f"{name}_on_1"), "world": 1, "sharded": True, "copy": str(home / f"{name}_killed")},
        ]
    _run(jobs)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_sharded_weights_train_as_whole_ones(sharded, name):
    _close(sharded / f"{name}_2", sharded / f"{name}_plain", ("loss", "ce", "mse"))
    wrapped = json.loads((sharded / f"{name}_2" / "wrapped.json").read_text())
    assert wrapped == [f"language_model.model.layers.{i}" for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_sharded_run_resumes_exactly_and_on_another_number(sharded, name):
    _same(sharded / f"{name}_on_2", sharded / f"{name}_2")
    _close(sharded / f"{name}_on_1", sharded / f"{name}_plain", ("loss", "ce", "mse"))


if __name__ == "__main__":
    main()
