"""Groups of what pairs link, against networkx, and the orders that those who ask for them rely on."""

import networkx as nx
import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.bench import statistics
from clear.data.groups import connected
from clear.data.records import Question, Sample
from clear.stages.mmd_bench import _pair_groups

linked = st.integers(1, 30).flatmap(
    lambda count: st.tuples(
        st.just(count), st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=40)
    )
)


@settings(deadline=None)
@given(linked)
def test_groups_are_those_of_networkx_numbered_by_their_first_nodes(given_links):
    count, links = given_links
    graph = nx.Graph(links)
    graph.add_nodes_from(range(count))
    expected = sorted(sorted(nodes) for nodes in nx.connected_components(graph))
    found = connected(count, links)
    assert found.dtype == np.int64
    assert [np.flatnonzero(found == number).tolist() for number in range(found.max() + 1)] == expected
    assert connected(count, links[::-1]).tolist() == found.tolist()


def test_no_node_and_no_link():
    assert connected(0, []).tolist() == [] and connected(3, []).tolist() == [0, 1, 2]


def test_a_cluster_has_the_place_of_the_sample_that_comes_first_in_the_frame():
    """Bootstrap draws go by these numbers: a pair that begins with its later name is numbered by that name."""
    rows = [("d", "p"), ("c", ""), ("a", "p"), ("b", ""), ("e", "q"), ("f", "q"), ("d", "p"), ("a", "")]
    frame = pd.DataFrame(rows, columns=["sample", "pair"])
    assert statistics.clusters(frame).tolist() == [2, 1, 2, 0, 3, 3, 2, 2]
    assert statistics.clusters(frame.iloc[::-1]).tolist() == [2, 2, 3, 3, 0, 2, 1, 2]
    assert statistics.clusters(frame[:0]).tolist() == []
    several = pd.DataFrame([("c", "q"), ("a", "p"), ("b", ""), ("c", "p"), ("d", "q")], columns=["sample", "pair"])
    assert statistics.clusters(several).tolist() == [0, 0, 1, 0, 0], "its first pair by id is p, and a is first there"


def test_images_that_share_a_pair_are_one_group():
    def sample(name: str, *pairs: str) -> Sample:
        questions = tuple(Question(f"{name}{n}", "kind", "?", "a", pair=pair) for n, pair in enumerate(pairs))
        return Sample(name, "source", "bench", b"", "", questions)

    samples = [sample("d", "p"), sample("c"), sample("a", "p", "q"), sample("b", "q", ""), sample("e", "")]
    assert _pair_groups(samples) == [["a", "b", "d"], ["c"], ["e"]]
