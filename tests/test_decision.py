"""The decision to restore, learned from where a model's own two paths differ (clear/training/bridge.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.model.sequence import IGNORE
from clear.model.tokenizer import encode
from clear.reasoning import engine, grammar
from clear.training.bridge import Decision, decision_loss, decisions
from tests.tiny import tiny_model, tiny_prompts

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@settings(deadline=None)
@given(OUTCOMES, st.floats(0, 1))
def test_where_one_path_alone_is_right_it_is_the_label(outcomes, price):
    direct, restored = zip(*outcomes, strict=True)
    numbers = list(range(len(outcomes)))
    chosen = {d.prompt: d.restore for d in decisions(numbers, direct, restored, price, seed=1)}
    for n, (a, b) in enumerate(outcomes):
        if a != b:
            assert chosen[n] is b
        else:
            assert chosen.get(n, False) is False, "no difference is never a reason to restore"
    more = {d.prompt for d in decisions(numbers, direct, restored, min(1.0, price + 0.2), seed=1)}
    assert set(chosen) <= more


def test_the_price_is_the_share_of_ties_that_speak_against_a_restoration():
    ties = decisions(range(4000), [True] * 4000, [True] * 4000, 0.3, seed=5)
    assert len(ties) == pytest.approx(1200, abs=100)
    assert not decisions(range(50), [False] * 50, [False] * 50, 0.0, seed=5)


def seen_by(model, loss, index):
    """Layouts that the model was given for one loss."""
    seen, whole = [], model.forward

    def spy(built, *rest, **named):
        seen.append(built)
        return whole(built, *rest, **named)

    model.forward = spy
    try:
        return loss(index), seen
    finally:
        model.forward = whole


def test_a_decision_is_one_token_and_the_other_batches_are_traces():
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 2)
    chosen = [Decision(prompts[0], True), Decision(prompts[1], False)]

    def traces(index):
        return torch.tensor(7.0), {"traces": float(len(index))}

    torch.manual_seed(0)
    (total, figures), seen = seen_by(model, decision_loss(model, tokenizer, chosen, traces, share=1.0), [0, 1, 2, 3])
    built = seen[0]
    direct, trigger = encode(tokenizer, grammar.direct_prefix()), encode(tokenizer, grammar.restore_reply())
    place = grammar.fork(direct, trigger)
    assert (built.target != IGNORE).sum(1).tolist() == [1] * 4
    assert set(built.target[built.target != IGNORE].tolist()) <= {direct[place], trigger[place]}
    assert total.item() == pytest.approx(figures["decision"])
    assert decision_loss(model, tokenizer, chosen, traces, share=0.0)([0, 1]) == (torch.tensor(7.0), {"traces": 2.0})


def test_the_engine_follows_what_was_learned():
    """Two pictures with opposite labels: after the training one is restored and the other is not."""
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 2)
    chosen = [Decision(prompts[0], True), Decision(prompts[1], False)]
    loss = decision_loss(model, tokenizer, chosen, lambda index: None, share=1.0)
    first = [encode(tokenizer, text) for text in (grammar.restore_reply(), grammar.direct_prefix())]
    place = grammar.fork(*first)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(60):
        optimiser.zero_grad()
        total, figures = loss(list(range(8)))
        total.backward()
        optimiser.step()
    assert figures["decision_accuracy"] == 1.0
    # The engine is made to say what comes before the deciding token, which nothing here has taught.
    with torch.no_grad():
        rows = engine.prefill(model, prompts)
    fed = torch.tensor([[model.config.special.bos, *first[0][:place]]] * 2)
    with torch.no_grad():
        logits = engine.feed(model, rows, fed)
    assert logits.argmax(-1).tolist() == [first[0][place], first[1][place]]
