"""Degrading and answering on a Dask cluster of real processes: the results of a local run, even when a worker is
killed meanwhile."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from clear.bench.answers import Shard, answer, answer_shard
from clear.bench.models import UnderTest
from clear.bench.vlmeval import respond
from clear.config import compose, from_dict
from clear.data.pool import code_digest, parallel
from clear.degradation.build import degraded_samples
from clear.degradation.protocol import CELLS
from clear.errors import ClearError
from clear.reasoning import engine
from clear.reasoning.answering import Answer, _elected
from clear.sources.scenes.render import scenes
from clear.validation import metrics
from tests.conftest import ROOT
from tests.tiny import save_random_model


@pytest.fixture
def start(tmp_path):
    """Function: start `dask <arguments>` with a scheduler file in tmp_path; all are ended afterwards."""
    running = []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shared = ["--scheduler-file", str(tmp_path / "scheduler.json"), "--no-dashboard"]

    def launch(*arguments):
        command = [sys.executable, "-m", "dask", *arguments, *shared]
        with (tmp_path / f"{len(running)}.log").open("w") as log:
            running.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
        return running[-1]

    yield launch
    for process in running:
        process.kill()
        process.wait()


def address_of(tmp_path) -> str:
    import json

    for _ in range(600):
        if (tmp_path / "scheduler.json").exists():
            return json.loads((tmp_path / "scheduler.json").read_text())["address"]
        time.sleep(0.1)
    raise AssertionError((tmp_path / "0.log").read_text())


def two_workers(tmp_path, start) -> tuple[str, list[subprocess.Popen]]:
    """The address of a cluster, and its two worker processes."""
    start("scheduler", "--host", "127.0.0.1", "--port", "0")
    address = address_of(tmp_path)
    workers = [start("worker", "--nthreads", "1", "--no-nanny", "--name", name) for name in "ab"]
    from distributed import Client

    with Client(address) as client:
        client.wait_for_workers(2, timeout=60)
    return address, workers


@pytest.mark.slow
def test_a_killed_worker_changes_no_byte(tmp_path, start):
    samples = list(scenes("rl", 8, 3, 256, 4))
    variants = [(sample, *cell) for sample in samples for cell in CELLS]
    address, workers = two_workers(tmp_path, start)
    stream = degraded_samples(variants, 0.4, cluster=address)
    found = [next(stream)]
    os.kill(workers[0].pid, signal.SIGKILL)
    found += stream
    assert workers[0].wait(10) == -signal.SIGKILL and workers[1].poll() is None
    assert found == list(degraded_samples(variants, 0.4, workers=1))


def test_an_unreachable_cluster_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("clear.data.pool.CLUSTER_TIMEOUT", 1)
    with pytest.raises(ClearError, match=r"degrade.cluster = 'tcp://127.0.0.1:1' cannot be reached; start `dask"):
        list(parallel(len, ["a"], cluster="tcp://127.0.0.1:1"))
    with pytest.raises(ClearError, match=r"degrade.cluster = 'nowhere"):
        list(parallel(len, ["a"], cluster="nowhere://x"))


def test_a_cluster_without_workers_is_not_waited_for_forever(tmp_path, start, monkeypatch):
    monkeypatch.setattr("clear.data.pool.CLUSTER_TIMEOUT", 3)
    start("scheduler", "--host", "127.0.0.1", "--port", "0")
    with pytest.raises(ClearError, match="has no worker; start `dask"):
        list(parallel(len, ["a"], cluster=address_of(tmp_path)))


@pytest.fixture(scope="module")
def tested(tmp_path_factory) -> UnderTest:
    """A random model of the smoke profile's size that is made to restore; 24 questions to a shard."""
    few = ["sampling.batch=24", "sampling.flow_steps=2", "sampling.max_think_tokens=6", "runtime.threads=1"]
    config = from_dict(compose(["profile=smoke", *few]))
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder, config)
    return UnderTest(folder, "always", "bridge", config)


@pytest.fixture(scope="module")
def benchmark():
    """Eight pictures with three questions each, clean and with five degradations: 144 questions."""
    clean = [replace(sample, questions=sample.questions[:3]) for sample in scenes("bench", 8, 3, 256, 4)]
    return clean + list(degraded_samples([(s, *cell) for s in clean for cell in CELLS[::10]], 0.4, workers=1))


def test_a_cluster_that_an_option_names_is_not_explained_by_a_setting(tested, monkeypatch):
    monkeypatch.setattr("clear.data.pool.CLUSTER_TIMEOUT", 1)
    folder = respond.Folder(tested.folder, tested.config, cluster="tcp://127.0.0.1:1")
    with pytest.raises(ClearError) as error:
        list(folder.respond([respond.Shard(0, 0, ())]))
    said = "--cluster 'tcp://127.0.0.1:1' cannot be reached; start `dask scheduler` and `dask worker`, or leave out "
    assert str(error.value) == f"{said}--cluster."


def test_a_degraded_picture_is_compared_once_for_all_questions_about_it(tested, benchmark, monkeypatch):
    """Its PSNR and SSIM stand in the row of each; a restored picture belongs to one answer and is compared for it."""
    compared, psnr = [], metrics.psnr
    monkeypatch.setattr(metrics, "psnr", lambda one, two: (compared.append(two.tobytes()), psnr(one, two))[1])
    asked = tuple((s, q) for s in (benchmark[0], benchmark[8]) for q in s.questions)
    rows = answer_shard(Shard(tested, 0, asked)).rows
    assert len(rows) == 6 and [row["psnr_degraded"] is None for row in rows] == [True] * 3 + [False] * 3
    assert len({(row["psnr_degraded"], row["ssim_degraded"]) for row in rows[3:]}) == 1
    restored = sum(row["psnr_restored"] is not None for row in rows)
    assert len(compared) == 1 + restored and [row["restored"] for row in rows[3:]].count(True) == restored


@pytest.mark.slow
def test_a_benchmark_that_a_cluster_answers_has_the_rows_of_a_local_run(tmp_path, start, tested, benchmark):
    here, _ = answer(tested, benchmark)
    assert len(here) == 144 and all(row["restored"] for row in here)
    assert sum(row["restored_png"] is not None for row in here) == 6, "one picture per corruption and level"
    address, workers = two_workers(tmp_path, start)
    config = replace(tested.config, evaluate=replace(tested.config.evaluate, cluster=address))
    asked, killed = [], []

    def progress(number: int) -> None:
        asked.append(number)
        if not killed:
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].wait(10))

    there, seconds = answer(replace(tested, config=config), benchmark, progress)
    assert there == here and seconds > 0
    assert asked == [24] * 6 and killed == [-signal.SIGKILL] and workers[1].poll() is None


def test_a_question_has_the_same_noise_in_any_shard(tested, benchmark):
    few = benchmark[:4]
    config = replace(tested.config, sampling=replace(tested.config.sampling, batch=5))
    whole, _ = answer(tested, few)
    parts, _ = answer(replace(tested, config=config), few)
    degraded = [few[0], *benchmark[8:10]]
    assert [row["question"] for row in parts] == [row["question"] for row in whole]
    assert [row["output"] for row in parts] == [row["output"] for row in whole]
    one, _ = answer(tested, degraded)
    other, _ = answer(replace(tested, config=config), degraded)
    for a, b in zip(one[3:], other[3:], strict=True):
        assert a["psnr_restored"] == pytest.approx(b["psnr_restored"], abs=1e-3)


def test_votes_are_cast_by_other_restorations_and_in_any_shard_the_same(tested, benchmark, monkeypatch):
    """Each vote is an answer as one alone would be; what did not restore is not asked again."""
    drawn = engine._row_noise
    seeds = []
    monkeypatch.setattr(engine, "_row_noise", lambda seed, *rest: (seeds.append(seed), drawn(seed, *rest))[1])
    few = benchmark[8:12]  # twelve questions
    asked = sum(len(sample.questions) for sample in few)
    single, _ = answer(tested, few)
    assert seeds == [tested.config.seed + n for n in range(asked)]
    seeds.clear()
    three = replace(tested.config, evaluate=replace(tested.config.evaluate, votes=3))
    rows, _ = answer(replace(tested, config=three), few)
    assert len(seeds) == len(set(seeds)) == 3 * asked
    assert all(row["tokens"] > alone["tokens"] for row, alone in zip(rows, single, strict=True)), "of all votes"
    cast, seeds[:] = set(seeds), []
    small = replace(three, sampling=replace(three.sampling, batch=5))
    parts, _ = answer(replace(tested, config=small), few)
    assert set(seeds) == cast and [row["prediction"] for row in parts] == [row["prediction"] for row in rows]
    never, _ = answer(replace(tested, restore="never"), few)
    seeds.clear()
    assert answer(replace(tested, restore="never", config=three), few)[0] == never and not seeds


def test_most_votes_win_and_of_as_many_the_surer():
    def cast(prediction: str, probability: float) -> Answer:
        return Answer((f"{prediction} {probability}",), prediction, 4, probability, None, None)

    a, b, c = cast("a", 0.9), cast("b", 0.2), cast("b", 0.3)
    assert _elected([a, b, c]) == replace(b, tokens=12), "the first of the two that say so"
    assert _elected([b, a]) == replace(a, tokens=8) and _elected([c]) == c


def test_a_worker_with_another_model_or_other_code_is_refused(tested, benchmark):
    from clear.data.pool import _run_remote

    shard = Shard(replace(tested, digest="{}"), 0, ((benchmark[0], benchmark[0].questions[0]),))
    with pytest.raises(ClearError, match=r"does not find the model under test there; .* evaluate.cluster"):
        answer_shard(shard)
    assert _run_remote(len, ["abc"], code_digest()) == [3]
    with pytest.raises(ClearError, match=r"has other code of this project, in .*clear; start the workers again"):
        _run_remote(len, ["abc"], "other")
