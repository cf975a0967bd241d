"""Block masks give what dense masks give, for every kind of layout; gradients where a GPU computes them."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.errors import ClearError
from clear.model import flex, mot
from clear.model.mot import as_bias, attend
from clear.model.sequence import BRIDGE, LATENT, VIT, Gap, Image, SpecialTokens, Text, layout
from tests.tiny import random_contents, tiny_model

SPECIAL = SpecialTokens(0, 1, 2, 3)
PROMPT = [Image(LATENT, (3, 3)), Image(VIT, (2, 2)), Text([10, 11, 12])]
LONG = Text([5 + i % 9 for i in range(150)])
RESTORING = [*PROMPT, Text([13]), Image(LATENT, (3, 3), noise=True), Image(LATENT, (3, 3), noise=True)]
LAYOUTS = {
    "text": [[Text([10, 11])]],
    "prompt": [PROMPT],
    "noisy splits": [[*RESTORING, Image(LATENT, (3, 3)), Image(VIT, (3, 3), noise=True), Text([14])]],
    "bridge and gap": [[Image(LATENT, (3, 3)), Gap(), Text([10]), Image(BRIDGE, (3, 3)), Text([11])]],
    "branches": [[*PROMPT, Text([13], branch=1), Text([15], branch=2), Image(LATENT, (3, 3), noise=True, branch=2)]],
    "rows with padding": [PROMPT, [Text([10])], [*RESTORING, LONG]],
    "longer than a block": [[LONG, *RESTORING, LONG, Image(LATENT, (4, 4)), LONG]],
}
PACKED = {"packed": [[0, 2], [1]], "packed in one row": [[2, 0, 1]]}


@pytest.fixture(autouse=True)
def unfused():
    """torch says at every uncompiled call that it is slow; on the CPU that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
        yield


def _built(name):
    return layout(LAYOUTS.get(name) or LAYOUTS["rows with padding"], SPECIAL, packed=PACKED.get(name))[0]


@pytest.mark.parametrize("name", [*LAYOUTS, *PACKED])
def test_the_blocks_hold_the_rule(name):
    """Every pair of a full block is allowed, every allowed pair lies in a listed block, and the rest asks the rule."""
    built = _built(name)
    mask, allowed = flex.block_mask(built), built.allowed()
    rows, size = built.ids.shape
    full = torch.zeros_like(allowed)
    listed = torch.zeros_like(allowed)
    for kind, count, indices in (
        (listed, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for b in range(rows):
            for q in range(count.shape[2]):
                for k in indices[b, 0, q, : int(count[b, 0, q])].tolist():
                    kind[b, q * flex.BLOCK : (q + 1) * flex.BLOCK, k * flex.BLOCK : (k + 1) * flex.BLOCK] = True
    assert not (full & ~allowed).any() and not (allowed & ~full & ~listed).any() and not (full & listed).any()
    index = torch.arange(size)
    asked = mask.mask_mod(torch.arange(rows)[:, None, None], None, index[None, :, None], index[None, None, :])
    assert asked.equal(allowed)
    assert flex.block_mask(built) is mask, "one mask per layout"


@pytest.mark.parametrize("name", [*LAYOUTS, *PACKED])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_over_blocks_equals_the_dense_one(name, kv_heads):
    built = _built(name)
    generator = torch.Generator().manual_seed(1)
    rows, size = built.ids.shape
    q = torch.randn(rows, 4, size, 16, generator=generator)
    k, v = torch.randn(2, rows, kv_heads, size, 16, generator=generator)
    found = flex.attend_blocks(q, k, v, flex.block_mask(built))
    torch.testing.assert_close(found, attend(q, k, v, as_bias(built.allowed())), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("one_line", [False, True], ids=["a line per query", "one line for all"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_kernel_gives_the_values_and_gradients_of_plain_attention(kv_heads, one_line, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(2, 4, 37, 16, generator=generator), *torch.randn(2, 2, kv_heads, 50, 16, generator=generator)
    allowed = torch.rand(2, 1 if one_line else 37, 50, generator=generator) < 0.4
    allowed[..., 0] = True
    upstream, found = torch.randn(2, 4, 37, 16, generator=generator), []
    if not one_line:  # padding sees nothing, and nothing that is scored sees it
        allowed[1, -1], upstream[1, :, -1] = False, 0
    for most in (mot.SCORES, 0):
        monkeypatch.setattr(mot, "SCORES", most)
        inputs = [x.clone().requires_grad_() for x in given]
        mixed = attend(*inputs, as_bias(allowed))
        mixed.backward(upstream)
        found.append([mixed.detach(), *(x.grad for x in inputs)])
    for one, plain in zip(*reversed(found), strict=True):
        torch.testing.assert_close(one, plain, atol=1e-5, rtol=1e-5)


segments = st.lists(
    st.one_of(
        st.lists(st.integers(5, 14), min_size=1, max_size=60).map(Text),
        st.tuples(st.sampled_from([VIT, LATENT]), st.booleans(), st.integers(1, 9)).map(
            lambda a: Image(a[0], (a[2], a[2]), noise=a[1])
        ),
    ),
    min_size=1,
    max_size=4,
)


@given(st.lists(segments, min_size=1, max_size=4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_packing_gives_the_same_values(conversations, one_row):
    numbers = list(range(len(conversations)))
    built, _ = layout(conversations, SPECIAL, packed=[numbers] if one_row else None)
    q = torch.randn(built.ids.shape[0], 2, built.ids.shape[1], 8, generator=torch.Generator().manual_seed(2))
    found = flex.attend_blocks(q, q, q.flip(-1), flex.block_mask(built))
    expected = attend(q, q, q.flip(-1), as_bias(built.allowed()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [None, [[1, 0]]])
def test_the_model_gives_the_same_with_either(packed, monkeypatch):
    model, _ = tiny_model()
    generator = torch.Generator().manual_seed(3)
    talks = [[*RESTORING, Image(BRIDGE, (3, 3)), LONG], PROMPT]
    order = [talks[i] for row in packed or [[0], [1]] for i in row]
    contents = random_contents([segment for talk in order for segment in talk], generator)
    built, _ = layout(talks, model.config.special, packed=packed)
    found = []
    for choice in ("dense", "flex"):
        model.language_model.attention = choice
        with torch.no_grad():
            hidden = model(built, contents)
        found.append(hidden.routing.merge(hidden.und, hidden.gen)[built.valid])
    assert built.blocks is not None, "the second went over blocks"
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_the_choice_follows_the_device_unless_it_is_forced():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [flex.wanted("auto", place) for place in (cpu, cuda)] == [False, True]
    assert flex.wanted("flex", cpu) and not flex.wanted("dense", cuda)


def test_training_over_blocks_on_the_cpu_is_refused():
    model, _ = tiny_model()
    model.language_model.attention = "flex"
    built, _ = layout([[Text([10, 11])]], model.config.special)
    with pytest.raises(ClearError, match=r"runtime.attention = flex has a backward pass on CUDA only"):
        model(built, random_contents([], torch.Generator()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the compiled kernel needs a GPU")
@pytest.mark.parametrize("name", [*LAYOUTS, *PACKED])
def test_compiled_blocks_have_the_dense_values_and_gradients(name):
    built = _built(name).to("cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    rows, size = built.ids.shape
    q = torch.randn(rows, 4, size, 64, generator=generator, device="cuda", requires_grad=True)
    k, v = (torch.randn(rows, 2, size, 64, generator=generator, device="cuda", requires_grad=True) for _ in range(2))
    found = []
    for run in (
        lambda: flex.attend_blocks(q, k, v, flex.block_mask(built)),
        lambda: attend(q, k, v, as_bias(built.allowed())),
    ):
        out = run()
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
