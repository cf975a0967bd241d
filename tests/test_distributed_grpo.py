"""GRPO on two processes is GRPO on one, sharded (FSDP2) or not: same rollouts, same curve, same weights.

Processes are forked from one interpreter, on the CPU with gloo, as in test_distributed.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear.config import compose, from_dict
from clear.data.records import Question
from clear.reasoning.engine import Options
from clear.training.load import trainable
from clear.training.loop.run import StageRun
from clear.training.rl.policy import Task
from tests.helpers.ranks import Interrupted, forget, fork, fsdp_environment, join, run_jobs, shard_on_cpu
from tests.tiny import tiny_model, tiny_prompts

OPTIONS = Options(flow_steps=3, shift=3.0, sigma=0.3, temperature=1.0, max_tokens=6, batch=64)
STEPS = 4
FIGURES = (
    "loss",
    "reward",
    "accuracy_holdout",
    "groups_with_variance",
    "reward_sometimes",
    "call_rate",
    "image_advantage",
)
"""The others are means over the slices that a process scores, which are other slices with more processes."""


def _uneven(texts, restored, question, config, more, accuracy):
    """A random model never answers; any reward with variance will do, and none for some prompts."""
    value = float(len(texts[-1]) % 3) if question.id != "1" else 1.0
    # A reward that not every trajectory has: its mean is over those that have it, wherever they are.
    return {"reward": value, "reward_accuracy": value} | ({"reward_sometimes": value} if value else {})


def _train(folder: Path, rank: int, stop_at: int | None, restore: str, more: dict) -> None:
    import clear.training.rl.grpo as module

    torch.set_num_threads(1)
    module.rewards = _uneven
    module.InterleavedGRPO.own_streams = True
    small = [
        "grpo.steps=4",
        "grpo.prompts=4",
        "grpo.group_size=2",
        "grpo.lr=0.01",
        "grpo.warmup=0",
        "grpo.rows_per_pass=2",
        "grpo.holdout_every=1",
        "grpo.scale_advantages=batch",
    ]
    usual = ["profile=smoke", "runtime.checkpoint_every=2", "runtime.log_every=1", "runtime.device=cpu"]
    config = from_dict(compose([*usual, *small, *(f"{k}={v}" for k, v in more.items())]))
    model, tokenizer = tiny_model("direct")
    forget(model, rank)
    trainable(model)
    model.language_model.gradient_checkpointing = config.runtime.gradient_checkpointing
    prompts = tiny_prompts(tokenizer, 6)
    questions = [Question(str(i), "test", "a b", "abcdef"[i]) for i in range(6)]
    run = StageRun("grpo", config, [folder.parent / "input.txt"], folder / "runs")
    asked = 0

    def holdout(policy) -> float:
        nonlocal asked
        asked += 1
        if asked == stop_at:
            raise Interrupted
        return policy.language_model.lm_head.weight.detach().double().square().sum().item()

    torch.manual_seed(3)
    original = module.training_arguments

    def arguments(*given, **named):
        # Without momentum a wrong scale of the gradients shows in the weights.
        return original(*given, **named | {"optim": "sgd"})

    module.training_arguments = arguments
    try:
        module.train(run, model, Task(tokenizer, prompts, questions, replace(OPTIONS, restore=restore), holdout))
    except Interrupted:
        return
    after = holdout(model)
    if rank == 0:
        (folder / "curve.json").write_text(json.dumps([*run.curve, {"after": after}]))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    run.finish(folder / f"curve_{rank}.csv")


def _worker(rank: int, world: int, port: int, job: dict) -> None:
    if world > 1 or job.get("sharded"):
        join(rank, world, port)
    if job.get("sharded"):
        os.environ.update(fsdp_environment())
        shard_on_cpu()
    _train(Path(job["folder"]), rank, job.get("stop_at"), job.get("restore", "always"), job.get("more", {}))


def main() -> None:
    """Run jobs {folder, world, sharded, stop_at, restore, more, copy}, given as JSON, one after another."""
    import clear.training.rl.grpo  # noqa: F401, imported once, before the processes are forked

    for number, job in enumerate(json.loads(sys.argv[1])):
        folder = Path(job["folder"])
        if job.get("copy"):
            shutil.copytree(job["copy"], folder)
        folder.mkdir(parents=True, exist_ok=True)
        port = 31000 + (os.getpid() * 7 + number) % 2000
        fork(_worker, [(rank, job["world"], port, job) for rank in range(job["world"])], f"job {number}")


def _run(jobs: list[dict]) -> None:
    run_jobs("tests.test_distributed_grpo", jobs)


def _close(found: Path, expected: Path) -> None:
    curve, wanted = (json.loads((folder / "curve.json").read_text()) for folder in (found, expected))
    assert len(curve) == len(wanted) == STEPS + 1
    assert curve[-1]["after"] == pytest.approx(wanted[-1]["after"], rel=1e-6)
    for row, reference in zip(curve[:-1], wanted[:-1], strict=True):
        for name in FIGURES:
            assert row[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-6), (name, row, reference)
    weights, other = (load_file(folder / "weights.safetensors") for folder in (found, expected))
    for name, value in other.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4, msg=name)


SHAPES = {
    "plain_2": {"world": 2},
    "recomputed_2": {"world": 2, "more": {"runtime.gradient_checkpointing": "true"}},
    "sharded_1": {"world": 1, "sharded": True},
    "sharded_2": {"world": 2, "sharded": True},
    "packed_2": {"world": 2, "sharded": True, "more": {"runtime.token_budget": 90}},
}


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> Path:
    """The same run on one process and in all shapes; with "auto" some slices have no restoration at all."""
    home = tmp_path_factory.mktemp(request.param)
    (home / "input.txt").write_text("data")
    shapes = {"plain_1": {"world": 1}, **SHAPES}
    jobs = [shape | {"folder": str(home / name), "restore": request.param} for name, shape in shapes.items()]
    if request.param == "always":
        killed = {"folder": str(home / "killed"), "restore": request.param} | SHAPES["sharded_2"]
        resumed = killed | {"folder": str(home / "resumed"), "copy": str(home / "killed")}
        jobs += [killed | {"stop_at": 4}, resumed]
    _run(jobs)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("runs", ["always", "auto"], indirect=True)
@pytest.mark.parametrize("name", SHAPES)
def test_processes_and_sharding_do_not_change_a_run(runs, name):
    _close(runs / name, runs / "plain_1")


@pytest.mark.slow
@pytest.mark.parametrize("runs", ["always"], indirect=True)
def test_a_killed_sharded_run_resumes_exactly(runs):
    assert not (runs / "killed" / "curve.json").exists()
    found, expected = (json.loads((runs / name / "curve.json").read_text()) for name in ("resumed", "sharded_2"))
    assert found == expected, "and its reference is the incoming policy, not the checkpoint"
    weights, other = (load_file(runs / name / "weights.safetensors") for name in ("resumed", "sharded_2"))
    assert all(torch.equal(weights[name], value) for name, value in other.items())


if __name__ == "__main__":
    main()
