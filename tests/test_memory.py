"""The memory estimate against the model itself: counts exactly, activations as measured in a real training step."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clear.config import compose, from_dict
from clear.data.images import encode_image
from clear.data.records import Sample
from clear.model import lora, mot
from clear.model.bagel import FROZEN, GENERATION, Bagel
from clear.model.images import ImageBank
from clear.model.mot import Mlp
from clear.model.runtime import precision, stored
from clear.model.sequence import IGNORE, LATENT, VIT, Text
from clear.model.tokenizer import word_tokenizer
from clear.model.vae import AutoEncoder
from clear.reasoning import grammar
from clear.reasoning.engine import Options, Reply, Restoration, Trajectory
from clear.reasoning.prompts import Prompt
from clear.schema import QUANTISED
from clear.traces.table import TraceRow
from clear.training import footprint, memory, sft
from clear.training.build import scene_words
from clear.training.load import trainable
from clear.training.loop.parallel import Pass
from clear.training.loop.trainer import Objective
from clear.training.rl import scoring
from clear.training.rl.grpo import InterleavedGRPO
from tests.conftest import ROOT
from tests.shapes import Planned, Planner, Shapes, passes, stage_loss

ADAPTER = ["lora.rank=4", "lora.experts=both"]
ROWS = 4


def _config(*overrides: str, profile: str = "tiny"):
    return from_dict(compose([f"profile={profile}", "runtime.device=cpu", *overrides]))


def _model(config, tokenizer, bridge: str = "direct") -> Bagel:
    """A random model of the configuration, trained as stage sft trains it."""
    torch.manual_seed(0)
    dtype, kind = stored(config)
    shapes = replace(memory.shapes(config, tokenizer.get_vocab_size()), bridge=bridge, quantised=kind)
    model = Bagel(shapes).initialise().train().to(dtype)
    if config.lora.rank:
        lora.attach(model, config.lora)
    trainable(model)
    model.language_model.gradient_checkpointing = config.runtime.gradient_checkpointing
    return model


def _step(config, tokenizer, model: Bagel):
    """The objective of stage sft over ROWS restoring traces of random pictures."""
    rng = np.random.default_rng(0)
    pictures = [encode_image(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)) for _ in range(2 * ROWS)]
    shown, clean = (ImageBank(part, config.model) for part in (pictures[:ROWS], pictures[ROWS:]))
    for bank in (shown, clean):  # what is encoded does not change what is held
        bank.latents = list(torch.randn(ROWS, memory.grids(config)[0], model.config.latent_channels))
    samples = [Sample(f"s{i}", "test", "sft", b"", "", (), "") for i in range(ROWS)]
    question, reply = "which colour is the circle ?", "which colour is the shape above the star ?"
    rows = [TraceRow(f"s{i}", "q", question, "dark", "high", reply, reply, reply, reply, False) for i in range(ROWS)]
    data = sft.TraceData(tokenizer, rows, samples, shown, clean)
    feedback = VIT if config.bridge.kind == "mlp" else LATENT
    weights = sft.TraceWeights(feedback, distill=config.sft.distill_weight, stride=config.sft.distill_stride)
    return Objective(model, sft.trace_loss(model, data, weights), precision(config))


class Live(TorchDispatchMode):
    """Every storage that an operation returns; `held` counts those still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                reference = StorageWeakRef(value.untyped_storage())
                self.seen[reference.cdata] = reference, value.untyped_storage().nbytes()
        return out

    def held(self, known: set[int]) -> int:
        """Bytes of the storages alive now, without the `known` ones."""
        return sum(size for key, (ref, size) in self.seen.items() if not ref.expired() and key not in known)


def _measured_batch(model: Bagel, objective: Objective) -> tuple[footprint.Batch, int]:
    """The batch that the objective's forward builds, and the bytes alive between forward and backward."""
    layouts = []
    hook = model.register_forward_pre_hook(lambda module, args: layouts.append(args[0]))
    own = (*model.parameters(), *model.buffers())  # coded weights are buffers
    known = {StorageWeakRef(value.untyped_storage()).cdata for value in own}
    with Live() as live:
        loss = objective(torch.arange(ROWS))["loss"]
        held = live.held(known)
    loss.backward()
    hook.remove()
    built = layouts[0]
    teacher = (built.kind == VIT) & (built.noise > 0)
    return footprint.Batch(
        rows=built.ids.shape[0],
        length=built.ids.shape[1],
        gen=int(built.is_gen.sum()),
        scored=int((built.target != IGNORE).sum()),
        noisy=int(built.noisy.sum()),
        pairs=int(teacher.sum()),
        vit=int((built.kind == VIT).sum()),
    ), held


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(scene_words())


FEW = ["lora.rank=4", "lora.experts=gen", "lora.targets=[q_proj,down_proj]"]


@pytest.mark.parametrize(
    ("types", "adapter", "checkpointing", "bridge"),
    [
        (("float32", "float32"), [], "false", "mlp"),
        (("float32", "float32"), ADAPTER, "false", "direct"),
        (("float32", "bfloat16"), [], "false", "direct"),
        (("float32", "bfloat16"), [], "true", "mlp"),
        (("float32", "bfloat16"), [], "true", "direct"),
        (("float32", "bfloat16"), ADAPTER, "false", "mlp"),
        (("bfloat16", "bfloat16"), ADAPTER, "false", "direct"),
        (("bfloat16", "bfloat16"), ADAPTER, "true", "direct"),
        (("bfloat16", "bfloat16"), FEW, "false", "mlp"),
        (("nf4", "float32"), ADAPTER, "false", "direct"),
        (("nf4", "bfloat16"), ADAPTER, "true", "direct"),
        (("int8", "float32"), ADAPTER, "false", "mlp"),
    ],
)
def test_activations_are_within_a_quarter_of_what_a_training_step_holds(
    tokenizer, types, adapter, checkpointing, bridge
):
    names = zip(("runtime.weights", "runtime.precision"), types, strict=True)
    config = _config(
        *adapter,
        *(f"{name}={value}" for name, value in names),
        f"bridge.kind={bridge}",
        f"runtime.gradient_checkpointing={checkpointing}",
    )
    model = _model(config, tokenizer)
    batch, held = _measured_batch(model, _step(config, tokenizer, model))
    compute = 2 if types[1] == "bfloat16" else 4
    weights = stored(config)[0].itemsize
    train = footprint.Training(compute, weights, config.lora, checkpointing == "true")
    found = footprint.activations(model.config, batch, train, config.sft.distill_stride)
    if compute < train.weights and not train.checkpointing:  # the layers hold autocast's copies of their weights
        found += compute * footprint.count(model.config, config.lora, bridge=False).cast
    assert 0.75 <= found / held <= 1.25


@pytest.mark.parametrize("adapter", [[], ADAPTER])
def test_parameters_gradients_and_optimiser_are_exact(tokenizer, adapter):
    config = _config(*adapter, "runtime.precision=float32")
    model = _model(config, tokenizer)
    vae = AutoEncoder(model.config.vae)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=1e-4)
    _step(config, tokenizer, model)(torch.arange(ROWS))["loss"].backward()
    optimiser.step()
    found = memory.estimate(config, "sft", tokenizer.get_vocab_size())

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    moments = [value for state in optimiser.state.values() for name, value in state.items() if name != "step"]
    whole = [*model.parameters(), *vae.parameters()]
    assert found.weights == size(whole)
    assert found.parameters == sum(p.numel() for p in whole)
    assert found.trainable == sum(p.numel() for p in chosen)
    assert found.gradients == size(p.grad for p in chosen)
    assert found.optimiser == size(moments) == 2 * found.gradients


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", ["mlp", "direct"])
def test_the_stage_bridge_trains_what_is_counted(tokenizer, rank, kind):
    config = _config(f"lora.rank={rank}", f"bridge.kind={kind}")
    model = _model(config, tokenizer, kind)
    never = (*FROZEN, *GENERATION) if kind == "mlp" else FROZEN
    trainable(model, never=never)
    found = memory.estimate(config, "bridge", tokenizer.get_vocab_size())
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = [*model.parameters(), *AutoEncoder(model.config.vae).parameters()]
    assert found.weights == sum(p.numel() * p.element_size() for p in parts)


def test_the_cache_is_exact(tokenizer):
    model = _model(_config(), tokenizer)
    cache = model.new_cache(3, footprint.kv_capacity(50, 60))
    assert sum(t.nbytes for t in [*cache.keys, *cache.values]) == footprint.kv_bytes(model.config.llm, 3, 178, 4)
    key = torch.zeros(3, model.config.llm.kv_heads, 150, model.config.llm.head_dim)
    for total in (100, 200, 300, 400):  # grown in steps as a rollout grows it
        cache.reserve(100)
        valid = torch.ones(3, 100, dtype=torch.bool)
        for layer in range(model.config.llm.layers):
            cache.append(layer, key[:, :, :100], key[:, :, :100], cache.places(valid))
        cache.advance(valid)
        assert cache.keys[0].shape[2] == footprint.kv_capacity(50, total)


@pytest.mark.parametrize("choice", ["random", "window", "all"])
@pytest.mark.parametrize(("steps", "flow_steps"), [(2, 8), (8, 8), (40, 8)])
def test_the_noisy_splits_are_those_that_grpo_scores(choice, steps, flow_steps):
    config = _config(f"grpo.sde_choice={choice}", f"grpo.sde_steps={steps}", f"sampling.flow_steps={flow_steps}")
    trainer = SimpleNamespace(grpo=config.grpo, options=Options(flow_steps=flow_steps))
    generator = torch.Generator()
    placed = InterleavedGRPO._placed(trainer, generator)
    scored = InterleavedGRPO._chosen_steps(trainer, placed, generator)
    assert memory.scored_steps(config) == len(scored)
    latent, _ = memory.grids(config)
    batch = memory.stage_batch(config, "grpo")
    assert batch.noisy == batch.rows * len(scored) * latent


PROFILES = sorted(file.stem for file in (ROOT / "clear/conf/profile").glob("*.yaml"))


def _shaped(config, count: int, rng: np.random.Generator | None = None) -> sft.TraceData:
    """Traces of pictures of the largest size with texts of the assumed lengths, all restoring, or showing both paths
    where the profile does so; with `rng` all up to that, and about half of them direct."""
    stride = 2 ** (len(config.model.vae_mult) - 1) * config.model.latent_patch
    sides = [(config.model.vae_min, config.model.vae_size, stride)]
    sides += [(config.model.vit_min, config.model.vit_size, config.model.vit_patch)]

    def some(smallest: int, largest: int) -> int:
        return largest if rng is None else int(rng.integers(smallest, largest + 1))

    grids = [[(some(a // p, b // p), some(a // p, b // p)) for _ in range(count)] for a, b, p in sides]
    bank = Shapes(*grids)
    samples = [Sample(f"s{i}", "test", "sft", b"", "", degraded=b"other") for i in range(count)]
    restoring = [rng is None or rng.random() < 0.5 for _ in samples]
    second = [grammar.restore_reply() if r else "" for r in restoring]
    rows = [TraceRow(f"s{i}", "q", "", "dark", "high", "", text, "", "", False) for i, text in enumerate(second)]
    data = sft.TraceData(word_tokenizer(grammar.WORDS), rows, samples, bank, bank)
    data.system = (0,) * memory.SYSTEM_TOKENS if config.sampling.system_prompt else ()
    data.question = [[0] * some(1, memory._question(config)) for _ in rows]
    for replies in (data.reply_1, data.direct, data.restored):
        replies[:] = [[0] * some(1, memory._reply(config)) for _ in rows]
    data.trigger = [0] * min(16, memory._reply(config))
    return data


def _largest_pass(config, stage: str, world: int, data: sft.TraceData, batches: int, monkeypatch) -> int:
    """Most tokens, padding included, that a device computes at once, of so many batches in order."""
    batch = (config.sft.traces if stage == "sft" else config.bridge.answer).batch
    loss, found = stage_loss(config, stage, data), 0
    for n in range(batches):
        index = list(range(n * batch, (n + 1) * batch))
        for rank in range(world):
            now = Pass(config.runtime.rows_per_pass, config.runtime.token_budget)
            built = passes(loss, index, now, monkeypatch, world, rank)
            found = max(found, *(one.ids.numel() for one in built))
    return found


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("stage", ["sft", "bridge"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_a_pass_has_the_tokens_that_training_puts_into_it(profile, stage, gpus, monkeypatch):
    """Traces of full size: exactly, up to what they leave of the budget. Smaller ones fill it and never exceed it."""
    config = _config("sft.drop_vit=0.0", profile=profile)
    config.sft.other_path = float(config.sft.both_paths)
    expected, budget = memory.stage_batch(config, stage, gpus), config.runtime.token_budget
    alone = memory.stage_batch(_config("runtime.token_budget=0", profile=profile), stage, gpus).length
    batch = (config.sft.traces if stage == "sft" else config.bridge.answer).batch
    full = _largest_pass(config, stage, gpus, _shaped(config, batch), 1, monkeypatch)
    together = min(batch // gpus, max(1, budget // alone) if budget else config.runtime.rows_per_pass or batch)
    assert full == together * alone <= expected.tokens
    assert (gpus == 1 and budget) or full == expected.tokens
    mixed = _shaped(config, 12 * batch, np.random.default_rng(0))
    found = _largest_pass(config, stage, gpus, mixed, 12 if gpus == 1 else 2, monkeypatch)
    assert found <= expected.tokens
    assert not (gpus == 1 and budget) or found >= 0.95 * expected.tokens == 0.95 * budget


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
@pytest.mark.parametrize("budget", [0, 150, 400, 10**6])
@pytest.mark.parametrize("traces", [1, 3, 8])
def test_packed_rows_are_the_most_that_training_makes(traces, budget, limit, monkeypatch):
    """Whatever the lengths up to 200: never more than the estimate, and as much where they are chosen for it."""
    rows, longest = memory.packed_rows(traces, 200, budget, limit or traces)
    rng, found = np.random.default_rng(1), 0
    filled = [200] * traces, [max(1, longest - 200 * (traces - rows))] + [200] * (traces - 1)
    for lengths in [*filled, *rng.integers(1, 201, (200, traces)).tolist()]:
        samples = [[Text([0] * n, bos=False, eos=False)] for n in lengths]
        now = Pass(limit, budget)
        mine, *_ = now.divide(samples)
        for n in range(now.passes):
            chosen = mine[len(mine) * n // now.passes : len(mine) * (n + 1) // now.passes]
            found = max(found, len(chosen) * max(sum(lengths[i] for i in row) for row in chosen))
    assert 0.8 * rows * longest <= found <= rows * longest


@pytest.mark.parametrize("profile", PROFILES)
def test_a_slice_of_grpo_has_the_tokens_that_are_scored(profile):
    """As many trajectories as a slice has, each with all restorations, at full size; none longer than it may be."""
    config = _config("grpo.group_size=8", profile=profile)
    latent_tokens, vit = memory.grids(config)
    rows = columns = round(latent_tokens**0.5)
    system = (0,) * memory.SYSTEM_TOKENS if config.sampling.system_prompt else ()
    latent = torch.zeros(rows * columns, 1)
    side = round(vit**0.5)
    prompt = Prompt(system, (0,) * memory._question(config), latent, (rows, columns), torch.zeros(vit, 1), (side, side))
    rounds, steps = config.sampling.max_restorations, list(range(memory.scored_steps(config)))
    states = torch.zeros(config.sampling.flow_steps + 1, *latent.shape)
    replies = [Reply([0] * (memory._reply(config) + 1))] * (rounds + 1)
    one = Trajectory(0, 0, replies, [Restoration(latent, (rows, columns), states)] * rounds)
    expected = memory.stage_batch(config, "grpo")
    count = max(n for n in range(1, config.grpo.rows_per_pass + 1) if config.grpo.prompts * 8 % n == 0)
    times, budget = [0.5] * (config.sampling.flow_steps + 1), config.runtime.token_budget
    planner = Planner(config.bridge.kind)
    with pytest.raises(Planned) as planned:
        scoring.score(planner, [prompt] * count, [one] * count, [steps] * count, times, 0.3, 1.0, budget)
    assert planned.value.args[0].ids.shape == (expected.rows, expected.length)


@pytest.mark.parametrize("pieces", [False, True])
def test_swiglu_in_pieces_keeps_what_they_are_cut_from(tokenizer, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr(Mlp, "piece", 64)
    config = _config(*ADAPTER, "runtime.precision=float32", "model.mlp=2048")
    model = _model(config, tokenizer)
    batch, held = _measured_batch(model, _step(config, tokenizer, model))
    train = footprint.Training(4, 4, config.lora, piece=64 if pieces else 0)
    assert 0.75 <= footprint.activations(model.config, batch, train, config.sft.distill_stride) / held <= 1.25


def test_one_kernel_keeps_no_scores(tokenizer, monkeypatch):
    config = _config(*ADAPTER, "runtime.precision=float32", "model.heads=16", "model.kv_heads=4")
    model, train = _model(config, tokenizer), footprint.Training(4, 4, config.lora)
    found = []
    for most in (mot.SCORES, 0):
        monkeypatch.setattr(mot, "SCORES", most)
        batch, held = _measured_batch(model, _step(config, tokenizer, model))
        estimated = footprint.activations(model.config, batch, train, config.sft.distill_stride)
        assert 0.75 <= estimated / held <= 1.25
        found.append(held)
    scores = config.model.layers * ROWS * config.model.heads * batch.length**2 * 4
    assert found[0] - found[1] >= 0.5 * scores


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("stage", ["sft", "evaluate"])
def test_quantised_weights_are_exact(tokenizer, kind, stage):
    config = _config(*ADAPTER, f"runtime.weights={kind}", "runtime.precision=float32", "bridge.kind=direct")
    model = _model(config, tokenizer)
    held = [*model.state_dict().values(), *AutoEncoder(model.config.vae).parameters()]
    found = memory.estimate(config, stage, tokenizer.get_vocab_size())
    assert found.weights == sum(value.nbytes for value in held)
    exact = memory.estimate(_config(*ADAPTER, "bridge.kind=direct"), stage, tokenizer.get_vocab_size())
    assert found.parameters == exact.parameters and found.gradients == exact.gradients


def test_bagel_has_the_published_number_of_parameters():
    config = _config(profile="bagel_7b_lora")
    counts = footprint.count(memory.shapes(config), config.lora)
    assert round(counts.base / 1e9, 3) == 14.607  # 29.2 GB in bfloat16, as published
    assert counts.adapter == counts.trained == 16 * 5_046_272


def test_more_memory_is_asked_for_where_more_is_used():
    def of(*overrides, profile="bagel_7b_lora", stage="sft", gpus=1):
        return memory.estimate(_config(*overrides, profile=profile), stage, gpus=gpus)

    usual = of()
    assert of("runtime.gradient_checkpointing=false").activations > 5 * usual.activations
    assert of("lora.rank=32").optimiser == 2 * usual.optimiser
    assert of("lora.experts=und").trainable * 2 == usual.trainable
    assert of("sft.traces.batch=4").activations == usual.activations == of("runtime.rows_per_pass=2").activations // 2
    full, sharded = of(profile="bagel_7b"), of(profile="bagel_7b", gpus=8)
    assert full.optimiser > 100 * usual.optimiser and abs(8 * sharded.optimiser - full.optimiser) <= 8
    assert of("sft.ema=0.0", profile="bagel_7b").optimiser == 2 * full.gradients == full.optimiser * 2 // 3
    assert of(stage="grpo").weights - usual.weights == 4 * usual.trainable  # the frozen adapter of the reference
    bridge = of("runtime.device=cuda", profile="bagel_7b", stage="bridge", gpus=8)
    assert bridge.peak > 8 * bridge.weights + bridge.kv_cache  # whole on the first device, where it generates
    assert of("runtime.device=cuda", "sampling.batch=2", profile="bagel_7b", stage="bridge", gpus=8).peak < memory.LIMIT
    assert of("sampling.batch=2", stage="evaluate").kv_cache * 2 == of(stage="evaluate").kv_cache
    plain = of("sampling.text_guidance=1.0", "sampling.image_guidance=1.0", stage="evaluate").kv_cache
    assert of("sampling.image_guidance=1.0", stage="evaluate").kv_cache == plain, "fewer of the same entries"
    assert plain < of(stage="evaluate").kv_cache < 1.5 * plain, "and the context of the texts alone"
