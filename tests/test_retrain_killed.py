"""Runs aside that are killed where git knows nothing yet: a clone in the making, a removal, a message to people."""

import json
import os
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from clear.data.io import acquire
from clear.project import scratch
from clear.project.retrain import intake, request
from clear.project.retrain.reproduce import reproduce
from clear.project.retrain.run import proposal, retrain
from clear.sources.incoming import sets
from tests.conftest import git
from tests.helpers.processes import python, run_dvc
from tests.helpers.retraining import die, killed, look, tools

pytest_plugins = ["tests.helpers.retraining"]

COPY = Path(".clear/scratch/reproduce/copy")


def at_the_checkout() -> None:
    """Be killed when git has made the clone, and nothing else belongs to it yet."""
    output = scratch.output

    def dying(folder, *arguments):
        said = output(folder, *arguments)
        if arguments[0] == "checkout":
            die()
        return said

    scratch.output = dying


def among_the_raw_data() -> None:
    """Be killed when two files of the user's own data are in the clone."""
    link, done = os.link, []

    def dying(*given, **options):
        if len(done) == 2:
            die()
        done.append(given)
        return link(*given, **options)

    os.link = dying


def in_the_removal() -> None:
    """Be killed when the removal of a clone has come as far as git's objects."""
    remove = shutil.rmtree

    def dying(folder, *given, **options):
        if (Path(folder) / ".git").exists():
            remove(Path(folder) / ".git" / "objects")
            die()
        return remove(folder, *given, **options)

    shutil.rmtree = dying


def seen(project: Path) -> dict:
    """What a run finds in its clone where the stages would run; they change nothing, so nothing is out of date."""
    found = {}

    def stages(folder: Path, names) -> None:
        found["raw"] = sorted(path.name for path in (folder / "data/raw/photos").iterdir())
        found["replies"] = (folder / "data/replies/teacher.sqlite").read_text()
        found["cache"] = run_dvc(folder, "cache", "dir").strip()
        found["remote"] = intake.default_remote(folder)
        found["model"] = (folder / "data/models/grpo/w").exists()

    assert reproduce(project, replace(tools([]), reproduce=stages)).state == "NothingNew"
    return found


@pytest.mark.parametrize("point", [at_the_checkout, among_the_raw_data])
def test_a_clone_that_is_not_complete_is_made_anew(trained, point):
    (trained / "data/raw/photos").mkdir(parents=True)
    for n in range(5):
        (trained / f"data/raw/photos/{n}.png").write_text(str(n))
    (trained / "data/replies").mkdir()
    (trained / "data/replies/teacher.sqlite").write_text("paid")
    with (trained / ".gitignore").open("a") as file:
        file.write("/data/raw/\n/data/replies/\n")
    git(trained, "commit", "-q", "-a", "-m", "own data")
    git(trained, "push", "-q", "origin", "main")
    expected = {
        "raw": [f"{n}.png" for n in range(5)],
        "replies": "paid",
        "cache": str(trained / ".dvc/cache"),
        "remote": "storage",
        "model": True,
    }
    killed(lambda: (point(), reproduce(trained, tools([]))))
    assert seen(trained) == expected
    assert not list((trained / COPY).parent.glob("copy*"))


def a_removal(project: Path) -> None:
    killed(lambda: (in_the_removal(), reproduce(project, replace(tools([]), reproduce=lambda folder, stages: None))))


def of_an_earlier_version(project: Path) -> None:
    """What a removal has left that did not rename the clone first."""
    (project / COPY / ".git").mkdir(parents=True)


@pytest.mark.parametrize("half", [a_removal, of_an_earlier_version])
def test_git_never_answers_for_the_workspace_in_place_of_half_a_clone(trained, half):
    half(trained)
    with (trained / "code/grpo.py").open("a") as file:
        file.write("# an unfinished edit\n")
    before = git(trained, "status", "--porcelain")
    said: list[str] = []
    outcome = reproduce(trained, replace(tools(said), reproduce=lambda folder, stages: None))
    assert outcome.state == "NothingNew" and said == ["dvc checkout --allow-missing"]
    assert git(trained, "status", "--porcelain") == before
    assert git(trained, "branch", "--format=%(refname:short)").split() == ["main"]
    assert not git(trained.parent / "origin.git", "branch", "--list", "reproduce/*")
    assert not list((trained / COPY).parent.glob("copy*"))


def test_what_a_killed_run_left_is_removed_when_its_last_command_has_ended(tmp_path):
    lock = tmp_path / "copy.partial/.clear/command.lock"
    lock.parent.mkdir(parents=True)
    (tmp_path / "copy.gone/.dvc").mkdir(parents=True)
    held = acquire(lock)
    code = "import pathlib, sys; print(flush=True); input(); pathlib.Path(sys.argv[1], 'late').write_text('x')"
    command = python(code, str(lock.parents[1]), stdin=subprocess.PIPE, pass_fds=[held])
    os.close(held)
    assert command.stdout.readline() == "\n"
    removal = threading.Thread(target=scratch.clear_leftovers, args=[tmp_path / "copy"])
    removal.start()
    command.communicate("\n")
    removal.join()
    assert command.returncode == 0, "it had its folder to the end"
    assert not list(tmp_path.iterdir())


def test_a_quarantine_of_which_nobody_was_told_is_told_by_the_next_run_and_by_no_further_one(trained):
    rows = '{"image": "no.png", "question": "what letter is there?", "answer": "a"}\n'
    (trained / "data/incoming/fog/rows.jsonl").write_text(rows)
    killed(lambda: retrain(trained, replace(tools([]), refused=die)))
    report = trained / "data/quarantine/fog.report"
    assert report.exists() and not (trained / "data/incoming/fog").exists()
    outcome, said = look(trained)
    problem = json.loads((report / "refused.json").read_text())["problem"]
    assert outcome.state == "NothingNew" and said == [
        f"fog is not good: {problem}. It is now in data/quarantine/fog, with its report beside it.",
        f"refused: fog: {problem}",
    ]
    assert look(trained)[1] == [], "as with sets that were refused before there were such notes"


def test_a_set_that_is_not_in_quarantine_yet_is_not_told_of(trained, tmp_path):
    (new,) = sets(trained / "data/incoming")
    source = intake.Source.of(trained, "data/incoming", tmp_path)

    def before_the_move() -> None:
        Path.rename = die
        source.quarantine(new, trained, "not good")

    killed(before_the_move)
    told = []
    source.remind(lambda *given: told.append(given))
    assert told == [] and [one.fingerprint for one in sets(trained / "data/incoming")] == [new.fingerprint]
    source.quarantine(new, trained, "not good", lambda *given: told.append(given))
    source.remind(lambda *given: told.append(given))
    assert told == [("fog", "not good", "data/quarantine/fog")]


def test_a_refused_set_that_dvc_tracks_does_not_come_back_after_a_kill(trained, tmp_path):
    run_dvc(trained, "add", "-q", "data/incoming/fog")
    run_dvc(trained, "push", "-q", "data/incoming/fog")
    (new,) = sets(trained / "data/incoming")
    source, done = intake.Source.of(trained, "data/incoming", tmp_path), []

    def second(act):
        def dying(path, *given, **options):
            if path.parent.name == "incoming" and path.name in ("fog", "fog.dvc"):
                done.append(path)
                if len(done) == 2:
                    die()
            return act(path, *given, **options)

        return dying

    def between() -> None:
        Path.rename, Path.unlink = second(Path.rename), second(Path.unlink)
        source.quarantine(new, trained, "not good")

    killed(between)
    pulled = []
    source.fetch(lambda arguments, folder: pulled.append(arguments), pulled.append)
    assert not pulled, "there is a .dvc file without its set"
    (again,) = sets(trained / "data/incoming")
    assert source.quarantine(again, trained, "not good") == "data/quarantine/fog"
    assert not sets(trained / "data/incoming")


@pytest.fixture
def made(trained):
    """The small project with a branch that is reproduced, not yet public."""
    git(trained, "branch", "reproduce/0123456789")
    return trained


def publish(project: Path, waiting: bool = True, **told):
    """Publish the branch; what was told."""
    said: list[str] = []
    given = replace(tools(said), **told)
    proposal(project, "reproduce/0123456789", "main", "Reproduced main: the gate FAILS", "x\n", given, {}, waiting)
    return [line for line in said if line.startswith("proposed")]


@pytest.mark.parametrize("origin", [True, False])
def test_a_branch_of_which_nobody_was_told_is_told_by_the_next_run_and_by_no_further_one(made, origin):
    if not origin:
        git(made, "remote", "remove", "origin")
    killed(lambda: publish(made, waiting=False, proposed=die))
    assert publish(made) == ["proposed: reproduce/0123456789"]
    assert publish(made) == [], "as with branches that were published before there were such notes"


def test_a_branch_is_told_of_when_its_own_run_never_comes_again(made):
    """The weekly run looks for the branch of the newest commit, which is another one by now."""
    nothing = {"reproduce": lambda folder, stages: None}
    killed(lambda: publish(made, waiting=False, proposed=die))
    for expected in (["proposed: reproduce/0123456789"], []):
        said: list[str] = []
        assert reproduce(made, replace(tools(said), **nothing)).state == "NothingNew"
        assert [line for line in said if line.startswith("proposed")] == expected


def test_a_branch_that_is_not_public_yet_is_not_told_of(made):
    def before_the_push() -> None:
        output = request.output
        request.output = lambda folder, *given: die() if given[0] == "push" else output(folder, *given)
        publish(made, waiting=False)

    killed(before_the_push)
    said: list[str] = []
    reproduce(made, replace(tools(said), reproduce=lambda folder, stages: None))
    assert not [line for line in said if line.startswith("proposed")], "it is not at origin"
    assert publish(made) == ["proposed: reproduce/0123456789"]
    assert publish(made) == []
