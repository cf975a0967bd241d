"""The stage bridge on two sharded processes (FSDP2) is the stage on one; the weights are read by one of the two.

Processes are forked from one interpreter, on the CPU with gloo, as in test_distributed.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clear.config import load
from tests.helpers.bridging import bridge_workspace
from tests.helpers.ranks import fork, fsdp_environment, join, run_jobs, shard_on_cpu

SMALL = ["profile=smoke", "runtime.threads=1", "runtime.device=cpu", "runtime.precision=float32"]
SMALL += ["runtime.log_every=1", "runtime.checkpoint_every=4", "sampling.flow_steps=2"]
SMALL += ["bridge.distill={steps: 3, batch: 4, warmup: 1}", "bridge.answer={steps: 3, batch: 4, warmup: 1}"]
SMALL += ["bridge.decide={steps: 3, batch: 4, warmup: 1}", "bridge.price=1.0"]
PHASES = 3


def _work(rank: int, world: int, port: int) -> None:
    """The stage in the working directory; notes where this process loads the weights to and whether it generates."""
    torch.set_num_threads(1)
    if world > 1:
        join(rank, world, port)
        os.environ.update(fsdp_environment())
        shard_on_cpu()
    from clear.errors import ClearError
    from clear.model import lora
    from clear.stages import bridge as stage
    from clear.training import bridge

    def noted(function, say):
        def call(*given):
            with Path(f"{rank}.txt").open("a") as file:
                file.write(say(given))
            return function(*given)

        return call

    lora.load_model = noted(lora.load_model, lambda given: f"{given[2]} ")
    bridge.own_latents = noted(bridge.own_latents, lambda _: "generates ")
    try:
        stage.run(load())
    except ClearError as error:  # under FSDP a process trains one phase
        assert world > 1 and "repeat the command" in str(error)


def main() -> None:
    """Run the stage in each folder given as JSON {folder: number of processes}, once a phase where there are two."""
    from clear.stages import bridge  # noqa: F401, imported once, before the processes are forked
    from clear.training import load as _load  # noqa: F401

    for folder, world in json.loads(sys.argv[1]).items():
        os.chdir(folder)
        for turn in range(1 if world == 1 else PHASES):
            port = 27000 + (os.getpid() * 7 + turn) % 2000
            fork(_work, [(rank, world, port) for rank in range(world)], folder)


@pytest.mark.slow
def test_two_sharded_processes_make_the_bridge_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    bridge_workspace(one, SMALL)
    shutil.copytree(one, two)
    run_jobs("tests.test_distributed_bridge", {str(one): 1, str(two): 2})

    assert (one / "0.txt").read_text().split() == ["cpu", "generates"]
    assert (two / "0.txt").read_text().split() == ["cpu", "generates", "cpu", "cpu"], "latents outlive the first phase"
    assert (two / "1.txt").read_text().split() == ["meta"] * PHASES
    for name in ("ema", "bridge"):
        wanted, found = (load_file(folder / f"data/models/bridge/{name}.safetensors") for folder in (one, two))
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3, msg=key)
    figures = [json.loads((folder / "data/metrics/bridge.json").read_text()) for folder in (one, two)]
    assert figures[0]["own_latents"] == figures[1]["own_latents"] == 8
    assert figures[0]["decisions"] == figures[1]["decisions"]
    for phase in ("answer", "decide"):
        loss = [one["training"][f"{phase}_loss"] for one in figures]
        assert loss[1] == pytest.approx(loss[0], rel=1e-3)


if __name__ == "__main__":
    main()
