"""The cloud account's side: `make stack` creates or updates the CloudFormation stack, `make image` pushes the image.

Both read infra/compute.yaml. Neither has been run against real hardware yet (docs/CLOUD.md).
"""

import base64
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from clear.data import aws
from clear.errors import ClearError, fail, say
from flows.batch import settings
from flows.batch.job import OUTPUTS, account
from flows.batch.request import environment_tag
from flows.batch.settings import Compute
from flows.batch.store import client, split

TEMPLATE = Path("infra/stack.yaml")
PLATFORM = "linux/amd64"


def parameters(compute: Compute, root: Path, mail: str = "") -> dict[str, str]:
    """The template's parameters for a configuration: instance types of all jobs, disk, limits, image, weights."""
    types = sorted({instance_type for job in compute.jobs.values() for instance_type in job.instance_types})
    return {
        "InstanceTypes": ",".join(types),
        "RootVolumeGiB": str(compute.root_volume_gib),
        "MaxVcpus": str(compute.max_vcpus),
        "ImageTag": environment_tag(root),
        "WeightsBucket": split(compute.weights)[0] if compute.weights else "",
        "AlarmUsd": f"{compute.alarm_usd:g}",
        "AlarmMail": mail,
    }


def apply(compute: Compute, root: Path, mail: str = "") -> dict[str, str]:
    """Create the stack or bring it up to date; returns its outputs. Raises ClearError with CloudFormation's reason."""
    from botocore.exceptions import WaiterError

    formation = client("cloudformation", compute.region)
    given: dict[str, Any] = {
        "StackName": compute.stack,
        "TemplateBody": (root / TEMPLATE).read_text(),
        "Parameters": [
            {"ParameterKey": name, "ParameterValue": value} for name, value in parameters(compute, root, mail).items()
        ],
        "Capabilities": ["CAPABILITY_IAM"],
        "Tags": [{"Key": "clear", "Value": compute.stack}],
    }
    try:
        with aws.explained(f"stack {compute.stack}"):
            if _exists(formation, compute.stack):
                if not mail:  # the address that it was made with stays: without one there is no alarm
                    kept = {"ParameterKey": "AlarmMail", "UsePreviousValue": True}
                    given["Parameters"] = [*(p for p in given["Parameters"] if p["ParameterKey"] != "AlarmMail"), kept]
                formation.update_stack(**given)
                formation.get_waiter("stack_update_complete").wait(StackName=compute.stack)
            else:
                formation.create_stack(**given, OnFailure="DELETE")
                formation.get_waiter("stack_create_complete").wait(StackName=compute.stack)
    except ClearError as error:
        if isinstance(error.__cause__, WaiterError):  # which says that it failed, and not why
            raise ClearError(f"stack {compute.stack}: {_reason(formation, compute.stack) or error}") from error
        if "No updates are to be performed" not in str(error):
            raise
    return account(compute).outputs


def _exists(formation: Any, stack: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        formation.describe_stacks(StackName=stack)
    except ClientError as error:
        if "does not exist" in str(error):
            return False
        raise
    return True


def _reason(formation: Any, stack: str) -> str:
    events = formation.describe_stack_events(StackName=stack)["StackEvents"]
    failed = [event for event in events if event["ResourceStatus"].endswith("FAILED")]
    first = failed[-1] if failed else {}
    return f"{first['LogicalResourceId']}: {first.get('ResourceStatusReason')}" if first else ""


def push_image(compute: Compute, root: Path) -> str:
    """Build infra/Dockerfile and push it under the tag of this environment; returns its name.

    An image that is there is not built again. Raises ClearError where Docker is missing or refuses.
    """
    repository = account(compute).outputs["Repository"]
    name, tag = repository, environment_tag(root)
    registry = client("ecr", compute.region)
    with aws.explained(f"repository {name}"):
        images = registry.list_images(repositoryName=name.partition("/")[2])["imageIds"]
        if any(image.get("imageTag") == tag for image in images):
            return f"{name}:{tag}"
        token = registry.get_authorization_token()["authorizationData"][0]
    user, _, password = base64.b64decode(token["authorizationToken"]).decode().partition(":")
    address = token["proxyEndpoint"]
    _docker(["build", "--platform", PLATFORM, "-f", "infra/Dockerfile", "-t", f"{name}:{tag}", "."], root)
    _docker(["login", "--username", user, "--password-stdin", address], root, password)
    _docker(["push", f"{name}:{tag}"], root)
    return f"{name}:{tag}"


def _docker(arguments: list[str], root: Path, given: str | None = None) -> None:
    environment = os.environ | {"DOCKER_BUILDKIT": "1"}
    try:
        done = subprocess.run(["docker", *arguments], cwd=root, input=given, text=True, env=environment, check=False)
    except FileNotFoundError as error:
        raise ClearError("docker is not installed; install it and repeat.") from error
    if done.returncode:
        raise ClearError(f"`docker {arguments[0]}` ended with status {done.returncode}; its reason is above.")


def main(arguments: list[str]) -> int:
    """`stack [mail]` or `image`, in the project's folder; 0 done, 1 refused with one line."""
    root = Path.cwd()
    try:
        compute = settings.load(root)
        if arguments[:1] == ["image"]:
            say(f"image: {push_image(compute, root)}")
        elif arguments[:1] == ["stack"]:
            outputs = apply(compute, root, "".join(arguments[1:2]))
            for name in (*OUTPUTS, "FlowPolicy"):
                say(f"{name:15} {outputs.get(name, '')}")
            say(f"next: make image; make remote BUCKET={outputs['Bucket']}/dvc")
        else:
            raise ClearError("say `stack` or `image`: make stack [MAIL=address], make image.")
    except ClearError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
