"""Generation of small models in tests: its options, and what a run of it showed."""

import math

from clear.reasoning.engine import Options

OPTIONS = Options(flow_steps=3, shift=3.0, max_tokens=6, batch=64)


def ids_of(trajectories):
    return [[reply.ids for reply in t.replies] for t in trajectories]


def forwards(model):
    """Batch sizes of the language model's forwards from here on."""
    sizes = []
    model.language_model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


def decoding(found, model, limit):
    """Batch sizes that make the last replies: all rows, then those that have not ended with their k-th token."""
    replies = [t.replies[-1].ids for t in found]
    ended = [len(ids) if ids[-1] == model.config.special.eos else math.inf for ids in replies]
    sizes = [len(found), *(sum(end > k for end in ended) for k in range(1, limit))]
    return [size for size in sizes if size]
