"""The statistics of drift, on numbers alone and on single pictures: clear/drift below the command."""

import subprocess
import sys

import numpy as np
import pytest
from markdown_it import MarkdownIt
from scipy.stats import wasserstein_distance

from clear.data.images import encode_image
from clear.drift import power, resemblance
from clear.drift.measures import METRICS, SMALLEST, describe, measure
from clear.drift.night import Night, begun, with_night
from clear.drift.page import markdown
from clear.drift.proposal import Proposal
from clear.drift.resemblance import Share
from clear.drift.statistics import PERMUTATIONS, Decision, decide, p_value
from tests.conftest import ROOT
from tests.helpers.drifting import picture


def columns(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Columns that go together, have heavy tails, few values, or are the same everywhere."""
    one = rng.normal(size=rows)
    heavy = rng.standard_t(1.5, size=rows)
    few = rng.integers(0, 3, rows)
    return np.column_stack([one, one + 0.1 * rng.normal(size=rows), heavy, few, np.zeros(rows), one * heavy])


NAMES = ("one", "other", "heavy", "few", "same", "both")


def test_the_distance_is_wassersteins_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    night, before = columns(rng, 150), columns(rng, 400)
    night[:, 0] += 0.7
    found = decide(night, before, NAMES, 0.01, 0.95)
    for number, column in enumerate(found.columns):
        assert column.distance == pytest.approx(wasserstein_distance(night[:, number], before[:, number]), rel=1e-4)
        assert column.low <= column.high
    assert found.drifted and found.p == 1 / (1 + PERMUTATIONS)
    by_name = {column.name: column for column in found.columns}
    assert by_name["one"].p <= 0.01 < by_name["few"].p and by_name["same"].p == 1
    assert by_name["one"].low < 0.7 < by_name["one"].high


@pytest.mark.parametrize("size", [20, 100])
def test_nights_without_change_are_called_drifted_at_the_stated_rate(size):
    """Columns of every form, at 5 %: 400 nights have 20 alarms on average, more than 34 in one of a thousand runs."""
    rng = np.random.default_rng(size)
    alarms = 0
    for _ in range(400):
        rows = columns(rng, size + 150)
        alarms += p_value(rows[:size], rows[size:], 39, rng) <= 0.05
    assert 7 <= alarms <= 34


def test_one_column_of_many_that_has_moved_for_a_tenth_is_noticed():
    rng = np.random.default_rng(1)
    noticed = 0
    for _ in range(20):
        night, before = rng.normal(size=(200, 30)), rng.normal(size=(600, 30))
        night[:20, 17] += 6
        noticed += p_value(night, before, 99, rng) <= 0.01
    assert noticed >= 18


def test_the_statistics_need_neither_torch_nor_prefect():
    code = (
        "import sys, clear.drift.statistics; "
        "sys.exit(bool({'torch', 'prefect', 'scipy', 'pandas'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- resemblance ------------------------------------------------------------------------------------------------------

CELLS = (resemblance.UNDAMAGED, ("blur", "mid"), ("blur", "high"), ("noise", "mid"), ("rare", "high"))
CENTRES = np.array([[0, 0, 0], [2, 0, 0], [4, 0, 0], [0, 3, 0], [0, 0, 5]], float)


def cloud(rng: np.random.Generator, counts: list[int]) -> tuple[np.ndarray, list[resemblance.Cell]]:
    values = np.vstack([rng.normal(centre, 0.7, (n, 3)) for centre, n in zip(CENTRES, counts, strict=True)])
    return values, [cell for cell, n in zip(CELLS, counts, strict=True) for _ in range(n)]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    counts = [400, 80, 80, 80, resemblance.FEWEST - 1]
    return resemblance.fit(*cloud(rng, counts), *cloud(rng, counts))


def test_shares_are_found_whatever_the_classes_shares_were_in_training(model):
    rng = np.random.default_rng(1)
    values, _ = cloud(rng, [900, 0, 60, 40, 0])
    probabilities = model.probabilities(values)
    found = dict(zip(model.cells, resemblance.shares(probabilities, model.prior), strict=True))
    assert found["blur", "high"] == pytest.approx(0.06, abs=0.015)
    assert found["noise", "mid"] == pytest.approx(0.04, abs=0.015)
    assert found["blur", "mid"] < 0.02 and sum(found.values()) == pytest.approx(1)
    low, high = resemblance.share_intervals(probabilities, model.prior, 0.95)
    at = model.cells.index(("blur", "high"))
    assert low[at] < 0.06 < high[at]
    # Means of the probabilities, or counts of the likeliest class, lean towards the shares of training.
    assert abs(probabilities[:, at].mean() - 0.06) > abs(found["blur", "high"] - 0.06)


def test_the_classifier_is_right_calibrated_and_knows_no_class_of_a_few_pictures(model):
    assert ("rare", "high") not in model.cells and model.kinds == ("blur", "noise")
    values, cells = cloud(np.random.default_rng(2), [400, 200, 200, 200, 3])
    table = resemblance.confusion(model, values, cells)
    assert table.sum() == 1000 and np.trace(table) > 850
    assert resemblance.calibration_error(model, values, cells) < 0.05
    scores = model.scores(model.probabilities(values))
    assert scores.shape == (1003, 3)
    np.testing.assert_allclose(scores[:, :2].sum(axis=1), scores[:, 2], atol=1e-9)


def test_what_is_like_nothing_known_is_strange(model):
    rng = np.random.default_rng(3)
    known, _ = cloud(rng, [500, 50, 50, 50, 0])
    assert (model.strange(known) > 1).mean() < 0.03
    assert (model.strange(rng.normal([-6, -6, 6], 0.7, (50, 3))) > 1).all()


# --- power ------------------------------------------------------------------------------------------------------------


def test_power_is_simulated_and_said_as_a_number_of_pictures():
    rng = np.random.default_rng(0)
    clean, copies = rng.normal(size=(600, 4)), {("blur", "high"): rng.normal([6, 0, 0, 0], 1, (40, 4))}
    found = power.calibrate(clean, copies, 0.01, unchanged=100, nights=10, sizes=(20, 100), say=lambda line: None)
    assert found["false_alarms"]["0.01"] <= found["false_alarms"]["0.05"] <= 12
    few, many = (found["power"][size]["blur/high"] for size in ("20", "100"))
    assert few[0] < 0.8 <= many[1] and many == sorted(many)
    needed = dict(power.needed(found))
    assert needed[0.2] in (20, 100)
    assert power.enough(found | {"power": {"20": {"blur/high": [0, 0, 0.9]}}}).endswith(
        "more than 20 for 5%, more than 20 for 10%, 20 for 20%"
    )


def test_the_committed_figures_keep_the_rate_and_cover_the_sixteen():
    found = power.figures()
    setting = found["measured"]
    for level, alarms in found["false_alarms"].items():
        expected = float(level) * setting["unchanged"]
        assert alarms <= expected + 3.1 * np.sqrt(expected), "more than chance allows"
    assert found["false_alarms"][f"{setting['alpha']:g}"] <= 0.05 * setting["unchanged"]
    assert all(len(cells) == 48 for cells in found["power"].values())


# --- measures ---------------------------------------------------------------------------------------------------------


def of(image: np.ndarray) -> dict[str, float]:
    return dict(zip(METRICS, describe(image), strict=True))


def test_metrics_say_what_their_names_say():
    rng = np.random.default_rng(0)
    whole = picture(3, 128)
    plain = of(whole)
    noisy = of(np.clip(whole + rng.normal(0, 20, whole.shape), 0, 255).astype(np.uint8))
    striped = whole.copy()
    striped[::4] = 0
    assert noisy["noise"] > plain["noise"] + 0.3 and noisy["flat"] < plain["flat"]
    assert of(striped)["lines"] > plain["lines"] + 0.5 and of(striped)["rows"] > plain["rows"]
    assert of(whole // 8)["dark"] > 0.9 and of(whole // 2)["luminance"] < plain["luminance"]
    grey = np.repeat(whole.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    assert of(grey)["saturation"] == 0 and of(grey)["colours"] < 1 < plain["colours"]
    assert of(np.kron(whole[::8, ::8], np.ones((8, 8, 1), np.uint8)))["blocks"] > plain["blocks"] + 1


@pytest.mark.parametrize("colour", [0, 127, 255])
def test_a_picture_of_one_colour_has_finite_metrics(colour):
    assert np.isfinite(describe(np.full((SMALLEST, SMALLEST + 9, 3), colour, np.uint8))).all()


def test_format_and_size_alone_are_no_drift():
    whole = picture(4, 128)
    png, jpeg = (measure(("a", encode_image(whole, kind), 128)).values for kind in ("png", "jpeg"))
    assert png == jpeg
    big = measure(("a", encode_image(np.kron(whole, np.ones((2, 2, 1), np.uint8))), 128))
    assert (big.width, big.height) == (256, 256)
    np.testing.assert_allclose(big.values, png)


def test_what_is_no_picture_has_a_problem_and_no_metrics():
    bad = measure(("a.txt", b"hello", 64))
    assert bad.values == () and "5 bytes are not a complete image" in bad.problem and "a.txt" not in bad.problem
    small = measure(("b", encode_image(picture(1, SMALLEST)[: SMALLEST - 1]), 64))
    assert small.problem.startswith(f"{SMALLEST}x{SMALLEST - 1} px")


def test_the_name_of_a_place_does_not_end_the_block_of_commands():
    command = "clear watch 'a\n```\n# b'"
    proposal = Proposal("incoming", "no preset stands for them", (command,))
    night = Night("2026-01-01", "a", "training", "Drifted", "changed", 1, 1, 1, 1, proposal=proposal)
    (block,) = [token for token in MarkdownIt().parse(markdown(night)) if token.type in ("fence", "heading_open")]
    assert block.content == f"{command}\n"


def test_a_change_lasts_until_a_night_without_it_or_with_another_one():
    def night(day, verdict, damage="+fog", reference="training"):
        share = Share(damage, "mid", 0.3, 0.2, 0.4, 0.0, 9)
        decision = Decision(verdict == "Drifted", 0.001, 0.01, 9, 9, ()) if verdict != "TooFew" else None
        return Night(f"2026-01-0{day}", "a", reference, verdict, "", 9, 9, 9, 9, decision=decision, damage=(share,))

    rows = []
    firsts = []
    for one in (
        night(1, "Drifted"),
        night(2, "Drifted"),
        night(3, "TooFew"),
        night(4, "Drifted"),
        night(5, "NoDrift"),
        night(6, "Drifted"),
        night(7, "Drifted", damage="+blur"),
        night(8, "Drifted", damage="+blur", reference="@prod"),
    ):
        rows = with_night(rows, one)
        firsts.append(begun(rows, one).removeprefix("2026-01-0"))
    assert firsts == ["1", "1", "", "1", "", "6", "7", "8"]
    assert begun(rows, night(2, "Drifted")) == "2026-01-01", "a night that is judged again looks back alone"


def test_numbers_in_names_of_nights_are_ordered_as_numbers():
    names = ["2026-01-31", "2026-02-01", "week-1", "week-9", "week-9.1", "week-10"]
    share, decision = Share("+fog", "mid", 0.3, 0.2, 0.4, 0.0, 9), Decision(True, 0.001, 0.01, 9, 9, ())
    rows = []
    for name in (*reversed(names), "week-9"):
        verdict = "NoDrift" if name == "week-1" else "Drifted"
        one = Night(name, "a", "training", verdict, "", 9, 9, 9, 9, decision=decision, damage=(share,))
        rows = with_night(rows, one)
    assert [row["night"] for row in rows] == names
    assert begun(rows, one) == "week-9", "neither week-10, which was later, nor what was before week-1"
