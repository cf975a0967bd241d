"""Pretrained weights that a job may not read are refused before it is submitted; how it fetches them:
tests/test_batch_worker.py."""

import json
from dataclasses import replace

import boto3
import pytest
import yaml

from clear.errors import ClearError
from tests.cloud import STACK

pytest_plugins = ["tests.cloud"]


@pytest.fixture
def asked(work, training, cloud):
    """Ask for a stage under some `model` parameters and compute.weights; returns how many jobs were submitted."""

    def ask(model, weights="", stage="sft"):
        params = yaml.safe_load((training / "params.yaml").read_text())
        params["model"] |= model
        (training / "params.yaml").write_text(yaml.safe_dump(params))
        mine = work("ends", weights=weights)
        mine.inputs = replace(mine.inputs, stage=stage)
        mine.run()
        return sum(name == "submitjob" for name, _ in cloud.batch.requests)

    return ask


@pytest.mark.parametrize(
    ("model", "weights", "said"),
    [
        (
            {"checkpoint": "s3://other/bagel"},
            "",
            "params: model.checkpoint = s3://other/bagel: a job may not read bucket other; set compute.weights = "
            "s3://other/bagel in infra/compute.yaml and run `make stack`, which gives it that right, or copy the files "
            "into s3://cloud and name them there.",
        ),
        ({"checkpoint": "s3://cloud/a", "base": "s3://other/bagel"}, "", "params: model.base = s3://other/bagel: "),
        (
            {"checkpoint": "s3://other/bagel"},
            "s3://other/more",
            "a job may not read bucket other; run `make stack`, which gives it that right",
        ),
        (
            {"checkpoint": "weights"},
            "s3://other/bagel",
            "compute.weights = s3://other/bagel: a job may not",
        ),
        ({"checkpoint": "weights"}, "", "params: model.checkpoint is set and compute.weights is not"),
    ],
)
def test_weights_that_a_job_may_not_read_are_refused_before_it_is_submitted(asked, cloud, model, weights, said):
    with pytest.raises(ClearError) as refused:
        asked(model, weights)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert cloud.batch.jobs == {} and not cloud.store.names("ledger/")


def test_weights_that_a_job_may_read_or_does_not_need_are_no_reason_to_refuse_it(asked, cloud):
    assert asked({"checkpoint": "s3://cloud/bagel"}) == 1, "the stack's own bucket"
    assert asked({"checkpoint": "s3://other/bagel"}, stage="source") == 2, "this stage reads none"
    parameter = {"WeightsBucket": {"Type": "String", "Default": ""}}
    given = [{"ParameterKey": "WeightsBucket", "ParameterValue": "other"}]
    template = json.dumps(STACK | {"Parameters": parameter})
    boto3.client("cloudformation").update_stack(StackName="clear", TemplateBody=template, Parameters=given)
    assert asked({"checkpoint": "s3://other/bagel"}) == 3, "`make stack` has given the right"
