"""`clear release` on a real project: git with an origin, DVC with a remote in a folder, GTO's tags."""

import json
import os
import shutil
from pathlib import Path

import pytest

from clear.data.io import write_json
from clear.errors import ClearError
from clear.project.release import cards, fetch, publish, registry
from clear.project.scratch import write_params
from tests.conftest import ROOT, git
from tests.helpers.registry_project import another, copied, dvc, make
from tests.revisions import LEVELS

WORSE = dict.fromkeys(LEVELS, 0.3)


@pytest.fixture(scope="module")
def _made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("registry")).parent


@pytest.fixture
def project(_made, tmp_path, monkeypatch) -> Path:
    """A copy of the project with both its remotes; the working directory."""
    folder = copied(_made, tmp_path, monkeypatch)
    monkeypatch.chdir(folder)
    return folder


def refused(clear, *arguments: str) -> str:
    """The one line with which a release is refused; neither commits nor tags are made, and no file is changed."""
    before = git(Path(), "rev-parse", "HEAD"), git(Path(), "tag"), git(Path(), "status", "--porcelain")
    status, stdout, stderr = clear("release", *arguments)
    assert (status, stdout) == (1, "") and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert (git(Path(), "rev-parse", "HEAD"), git(Path(), "tag"), git(Path(), "status", "--porcelain")) == before
    return stderr


def released(clear, *arguments: str) -> str:
    status, stdout, stderr = clear("release", *arguments)
    assert status == 0, stderr
    return stdout


@pytest.mark.slow
def test_releases_are_assigned_put_back_and_fetched_by_a_fresh_clone(project, clear, monkeypatch):
    model = {file.name: file.read_bytes() for file in (project / "data/models/grpo").iterdir()}
    said = released(clear, "grpo", "v1.0.0", "--push")
    assert "prod is empty" in said and "every check passed" in said and "pushed: main grpo@v1.0.0" in said
    released(clear, "--assign", "prod", "v1.0.0", "--push")
    another(project, "as good", seed=1)
    assert "passes against grpo v1.0.0" in released(clear, "grpo", "v1.1.0", "--push")
    released(clear, "grpo", "--assign", "prod", "v1.1.0", "--push")
    assert "is in prod already" in refused(clear, "--assign", "prod", "v1.1.0")
    assert registry.in_stage(project, "grpo", "prod") == "v1.1.0"
    assert "in place of v1.1.0" in released(clear, "--assign", "prod", "v1.0.0", "--push")
    assert registry.in_stage(project, "grpo", "prod") == "v1.0.0"

    lines = clear("release", "--history")[1].splitlines()
    assert [line.split()[1:4] for line in lines[1:]] == [
        ["assignment", "v1.0.0", "prod"],
        ["assignment", "v1.1.0", "prod"],
        ["registration", "v1.1.0", git(project, "rev-parse", "--short=10", "grpo@v1.1.0^{commit}").strip()],
        ["assignment", "v1.0.0", "prod"],
        ["registration", "v1.0.0", git(project, "rev-parse", "--short=10", "grpo@v1.0.0^{commit}").strip()],
    ]
    fresh = project.parent / "fresh"
    git(project.parent, "clone", "-q", "origin.git", "fresh")
    assert not (fresh / "data/models").exists()
    # DVC's own command reads the same registry, from outside any project.
    dvc(project.parent, "artifacts", "get", "origin.git", "grpo", "--rev", "v1.0.0", "-o", "got", "--remote-config",
        f"url={project.parent / 'store'}")  # fmt: skip
    assert {file.name: file.read_bytes() for file in (project.parent / "got").iterdir()} == model
    monkeypatch.chdir(fresh)
    folder = fetch.released(Path("@prod"))
    assert folder.name == "grpo-v1.0.0" and folder.parent.parent == Path(os.environ["CLEAR_HOME"]) / "releases"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == model
    assert "note.txt" in {file.name for file in fetch.released(Path("grpo@v1.1.0")).iterdir()}
    shutil.rmtree(project.parent / "store")
    assert fetch.released(Path("grpo@prod")) == folder, "what was fetched needs no remote"
    (project.parent / "picture.png").write_bytes(_picture())
    status, stdout, stderr = clear("ask", project.parent / "picture.png", "is there a red circle ?", "--model", "@prod")
    assert status == 0 and "answer:" in stdout, stderr


def _picture() -> bytes:
    import numpy as np

    from clear.data.images import encode_image

    return encode_image(np.full((48, 48, 3), 90, np.uint8))


def test_cards_are_committed_and_made_of_what_is_committed(project, clear):
    released(clear, "grpo", "v1.0.0")
    assert git(project, "status", "--porcelain") == ""
    assert git(project, "rev-parse", "HEAD") == git(project, "rev-parse", "grpo@v1.0.0^{commit}")
    model, data = (git(project, "show", f"grpo@v1.0.0:data/cards/{name}") for name in ("grpo.md", "grpo_data.md"))
    metrics = json.loads((ROOT / "data/metrics/evaluate_grpo.json").read_text())
    hard = [100 * value for value in (metrics["accuracy"]["high"], *metrics["interval"]["high"])]
    assert "{:.1f} [{:.1f}, {:.1f}]".format(*hard) in model and "of exactly these weights" in model
    lock = git(project, "show", "HEAD:dvc.lock")
    for text, path in ((model, "data/models/grpo"), (data, "data/samples/sft")):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{path}`")]
        assert row.split("`")[3] in lock
    degrade = json.loads((ROOT / "data/metrics/degrade.json").read_text())["images"]
    cells = [" / ".join(str(degrade[split]["dark"][level]) for level in LEVELS[1:]) for split in ("sft", "rl")]
    assert f"| dark | {cells[0]} | {cells[1]} |" in data and "Every check passed. Rejected rows: 0." in data
    assert "Apache-2.0" in data and "grpo@v1.0.0" in data
    assert str(project) not in model + data and " 2026-" not in model + data, "neither a path nor a clock"
    entry = registry.artifact(project, "grpo")
    shutil.rmtree(project / "data/models")
    assert cards.texts(project, entry, "grpo@v1.0.0") == (model, data), "the same again, and without any data"


@pytest.mark.slow
def test_what_nobody_else_could_have_is_no_release(project, clear, monkeypatch):
    assert "it has: grpo, sft" in refused(clear, "gpro", "v1.0.0")
    assert "sft: no output of a stage" in refused(clear, "sft", "v1.0.0")
    assert "such as v1.2.0" in refused(clear, "grpo", "1.0.0")
    assert "say one thing" in refused(clear, "grpo")
    assert "has letters" in refused(clear, "--assign", "pr od", "v1.0.0")
    assert "v1.0.0 is no release here (there are: none)" in refused(clear, "--assign", "prod", "v1.0.0")
    (project / "code/source.txt").write_text("edited")
    assert "code/source.txt: changed and not committed" in refused(clear, "grpo", "v1.0.0")
    git(project, "commit", "-qam", "code alone")
    assert "dvc.lock does not belong to this commit: dependency code/source.txt" in refused(clear, "grpo", "v1.0.0")
    dvc(project, "repro", "-q")
    git(project, "commit", "-qam", "reproduced, not pushed")
    said = refused(clear, "grpo", "v1.0.0")
    assert "not in DVC's remote" in said and "run `dvc push`" in said
    dvc(project, "push", "-q")
    (project / ".dvc/config").write_text("")
    git(project, "commit", "-qam", "no remote")
    assert "no DVC remote is configured" in refused(clear, "grpo", "v1.0.0")
    git(project, "revert", "--no-edit", "-n", "HEAD")
    git(project, "commit", "-qm", "the remote again")
    hook = project / ".git/hooks/pre-commit"
    hook.write_text("#!/bin/sh\necho no commits on a Sunday >&2\nexit 1\n")
    hook.chmod(0o755)
    assert "no commits on a Sunday" in refused(clear, "grpo", "v1.0.0")
    hook.unlink()
    released(clear, "grpo", "v1.0.0")
    assert "grpo v1.0.0 exists" in refused(clear, "grpo", "v1.0.0")
    assert "this commit is grpo v1.0.0 already" in refused(clear, "grpo", "v1.0.1")


@pytest.mark.slow
def test_the_gate_guards_the_stage_and_never_the_way_back(project, clear):
    released(clear, "grpo", "v1.0.0")
    released(clear, "--assign", "prod", "v1.0.0")
    another(project, "worse", right=WORSE)
    said = refused(clear, "grpo", "v1.1.0", "--because", "I like it")
    assert "does not pass against grpo v1.0.0: clean accuracy" in said and "`clear gate " in said
    released(clear, "grpo", "v1.1.0", "--stage", "dev")
    assert "does not pass against grpo v1.0.0" in refused(clear, "--assign", "prod", "v1.1.0")
    released(clear, "--assign", "dev", "v1.1.0")
    assert registry.in_stage(project, "grpo", "dev") == "v1.1.0"
    assert registry.in_stage(project, "grpo", "prod") == "v1.0.0"
    another(project, "better than both", right=dict.fromkeys(LEVELS, 0.99))
    released(clear, "grpo", "v1.2.0")
    released(clear, "--assign", "prod", "v1.2.0")
    assert "It has been there before." in released(clear, "--assign", "prod", "v1.0.0"), "though it is worse"
    another(project, "another benchmark", images=60, damage=9.0)
    assert "a person decides" in refused(clear, "grpo", "v2.0.0")
    released(clear, "grpo", "v2.0.0", "--because", "the new benchmark is the one that counts")
    assert "the one that counts" in git(project, "tag", "-n1", "-l", "grpo@v2.0.0")


def test_data_that_failed_its_checks_is_never_released(project, clear):
    file = project / "data/metrics/validate.json"
    write_json(file, json.loads(file.read_text()) | {"success": False})
    git(project, "commit", "-qam", "failed")
    assert "does not pass against no version, since prod is empty: validation passed" in refused(
        clear, "grpo", "v1.0.0"
    )


def test_files_that_are_not_those_of_the_release_are_not_used(project, clear):
    released(clear, "grpo", "v1.0.0")
    assert fetch.released(Path("no@where.txt/x")) == Path("no@where.txt/x"), "a path"
    with pytest.raises(ClearError, match=r"grpo@prod: no version and no stage with one in it \(versions: v1.0.0\)"):
        fetch.released(Path("@prod"))
    shutil.rmtree(project / ".dvc/cache")
    shutil.rmtree(project / "data/models")
    (victim, *_) = [file for file in (project.parent / "store").rglob("*") if file.stat().st_size > 100_000]
    victim.chmod(0o644)
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ClearError, match=r"(cannot be fetched|not what the release's dvc\.lock names)"):
        fetch.released(Path("@v1.0.0"))
    assert not list(Path(os.environ["CLEAR_HOME"]).rglob("grpo-*"))
    victim.unlink()
    with pytest.raises(ClearError, match="cannot be fetched"):
        fetch.released(Path("@v1.0.0"))


def test_given_weights_need_a_licence_that_only_a_person_knows(project):
    given = ["model.checkpoint=/w", "source.kind=llava_onevision", "source.path=/p", "traces.kind=teacher"]
    write_params(project / "params.yaml", ["profile=bagel_7b_lora", *given, "teacher.url=http://t/v1"])
    entry = registry.artifact(project, "grpo")
    with pytest.raises(ClearError, match=r"dvc\.yaml: artifacts\.grpo\.meta\.license is missing"):
        cards.texts(project, entry, "grpo@v1.0.0")
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("grpo, type: model}", "grpo, type: model, meta: {license: mit}}"))
    with pytest.raises(ClearError, match=r"artifacts\.grpo\.meta\.base_model is missing"):
        cards.texts(project, registry.artifact(project, "grpo"), "grpo@v1.0.0")


def test_every_artifact_is_a_model_that_the_gate_can_judge():
    """Of this project itself."""
    import yaml

    entries = yaml.safe_load((ROOT / "dvc.yaml").read_text())["artifacts"]
    assert [publish.evaluated(registry.artifact(ROOT, name)) for name in entries] == list(entries)


@pytest.fixture
def two(project) -> tuple[Path, Path]:
    """Two people's clones of a project with the versions v1.0.0 and v1.1.0; nothing is in a stage."""
    publish.release(project, "grpo", "v1.0.0", push=True)
    another(project, "as good", seed=1)
    publish.release(project, "grpo", "v1.1.0", push=True)
    git(project.parent, "clone", "-q", "origin.git", "theirs")
    theirs = project.parent / "theirs"
    for key, value in {"name": "b", "email": "b@localhost"}.items():
        git(theirs, "config", f"user.{key}", value)
    return project, theirs


def test_an_assignment_that_the_remote_refuses_is_none(two):
    ours, theirs = two
    publish.assign(ours, "grpo", "prod", "v1.0.0", push=True)
    with pytest.raises(ClearError, match=r"refuses grpo#prod#1 \(already exists\).* `git fetch --tags origin` shows"):
        publish.assign(theirs, "grpo", "prod", "v1.1.0", push=True)
    assert registry.in_stage(theirs, "grpo", "prod") == ""
    assert publish.fetch_tags(theirs)
    assert registry.in_stage(theirs, "grpo", "prod") == "v1.0.0"
    assert "pushed: " in "".join(publish.assign(theirs, "grpo", "prod", "v1.1.0", push=True))
    hook = ours.parent / "origin.git/hooks/update"
    hook.write_text("#!/bin/sh\necho ask the owner >&2\nexit 1\n")
    hook.chmod(0o755)
    before = git(theirs, "tag")
    with pytest.raises(ClearError, match=r"refuses grpo#prod#3 \(hook declined\).*ask the owner"):
        publish.assign(theirs, "grpo", "prod", "v1.0.0", push=True)
    assert git(theirs, "tag") == before
    git(theirs, "remote", "set-url", "origin", "../gone.git")
    with pytest.raises(ClearError, match=r"grpo#prod#3 is made here, but .* failed: .*; repeat that command"):
        publish.assign(theirs, "grpo", "prod", "v1.0.0", push=True)
    assert registry.in_stage(theirs, "grpo", "prod") == "v1.0.0", "the network may come back"


def test_a_release_behind_the_branch_is_pushed_after_a_pull(project):
    git(project.parent, "clone", "-q", "origin.git", "theirs")
    git(project.parent / "theirs", "commit", "-q", "--allow-empty", "-m", "theirs")
    git(project.parent / "theirs", "push", "-q")
    with pytest.raises(ClearError, match=r"grpo@v1.0.0 is made here.*`git pull --no-rebase origin main`, then repeat"):
        publish.release(project, "grpo", "v1.0.0", push=True)
    git(project, "pull", "-q", "--no-rebase", "origin", "main")
    git(project, "push", "-q", "--atomic", "origin", "main", "grpo@v1.0.0")


def test_tags_that_differ_are_named_where_they_are_fetched(two):
    ours, theirs = two
    publish.assign(ours, "grpo", "prod", "v1.0.0", push=True)
    publish.assign(theirs, "grpo", "prod", "v1.1.0")  # and the push is forgotten
    with pytest.raises(ClearError, match=r"different tags named 'grpo#prod#1'.* `git tag -d 'grpo#prod#1'` and repeat"):
        publish.fetch_tags(theirs)
    with pytest.raises(ClearError, match="is in prod already, by the tags of this clone"):
        publish.assign(theirs, "grpo", "prod", "v1.1.0")
    git(theirs, "tag", "-d", "grpo#prod#1")
    assert publish.fetch_tags(theirs) and registry.in_stage(theirs, "grpo", "prod") == "v1.0.0"
    git(theirs, "remote", "set-url", "origin", "../gone.git")
    with pytest.raises(ClearError, match=r"`git fetch --tags origin` failed: .*gone\.git"):
        publish.fetch_tags(theirs)
    git(theirs, "remote", "remove", "origin")
    assert not publish.fetch_tags(theirs), "nobody else has tags"


@pytest.mark.parametrize("names", ["origin, its branch tracks main", "origin and a fork", "another name"])
def test_tags_go_where_they_come_from(two, names):
    ours, _ = two
    git(ours, "switch", "-q", "-c", "prepared")
    if names == "another name":
        git(ours, "remote", "rename", "origin", "team")
    elif names == "origin and a fork":
        git(ours.parent, "init", "-q", "--bare", "fork.git")
        git(ours, "remote", "add", "fork", "../fork.git")
        git(ours, "push", "-q", "-u", "fork", "prepared")
    else:
        git(ours, "branch", "-q", "--set-upstream-to=main")
    assert "pushed: grpo#prod#1" in publish.assign(ours, "grpo", "prod", "v1.0.0", push=True)
    assert "grpo#prod#1" in git(ours.parent / "origin.git", "tag").split()
    assert publish.fetch_tags(ours)


def test_a_version_withdrawn_from_its_stage_can_be_replaced(two, clear):
    ours, _ = two
    publish.assign(ours, "grpo", "prod", "v1.1.0")
    gone = "grpo commit " + git(ours, "rev-parse", "grpo@v1.1.0^{commit}")[:10]
    git(ours, "tag", "-d", "grpo@v1.1.0")
    another(ours, "a third", seed=2)
    said = refused(clear, "grpo", "v1.2.0")
    assert f"{gone}, which is no release here" in said and "a person decides, with `--because REASON`" in said
    released(clear, "grpo", "v1.2.0", "--because", "v1.1.0 was withdrawn")
    with pytest.raises(publish.Undecided):
        publish.judge(ours, "grpo", "prod", "v1.2.0")
    assert "in place of commit " in released(clear, "--assign", "prod", "v1.2.0", "--because", "v1.1.0 was withdrawn")
    assert registry.in_stage(ours, "grpo", "prod") == "v1.2.0"
    git(ours, "tag", "-d", "grpo@v1.2.0")
    file = ours / "data/metrics/validate.json"
    write_json(file, json.loads(file.read_text()) | {"success": False})
    git(ours, "commit", "-qam", "failed")
    assert "does not pass against grpo commit" in refused(clear, "grpo", "v1.3.0", "--because", "I want it")
