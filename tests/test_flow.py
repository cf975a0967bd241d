"""The Prefect flow runs the stages of a real DVC project in order, says what was cached, and stops at a failure."""

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.pipeline import pipeline, stages_in_order


@pytest.fixture(scope="module", autouse=True)
def server():
    with prefect_test_harness(server_startup_timeout=60):
        yield


def test_stages_come_after_what_they_depend_on(project):
    order = stages_in_order(project)
    assert len(order) == len(set(order)) >= 2
    assert order.index("source") < max(i for i, name in enumerate(order) if name.startswith("evaluate"))


def test_a_second_run_is_cached(project):
    (project / "code/source.txt").write_text("changed")
    first = pipeline(str(project))
    assert "Ran" in first.values()
    assert set(pipeline(str(project)).values()) == {"Cached"}


def test_a_failing_stage_ends_the_flow_and_names_itself(project):
    (project / "code/source.txt").unlink()
    with pytest.raises(Exception, match="stage source failed"):
        pipeline(str(project))
