"""Images of different sizes, whose ViT and latent grids differ too, in one batch: losses, engine and scoring."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clear.config import compose, from_dict
from clear.data.images import decode_image, encode_image
from clear.data.records import Question
from clear.model import flow
from clear.model.bagel import Contents
from clear.model.images import ImageBank
from clear.model.sequence import BRIDGE, IGNORE, LATENT, VIT, Image, Text, layout
from clear.model.tokenizer import encode
from clear.reasoning import grammar
from clear.reasoning.answering import Answerer
from clear.reasoning.engine import Options, generate
from clear.schema import Phase
from clear.training.bridge import imitation_loss, own_latents
from clear.training.loop.run import StageRun
from clear.training.loop.trainer import optimise
from clear.training.rl import scoring
from clear.training.robust import robust_loss
from clear.training.sft import (
    TraceWeights,
    direct_loss,
    restoration_loss,
    set_trainable,
    trace_loss,
    trace_weights,
)
from tests.helpers.mixed_sizes import parts

OPTIONS = Options(flow_steps=3, max_tokens=6, batch=64)


def test_restoration_loss_is_the_token_mean_over_all_images(config, images):
    model, _, _, data = parts("direct", config, images)
    index = [0, 1, 3]
    torch.manual_seed(3)
    found, _ = restoration_loss(model, data)(index)
    torch.manual_seed(3)
    times = flow.draw_times(len(index))
    clean = [data.clean.latents[i] for i in index]
    noise = torch.randn(sum(map(len, clean)), clean[0].shape[1]).split([len(z) for z in clean])
    errors = []
    for n, t, z, e in zip(index, times, clean, noise, strict=True):
        contents = Contents(vit=[], latent=[], time=[])
        noisy = Image(LATENT, data.clean.latent_grid(n), noise=True)
        built, _ = layout([[*data.open_row(n, contents), Text(data.trigger), noisy]], model.config.special)
        contents.latent.append((1 - t) * z + t * e)
        contents.time.append(t.item())
        errors.append(((model.velocities(model(built, contents), built) - (e - z)) ** 2).flatten())
    torch.testing.assert_close(found, torch.cat(errors).mean(), atol=1e-5, rtol=1e-5)
    found.backward()
    assert model.llm2vae.weight.grad.abs().sum() > 0


def test_a_reply_beside_a_restoration_is_learned_as_if_either_were_alone(config, images):
    model, tokenizer, _, data = parts("direct", config, images)
    data.direct = [encode(tokenizer, "<think> a b c </think> <answer> c </answer>") for _ in data.rows]
    index = [0, 1, 3]
    for n in index[1:]:
        data.reply_1[n], data.reply_2[n] = data.direct[n], None

    def measured(loss, numbers):
        model.zero_grad()
        torch.manual_seed(3)
        total, figures = loss(numbers)
        total.backward()
        return figures, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    both, gradients = measured(restoration_loss(model, data, replies=True), index[1:])
    alone, restoring = measured(restoration_loss(model, data), index[1:])
    direct, answering = measured(direct_loss(model, data), index[1:])
    assert both == pytest.approx(alone | direct, rel=1e-5)
    for name, value in gradients.items():
        zero = torch.zeros_like(value)
        expected = restoring.get(name, zero) + answering.get(name, zero)
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4, msg=name)

    # A trace loss's row 1 is shown the restoration its trace has not; its own reply is one branch more.
    weights = TraceWeights(LATENT, other_path=1.0)
    shown, _ = measured(trace_loss(model, data, weights), [1])
    both, _ = measured(trace_loss(model, data, replace(weights, both_paths=True)), [1])
    alone, _ = measured(direct_loss(model, data), [1])
    tokens = len(data.restored[1]) + 1, len(data.direct[1]) + 1
    assert both["mse"] == pytest.approx(shown["mse"], rel=1e-5)
    assert both["ce"] == pytest.approx(np.average([shown["ce"], alone["ce"]], weights=tokens), rel=1e-5)


def test_the_path_a_trace_did_not_choose_is_learned_behind_its_deciding_token(config, images):
    model, tokenizer, _, data = parts("direct", config, images)
    data.direct = [encode(tokenizer, "<think> a b c </think> <answer> c </answer>") for _ in data.rows]
    data.reply_1[1], data.reply_2[1] = data.direct[1], None  # trace 0 restores, trace 1 answers directly
    place = grammar.fork(data.direct[0], data.trigger)
    assert data.direct[0][:place] == data.trigger[:place] and data.direct[0][place] != data.trigger[place]

    def learned(loss, n) -> list[list[int]]:
        """The learned tokens of trace n, branch by branch."""
        seen = []
        whole = model.forward

        def spy(built, *rest, **named):
            seen.append(built)
            return whole(built, *rest, **named)

        model.forward = spy
        try:
            loss([n])
        finally:
            model.forward = whole
        built = seen[0]
        return [built.target[0][(built.branch[0] == b) & (built.target[0] != IGNORE)].tolist() for b in (1, 2)]

    eos = model.config.special.eos
    direct, restored, trigger = [*data.direct[0], eos], [*data.restored[0], eos], [*data.trigger, eos]
    tail = direct[place + 1 :]
    both = TraceWeights(LATENT, other_path=1.0, both_paths=True)
    undecided = replace(both, decide=False)
    assert learned(restoration_loss(model, data, replies=True), 0) == [trigger, tail]
    assert learned(restoration_loss(model, data, replies=True), 1) == [[], direct]
    assert learned(trace_loss(model, data, both), 0) == [trigger + restored, tail]
    assert learned(trace_loss(model, data, both), 1) == [restored, direct]
    assert learned(trace_loss(model, data, undecided), 0) == learned(trace_loss(model, data, undecided), 1)
    assert learned(trace_loss(model, data, undecided), 0) == [restored, tail]
    # Only with the other path beside it does a trace leave its decision to others.
    alone = replace(undecided, other_path=0.0)
    assert measured_ce(trace_loss(model, data, alone), 0) == measured_ce(
        trace_loss(model, data, TraceWeights(LATENT)), 0
    )


def test_a_picture_without_an_answer_is_restored_and_in_no_batch_of_replies(config, images):
    model, tokenizer, _, data = parts("direct", config, images)
    data.direct = [encode(tokenizer, "<think> a b c </think> <answer> c </answer>") for _ in data.rows]
    data.learned = [2]

    def measured(loss, numbers):
        torch.manual_seed(3)
        return {name: value for name, value in loss(numbers)[1].items() if name != "token_accuracy"}

    restored = measured(restoration_loss(model, data), [0, 1, 2])
    # The other losses count the traces that may be learned: their number 0 is trace 2.
    learned = measured(direct_loss(model, data), [0]), measured(trace_loss(model, data, TraceWeights(LATENT)), [0])
    data.learned = [0, 1, 2]
    assert restored == measured(restoration_loss(model, data), [0, 1, 2])
    assert learned == (
        measured(direct_loss(model, data), [2]),
        measured(trace_loss(model, data, TraceWeights(LATENT)), [2]),
    )


def measured_ce(loss, n: int) -> float:
    """The text loss of trace n, with the same random numbers each time."""
    torch.manual_seed(3)
    return loss([n])[1]["ce"]


@pytest.mark.parametrize("stride", [0, 1])
@pytest.mark.parametrize(("bridge", "feedback"), [("direct", LATENT), ("direct", VIT), ("mlp", BRIDGE)])
def test_trace_loss_of_a_batch_is_the_mean_over_its_images(config, images, bridge, feedback, stride):
    model, _, _, data = parts(bridge, config, images)
    loss = trace_loss(model, data, TraceWeights(feedback, mse=0.0, distill=0.4, stride=stride))
    total, figures = loss([0, 1, 3])
    alone = [loss([n])[1] for n in (0, 1, 3)]
    assert ("distill" in figures) == (feedback == LATENT)
    for name in figures:
        assert figures[name] == pytest.approx(sum(one[name] for one in alone) / 3, rel=1e-4)
    total.backward()
    assert model.vae2llm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["direct", "mlp"])
def test_the_answers_through_a_direct_bridge_are_learned_beside_the_picture(config, images, kind):
    """What reads the latent draws it too: it learns the velocity on the same rows. The mlp bridge leaves it frozen."""
    model, _, _, data = parts(kind, config, images)
    settings = from_dict(
        compose(["profile=smoke", f"bridge.kind={kind}", "sft.mse_weight=0.5", "sft.distill_weight=0.4"])
    )
    total, figures = trace_loss(model, data, trace_weights(settings, bridge=True), {1: torch.randn(8, 4)})([0, 1, 3])
    total.backward()
    drawn = model.llm2vae.weight.grad is not None and bool(model.llm2vae.weight.grad.abs().sum() > 0)
    assert drawn is ("mse" in figures) is ("distill" in figures) is (kind == "direct")
    if drawn:
        assert total.item() == pytest.approx(figures["ce"] + 0.5 * figures["mse"] + 0.4 * figures["distill"], rel=1e-5)


def test_trace_loss_with_velocities(config, images):
    model, _, _, data = parts("direct", config, images)
    own = {1: torch.randn(8, 4)}
    loss = trace_loss(model, data, TraceWeights(LATENT, distill=0.4, own=1.0), own)
    total, figures = loss([0, 1, 2, 3])
    assert figures.keys() == {"ce", "token_accuracy", "mse", "distill"}
    expected = figures["ce"] + figures["mse"] + 0.4 * figures["distill"]
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_the_teacher_stands_on_the_latent_grid(config, images):
    _, _, _, data = parts("direct", config, images)
    for i in range(len(images)):
        rows, columns = data.clean.latent_grid(i)
        assert data.clean.paired_patches(i).shape == (rows * columns, 48)


def test_own_latents_are_grouped_by_grid(config, images):
    model, _, _, data = parts("mlp", config, images)
    mixed = own_latents(model, data, [0, 1, 2, 3], OPTIONS, seed=5)
    assert list(mixed) == [0, 1, 2, 3]
    assert [mixed[n].shape for n in mixed] == [data.clean.latents[n].shape for n in mixed]
    square = own_latents(model, data, [0, 2], OPTIONS, seed=5)
    for n in square:
        torch.testing.assert_close(mixed[n], square[n], atol=1e-5, rtol=0)
    guided = own_latents(model, data, [0, 2], replace(OPTIONS, guidance=flow.Guidance(3.0, 2.0)), seed=5)
    assert (guided[0] - square[0]).abs().max() > 1e-3, "they are made as inference makes them"


def test_imitation_loss_pairs_tokens_of_one_grid(config, images):
    model, _, _, data = parts("mlp", config, images)
    pairs = [(0, None), (1, torch.randn(8, 4)), (3, None), (2, None)]
    found, figures = imitation_loss(model, data, pairs)([0, 1, 2, 3])
    made, target = [], []
    for i, own in pairs:
        rows, columns = data.clean.latent_grid(i)
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        made.append(model.bridge_tokens([data.clean.latents[i] if own is None else own], place))
        target.append(model.vit_tokens([data.clean.paired_patches(i)], place).detach())
    made, target = torch.cat(made), torch.cat(target)
    cosine = F.cosine_similarity(made, target, dim=-1).mean()
    torch.testing.assert_close(found, F.mse_loss(made, target) / target.var() + 1 - cosine, atol=1e-5, rtol=1e-5)
    assert figures["cosine"] == pytest.approx(cosine.item(), abs=1e-5)


def test_the_vision_tower_learns_what_it_had_seen_in_the_clean_picture(config, images):
    """The pictures as shown have the clean ones' features for a target, the clean ones their own from before."""
    model, _, _, data = parts("direct", config, images)
    damaged = [encode_image(255 - decode_image(image)) for image in images]
    data.shown = ImageBank(damaged, config.model)
    data.shown.latents = data.clean.latents
    loss = robust_loss(model, data)
    index = [0, 1, 3, 4 + 1]
    seen = [(data.shown, 0), (data.shown, 1), (data.shown, 3), (data.clean, 1)]
    made, target = [], []
    for bank, i in seen:
        rows, columns = bank.vit_grid(i)
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        positions = (place[:, 0] * model.config.vit.side + place[:, 1])[None]
        for to, patches in ((made, bank.patches(i)), (target, data.clean.patches(i))):
            to.append(model.vit_model(patches[None], positions)[0].detach())
    made, target = torch.cat(made), torch.cat(target)
    found, figures = loss(index)
    cosine = F.cosine_similarity(made, target, dim=-1).mean().item()
    assert figures["cosine"] == pytest.approx(cosine, abs=1e-5) and cosine < 0.999
    assert found.item() == pytest.approx((F.mse_loss(made, target) / target.var()).item() + 1 - cosine, rel=1e-4)
    assert loss([4, 5])[0].item() == pytest.approx(0, abs=1e-5), "clean ones are as they were"
    set_trainable(model, ("vit_model",), ())
    optimiser = torch.optim.SGD(model.vit_model.parameters(), 1e-3)
    found.backward()
    assert model.connector.fc1.weight.grad is None
    optimiser.step()
    assert loss(index)[0] < found and loss([4, 5])[0].item() > 0, "the target stays what it was"


@pytest.mark.parametrize("guidance", [flow.Guidance(), flow.Guidance(3.0, 2.0, low=0.0)])
@pytest.mark.parametrize("bridge", ["mlp", "direct"])
def test_a_mixed_batch_generates_what_each_image_does_alone(config, images, bridge, guidance):
    model, tokenizer, _, data = parts(bridge, config, images)
    prompts = [data.prompt(n) for n in range(4)]
    options = replace(OPTIONS, restore="always", guidance=guidance, noise_seed=10)
    batch = generate(model, tokenizer, prompts, options)
    for n, together in enumerate(batch):
        alone = generate(model, tokenizer, [prompts[n]], replace(options, noise_seed=10 + n))[0]
        assert together.prompt == n and together.restorations[0].grid == prompts[n].latent_grid
        assert [r.ids for r in together.replies] == [r.ids for r in alone.replies]
        torch.testing.assert_close(together.restorations[0].x0, alone.restorations[0].x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bridge", ["mlp", "direct"])
def test_a_fresh_policy_has_ratio_one(config, images, bridge):
    model, tokenizer, _, data = parts(bridge, config, images)
    prompts = [data.prompt(n) for n in range(4)]
    options = replace(OPTIONS, restore="always", sigma=0.3, temperature=1.0)
    found = generate(model, tokenizer, prompts, options, 2, torch.Generator().manual_seed(1))
    steps, times = [[0, 2]] * len(found), flow.time_grid(3, options.shift).tolist()
    with torch.no_grad():
        new = scoring.score(model, [prompts[t.prompt] for t in found], found, steps, times, 0.3, 1.0)
    text, image = scoring.recorded(found, steps)
    assert len(image) == len(new.image) == 16
    assert (torch.exp(new.text - text) - 1).abs().max() <= 1e-3
    assert (torch.exp(new.image - image) - 1).abs().max() <= 1e-3


@pytest.mark.parametrize("feedback", ["bridge", "reencode"])
def test_answers_about_images_of_different_sizes(config, images, feedback):
    model, tokenizer, vae, _ = parts("mlp", config, images)
    answerer = Answerer(model, vae, tokenizer, config)
    bank = answerer.bank(images, [f"image {i}" for i in range(4)])
    asked = [(i, Question("q", "task", "a b", "")) for i in (3, 0, 1)]
    answers = answerer.answer(bank, asked, "always", feedback)
    assert [a.grid for a in answers] == [(4, 2), (4, 4), (2, 4)]
    pictures = [answerer.pictures(a.latent[None], a.grid)[0] for a in answers]
    assert [p.shape for p in pictures] == [(8, 4, 3), (8, 8, 3), (4, 8, 3)]


def test_a_restoration_is_decoded_in_float32_also_where_the_model_is_in_bfloat16(config, images):
    """Decode-reencode decodes within the engine's autocast, and would read a coarser picture than the user is shown."""
    model, tokenizer, vae, _ = parts("mlp", config, images)
    answerer = Answerer(model.to(torch.bfloat16), vae, tokenizer, config)
    seen = set()
    vae.decoder.conv_in.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    asked = [(0, Question("q", "task", "a b", ""))]
    answerer.answer(answerer.bank(images, [f"image {i}" for i in range(4)]), asked, "always", "reencode")
    assert seen == {torch.float32}


@pytest.mark.parametrize("bridge", ["direct", "mlp"])
def test_passes_over_parts_of_a_batch_are_one_pass(config, images, tmp_path, bridge):
    """Same losses and weights however many rows are computed at a time, with unequal images and all three terms."""
    config = replace(config, runtime=replace(config.runtime, precision="float32", log_every=1, device="cpu"))
    (tmp_path / "input.txt").write_text("data")
    feedback = BRIDGE if bridge == "mlp" else LATENT
    found = []
    for rows in (0, 1, 2):
        model, _, _, data = parts(bridge, config, images)
        set_trainable(model)
        config.runtime.rows_per_pass = rows
        run = StageRun("test", config, [tmp_path / "input.txt"], tmp_path / "runs")
        torch.manual_seed(1)
        loss = trace_loss(model, data, TraceWeights(feedback, distill=0.5))
        optimise(run, "phase", model, loss, len(data), Phase(steps=3, batch=3, lr=1e-3, warmup=0))
        found.append(([row["loss"] for row in run.curve], model))
    (losses, whole), *others = found
    assert len(losses) == 3
    for other, model in others:
        assert other == pytest.approx(losses, rel=1e-5)
        for (name, expected), value in zip(whole.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=name)
