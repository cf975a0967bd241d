"""Which option a reply chooses, held by a golden table, and the names of degraded files, read as they are written."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clear.bench.vlmeval import names
from clear.bench.vlmeval.options import REFUSED, answer_in, chosen
from clear.degradation.corruptions import CORRUPTIONS
from clear.errors import ClearError
from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / "tests/golden/options.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_the_option_that_a_reply_chooses(case):
    """`upstream` is what VLMEvalKit's own rule gives at the commit that clear.bench.vlmeval.options names."""
    assert chosen(answer_in(case["reply"]), case["options"]) == case["expected"]
    assert ("departure" in case) == (case["expected"] != case["upstream"])


def test_options_that_contain_each_other_are_not_guessed():
    assert chosen("two cups", ["two", "two cups"]) == ""
    assert chosen("B", ["x"]) == "", "a letter beyond the options chooses nothing"


@given(st.integers(2, 10), st.data())
def test_a_letter_alone_chooses_its_option_whatever_stands_around_it(count, data):
    options = [f"option text {n}" for n in range(count)]
    letter = data.draw(st.sampled_from("ABCDEFGHIJ"[:count]))
    form = data.draw(
        st.sampled_from(["{}", "({})", "**{}**", "{}.", "the answer is {}", "<answer>{}</answer>", "Answer: {}"])
    )
    assert chosen(answer_in(form.format(letter)), options) == letter


@given(st.text(), st.lists(st.text(max_size=9), min_size=1, max_size=10))
def test_any_reply_chooses_an_option_or_nothing(reply, options):
    assert chosen(answer_in(reply), options) in ("", REFUSED, *"ABCDEFGHIJ"[: len(options)])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("CLEAR_MMStar", ("CLEAR_MMStar", "clean", "clean")),
        ("CLEAR_MMStar_LOW_LEVEL_HIGH", ("CLEAR_MMStar", "mixed", "high")),
        ("my_model_MMBench_DEV_EN_V11_gaussian_noise_MID", ("my_model_MMBench_DEV_EN_V11", "gaussian_noise", "mid")),
        ("M_MMBench_dev_ar", ("M_MMBench_dev_ar", "clean", "clean")),
        ("M_MME-RealWorld", ("M_MME-RealWorld", "clean", "clean")),
        ("M_MMStar_MINI_dark_LOW", ("M_MMStar_MINI", "dark", "low")),
        ("x_some_bench_LOW", ("x_some_bench", "mixed", "low")),
    ],
)
def test_benchmark_corruption_and_level_are_in_the_name(name, place):
    assert names.parsed(name) == place


@pytest.mark.parametrize("bench", ["MMBench_DEV_EN_V11", "MMVet", "MMVP", "CV-Bench-2D", "MMStar", "RealWorldQA"])
def test_names_of_degraded_files_are_read_as_they_are_written(bench):
    for severity in names.LEVELS:
        for corruption in (*CORRUPTIONS, names.MIXED):
            name = names.target_name(bench, corruption, severity)
            assert names.parsed(f"CLEAR_{name}") == (f"CLEAR_{bench}", corruption, severity)
    theirs = {names.target_name(bench, corruption, "high", authors=True): corruption for corruption in CORRUPTIONS}
    assert {f"{bench}_jpeg_compression", f"{bench}_dark_illumination", f"{bench}_lens_blur"} < set(theirs)
    assert len(theirs) == 16
    assert all(names.parsed(f"CLEAR_{name}") == (f"CLEAR_{bench}", own, "high") for name, own in theirs.items())
    with pytest.raises(ClearError, match="at level high, not low"):
        names.target_name(bench, "dark", "low", authors=True)


VLMEVAL = """
import runpy
class ImageMCQDataset:
    DATASET_URL = {"MMStar": "https://x/MMStar.tsv", "MMVP": "https://x/MMVP.tsv"}
    supported_datasets = classmethod(lambda cls: list(cls.DATASET_URL))
class CustomMCQDataset(ImageMCQDataset): pass
class CVBench(ImageMCQDataset):
    DATASET_URL = {"CV-Bench-2D": "https://x/CV-Bench-2D.tsv"}
class MMVet(ImageMCQDataset):
    DATASET_URL = {"MMVet": "https://x/MMVet.tsv"}
DATASET_CLASSES = [ImageMCQDataset, CVBench, MMVet, CustomMCQDataset]
"""


def test_the_snippet_that_registers_degraded_sets_gives_each_the_class_of_its_benchmark(tmp_path):
    """VLMEvalKit itself is not installed: its register of classes and names, and nothing else, is stood in for."""
    (block,) = (
        part for part in (ROOT / "docs/DATA.md").read_text().split("```") if part.startswith("python\n# run_mmd.py")
    )
    (tmp_path / "run_mmd.py").write_text(block.removeprefix("python"))
    (tmp_path / "vlmeval/dataset").mkdir(parents=True)
    (tmp_path / "vlmeval/dataset/__init__.py").write_text(VLMEVAL)
    (tmp_path / "vlmeval/smp.py").write_text("def LMUDataRoot(): return 'lmu'\n")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom vlmeval.dataset import DATASET_CLASSES\nfor name in sys.argv[1:]:\n"
        "    print(next(kind.__name__ for kind in DATASET_CLASSES if name in kind.supported_datasets()))\n"
    )
    (tmp_path / "lmu").mkdir()
    made = [names.target_name("MMVP", "dark", "high", authors=True), names.target_name("CV-Bench-2D", "", "low")]
    made += [names.target_name("MMVet", "jpeg", "mid"), "MMStar"]
    for name in made:
        (tmp_path / f"lmu/{name}.tsv").touch()
    done = subprocess.run([sys.executable, "run_mmd.py", *made], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["ImageMCQDataset", "CVBench", "MMVet", "ImageMCQDataset"], done.stderr
