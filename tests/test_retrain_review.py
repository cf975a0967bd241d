"""Branches that wait for review: left to the reviewers, known on every machine, and in nobody's way."""

import subprocess

import pytest

from clear.errors import ClearError
from clear.project.retrain import reproduce as reproducing
from clear.project.retrain import request as pull_request
from clear.project.retrain.reproduce import reproduce
from clear.project.retrain.run import retrain
from tests.conftest import git
from tests.helpers.incoming_sets import put
from tests.helpers.retraining import look, tools

pytest_plugins = ["tests.helpers.retraining"]


@pytest.mark.slow
def test_a_branch_that_reviewers_have_changed_is_left_to_them_and_new_data_is_trained(trained, forge):
    branch = look(trained)[0].branch
    origin = trained.parent / "origin.git"
    git(trained.parent, "clone", "-q", "-b", branch, str(origin), "reviewer")
    reviewer = trained.parent / "reviewer"
    git(reviewer, "commit", "-q", "--amend", "-m", "Retrained on fog\n\nRetrain-Step: retrained")
    git(reviewer, "push", "-q", "--force", "origin", branch)
    theirs = git(origin, "rev-parse", branch)
    again, said = look(trained)
    assert again.state == "WaitsForReview" and not [one for one in said if one.startswith("proposed")], said
    put(trained / "data/incoming/rain", range(12, 24))
    outcome, said = look(trained)
    assert outcome.state == "Proposed" and outcome.branch.startswith("retrain/rain-")
    assert said[-1] == f"proposed: {outcome.branch}"
    assert git(origin, "rev-parse", branch) == theirs
    git(origin, "branch", "-q", "-D", branch)
    look(trained)
    assert git(origin, "rev-parse", branch) == git(trained, "rev-parse", branch), "one that was deleted comes back"


@pytest.mark.slow
def test_trouble_with_a_waiting_branch_keeps_no_new_data_from_training_and_is_raised_last(trained, forge, monkeypatch):
    branch = look(trained)[0].branch
    put(trained / "data/incoming/rain", range(12, 24))
    publish = pull_request.publish

    def refuses(workspace, one, *given):
        if one == branch:
            raise ClearError("the forge says no")
        return publish(workspace, one, *given)

    monkeypatch.setattr(pull_request, "publish", refuses)
    said: list[str] = []
    with pytest.raises(ClearError, match=r"^the forge says no$"):
        retrain(trained, tools(said))
    (rain,) = [request["head"] for request in forge.requests if request["head"] != branch]
    assert rain.startswith("retrain/rain-") and said[-1] == f"proposed: {rain}"
    assert f"{branch} cannot be published: the forge says no" in said


@pytest.mark.slow
def test_a_second_machine_finds_what_the_first_has_reproduced(trained, forge, monkeypatch):
    (trained / "code/evaluate.py").write_text((trained / "code/evaluate.py").read_text() + "# another recipe\n")
    git(trained, "commit", "-q", "-a", "-m", "another recipe")
    git(trained, "push", "-q", "origin", "main")
    second, third = trained.parent / "second", trained.parent / "third"
    for other in (second, third):
        subprocess.run(["cp", "-r", str(trained), str(other)], check=True)
    branch = reproduce(trained, tools([])).branch
    said: list[str] = []
    for _ in range(2):
        outcome = reproduce(second, tools(said))
        assert (outcome.state, outcome.branch) == ("WaitsForReview", branch)
    assert not [one for one in said if one.startswith(("dvc", "proposed"))], said

    fetch = reproducing.fetch_branches
    monkeypatch.setattr(
        reproducing, "fetch_branches", lambda *given: monkeypatch.setattr(reproducing, "fetch_branches", fetch)
    )
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2030-01-01T00:00:00Z")
    outcome = reproduce(third, tools(said))  # as fast as the first one, but for the end
    assert outcome.state == "WaitsForReview" and f"origin has another {branch}, which is left as it is." in said
    assert len(forge.requests) == 1 and not [one for one in said if one.startswith("proposed")], said
