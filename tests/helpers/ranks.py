"""Several processes that train together on the CPU with gloo, forked from one interpreter or launched."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch

from clear.model.bagel import Bagel
from tests.conftest import ROOT


class Interrupted(Exception):
    """Stands for the kill of the process."""


def forget(model: Bagel, rank: int) -> None:
    """Under the shipped settings only the first process has weights (`load.incoming`); the others' are overwritten."""
    if rank and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true":
        for value in model.parameters():
            value.data = torch.full_like(value, torch.nan)


def join(rank: int, world: int, port: int) -> None:
    """Tell this process its place among `world`, as `accelerate launch` does."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})


def fork(worker: Callable, arguments: list[tuple], job: str) -> None:
    """Call `worker` with each of the arguments, each in a process of its own; one failure ends all, and the caller."""
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=worker, args=one) for one in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
            sys.exit(f"{job} failed")


def run_jobs(module: str, jobs: list | dict) -> None:
    """Run `main` of a test module with jobs, in an interpreter of its own that forks on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def shard_on_cpu() -> None:
    """accelerate shards between accelerators only: let it take these CPU processes for such, and gloo for NCCL."""
    from accelerate import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch --config_file infra/fsdp.yaml` tells its processes, by accelerate's own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(ROOT / "infra/fsdp.yaml"), "script.py"])
    found = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return {name: value for name, value in found.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
