"""AWS Batch through boto3: job definitions from the configuration, one job per inputs, its state, its end.

A definition's name carries a hash of its content, so that an unchanged one is registered once and never doubled. A
job's name carries the hash of the stage's inputs: asking again for what is queued or running finds that job. Batch
starts a job again only where its machine was reclaimed, which it sees in the reason it gives, or in the exit status of
a job that had time to leave by itself; a stage that failed would fail again.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from clear.data import aws
from clear.errors import ClearError
from flows.batch.settings import BatchJob, Compute
from flows.batch.store import client

PREEMPTED = 75
"""Exit status of a job that was asked to leave and has kept its checkpoint."""
RECLAIMED = "Host EC2"
"""How the reason begins that Batch gives for a job whose machine was taken away."""
LEFT = "its flow ended"
"""How the reason begins with which a flow that stops waiting ends its job; others may not have stopped."""
NO_SPOT = "no spot machine in time"
TAG = "clear"
ENDED = ("SUCCEEDED", "FAILED")
ACTIVE = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING", "RUNNING")
OUTPUTS = ("Bucket", "SpotQueue", "OnDemandQueue", "Repository", "JobRole", "ExecutionRole", "LogGroup")


@dataclass(frozen=True)
class Account:
    """What the stack has made: its outputs by name, and clients.

    Jobs may read the stack's own bucket and `weights_bucket`, if there is one.
    """

    outputs: dict[str, str]
    batch: Any
    s3: Any
    weights_bucket: str = ""

    def queue(self, spot: bool) -> str:
        """The queue for machines of that kind."""
        return self.outputs["SpotQueue" if spot else "OnDemandQueue"]


def account(compute: Compute) -> Account:
    """Read the stack's outputs. Raises ClearError if it is not there or is not ours."""
    with aws.explained(f"CloudFormation stack {compute.stack} (compute.stack; `make stack` creates it)"):
        stack = client("cloudformation", compute.region).describe_stacks(StackName=compute.stack)["Stacks"][0]
    outputs = {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}
    if missing := [name for name in OUTPUTS if name not in outputs]:
        raise ClearError(f"stack {compute.stack} has no output {', '.join(missing)}; update it with `make stack`.")
    given = {item["ParameterKey"]: item.get("ParameterValue", "") for item in stack.get("Parameters", [])}
    clients = client("batch", compute.region), client("s3", compute.region)
    return Account(outputs, *clients, given.get("WeightsBucket", ""))


def retry_strategy(attempts: int) -> dict[str, Any]:
    """Start again after a reclaim, and after nothing else."""
    return {
        "attempts": attempts,
        "evaluateOnExit": [
            {"onStatusReason": f"{RECLAIMED}*", "action": "RETRY"},
            {"onExitCode": str(PREEMPTED), "action": "RETRY"},
            {"onReason": "*", "action": "EXIT"},
        ],
    }


def definition(compute: Compute, job: BatchJob, image: str, outputs: dict[str, str]) -> dict[str, Any]:
    """The job definition (as RegisterJobDefinition takes it) for a machine of the configuration."""
    container = {
        "image": image,
        "command": ["python", "-m", "flows.batch.worker"],
        "jobRoleArn": outputs["JobRole"],
        "executionRoleArn": outputs["ExecutionRole"],
        "resourceRequirements": [
            {"type": "VCPU", "value": str(job.vcpus)},
            {"type": "MEMORY", "value": str(job.memory_mib)},
            *([{"type": "GPU", "value": str(job.gpus)}] if job.gpus else []),
        ],
        # the init process hands SIGTERM on; NCCL and data loaders need more shared memory than the 64 MiB of Docker
        "linuxParameters": {"sharedMemorySize": job.shared_memory_mib, "initProcessEnabled": True},
        "environment": [
            {"name": "CLEAR_GPUS", "value": str(job.gpus)},
            {"name": "CLEAR_LAUNCH", "value": job.launch},
            {"name": "CLEAR_NODES", "value": str(job.nodes)},
        ],
        "logConfiguration": {"logDriver": "awslogs", "options": {"awslogs-group": outputs["LogGroup"]}},
    }
    content: dict[str, Any] = {
        "type": "container" if job.nodes == 1 else "multinode",
        "retryStrategy": retry_strategy(job.attempts),
        "timeout": {"attemptDurationSeconds": max(60, round(job.timeout_hours * 3600))},
        "propagateTags": True,
        "platformCapabilities": ["EC2"],
    }
    if job.nodes == 1:
        content["containerProperties"] = container
    else:
        content["nodeProperties"] = {
            "numNodes": job.nodes,
            "mainNode": 0,
            "nodeRangeProperties": [
                {"targetNodes": "0:", "container": container, "instanceTypes": list(job.instance_types)}
            ],
        }
        del content["platformCapabilities"]  # Batch refuses it there
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return {"jobDefinitionName": f"{compute.stack}-stage-{digest}", "tags": {TAG: compute.stack}, **content}


def ensure_definition(batch: Any, wanted: dict[str, Any]) -> str:
    """Register a definition unless it is there; returns its ARN."""
    name = wanted["jobDefinitionName"]
    with aws.explained(f"job definition {name}"):
        there = batch.describe_job_definitions(jobDefinitionName=name, status="ACTIVE")["jobDefinitions"]
        return there[0]["jobDefinitionArn"] if there else batch.register_job_definition(**wanted)["jobDefinitionArn"]


def job_name(stack: str, stage: str, key: str) -> str:
    """Name of the job that runs a stage on these inputs."""
    return f"{stack}-{re.sub('[^A-Za-z0-9_-]', '-', stage)}-{key}"[:128]


def find(account: Account, name: str, passed: str = "") -> tuple[bool, str] | None:
    """The queued or running job of that name but for the id `passed`, the first submitted if there are several: whether
    it is on spot, and its id. None if there is none."""
    active = []
    for spot in (True, False):
        queue = account.queue(spot)
        with aws.explained(f"jobs in {queue}"):
            named = [{"name": "JOB_NAME", "values": [name]}]
            listed = account.batch.list_jobs(jobQueue=queue, filters=named)["jobSummaryList"]
        listed = [job for job in listed if job["status"] in ACTIVE and job["jobId"] != passed]
        active += [(job.get("createdAt", 0), job["jobId"], spot) for job in listed]
    if not active:
        return None
    _, job_id, spot = min(active)
    return spot, job_id


def submit(
    account: Account,
    compute: Compute,
    job: BatchJob,
    image: str,
    name: str,
    spot: bool,
    request: str,
    tags: dict,
    passed: str = "",
) -> tuple[bool, str]:
    """Submit the job of that name, or find it in either queue; returns whether it is on spot, and its id.

    `passed` is a job that was given up. Where two flows submit at once, both look again, and the later job is ended by
    the flow that submitted it; one of them may ask on demand while the other still asks on spot.
    """
    batch, queue = account.batch, account.queue(spot)
    if there := find(account, name, passed):
        return there
    environment = [{"name": "CLEAR_REQUEST", "value": request}]
    if compute.region:
        environment.append({"name": "AWS_DEFAULT_REGION", "value": compute.region})
    overrides: dict[str, Any] = {"containerOverrides": {"environment": environment}}
    if job.nodes > 1:
        overrides = {
            "nodeOverrides": {
                "nodePropertyOverrides": [{"targetNodes": "0:", "containerOverrides": {"environment": environment}}]
            }
        }
    wanted = definition(compute, job, image, account.outputs)
    arn = ensure_definition(batch, wanted)
    with aws.explained(f"job {name} in {queue}"):
        mine = batch.submit_job(
            jobName=name,
            jobQueue=queue,
            jobDefinition=arn,
            propagateTags=True,
            tags={TAG: compute.stack, **tags},
            **overrides,
        )["jobId"]
    first = find(account, name, passed)
    if first is None or first[1] == mine:
        return spot, mine
    terminate(batch, mine, f"submitted twice; {first[1]} was first")
    return first


def describe(batch: Any, job_id: str) -> dict[str, Any] | None:
    """What Batch knows of a job; None if it has forgotten it."""
    with aws.explained(f"job {job_id}"):
        jobs = batch.describe_jobs(jobs=[job_id])["jobs"]
    return jobs[0] if jobs else None


def terminate(batch: Any, job_id: str, reason: str) -> None:
    """End a job in any state; one that has already ended is left as it is."""
    with aws.explained(f"job {job_id}"):
        batch.terminate_job(jobId=job_id, reason=reason[:1024])


def hours(job: dict[str, Any]) -> float:
    """Hours in which the machines of a job have run for it, all attempts together; until now for one that runs."""
    total = 0.0
    for attempt in [*job.get("attempts", []), *([job] if not job.get("attempts") and "stoppedAt" in job else [])]:
        if "startedAt" in attempt:  # a machine that was lost while it started has only an end
            total += max(0, attempt.get("stoppedAt", attempt["startedAt"]) - attempt["startedAt"])
    if job["status"] == "RUNNING" and "startedAt" in job:
        total += max(0, datetime.now(UTC).timestamp() * 1000 - job["startedAt"])
    return total / 3.6e6


def waiting(job: dict[str, Any]) -> float:
    """Seconds since a job that waits for a machine was submitted, or lost the last one."""
    begun = max([job.get("createdAt", 0), *(attempt.get("stoppedAt", 0) for attempt in job.get("attempts", []))])
    return datetime.now(UTC).timestamp() - begun / 1000 if begun else 0.0


def reclaimed(job: dict[str, Any]) -> bool:
    """Whether a job has failed because its machine was taken away, as often as it was allowed to start.

    One that somebody has ended leaves with the same status as one that is preempted.
    """
    if job.get("isTerminated"):
        return False
    last = (job.get("attempts") or [{}])[-1]
    reasons = (job.get("statusReason") or "", last.get("statusReason") or "")
    code = last.get("container", {}).get("exitCode", job.get("container", {}).get("exitCode"))
    return any(reason.startswith(RECLAIMED) for reason in reasons) or code == PREEMPTED
