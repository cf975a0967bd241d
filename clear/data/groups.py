"""What belongs together because pairs link it: images of minimal pairs, rows about one picture."""

from collections.abc import Sequence

import numpy as np


def connected(count: int, links: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    """The group (int64, 0…) of each of `count` nodes (0…), linked by pairs of nodes (E, 2), directly or through others.

    Groups are numbered by their first nodes, whatever the order of the links.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not count:
        return np.zeros(0, dtype=np.int64)
    ends = np.asarray(links, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(count, count))
    _, found = connected_components(graph, directed=False)
    _, first, group = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]
