"""`clear tidy`: what a release, a branch, a pull request, a copy or a young run needs stays; the rest is listed, and
removed only on request. A store in which deleting too much would be seen: every version of the data is asked for again.
"""

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect.logging import disable_run_logger

from clear.data.lock import writer
from clear.errors import ClearError
from clear.project.tidy import tidy
from tests.conftest import git
from tests.helpers.processes import python

OLD, LATER = (time.time() + days * 86400 for days in (-400, 400))


def commit(folder: Path, version: str, **environment: str) -> None:
    """Reproduce, push and commit a version of the samples."""
    from dvc.repo import Repo

    (folder / "code/source.txt").write_text(version)
    with Repo(str(folder)) as repo:
        repo.reproduce()
        repo.push()
    long_ago = {"GIT_COMMITTER_DATE": f"@{OLD:.0f}", "GIT_AUTHOR_DATE": f"@{OLD:.0f}"}
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(
        ["git", *identity, "commit", "-qam", version], cwd=folder, check=True, env=os.environ | long_ago | environment
    )


def versions(root: Path, store: str = "cache") -> set[str]:
    """The versions of the samples that a store has."""
    folder = root / (".dvc/cache" if store == "cache" else "../store")
    files = (file for file in folder.glob("files/md5/??/*") if file.is_file())
    return {file.read_text() for file in files if file.stat().st_size < 50 and not file.read_text().strip().isdigit()}


@pytest.fixture(scope="module")
def _team(_project, tmp_path_factory) -> Path:
    """A clone whose origin has a release, an open branch of somebody else, a pull request, and a version that only the
    history of main has; every commit is 400 days old."""
    base = tmp_path_factory.mktemp("team")
    project = base / "project"
    shutil.copytree(_project, project)
    git(base, "init", "-q", "--bare", "-b", "main", "origin.git")
    (project / ".dvc/config").write_text("[core]\n    remote = store\n['remote \"store\"']\n    url = ../../store\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        git(project, "remote", "add", "origin", "../origin.git")
        commit(project, "released")
        git(project, "tag", "-m", "a release", "grpo@v1.0.0")
        commit(project, "superseded")
        for name, where in {"branch": "refs/heads/theirs", "request": "refs/pull/7/head"}.items():
            git(project, "checkout", "-q", "-b", name)
            commit(project, f"of a {name}")
            git(project, "push", "-q", "origin", f"{name}:{where}")
            git(project, "checkout", "-q", "main")
            git(project, "branch", "-q", "-D", name)
        commit(project, "newest")
        git(project, "push", "-q", "--tags", "origin", "main")
        git(project, "remote", "remove", "origin")  # and with it what this clone knows of the others
        git(project, "remote", "add", "origin", "../origin.git")
    return base


@pytest.fixture
def team(_team, tmp_path, monkeypatch) -> Path:
    """A copy of it with its origin and its store; the working directory. Objects are looked at 400 days from now, since
    no program can set back when a file came."""
    shutil.copytree(_team, tmp_path / "team")
    project = tmp_path / "team/project"
    monkeypatch.chdir(project)
    monkeypatch.setenv("CLEAR_HOME", str(project / ".clear"))
    monkeypatch.setattr("clear.project.tidy.time", SimpleNamespace(time=lambda: LATER))
    return project


NEEDED = {"released", "of a branch", "of a request", "newest", "code/source.txt"}  # the last in a commit of today
EVER = NEEDED | {"superseded"}
PUSHED = EVER - {"code/source.txt"}  # made before there was a remote


def test_only_what_nobody_needs_is_removed_and_only_on_request(team, clear):
    from dvc.repo import Repo

    assert versions(team) >= EVER and versions(team, "remote") == PUSHED
    status, out, error = clear("tidy", "--remote")
    assert status == 0, error
    assert "1 tags, 1 branches, 2 branches of others, 1 pull requests" in out and "Nothing was removed" in out
    assert versions(team) >= EVER and versions(team, "remote") == PUSHED
    found = tidy(Path(), remove=True)
    assert found.removed and versions(team) == NEEDED
    assert versions(team, "remote") == PUSHED, "the remote only where it is asked for"
    tidy(Path(), remote=True, remove=True)
    assert versions(team, "remote") == NEEDED & PUSHED
    assert [store.needless for store in tidy(Path(), remote=True).stores] == [[], []]
    for revision in ("HEAD", "grpo@v1.0.0", "origin/theirs"):
        git(team, "checkout", "-q", revision)
        with Repo() as repo:
            repo.pull()
        assert (team / "data/samples").read_text() == (team / "code/source.txt").read_text()


def test_young_objects_and_young_commits_keep_their_data(team, monkeypatch):
    commit(team, "young", GIT_COMMITTER_DATE="@" + str(int(time.time()) - 60))
    commit(team, "newest")
    tidy(Path(), remove=True)
    assert versions(team) == NEEDED | {"young"}, "a commit of today names it"
    stray = team / ".dvc/cache/files/md5/00" / ("0" * 30)
    stray.parent.mkdir()
    stray.write_text("of a run elsewhere")
    with monkeypatch.context() as today:
        today.setattr("clear.project.tidy.time", time)
        tidy(Path(), remove=True)
    assert stray.exists(), "not yet committed, but of today"
    tidy(Path(), remove=True)
    assert not stray.exists()


@pytest.mark.parametrize("taken", [OLD, LATER], ids=["long ago", "later"])
def test_a_picture_that_was_linked_into_the_cache_is_as_young_as_its_link(team, monkeypatch, taken):
    """Where DVC links, the object is the picture itself, with the date on which it was taken."""
    from dvc.repo import Repo

    picture = team / "data/picture.png"
    picture.write_text("taken at another time")
    os.utime(picture, (taken, taken))
    with Repo(config={"cache": {"type": "hardlink"}}) as repo:
        repo.add("data/picture.png")
    (team / "data/picture.png.dvc").unlink()  # before its commit, or of a run elsewhere
    (kept,) = (file for file in (team / ".dvc/cache/files/md5").glob("??/*") if file.samefile(picture))
    assert kept.stat().st_mtime == pytest.approx(taken, abs=1)
    monkeypatch.setattr("clear.project.tidy.time", time)
    tidy(Path(), remove=True)
    assert kept.exists()
    monkeypatch.setattr("clear.project.tidy.time", SimpleNamespace(time=lambda: LATER))
    tidy(Path(), remove=True)
    assert not kept.exists()


def test_what_copies_and_experiments_need_stays(team, tmp_path):
    git(team, "worktree", "add", "-q", "--detach", str(tmp_path / "tree"), "HEAD~1")
    copy = team / ".clear/scratch/smoke"
    shutil.copytree(team, copy, ignore=shutil.ignore_patterns(".clear", "cache"))
    git(team, "update-ref", "refs/exps/ab/cd/one", git(team, "rev-parse", "HEAD~1").strip())
    needless = {one.id for one in tidy(Path()).stores[0].needless}
    git(team, "worktree", "remove", "--force", str(tmp_path / "tree"))
    assert {one.id for one in tidy(Path()).stores[0].needless} == needless, "the experiment has the same version"
    git(team, "update-ref", "-d", "refs/exps/ab/cd/one")
    assert {one.id for one in tidy(Path()).stores[0].needless} > needless
    lock = team / "dvc.lock"
    superseded = git(team, "show", "HEAD~1:dvc.lock")
    (copy / "dvc.lock").write_text(superseded)
    assert {one.id for one in tidy(Path()).stores[0].needless} == needless
    (copy / "dvc.lock").write_text(lock.read_text())
    (tmp_path / "other").mkdir()
    shutil.copytree(copy, tmp_path / "other", dirs_exist_ok=True)
    (tmp_path / "other/dvc.lock").write_text(superseded)
    assert {one.id for one in tidy(Path(), also=[tmp_path / "other"]).stores[0].needless} == needless


def test_data_added_in_a_project_below_the_top_of_its_clone_stay(team, tmp_path):
    """One repository may hold several projects; what is added with `dvc add` and not committed is in a file alone."""
    git(tmp_path, "init", "-q", "several")
    other = tmp_path / "several/other"
    (other / ".dvc").mkdir(parents=True)
    lost = hashlib.md5(b"superseded").hexdigest()
    needless = {one.id for one in tidy(Path(), also=[other]).stores[0].needless}
    assert lost in needless
    (other / "set.dvc").write_text(f"outs:\n- md5: {lost}\n  path: set\n")
    assert {one.id for one in tidy(Path(), also=[other]).stores[0].needless} == needless - {lost}


def test_nothing_is_removed_where_something_is_not_known(team, tmp_path, clear):
    def said(*arguments: str) -> str:
        status, _, error = clear("tidy", "--remove", *arguments)
        assert status == 1 and error.count("\n") == 1 and versions(team) >= EVER, error
        return error

    with writer(team / ".clear/scratch/nobody", "leave"):
        pass
    assert "no DVC project" in said("--also", str(tmp_path))
    for days in ("-1", "nan", "inf", "1e9"):
        assert "from 0 to 36500" in said(f"--days={days}")
    git(team, "remote", "set-url", "origin", "../gone.git")
    assert "git's remote origin does not say what is needed" in said()
    git(team, "remote", "remove", "origin")
    git(team, "clone", "-q", "--depth", "1", f"file://{tmp_path}/team/origin.git", str(tmp_path / "shallow"))
    with pytest.raises(ClearError, match="shallow"):
        tidy(tmp_path / "shallow")
    (tmp_path / "no-clone").mkdir()
    with pytest.raises(ClearError, match="/no-clone: not a git repository: run this in a clone of the project "):
        tidy(tmp_path / "no-clone")


def test_folders_are_kept_with_their_files_and_one_without_its_list_is_counted(team):
    """A release may be pushed from another clone: here its list is not, and what only it names is no use here."""
    from dvc.repo import Repo

    with Repo() as repo:
        for name in ("one", "two"):
            (team / "data/added").mkdir(exist_ok=True)
            (team / f"data/added/{name}").write_text(f"file {name}")
            repo.add("data/added")
            git(team, "add", "-A", "data")
            git(team, "commit", "-q", "-m", name)
    tidy(Path(), remove=True)
    assert {"file one", "file two"} < versions(team)
    for file in (team / ".dvc/cache/files/md5").glob("??/*.dir"):
        file.unlink()
    found = tidy(Path())
    assert found.absent == 2 and "2 folders that these name are in none of the stores" in "\n".join(found.lines())
    sizes = sorted(one.size for one in found.stores[0].needless if one.size == len("file one"))
    assert len(sizes) >= 2


def test_the_flow_only_lists_unless_it_is_told_otherwise(team, monkeypatch):
    from flows import tidy as flow

    shown = []
    monkeypatch.setattr(flow, "create_markdown_artifact", lambda text, **_: shown.append(text))
    with disable_run_logger():
        needless = flow.tidy.fn(str(team))
    assert set(needless) == {"cache", "remote store"} and all(needless.values())
    assert "Nothing was removed" in shown[0] and versions(team) >= EVER
    (team / ".dvc/config").write_text("")
    with disable_run_logger():
        assert set(flow.tidy.fn(str(team))) == {"cache"}, "without a remote there is only the cache"


def test_while_a_run_goes_on_nothing_is_removed(team, clear):
    program = "import sys, time; from pathlib import Path; from clear.data.lock import writer\n"
    program += "with writer(Path(), 'leave', 'a run'): print(flush=True); time.sleep(60)"
    run = python(program, cwd=team)
    try:
        assert run.stdout.readline() == "\n", "it holds the lock"
        status, _, error = clear("tidy", "--remove")
        assert status == 1 and "a run" in error and "Nothing is removed while a run may add" in error
        assert versions(team) >= EVER
        assert clear("tidy")[0] == 0, "to look is no harm"
    finally:
        run.kill()
        run.wait()


def held(folder: Path) -> subprocess.Popen:
    """A process that has the lock of a folder until it is killed."""
    program = "import sys, time; from pathlib import Path; from clear.data.lock import writer\n"
    program += f"with writer(Path({str(folder)!r}), 'leave', 'a run'): print(flush=True); time.sleep(60)"
    run = python(program, cwd=folder.parent)
    assert run.stdout.readline() == "\n", "it holds the lock"
    return run


def ended(run: subprocess.Popen) -> None:
    run.kill()
    run.wait()


LOST = hashlib.md5(b"superseded").hexdigest()


def needless() -> set[str]:
    return {one.id for one in tidy(Path()).stores[0].needless}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_clones_of_flows_count_wherever_the_private_folder_is(team, tmp_path, monkeypatch, elsewhere):
    """Flows work in the workspace's .clear, whatever CLEAR_HOME says, and DVC works there under the lock beside it."""
    if elsewhere:
        monkeypatch.setenv("CLEAR_HOME", str(tmp_path / "fast-disk"))
    copies = [team / f".clear/scratch/{name}" for name in ("retrain/copy", "benchmark")]
    copies += [tmp_path / "fast-disk/scratch/smoke"] if elsewhere else []
    for copy in copies:
        assert LOST in needless()
        shutil.copytree(team, copy, ignore=shutil.ignore_patterns(".clear", "cache"))
        (copy / "dvc.lock").write_text(git(team, "show", "HEAD~1:dvc.lock"))
        assert LOST not in needless()
        run = held(copy)
        with pytest.raises(ClearError, match="Nothing is removed while a run"):
            tidy(Path(), remove=True)
        ended(run)
        shutil.rmtree(copy)
    for beside in ("scratch", "scratch/retrain", "scratch/reproduce"):
        (team / ".clear" / beside).mkdir(parents=True, exist_ok=True)
        run = held(team / ".clear" / beside)
        with pytest.raises(ClearError, match="Nothing is removed while a run"):
            tidy(Path(), remove=True)
        ended(run)
    assert versions(team) >= EVER
    tidy(Path(), remove=True)
    assert versions(team) == NEEDED, "with nobody there, it does not lock itself out"


def test_what_is_added_in_a_copy_outside_git_stays(team, tmp_path, monkeypatch):
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path / "fast-disk"))
    copy = tmp_path / "fast-disk/scratch/smoke"
    shutil.copytree(team, copy, ignore=shutil.ignore_patterns(".clear", "cache", ".git"))
    assert LOST in needless()
    (copy / "data/incoming").mkdir()
    (copy / "data/incoming/rain.dvc").write_text(f"outs:\n- md5: {LOST}\n  path: rain\n")
    assert LOST not in needless()


def test_from_a_linked_worktree_the_main_one_is_another(team, tmp_path, monkeypatch):
    git(team, "remote", "set-url", "origin", str(tmp_path / "team/origin.git"))
    tree = tmp_path / "tree"
    git(team, "worktree", "add", "-q", "-b", "side", str(tree))
    (tree / ".dvc/config.local").write_text(f"[cache]\n    dir = {team}/.dvc/cache\n")
    monkeypatch.chdir(tree)
    monkeypatch.setenv("CLEAR_HOME", str(tree / ".clear"))
    assert LOST in needless()
    (team / "dvc.lock").write_text(git(team, "show", "HEAD~1:dvc.lock"))  # not committed, and only there
    assert LOST not in needless()
    run = held(team)
    with pytest.raises(ClearError, match="Nothing is removed while a run"):
        tidy(Path(), remove=True)
    ended(run)
    tidy(Path(), remove=True)
    assert versions(team) == EVER, "neither is it its own rival for the lock"


def test_a_tag_that_is_another_at_the_remote_keeps_both_its_data(team, tmp_path):
    """Two people made it at once; git refuses to replace the one that is here."""
    assert LOST in needless()
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(tmp_path / "team/origin.git"), str(other))
    git(other, "tag", "-f", "-m", "theirs", "grpo@v1.0.0", "origin/main~1")
    git(other, "push", "-q", "-f", "origin", "grpo@v1.0.0")
    before = git(team, "rev-parse", "grpo@v1.0.0")
    assert LOST not in needless(), "of the tag at the remote"
    assert git(team, "rev-parse", "grpo@v1.0.0") == before
    tidy(Path(), remove=True)
    assert versions(team) == EVER
