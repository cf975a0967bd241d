"""How many bytes the tensors of a model take: parameters, what a forward keeps, caches, temporaries (`clear memory`).

Exact: the number of parameters (the model is built on the meta device) and of trained ones; given the number of tokens,
the key-value cache. Estimates: activations (each term counts the tensors that one line of `mot.py` saves for the
backward pass; a test holds the sum to within 25 % of what is measured) and temporaries (the largest working set among
the known ones).

Symbols: T tokens of a micro-batch with padding, L its longest row, D hidden, I mlp width, Q = heads · head size,
K = key-value heads · head size, H heads, V vocabulary, a bytes of the compute type (2 under bfloat16 autocast).
All quantities are bytes unless said otherwise.
"""

import functools
import math
from dataclasses import dataclass

from clear.model.bagel import FROZEN, Bagel, BagelConfig
from clear.model.bridge import distilled_layers
from clear.model.cache import grown
from clear.model.mot import LlmConfig, one_kernel
from clear.model.quantised import size
from clear.model.runtime import without_weights
from clear.model.vae import AutoEncoder
from clear.schema import Lora

_GROUPS = (
    ("hidden", ("q_proj", "k_proj", "v_proj")),
    ("hidden", ("o_proj",)),
    ("hidden", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""Linear layers of a decoder layer that share one input, and the width of that input."""


@dataclass(frozen=True)
class Batch:
    """Tokens of one micro-batch.

    und, gen: tokens of the two experts (padding is understanding); scored: with a text loss; noisy: with a velocity
    loss; pairs: distilled token pairs; vit: ViT tokens.
    """

    rows: int
    length: int
    gen: int
    scored: int
    noisy: int
    pairs: int = 0
    vit: int = 0

    @property
    def tokens(self) -> int:
        """All tokens, padding included."""
        return self.rows * self.length

    @property
    def und(self) -> int:
        """Tokens of the understanding expert."""
        return self.tokens - self.gen


@dataclass(frozen=True)
class Training:
    """What decides which tensors are kept.

    compute, weights: bytes per number; cuda: on a GPU, whose attention is always one kernel; blocks: its mask is one of
    blocks, which is negligible, and its key-value heads are not repeated (flex_attention). piece: tokens that SwiGLU
    computes at a time.
    """

    compute: int
    weights: int
    lora: Lora
    checkpointing: bool = False
    cuda: bool = False
    blocks: bool = False
    piece: int = 0

    def at_once(self, tokens: int) -> int:
        """Of so many tokens those whose SwiGLU is held at a time."""
        return min(tokens, self.piece or tokens)


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters: base (without bridge and adapters), bridge, adapter, vae, trained; all exact.

    cast: weights of linear layers that autocast would copy to the compute type.
    """

    base: int
    bridge: int
    adapter: int
    vae: int
    trained: int
    cast: int


@functools.cache
def _parameters(model: BagelConfig) -> tuple[dict[str, tuple[int, ...]], int]:
    """Names and shapes of all parameters, from the model on the meta device, and the autoencoder's number."""
    with without_weights():
        module, vae = Bagel(model), AutoEncoder(model.vae)
    found = {name: tuple(value.shape) for name, value in module.named_parameters()}
    return found, sum(value.numel() for value in vae.parameters())


def count(model: BagelConfig, lora: Lora, never: tuple[str, ...] = FROZEN, bridge: bool = True) -> Counts:
    """Count the parameters of a model.

    With `lora.rank` r every target linear layer (out, in) gets r · (in + out) adapter parameters, and only these and
    the bridge are trained. `never`: name parts of what is not trained. `bridge`: the mlp bridge is there already.
    """
    found, vae = _parameters(model)
    sizes = {"base": 0, "bridge": 0, "adapter": 0, "trained": 0, "cast": 0}
    for name, shape in found.items():
        part = "bridge" if name.startswith("bridge.") else "base"
        if part == "bridge" and not bridge:
            continue
        allowed = not any(rule in name for rule in never)
        sizes[part] += math.prod(shape)
        if allowed and (part == "bridge" or not lora.rank):
            sizes["trained"] += math.prod(shape)
        if name.startswith("language_model") and len(shape) == 2 and "embed_tokens" not in name:
            sizes["cast"] += math.prod(shape)
        if _adapted(name, lora):
            sizes["adapter"] += lora.rank * sum(shape)
            sizes["trained"] += lora.rank * sum(shape) * allowed
    return Counts(vae=vae, **sizes)


def _adapted(name: str, lora: Lora) -> bool:
    """Whether the parameter `name` is the weight of a linear layer that gets an adapter."""
    if not (lora.rank and name.startswith("language_model.model.layers.") and name.endswith(".weight")):
        return False
    target = name.removesuffix(".weight").rpartition(".")[2].removesuffix("_moe_gen")
    return target in lora.targets and lora.experts in ("both", "gen" if "_moe_gen" in name else "und")


@dataclass(frozen=True)
class Coded:
    """The quantised layers of a model: the numbers their weights stand for, their bytes, and the largest one's numbers,
    which are decoded for its product."""

    numbers: int = 0
    bytes: int = 0
    largest: int = 0


def coded(model: BagelConfig, kind: str) -> Coded:
    """What of a model's weights is quantised as `kind` ("": nothing); exact."""
    if not kind:
        return Coded()
    found, _ = _parameters(model)
    weights = [s for name, s in found.items() if name.startswith("language_model.model.layers.") and len(s) == 2]
    numbers = [math.prod(shape) for shape in weights]
    return Coded(sum(numbers), sum(size(kind, *shape) for shape in weights), max(numbers))


def layer_activations(llm: LlmConfig, batch: Batch, train: Training) -> int:
    """What one decoder layer saves for its backward pass.

    - two norms: the float32 input 4TD each (the residual itself or its float32 copy) and, if the norm's weight is
      trained, the normed value 4TD; the reciprocal root 4T;
    - query and key norms likewise over Q + K channels;
    - linear layers: the input they need for their own gradient. Trained in full, layers that read the same tensor
      share it (D for q/k/v, D for o, D for gate/up, I for down; a bytes each). Frozen ones save nothing, an adapter
      saves its input (shared in float32; under autocast peft's casts give each target a copy) and r · a per token;
    - where both experts have tokens, bringing them together keeps what each projected: Q + 2K channels, a bytes each;
    - attention: q, k and v, the latter two repeated to all heads, 3TQa. Plain (few scores on a CPU): the float32
      softmax 4HL² per row and under autocast its copy for the product with v. One kernel (`mot.one_kernel`): the
      output, 4 bytes of log-sum per head, and the additive mask in the compute type aL² per row;
    - SwiGLU: the gate before and after its activation, and the other factor, 3TIa. In pieces it keeps what they are cut
      from instead, TDa, and of the linear layers within it nothing (`piece_activations`).
    """
    t, a, d = batch.tokens, train.compute, llm.hidden
    q, kv = llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim
    trained_norms = 1 if train.lora.rank else 2
    total = 2 * t * (4 * d * trained_norms + 4)
    total += t * (q + kv) * 4 * trained_norms + 4 * t * (llm.heads + llm.kv_heads)
    adapted = {"both": t, "und": batch.und, "gen": batch.gen}[train.lora.experts]
    total += _linear_inputs(llm, train, _GROUPS[:2], t, adapted)
    total += t * (q + 2 * kv) * a * bool(batch.gen)
    total += t * (q + 2 * (kv if train.blocks else q)) * a
    if train.at_once(t) < t:
        total += t * d * a
    else:
        total += _linear_inputs(llm, train, _GROUPS[2:], t, adapted) + 3 * t * llm.mlp * a
    if train.blocks:
        return total + t * (q * a + 4 * llm.heads)
    if one_kernel(train.cuda, llm.heads, batch.length, batch.length):
        return total + t * (q * a + 4 * llm.heads) + a * batch.rows * batch.length**2
    return total + batch.rows * llm.heads * batch.length**2 * (4 + (a if a < 4 else 0))


def _linear_inputs(llm: LlmConfig, train: Training, groups: tuple, tokens: int, adapted: int) -> int:
    """What the linear layers of `groups` keep of `tokens`, of which `adapted` ones pass through adapters."""
    total, a = 0, train.compute
    for width, names in groups:
        size, chosen = getattr(llm, width), sum(name in train.lora.targets for name in names)
        if train.lora.rank:
            total += adapted * a * (size * (chosen if a < 4 else min(1, chosen)) + chosen * train.lora.rank)
        else:
            total += tokens * size * a
    return total


def piece_activations(llm: LlmConfig, batch: Batch, train: Training) -> int:
    """What one piece of a SwiGLU that computes in pieces holds, at its forward and again before its gradient."""
    piece = train.at_once(batch.tokens)
    if piece == batch.tokens:
        return 0
    return 3 * piece * llm.mlp * train.compute + _linear_inputs(llm, train, _GROUPS[2:], piece, piece)


def activations(model: BagelConfig, batch: Batch, train: Training, stride: int = 1) -> int:
    """What a training forward holds at its end, ready for the backward pass.

    Without gradient checkpointing every layer's `layer_activations`. With it the two streams that enter each layer
    (TD in the type of the residual, which is that of the weights) and the one attention mask of 4L² per row.
    To this come: the final norms (as in a layer); the language head, per scored token its input Da (if trained) and
    the float32 log-softmax 4V; the velocity head, per noisy token its input Da (if trained) and prediction and target
    4C each; per distilled pair and layer (every `stride`-th) two float32 distributions 8D; the rotary table, two
    numbers per channel of a head and token; with full training the connector (vit, D and D per ViT token), the
    latent embedding (C per latent token), and both where they enter the residual (D per token).
    """
    llm, t, a = model.llm, batch.tokens, train.compute
    full = not train.lora.rank
    if train.checkpointing:
        kept = llm.layers * t * llm.hidden * train.weights + (0 if train.blocks else 4 * batch.rows * batch.length**2)
    else:
        kept = llm.layers * layer_activations(llm, batch, train)
    head = t * (4 * llm.hidden * (2 if full else 1) + 4) + 2 * t * llm.head_dim * a
    head += batch.scored * (4 * llm.vocab + llm.hidden * a * full)
    head += batch.noisy * (8 * model.latent_channels + llm.hidden * a * full)
    if batch.pairs:
        layers = len(distilled_layers(llm.layers, stride)) if stride else 1
        head += layers * batch.pairs * 8 * llm.hidden
    if full:
        head += batch.vit * (model.vit.hidden + 2 * llm.hidden) * a + batch.gen * model.latent_channels * a
        head += (batch.vit + batch.gen) * llm.hidden * train.weights
    return kept + head


def layer_numbers(model: BagelConfig) -> int:
    """How many numbers the weights of the decoder's layers are: what `runtime.offload` keeps in host memory."""
    shapes, _ = _parameters(model)
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("language_model.model.layers."))


def kv_bytes(llm: LlmConfig, rows: int, capacity: int, number: int) -> int:
    """Keys and values of all layers: 2 · layers · rows · capacity · K numbers of `number` bytes."""
    return 2 * llm.layers * rows * capacity * llm.kv_heads * llm.head_dim * number


def kv_capacity(prompt: int, total: int) -> int:
    """Places per row of a cache that starts with the prompt and 128 spare ones, and grows as clear.model.cache does."""
    return grown(prompt + 128, total)


def training_workspace(model: BagelConfig, batch: Batch, train: Training, cast: int) -> int:
    """Temporary memory of a step, the largest of three working sets, plus what autocast copies.

    Building the mask: three bools and a float32 per pair of tokens in a row. The loss: logits in the compute type,
    in float32, and their gradient, (a + 8) V per scored token. The backward of one layer: with checkpointing what the
    layer saves, computed again, and in either case a piece of its SwiGLU, if this is computed so, and the gradients of
    its widest part. float32 weights under autocast have a copy in the compute type, `cast` numbers.
    """
    llm = model.llm
    mask = 0 if train.blocks else 7 * batch.rows * batch.length**2
    loss = batch.scored * llm.vocab * (train.compute + 8)
    widest = 3 * max(train.at_once(batch.tokens) * llm.mlp, batch.tokens * llm.hidden) * train.compute
    if not one_kernel(train.cuda, llm.heads, batch.length, batch.length):
        widest = max(widest, 8 * batch.rows * llm.heads * batch.length**2)
    layer = widest + piece_activations(llm, batch, train)
    layer += layer_activations(llm, batch, train) if train.checkpointing else 0
    return max(mask, loss, layer) + (cast * train.compute if train.compute < train.weights else 0)
