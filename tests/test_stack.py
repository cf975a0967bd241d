"""The CloudFormation template: what it promises, that it can be created, and the commands around it."""

import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from botocore.exceptions import ClientError, WaiterError

from clear.errors import ClearError
from flows.batch import settings
from flows.batch import stack as compute_stack
from flows.batch.job import OUTPUTS, PREEMPTED, RECLAIMED, retry_strategy
from flows.batch.store import PREFIX
from tests.cloud import compute_with
from tests.conftest import ROOT

pytest_plugins = ["tests.cloud"]


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short forms as {name: value}."""


_Loader.add_multi_constructor("!", lambda loader, name, node: {name: _value(loader, node)})


def _value(loader, node):
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_scalar(node)
    build = loader.construct_sequence if isinstance(node, yaml.SequenceNode) else loader.construct_mapping
    return build(node, deep=True)


@pytest.fixture(scope="module")
def template():
    return yaml.load((ROOT / compute_stack.TEMPLATE).read_text(), _Loader)


def _of(template, kind):
    return {name: one["Properties"] for name, one in template["Resources"].items() if one["Type"] == kind}


def test_cfn_lint_finds_nothing():
    done = subprocess.run(
        [Path(sys.executable).parent / "cfn-lint", "--", ROOT / compute_stack.TEMPLATE],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_bucket_is_versioned_encrypted_closed_and_kept(template):
    storage = template["Resources"]["Storage"]
    assert storage["DeletionPolicy"] == storage["UpdateReplacePolicy"] == "Retain"
    settings = storage["Properties"]
    assert settings["VersioningConfiguration"] == {"Status": "Enabled"}
    (rule,) = settings["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    closed = ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets")
    assert all(settings["PublicAccessBlockConfiguration"][name] is True for name in closed)
    (policy,) = _of(template, "AWS::S3::BucketPolicy").values()
    (statement,) = policy["PolicyDocument"]["Statement"]
    assert statement["Effect"] == "Deny" and statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_what_passes_through_the_bucket_expires_and_data_does_not(template):
    rules = template["Resources"]["Storage"]["Properties"]["LifecycleConfiguration"]["Rules"]
    days = {rule["Prefix"]: rule["ExpirationInDays"] for rule in rules if "ExpirationInDays" in rule}
    written = {"objects", "bundles", "requests", "results", "logs", "checkpoints", "leases"}
    assert set(days) == {f"{PREFIX}/{name}/" for name in written}, "neither the DVC remote nor the ledger"
    assert days[f"{PREFIX}/results/"] < days[f"{PREFIX}/objects/"], "a result must not outlive its files"
    assert all(rule["Status"] == "Enabled" for rule in rules)
    assert any("NoncurrentVersionExpiration" in rule and "Prefix" not in rule for rule in rules)


def test_machines_exist_only_while_jobs_do(template):
    environments = _of(template, "AWS::Batch::ComputeEnvironment")
    assert {name: one["ComputeResources"]["Type"] for name, one in environments.items()} == {
        "SpotMachines": "SPOT",
        "OnDemandMachines": "EC2",
    }
    for one in environments.values():
        assert one["ComputeResources"]["MinvCpus"] == 0 and "DesiredvCpus" not in one["ComputeResources"]
        assert one["ComputeResources"]["MaxvCpus"] == {"Ref": "MaxVcpus"}
        assert one["ComputeResources"]["InstanceTypes"] == {"Ref": "InstanceTypes"}
    queues = _of(template, "AWS::Batch::JobQueue")
    found = {name: one["ComputeEnvironmentOrder"][0]["ComputeEnvironment"]["Ref"] for name, one in queues.items()}
    assert found == {"SpotQueue": "SpotMachines", "OnDemandQueue": "OnDemandMachines"}
    costly = {"AWS::EC2::NatGateway", "AWS::EC2::Instance", "AWS::EC2::EIP", "AWS::EC2::Volume", "AWS::KMS::Key"}
    assert not costly & {one["Type"] for one in template["Resources"].values()}, "at rest only storage is paid for"
    (machine,) = _of(template, "AWS::EC2::LaunchTemplate").values()
    disk = machine["LaunchTemplateData"]["BlockDeviceMappings"][0]["Ebs"]
    assert disk["DeleteOnTermination"] is True and disk["Encrypted"] is True
    assert disk["VolumeSize"] == {"Ref": "RootVolumeGiB"}
    assert machine["LaunchTemplateData"]["MetadataOptions"]["HttpTokens"] == "required"


def test_nothing_comes_in_from_outside(template):
    (firewall,) = _of(template, "AWS::EC2::SecurityGroup").values()
    assert "SecurityGroupIngress" not in firewall
    for one in _of(template, "AWS::EC2::SecurityGroupIngress").values():
        assert one["SourceSecurityGroupId"] == {"Ref": "Firewall"} and "CidrIp" not in one


def _statements(template):
    for name, one in template["Resources"].items():
        settings = one.get("Properties", {})
        documents = [policy["PolicyDocument"] for policy in settings.get("Policies", [])]
        if one["Type"] in ("AWS::IAM::Policy", "AWS::IAM::ManagedPolicy"):
            documents.append(settings["PolicyDocument"])
        for document in documents:
            for statement in document["Statement"]:
                actions = statement["Action"]
                yield name, statement, actions if isinstance(actions, list) else [actions]


def test_roles_may_do_little(template):
    everywhere = set()
    for name, statement, actions in _statements(template):
        assert not any("*" in action for action in actions), f"{name}: {actions}"
        if statement["Resource"] == "*":
            everywhere |= set(actions)
        if name == "JobRole":
            assert all(action.startswith("s3:") for action in actions)
            if "s3:DeleteObject" in actions:
                assert statement["Resource"]["Sub"].endswith(f"/{PREFIX}/checkpoints/*")
        if "iam:PassRole" in actions:
            assert statement["Condition"] and statement["Resource"] != "*"
        if "batch:TerminateJob" in actions:
            assert "aws:ResourceTag/clear" in json.dumps(statement["Condition"])
    assert everywhere == {
        "ecr:GetAuthorizationToken",
        "batch:DescribeJobs",
        "batch:ListJobs",
        "batch:DescribeJobDefinitions",
    }, "these know no resources"
    for name, one in _of(template, "AWS::IAM::Role").items():
        assert "Administrator" not in json.dumps(one), name


BUCKET, OTHER = "arn:aws:s3:::clear-storage", "arn:aws:s3:::somebody-elses"
BATCH = "arn:aws:batch:eu-west-1:111122223333"
MADE = {
    "Storage.Arn": BUCKET,
    "Repository.Arn": "arn:aws:ecr:eu-west-1:111122223333:repository/clear-stage",
    "Logs.Arn": "arn:aws:logs:eu-west-1:111122223333:log-group:clear:*",
    "JobRole.Arn": "arn:aws:iam::111122223333:role/job",
    "ExecutionRole.Arn": "arn:aws:iam::111122223333:role/execution",
    "SpotQueue": f"{BATCH}:job-queue/clear-spot",
    "OnDemandQueue": f"{BATCH}:job-queue/clear-on-demand",
    "WeightsBucket": "the-weights",
    "AWS::StackId": "arn:aws:cloudformation:eu-west-1:111122223333:stack/clear/1",
    "AWS::StackName": "clear",
    "AWS::Partition": "aws",
    "AWS::Region": "eu-west-1",
    "AWS::AccountId": "111122223333",
}
"""What the names of the template stand for once the stack is there."""


def _resolved(value):
    if isinstance(value, list):
        return [_resolved(item) for item in value]
    if isinstance(value, dict) and value and value.keys() <= {"Ref", "GetAtt", "Sub"}:
        ((kind, text),) = value.items()
        return re.sub(r"\$\{(.*?)\}", lambda match: MADE[match[1]], text) if kind == "Sub" else MADE[text]
    return {name: _resolved(item) for name, item in value.items()} if isinstance(value, dict) else value


def _documents(template, who):
    """The policies of a role, or of FlowPolicy, which is for whoever runs the flows."""
    own = template["Resources"][who]["Properties"]
    yield from [policy["PolicyDocument"] for policy in own.get("Policies", [])]
    if "PolicyDocument" in own:
        yield own["PolicyDocument"]
    for policy in _of(template, "AWS::IAM::Policy").values():
        if {"Ref": who} in policy["Roles"]:
            yield policy["PolicyDocument"]


def _may(template, who, action, resource, **context):
    """IAM's rule: something allows it and nothing denies it."""
    effects = set()
    for document in _documents(template, who):
        for statement in document["Statement"]:
            names, places = (_resolved(statement[part]) for part in ("Action", "Resource"))
            asked = [names] if isinstance(names, str) else names, [places] if isinstance(places, str) else places
            fits = all(any(fnmatchcase(v, p) for p in part) for v, part in zip((action, resource), asked, strict=True))
            wanted = _resolved(statement.get("Condition", {}))
            assert wanted.keys() <= {"StringEquals"}, "the only kind that is understood here"
            if fits and wanted.get("StringEquals", {}).items() <= context.items():
                effects.add(statement["Effect"])
    return effects == {"Allow"}


TAGGED = {"aws:ResourceTag/clear": "clear"}
TASKS = {"iam:PassedToService": "ecs-tasks.amazonaws.com"}
MAY = [
    ("JobRole", "s3:GetObject", f"{BUCKET}/compute/requests/k/1.json", {}),
    ("JobRole", "s3:GetObject", f"{BUCKET}/dvc/files/md5/ab/cd", {}),
    ("JobRole", "s3:PutObject", f"{BUCKET}/dvc/files/md5/ab/cd", {}),
    ("JobRole", "s3:PutObject", f"{BUCKET}/compute/results/k.json", {}),
    ("JobRole", "s3:DeleteObject", f"{BUCKET}/compute/checkpoints/k/1", {}),
    ("JobRole", "s3:ListBucket", BUCKET, {}),
    ("JobRole", "s3:GetObject", "arn:aws:s3:::the-weights/bagel/ema.safetensors", {}),
    ("FlowPolicy", "batch:SubmitJob", MADE["SpotQueue"], {}),
    ("FlowPolicy", "batch:SubmitJob", f"{BATCH}:job-definition/clear-stage-0123456789ab:1", {}),
    ("FlowPolicy", "batch:TerminateJob", f"{BATCH}:job/1", TAGGED),
    ("FlowPolicy", "iam:PassRole", MADE["JobRole.Arn"], TASKS),
    ("FlowPolicy", "s3:PutObject", f"{BUCKET}/compute/ledger/1.json", {}),
    ("ExecutionRole", "ecr:BatchGetImage", MADE["Repository.Arn"], {}),
]
MAY_NOT = [
    ("JobRole", "s3:PutObject", f"{BUCKET}/compute/ledger/1.json", {}),  # what was spent
    ("JobRole", "s3:PutObject", f"{BUCKET}/compute/leases/1/own.json", {}),  # who waits: it would never be swept
    ("JobRole", "s3:DeleteObject", f"{BUCKET}/dvc/files/md5/ab/cd", {}),
    ("JobRole", "s3:DeleteObject", f"{BUCKET}/compute/results/k.json", {}),
    ("JobRole", "s3:PutObject", "arn:aws:s3:::the-weights/bagel/ema.safetensors", {}),
    ("JobRole", "batch:SubmitJob", MADE["SpotQueue"], {}),
    ("JobRole", "batch:TerminateJob", f"{BATCH}:job/1", TAGGED),
    ("JobRole", "iam:PassRole", MADE["JobRole.Arn"], TASKS),
    ("FlowPolicy", "batch:SubmitJob", f"{BATCH}:job-queue/somebody-elses", {}),
    ("FlowPolicy", "batch:RegisterJobDefinition", f"{BATCH}:job-definition/somebody-elses", {}),
    ("FlowPolicy", "batch:TerminateJob", f"{BATCH}:job/1", {"aws:ResourceTag/clear": "another-stack"}),
    ("FlowPolicy", "batch:TerminateJob", f"{BATCH}:job/1", {}),
    ("FlowPolicy", "iam:PassRole", MADE["JobRole.Arn"], {"iam:PassedToService": "ec2.amazonaws.com"}),
    ("FlowPolicy", "iam:PassRole", "arn:aws:iam::111122223333:role/admin", TASKS),
    ("FlowPolicy", "cloudformation:UpdateStack", MADE["AWS::StackId"], {}),
    ("ExecutionRole", "ecr:BatchGetImage", "arn:aws:ecr:eu-west-1:111122223333:repository/other", {}),
    ("ExecutionRole", "ecr:PutImage", MADE["Repository.Arn"], {}),
    ("ExecutionRole", "s3:GetObject", f"{BUCKET}/compute/requests/k/1.json", {}),
    *(
        (who, action, place, {})
        for who in ("JobRole", "ExecutionRole", "FlowPolicy")
        for action, place in (
            ("s3:GetObject", f"{OTHER}/x"),
            ("s3:ListBucket", OTHER),
            ("s3:DeleteObjectVersion", f"{BUCKET}/dvc/files/md5/ab/cd"),  # so a deleted object can be brought back
            ("s3:PutBucketPolicy", BUCKET),
            ("s3:PutLifecycleConfiguration", BUCKET),
            ("iam:CreateRole", "arn:aws:iam::111122223333:role/new"),
            ("iam:PutRolePolicy", MADE["JobRole.Arn"]),
            ("sts:AssumeRole", MADE["JobRole.Arn"]),
            ("ec2:RunInstances", "arn:aws:ec2:eu-west-1:111122223333:instance/*"),
            ("secretsmanager:GetSecretValue", "arn:aws:secretsmanager:eu-west-1:111122223333:secret:x"),
        )
    ),
]


@pytest.mark.parametrize(("who", "action", "resource", "context"), MAY)
def test_a_role_may_do_what_it_is_for(template, who, action, resource, context):
    assert _may(template, who, action, resource, **context)


def test_and_nothing_else(template):
    assert [asked for asked in MAY_NOT if _may(template, *asked[:3], **asked[3])] == []


def test_no_right_to_steer_machines_is_left_unused(template):
    """Batch and CloudFormation: what FlowPolicy allows is what the code calls, and the tags that go along."""
    code = "".join(file.read_text() for file in (ROOT / "flows").rglob("*.py") if file.name != "stack.py")
    called = set(
        re.findall(r"\.((?:describe|list|submit|register|terminate|cancel|tag)_(?:jobs?|stacks|job_\w+))\(", code)
    )
    named = {name.title().replace("_", "") for name in called}
    allowed = {
        action
        for document in _documents(template, "FlowPolicy")
        for statement in document["Statement"]
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
    steering = {action.partition(":")[2] for action in allowed if action.startswith(("batch:", "cloudformation:"))}
    assert steering == named | {"TagResource"}


def test_the_bill_has_an_alarm(template):
    (budget,) = _of(template, "AWS::Budgets::Budget").values()
    assert budget["Budget"]["BudgetLimit"]["Amount"] == {"Ref": "AlarmUsd"}
    kinds = {one["Notification"]["NotificationType"] for one in budget["NotificationsWithSubscribers"]}
    assert kinds == {"ACTUAL", "FORECASTED"}


def test_the_trial_job_retries_like_ours_and_the_log_does_not_grow_for_ever(template):
    (job,) = _of(template, "AWS::Batch::JobDefinition").values()
    rules = job["RetryStrategy"]["EvaluateOnExit"]
    assert rules[0] == {"OnStatusReason": f"{RECLAIMED}*", "Action": "RETRY"}
    assert rules[-1] == {"OnReason": "*", "Action": "EXIT"}
    ours = retry_strategy(3)["evaluateOnExit"]
    assert [ours[0]["onStatusReason"], ours[1]["onExitCode"], ours[-1]["action"]] == [
        f"{RECLAIMED}*",
        str(PREEMPTED),
        "EXIT",
    ]
    assert job["Timeout"]["AttemptDurationSeconds"] <= 3600
    assert _of(template, "AWS::Logs::LogGroup")["Logs"]["RetentionInDays"] <= 90


def test_outputs_and_parameters_are_those_the_flows_use(template):
    assert set(OUTPUTS) <= set(template["Outputs"])
    compute = settings.from_dict(compute_with("compute.weights=s3://other/bagel"))
    given = compute_stack.parameters(compute, ROOT, "us@example.org")
    assert set(given) == set(template["Parameters"])
    assert (given["WeightsBucket"], given["InstanceTypes"], given["AlarmUsd"]) == ("other", "g6e.4xlarge", "200")


@pytest.fixture
def root(tmp_path):
    """The project's infrastructure files; moto wants the service role named that AWS takes by itself."""
    shutil.copytree(ROOT / "infra", tmp_path / "root/infra")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "root")
    file = tmp_path / "root" / compute_stack.TEMPLATE
    role = "      Type: MANAGED\n      ServiceRole: !GetAtt MachineRole.Arn\n"
    file.write_text(file.read_text().replace("      Type: MANAGED\n", role))
    return tmp_path / "root"


def test_the_stack_is_created_updated_and_read(cloud, monkeypatch, root):
    """On moto, which leaves out budget, bucket policy and versioning: creation, outputs, the machines' settings."""
    import boto3

    monkeypatch.delenv("AWS_ENDPOINT_URL_BATCH")
    compute = settings.from_dict(compute_with("compute.stack=mine", "compute.root_volume_gib=300"))
    outputs = compute_stack.apply(compute, root)
    batch, s3 = boto3.client("batch"), boto3.client("s3")
    assert {one["jobQueueName"] for one in batch.describe_job_queues()["jobQueues"]} == {"mine-spot", "mine-on-demand"}
    machines = [one["computeResources"] for one in batch.describe_compute_environments()["computeEnvironments"]]
    assert len(machines) == 2 and all(one["minvCpus"] == 0 for one in machines)
    s3.head_bucket(Bucket=outputs["Bucket"])
    versions = boto3.client("ec2").describe_launch_template_versions(Versions=["$Latest"])["LaunchTemplateVersions"]
    disks = [one["LaunchTemplateData"]["BlockDeviceMappings"][0]["Ebs"] for one in versions]
    assert [int(disk["VolumeSize"]) for disk in disks] == [300]
    assert set(OUTPUTS) <= set(outputs)
    assert compute_stack.apply(compute, root)["Bucket"] == outputs["Bucket"], "again is an update"


@pytest.mark.parametrize("mail", ["", "us@example.org"])
def test_an_update_without_an_address_keeps_that_of_the_alarm(root, monkeypatch, mail):
    """Without one the template has no budget: CloudFormation would delete it, and nobody would be told."""
    asked = {}
    formation = SimpleNamespace(
        describe_stacks=lambda **_: None,
        update_stack=asked.update,
        get_waiter=lambda _: SimpleNamespace(wait=lambda **_: None),
    )
    monkeypatch.setattr(compute_stack, "client", lambda *_: formation)
    monkeypatch.setattr(compute_stack, "account", lambda _: SimpleNamespace(outputs={}))
    compute_stack.apply(settings.from_dict(compute_with("compute.alarm_usd=300")), root, mail)
    given = {entry.pop("ParameterKey"): entry for entry in asked["Parameters"]}
    assert given["AlarmMail"] == ({"ParameterValue": mail} if mail else {"UsePreviousValue": True})
    assert given["AlarmUsd"] == {"ParameterValue": "300"}


def test_a_stack_that_fails_says_which_resource_and_why(monkeypatch):
    """Of a failed waiter boto3 says that it failed; CloudFormation's events say why."""

    class Formation:
        def describe_stacks(self, **_):
            raise ClientError({"Error": {"Message": "mine does not exist"}}, "DescribeStacks")

        def create_stack(self, **_):
            pass

        def get_waiter(self, name):
            return self

        def wait(self, **_):
            raise WaiterError("StackCreateComplete", "Waiter encountered a terminal failure state", {})

        def describe_stack_events(self, **_):
            events = [("Queue", "CREATE_COMPLETE", ""), ("Bucket", "CREATE_FAILED", "it exists already")]
            names = ("LogicalResourceId", "ResourceStatus", "ResourceStatusReason")
            return {"StackEvents": [dict(zip(names, event, strict=True)) for event in events]}

    monkeypatch.setattr(compute_stack, "client", lambda *_: Formation())
    with pytest.raises(ClearError, match=r"^stack mine: Bucket: it exists already$"):
        compute_stack.apply(settings.from_dict(compute_with("compute.stack=mine")), ROOT)


def test_commands_refuse_with_one_line(cloud, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert compute_stack.main(["nothing"]) == 1
    assert capsys.readouterr().err.startswith("error: say `stack` or `image`")
    monkeypatch.chdir(tmp_path)
    assert compute_stack.main(["stack"]) == 1
    assert "git checkout infra/compute.yaml" in capsys.readouterr().err
    with pytest.raises(ClearError, match="Dockerfile is missing"):
        compute_stack.environment_tag(tmp_path)
