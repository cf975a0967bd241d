"""The decision to restore, learned from what a model's own two paths are worth (clear/training/bridge.py)."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from clear.config import load
from clear.model.sequence import IGNORE
from clear.model.tokenizer import encode
from clear.reasoning import engine, grammar
from clear.stages import bridge
from clear.training.bridge import Decision, decision_loss, decisions
from tests.helpers.bridging import bridge_workspace
from tests.tiny import tiny_model, tiny_prompts

SCORES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60)


@settings(deadline=None)
@given(SCORES, st.floats(0, 1))
def test_the_least_expected_cost_is_to_restore_where_the_gain_is_above_the_price(scores, price):
    direct, restored = zip(*scores, strict=True)
    found = {d.number: d for d in decisions(direct, restored, price)}
    for n, (a, b) in enumerate(scores):
        gain = b - a - price
        if gain == 0:
            assert n not in found, "nothing to learn"
            continue
        assert found[n].restore is (gain > 0)
        assert found[n].weight == abs(gain)
    # Equal prompts are told apart by nothing, so the best that can be learned of them is the sign of the summed gain.
    total = sum(d.weight if d.restore else -d.weight for d in found.values())
    assert total == pytest.approx(sum(restored) - sum(direct) - price * len(scores), abs=1e-9)


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
    chosen = [Decision(0, True, 0.7), Decision(1, False, 0.2)]

    def traces(index):
        return torch.tensor(7.0), {"traces": float(len(index))}

    torch.manual_seed(0)
    (total, figures), seen = seen_by(
        model, decision_loss(model, tokenizer, prompts, chosen, traces, share=1.0), [0, 1, 2, 3]
    )
    built = seen[0]
    direct, trigger = encode(tokenizer, grammar.direct_prefix()), encode(tokenizer, grammar.restore_reply())
    place = grammar.fork(direct, trigger)
    assert (built.target != IGNORE).sum(1).tolist() == [1] * 4
    assert set(built.target[built.target != IGNORE].tolist()) <= {direct[place], trigger[place]}
    assert total.item() == pytest.approx(figures["decision"])
    assert decision_loss(model, tokenizer, prompts, chosen, traces, share=0.0)([0, 1]) == (
        torch.tensor(7.0),
        {"traces": 2.0},
    )


def test_a_decision_is_drawn_as_often_as_it_weighs():
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 2)
    chosen = [Decision(0, True, 0.9), Decision(1, False, 0.3)]
    torch.manual_seed(0)
    _, seen = seen_by(model, decision_loss(model, tokenizer, prompts, chosen, lambda index: None, share=1.0), [0] * 400)
    trigger = encode(tokenizer, grammar.restore_reply())[len(engine.deciding(tokenizer)[0])]
    drawn = seen[0].target[seen[0].target != IGNORE]
    assert (drawn == trigger).float().mean().item() == pytest.approx(0.75, abs=0.07)


def test_the_engine_follows_what_was_learned():
    """Two pictures with opposite labels: after the training one is restored and the other is not."""
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 2)
    chosen = [Decision(0, True, 0.7), Decision(1, False, 0.2)]
    loss = decision_loss(model, tokenizer, prompts, chosen, lambda index: None, share=1.0)
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


@pytest.mark.slow
def test_the_stage_learns_the_decision_in_the_output_head_alone(tmp_path, monkeypatch):
    """Otherwise few questions are learned by heart; what the phases before made of the model stays."""
    small = ["profile=smoke", "runtime.threads=1", "runtime.device=cpu", "runtime.precision=float32"]
    small += [f"bridge.{phase}={{steps: 2, batch: 2, warmup: 1}}" for phase in ("distill", "answer")]
    made = {}
    for steps in (0, 4):
        folder = tmp_path / str(steps)
        bridge_workspace(folder, [*small, "sampling.flow_steps=1", f"bridge.decide={{steps: {steps}, batch: 2}}"])
        monkeypatch.chdir(folder)
        bridge.run(load())
        made[steps] = {name: load_file(folder / f"data/models/bridge/{name}.safetensors") for name in ("ema", "bridge")}
    figures = json.loads(Path("data/metrics/bridge.json").read_text())["decisions"]
    assert figures["questions"] >= figures["differing"] and figures["either_accuracy"] >= figures["direct_accuracy"]
    for name in ("ema", "bridge"):
        changed = {key for key, value in made[0][name].items() if not torch.equal(value, made[4][name][key])}
        assert changed == ({"language_model.lm_head.weight"} if name == "ema" else set())
