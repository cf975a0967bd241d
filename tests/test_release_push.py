"""What a release or an assignment leaves that ended between its tag and its push, and how the same command goes on;
and whose files a name means once its tag is another.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clear.errors import ClearError
from clear.project.release import fetch, publish, registry
from flows import promote
from tests.conftest import ROOT, git
from tests.helpers.registry_project import another, copied, make


@pytest.fixture(scope="module")
def _made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("pushed")).parent


@pytest.fixture
def project(_made, tmp_path, monkeypatch) -> Path:
    """A copy of the project with both its remotes."""
    return copied(_made, tmp_path, monkeypatch)


def at_origin(project: Path) -> list[str]:
    return git(project.parent / "origin.git", "tag").split()


def killed(project: Path, *arguments: str) -> None:
    """`clear release` that is killed in the moment in which it calls `git push`."""
    path = project.parent / "bin"
    path.mkdir(exist_ok=True)
    own = shutil.which("git")
    (path / "git").write_text(f'#!/bin/sh\n[ "$1" = push ] && kill -9 $PPID && exit 1\nexec {own} "$@"\n')
    (path / "git").chmod(0o755)
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "clear", "release", *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_same_command_pushes_what_a_killed_one_has_tagged(project):
    killed(project, "grpo", "v1.0.0", "--push")
    assert (git(project, "tag").split(), at_origin(project)) == (["grpo@v1.0.0"], [])
    assert "pushed: main grpo@v1.0.0" in publish.release(project, "grpo", "v1.0.0", push=True)
    assert at_origin(project) == ["grpo@v1.0.0"]
    assert git(project.parent / "origin.git", "rev-parse", "main") == git(project, "rev-parse", "HEAD")
    with pytest.raises(ClearError, match=r"grpo v1.0.0 exists, at commit .{10}; choose the next version\.$"):
        publish.release(project, "grpo", "v1.0.0", push=True)
    killed(project, "grpo", "--assign", "prod", "v1.0.0", "--push")
    assert registry.in_stage(project, "grpo", "prod") == "v1.0.0" and at_origin(project) == ["grpo@v1.0.0"]
    moved, tag, _, pushed = publish.assign(project, "grpo", "prod", "v1.0.0", push=True)
    assert (moved, tag, pushed) == ("grpo v1.0.0 is in prod.", "tag grpo#prod#1", "pushed: grpo#prod#1")
    assert at_origin(project) == ["grpo#prod#1", "grpo@v1.0.0"]
    with pytest.raises(ClearError, match="is in prod already, by the tags of this clone; `git fetch --tags` brings"):
        publish.assign(project, "grpo", "prod", "v1.0.0", push=True)


def test_a_version_that_was_not_pushed_goes_with_its_stage(project):
    """Else a fresh clone has a stage with a commit in it that it cannot call a version."""
    publish.release(project, "grpo", "v1.0.0")
    assert publish.assign(project, "grpo", "prod", "v1.0.0", push=True)[-1] == "pushed: grpo@v1.0.0 grpo#prod#1"
    git(project.parent, "clone", "-q", "origin.git", "theirs")
    assert list(registry.versions(project.parent / "theirs", "grpo")) == ["v1.0.0"]
    # Also where the stage alone has been pushed, before.
    git(project, "push", "-q", "--delete", "origin", "grpo@v1.0.0")
    assert "pushed: grpo@v1.0.0" in publish.assign(project, "grpo", "prod", "v1.0.0", push=True)
    assert at_origin(project) == ["grpo#prod#1", "grpo@v1.0.0"]


def test_what_the_remote_lacks_is_said_with_the_command_and_an_unreachable_one_breaks_nothing(project):
    publish.release(project, "grpo", "v1.0.0")
    command = r"`git push --atomic origin main grpo@v1.0.0` publishes it\.$"
    with pytest.raises(ClearError, match=f"choose the next version; origin lacks grpo@v1.0.0; {command}"):
        publish.release(project, "grpo", "v1.0.0")
    said = publish.assign(project, "grpo", "prod", "v1.0.0")[-1]
    assert said == r"others see it after: git push --atomic origin grpo@v1.0.0 grpo\#prod\#1"
    lacking = r"already, by the tags of this clone; origin lacks grpo@v1.0.0 and grpo#prod#1; `git push --atomic .*`"
    with pytest.raises(ClearError, match=f"grpo v1.0.0 is in prod {lacking} publishes it"):
        publish.assign(project, "grpo", "prod", "v1.0.0")
    assert at_origin(project) == [], "asking pushes nothing"
    git(project, "commit", "-q", "--allow-empty", "-m", "later")
    with pytest.raises(ClearError, match=r"lacks grpo@v1.0.0; `git push --atomic origin grpo@v1.0.0` publishes it"):
        publish.release(project, "grpo", "v1.0.0", push=True)  # the branch is elsewhere by now
    git(project, "remote", "set-url", "origin", "../gone.git")
    silent = r"origin does not say whether it has grpo#prod#1 \(.*gone\.git.*\); `git push "
    with pytest.raises(ClearError, match=f"is in prod already, by the tags of this clone; {silent}"):
        publish.assign(project, "grpo", "prod", "v1.0.0")
    with pytest.raises(ClearError, match=r"grpo#prod#1 is made here, but .* failed: .*; repeat that command"):
        publish.assign(project, "grpo", "prod", "v1.0.0", push=True)
    git(project, "remote", "remove", "origin")
    with pytest.raises(ClearError, match=r"is in prod already, by the tags of this clone; `git fetch --tags` brings"):
        publish.assign(project, "grpo", "prod", "v1.0.0", push=True)


def test_a_tag_that_is_another_at_the_remote_is_neither_pushed_nor_deleted(project):
    publish.release(project, "grpo", "v1.0.0", push=True)
    publish.assign(project, "grpo", "prod", "v1.0.0", push=True)
    for tag in ("grpo#prod#1", "grpo@v1.0.0"):
        git(project, "tag", "-f", "-m", "ours", tag, "grpo@v1.0.0^{commit}")
    with pytest.raises(ClearError, match=r"origin has another grpo@v1.0.0; .* `git tag -d 'grpo@v1.0.0'` and run `git"):
        publish.assign(project, "grpo", "prod", "v1.0.0", push=True)
    with pytest.raises(ClearError, match=r"choose the next version; origin has another grpo@v1.0.0; if that of origin"):
        publish.release(project, "grpo", "v1.0.0", push=True)
    # Put into another stage, that version would be one here and another elsewhere.
    refused = r"origin refuses grpo@v1.0.0 \(already exists\), so that grpo#dev#2 is deleted here and does not count: "
    with pytest.raises(ClearError, match=refused):
        publish.assign(project, "grpo", "dev", "v1.0.0", push=True)
    assert git(project, "tag").split() == at_origin(project) == ["grpo#prod#1", "grpo@v1.0.0"]


def test_a_person_is_asked_about_an_assignment_that_did_not_reach_the_remote(project):
    """The flow `promote` asks `judge` before it assigns, so that this must not end it."""
    publish.release(project, "grpo", "v1.0.0", push=True)
    publish.assign(project, "grpo", "prod", "v1.0.0")
    asked = promote.question(project, "grpo", "v1.0.0", "prod")
    assert "If you agree, grpo v1.0.0 is in prod." in asked and "origin lacks grpo#prod#1" in asked
    publish.assign(project, "grpo", "prod", "v1.0.0", push=True)
    with pytest.raises(ClearError, match="is in prod already"):
        promote.question(project, "grpo", "v1.0.0", "prod")


def test_a_tag_that_is_set_anew_brings_its_own_files_and_not_those_that_had_its_name(project, monkeypatch):
    monkeypatch.chdir(project)
    publish.release(project, "grpo", "v1.0.0")
    former = Path(os.environ["CLEAR_HOME"]) / "releases/grpo-v1.0.0"  # of versions that went by the name alone
    shutil.copytree(project / "data/models/grpo", former)
    (former / "note.txt").write_text("of former times")
    first = fetch.released(Path("@v1.0.0"))
    assert "note.txt" not in {file.name for file in first.iterdir()}
    another(project, "another model")
    for tagged in ("HEAD", "HEAD~1"):
        git(project, "tag", "-d", "grpo@v1.0.0")
        registry.register(project, "grpo", "v1.0.0", git(project, "rev-parse", tagged).strip(), "")
        folder = fetch.released(Path("@v1.0.0"))
        assert (folder / "note.txt").exists() == (folder != first) == (tagged == "HEAD")
        assert folder.name == "grpo-v1.0.0", "what `clear serve` calls it"
    assert fetch.released(Path("grpo@v1.0.0")) == first, "those of both are kept"
    git(project, "rm", "-q", "--cached", "dvc.lock")
    git(project, "commit", "-q", "-m", "no lock")
    registry.register(project, "grpo", "v1.1.0", git(project, "rev-parse", "HEAD").strip(), "")
    with pytest.raises(ClearError, match=r"^[0-9a-f]{10,40} has no dvc\.lock; name a later revision\.$"):
        fetch.released(Path("@v1.1.0"))
    registry.register(project, "sft", "v1.0.0", git(project, "rev-parse", "HEAD~1").strip(), "")
    with pytest.raises(ClearError, match=r"sft v1.0.0: the dvc.lock of commit .* has no such model; `clear "):
        fetch.released(Path("sft@v1.0.0"))
