"""Contract 1: one layout. A cached prefill and continuation equals one full forward, for every kind of segment."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.model.bagel import Contents
from clear.model.sequence import BRIDGE, IGNORE, LATENT, VIT, Gap, Image, Layout, Row, SpecialTokens, Text, layout
from tests.tiny import random_contents, tiny_model

SPECIAL = SpecialTokens(0, 1, 2, 3)


def _join(a, b):
    return Contents(a.vit + b.vit, a.latent + b.latent, a.time + b.time, a.bridge + b.bridge)


PREFIX = [Image(LATENT, (3, 3)), Image(VIT, (2, 2)), Text([10, 11, 12])]
CONTINUATIONS = {
    "text": [Text([13, 14])],
    "text without markers": [Text([13, 14], bos=False, eos=False)],
    "vit": [Image(VIT, (2, 2))],
    "latent": [Image(LATENT, (3, 3))],
    "bridge": [Image(BRIDGE, (3, 3))],
    "noise": [Image(LATENT, (3, 3), noise=True)],
    "gap, then text": [Gap(), Text([15])],
    "reply, picture, reply": [Text([13]), Image(BRIDGE, (3, 3)), Text([16, 17])],
}


@pytest.mark.parametrize("name", CONTINUATIONS)
def test_continuation_of_a_cache_equals_the_full_forward(name):
    model, _ = tiny_model()
    generator = torch.Generator().manual_seed(1)
    tail = CONTINUATIONS[name]
    first, second = random_contents(PREFIX, generator), random_contents(tail, generator)
    with torch.no_grad():
        whole, _ = layout([[*PREFIX, *tail]], model.config.special)
        hidden = model(whole, _join(first, second))
        expected = hidden.routing.merge(hidden.und, hidden.gen)[0]
        start, ends = layout([PREFIX], model.config.special)
        cache = model.new_cache(1, 4)
        model(start, first, cache, write=True)
        rest, _ = layout([tail], model.config.special, rope=ends)
        hidden = model(rest, second, cache, write=name != "noise")
        found = hidden.routing.merge(hidden.und, hidden.gen)[0]
    torch.testing.assert_close(found, expected[start.ids.shape[1] :], atol=1e-5, rtol=0)


def test_rows_of_different_length_do_not_disturb_each_other():
    model, _ = tiny_model()
    generator = torch.Generator().manual_seed(2)
    short, long = [Text([10])], [Text([11, 12, 13, 14, 15]), Image(VIT, (2, 2)), Text([16])]
    contents = random_contents(long, generator)
    with torch.no_grad():
        both, _ = layout([short, long], model.config.special)
        hidden = model(both, contents)
        found = hidden.routing.merge(hidden.und, hidden.gen)
        for i, segments in enumerate((short, long)):
            one, _ = layout([segments], model.config.special)
            alone = model(one, contents if i else Contents())
            expected = alone.routing.merge(alone.und, alone.gen)[0]
            torch.testing.assert_close(found[i, : len(expected)], expected, atol=1e-5, rtol=0)


def test_a_branch_equals_the_trunk_with_only_that_branch():
    model, _ = tiny_model()
    generator = torch.Generator().manual_seed(3)
    contents = random_contents(PREFIX, generator)
    branches = [[Text([13, 14], branch=1)], [Text([15], branch=2), Image(LATENT, (3, 3), noise=True, branch=2)]]
    noise = random_contents(branches[1], generator)
    with torch.no_grad():
        packed, _ = layout([[*PREFIX, *branches[0], *branches[1]]], model.config.special)
        hidden = model(packed, _join(contents, noise))
        found = hidden.routing.merge(hidden.und, hidden.gen)[0]
        for number, (branch, more) in enumerate(zip(branches, (Contents([], [], [], []), noise), strict=True), start=1):
            alone, _ = layout([[*PREFIX, *branch]], model.config.special)
            hidden = model(alone, _join(contents, more))
            expected = hidden.routing.merge(hidden.und, hidden.gen)[0]
            mine = found[packed.branch[0] == number]
            torch.testing.assert_close(mine, expected[alone.branch[0] == number], atol=1e-5, rtol=0)


def test_packed_samples_do_not_see_each_other():
    row = Row()
    row.add([Text([10, 11])], SPECIAL)
    row.add([Text([12])], SPECIAL)
    allowed = Layout.stack([row]).allowed()[0]
    assert allowed[:4, :4].equal(torch.ones(4, 4).tril().bool())
    assert not allowed[4:, :4].any()


def test_targets_are_the_scored_tokens_only():
    built, _ = layout([[Text([10, 11, 12], scored=[False, True, True, False])]], SPECIAL)
    assert built.target[0].tolist() == [IGNORE, 11, 12, IGNORE, IGNORE]


segments = st.lists(
    st.one_of(
        st.lists(st.integers(5, 14), min_size=1, max_size=4).map(Text),
        st.tuples(st.sampled_from([VIT, LATENT]), st.booleans()).map(lambda a: Image(a[0], (2, 2), noise=a[1])),
        st.just(Gap()),
    ),
    min_size=1,
    max_size=6,
).filter(lambda conversation: not all(isinstance(segment, Gap) for segment in conversation))


@given(segments)
@settings(max_examples=60, deadline=None)
def test_the_attention_rule(conversation):
    built, _ = layout([conversation], SPECIAL)
    allowed, noise, block = built.allowed()[0], built.noise[0], built.block[0]
    for q in range(len(noise)):
        for k in range(len(noise)):
            same_image = block[q] == block[k] and block[k] > 0
            expected = (q >= k or same_image) and (noise[k] == 0 or noise[q] == noise[k])
            assert bool(allowed[q, k]) == bool(expected)
    assert (built.rope[0][1:] >= built.rope[0][:-1]).all()
