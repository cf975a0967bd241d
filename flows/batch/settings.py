"""Where stages run, on what machines, at what price: infra/compute.yaml (docs/CLOUD.md).

No stage depends on it, so that moving a stage to another machine makes nothing out of date. Prices are estimates.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from clear.config import check, read_yaml, typed
from clear.errors import ClearError
from clear.schema import Config, between, one_of

COMPUTE = Path("infra/compute.yaml")


def place() -> Any:
    """Where a stage runs."""
    return one_of("local", "aws_batch")


@dataclass
class Place:
    """Where each stage runs; `evaluate` stands for all its models."""

    source: str = place()
    degrade: str = place()
    mmd_bench: str = place()
    validate: str = one_of("local")  # it and `report` render pages for the machine of the person who reads them
    base: str = place()
    traces: str = place()
    sft: str = place()
    sft_direct: str = place()
    bridge: str = place()
    grpo: str = place()
    evaluate: str = place()
    report: str = one_of("local")


@dataclass
class BatchJob:
    """What a stage asks of AWS Batch; GPUs, vCPUs and memory are those of one node."""

    instance_types: list[str] = field()  # any of them may be used; estimates use the most expensive
    nodes: int = between(1, 64)  # several: one multi-node job, on demand only
    launch: str = one_of("single", "ddp", "fsdp")  # processes: one, or one per GPU with whole or sharded weights
    gpus: int = between(0, 16)
    vcpus: int = between(1, 1024)
    memory_mib: int = between(512, 2**25)
    shared_memory_mib: int = between(64, 2**24)
    spot: bool = field()  # spot first; on demand where spot has no capacity or was reclaimed `attempts` times
    attempts: int = between(1, 10)  # starts of one job; only a reclaimed machine is a reason for another one
    timeout_hours: float = between(0.02, 336)  # an attempt is ended after this time
    expected_hours: float = between(0.001, 336)  # for the estimate only


@dataclass
class Price:
    """US dollars per hour of one instance."""

    on_demand: float = between(0.001, 10**4)
    spot: float = between(0.001, 10**4)


@dataclass
class Compute:
    """Where stages run and what they may cost (docs/CLOUD.md). No stage depends on it: it changes no result."""

    place: Place
    budget_usd: float = between(0, 10**7)  # per calendar month, worst case; 0 = nothing may be submitted
    stack: str = field()  # name of the CloudFormation stack (infra/stack.yaml)
    region: str = field()  # empty: from the AWS environment
    image: str = field()  # full name of the container image; empty: what `make image` pushed for this environment
    weights: str = field()  # s3://bucket/prefix with the files of `model.checkpoint`; empty: none
    root_volume_gib: int = between(30, 16384)
    max_vcpus: int = between(1, 10**5)  # of all machines of a queue together
    alarm_usd: float = between(1, 10**7)  # monthly bill at which the account's owner gets a mail
    spot_wait_minutes: float = between(0, 10**4)  # in the queue before on demand is asked
    poll_seconds: float = between(0.05, 300)  # renews the lease (flows/batch/leases.py)
    checkpoint_seconds: float = between(0.05, 3600)  # between looks for a new checkpoint to keep in S3
    fetch_mib: float = between(0, 10**7)  # larger outputs stay in the DVC remote until a stage here reads them
    jobs: dict[str, BatchJob] = field()  # by stage; `default` for the others
    prices: dict[str, Price] = field()  # by instance type; estimates


@dataclass
class _File:
    """infra/compute.yaml; its one key is the prefix by which errors and docs name a setting."""

    compute: Compute


def load(workspace: Path) -> Compute:
    """Read and check where the stages of a workspace run. Raises ClearError naming the file and the key."""
    file = workspace / COMPUTE
    if not file.exists():
        raise ClearError(f"{file} is not here; run this from the project's folder, or `git checkout {COMPUTE}`.")
    return from_dict(read_yaml(file), str(file))


def from_dict(raw: Any, origin: str = str(COMPUTE)) -> Compute:
    """Plain nested dictionaries (or OmegaConf) to checked settings. Raises ClearError with the full key."""
    compute = typed(_File, raw, origin, "flows/batch/settings.py").compute
    check(compute, "compute", origin)
    _check_jobs(compute, origin)
    return compute


def refuse_clusters(compute: Compute, config: Config) -> None:
    """Raise ClearError where a stage is to run on a rented machine and to use a cluster of the user's."""
    for stage, section in {"degrade": "degrade", "mmd_bench": "degrade", "evaluate": "evaluate"}.items():
        placed = getattr(compute.place, stage)
        if getattr(config, section).cluster and placed != "local":
            raise ClearError(
                f"params: {section}.cluster and compute.place.{stage} = {placed}: a rented machine cannot reach your "
                f'cluster. Set {section}.cluster = "", or compute.place.{stage} = local in {COMPUTE}.'
            )


def _check_jobs(compute: Compute, origin: str) -> None:
    """Raise ClearError for jobs without a price, spot on several nodes, and the like."""
    stages = [item.name for item in fields(Place)]
    if not re.fullmatch("[a-z][a-z0-9-]{0,39}", compute.stack):
        raise ClearError(
            f"{origin}: compute.stack = {compute.stack!r}: use at most 40 lower-case letters, digits and hyphens."
        )
    for stage, job in compute.jobs.items():
        full = f"compute.jobs.{stage}"
        if stage not in ("default", *stages):
            raise ClearError(f"{origin}: {full} is no stage; there are default, {', '.join(stages)}.")
        if not job.instance_types:
            raise ClearError(f"{origin}: {full}.instance_types is empty; name at least one instance type.")
        for instance_type in job.instance_types:
            if instance_type not in compute.prices:
                raise ClearError(
                    f"{origin}: {full}.instance_types names {instance_type}; "
                    f"add its price as compute.prices.{instance_type}."
                )
        if job.nodes > 1 and job.spot:
            raise ClearError(
                f"{origin}: {full}.nodes = {job.nodes} with spot = true: AWS Batch runs multi-node jobs on demand "
                f"only; set {full}.spot = false."
            )
        if job.launch == "single" and (job.nodes > 1 or job.gpus > 1):
            raise ClearError(
                f"{origin}: {full}.launch = single uses one GPU of {job.nodes * job.gpus}; set {full}.launch to ddp or "
                "fsdp, or ask for one."
            )
        if job.expected_hours > job.timeout_hours:
            raise ClearError(
                f"{origin}: {full}.expected_hours = {job.expected_hours} is more than {full}.timeout_hours = "
                f"{job.timeout_hours}; raise the latter."
            )
    if "default" not in compute.jobs:
        raise ClearError(f"{origin}: compute.jobs.default is missing; it is for the stages that are not named there.")
    if compute.weights and not compute.weights.startswith("s3://"):
        raise ClearError(f"{origin}: compute.weights = {compute.weights!r}: write it as s3://bucket/prefix.")
