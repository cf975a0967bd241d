"""BAGEL: ViT and latent inputs, the MoT language model, and velocity and text outputs (METHOD §1).

Module and parameter names are those of the published `ema.safetensors`. The autoencoder is apart: `vae.AutoEncoder`.
The optional `LatentBridge` is this project's and is stored in its own file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clear.model import flex, quantised
from clear.model.bridge import LatentBridge
from clear.model.cache import CacheView, KVCache
from clear.model.mot import Hidden, LanguageModel, LlmConfig
from clear.model.sequence import BRIDGE, IGNORE, LATENT, VIT, Layout, SpecialTokens
from clear.model.vae import VaeConfig
from clear.model.vit import VisionTower, VitConfig

GENERATION = ("_moe_gen", "vae2llm", "llm2vae", "time_embedder")
"""Name parts of the parameters that only serve image generation."""
VISION = "vit_model"
"""Name part of the vision tower's parameters."""
FROZEN = (VISION, "vit_pos_embed", "latent_pos_embed")
"""Name parts of what no stage trains on a given checkpoint: the published recipe freezes the vision tower and the
position tables (the autoencoder is apart)."""


def frozen(train_vit: bool = False) -> tuple[str, ...]:
    """FROZEN, or what is left of it where the vision tower is trained."""
    return tuple(part for part in FROZEN if not (train_vit and part == VISION))


@dataclass(frozen=True)
class BagelConfig:
    """Shapes of the whole model. `bridge` is "direct" (no parameters) or "mlp"; `quantised` is "" or the type of the
    decoder's linear layers (clear/model/quantised.py)."""

    llm: LlmConfig
    vit: VitConfig
    vae: VaeConfig
    special: SpecialTokens
    latent_patch: int = 2
    max_latent_size: int = 64
    bridge: str = "direct"
    quantised: str = ""

    @property
    def latent_channels(self) -> int:
        """Features of one latent token."""
        return self.latent_patch**2 * self.vae.z_channels

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token."""
        return self.vae.downsample * self.latent_patch


@dataclass
class Contents:
    """What the image segments of a layout hold, in row-major order of the segments.

    vit: patches (N, 3p²) per VIT segment; latent: tokens (N, C) per LATENT segment with its `time` (0 = clean);
    bridge: latent tokens (N, C) per BRIDGE segment. Each may also be one stacked tensor (images, N, features).
    """

    vit: Sequence[Tensor] | Tensor = field(default_factory=list)
    latent: Sequence[Tensor] | Tensor = field(default_factory=list)
    time: Sequence[float] | Tensor = field(default_factory=list)
    bridge: Sequence[Tensor] | Tensor = field(default_factory=list)


class _Connector(nn.Module):
    def __init__(self, vit: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vit, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class _PositionTable(nn.Module):
    """Frozen 2-D sin-cos table (side², D): the first half of the channels encodes the column, the second the row."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        self.side, self.dim = side, dim
        self.pos_embed = nn.Parameter(torch.zeros(side**2, dim), requires_grad=False)

    def reset(self) -> None:
        """Fill the table with its formula."""
        line = torch.arange(self.side, dtype=torch.float64)
        omega = 10000.0 ** -(torch.arange(self.dim // 4, dtype=torch.float64) / (self.dim / 4))
        angle = line[:, None] * omega
        one = torch.cat([angle.sin(), angle.cos()], dim=1)
        column = one[None].expand(self.side, -1, -1)
        row = one[:, None].expand(-1, self.side, -1)
        self.pos_embed.data = torch.cat([column, row], dim=2).reshape(self.side**2, self.dim).to(self.pos_embed)

    def forward(self, place: Tensor) -> Tensor:
        """(N, 2) rows and columns to (N, D)."""
        return self.pos_embed[place[:, 0] * self.side + place[:, 1]]


class _TimeEmbedder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        """Unscaled times (N,) in [0, 1] to (N, D)."""
        rate = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angle = t.float()[:, None] * rate
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class Bagel(nn.Module):
    """The unified model: one forward over a `Layout` gives text logits and velocities."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.llm.hidden
        self.language_model = LanguageModel(config.llm)
        self.vit_model = VisionTower(config.vit)
        self.connector = _Connector(config.vit.hidden, hidden)
        self.vit_pos_embed = _PositionTable(config.vit.side, hidden)
        self.latent_pos_embed = _PositionTable(config.max_latent_size, hidden)
        self.time_embedder = _TimeEmbedder(hidden)
        self.vae2llm = nn.Linear(config.latent_channels, hidden)
        self.llm2vae = nn.Linear(hidden, config.latent_channels)
        if config.bridge == "mlp":
            self.bridge = LatentBridge(config.latent_channels, hidden)
        if config.quantised:
            quantised.quantise(self, config.quantised)

    def initialise(self) -> "Bagel":
        """Random weights for training from scratch: zero velocity head, formula position tables."""
        self.vit_pos_embed.reset()
        self.latent_pos_embed.reset()
        nn.init.normal_(self.language_model.model.embed_tokens.weight, std=0.5)
        nn.init.normal_(self.vit_model.vision_model.embeddings.position_embedding.weight, std=0.3)
        nn.init.normal_(self.connector.fc2.weight, std=2 * self.config.llm.hidden**-0.5)
        nn.init.zeros_(self.llm2vae.weight)
        nn.init.zeros_(self.llm2vae.bias)
        self.copy_und_to_gen()
        return self

    @torch.no_grad()
    def copy_und_to_gen(self) -> None:
        """Start the generation expert as a copy of the understanding expert (the reference's init_moe)."""
        state = dict(self.named_parameters())
        for name, value in state.items():
            if "_moe_gen" in name:
                value.copy_(state[name.replace("_moe_gen", "")])

    def vit_tokens(self, patches: Sequence[Tensor] | Tensor, place: Tensor) -> Tensor:
        """Patches per image and the (N, 2) places of all their tokens to understanding tokens (N, D)."""
        positions = place[:, 0] * self.config.vit.side + place[:, 1]
        sizes = [len(p) for p in patches]
        if len(set(sizes)) == 1:
            stack = patches if isinstance(patches, Tensor) else torch.stack(list(patches))
            features = self.vit_model(stack, positions.reshape(len(sizes), -1)).flatten(0, 1)
        else:
            parts = zip(patches, positions.split(sizes), strict=True)
            features = torch.cat([self.vit_model(p[None], at[None])[0] for p, at in parts])
        return self.connector(features) + self.vit_pos_embed(place)

    def latent_tokens(
        self, latents: Sequence[Tensor] | Tensor, times: Sequence[float] | Tensor, place: Tensor
    ) -> Tensor:
        """Latent tokens per image, one time per image, places (N, 2) of all tokens → generation tokens (N, D)."""
        flat = latents.flatten(0, 1) if isinstance(latents, Tensor) else torch.cat(list(latents))
        sizes = torch.tensor([len(z) for z in latents], device=flat.device)
        t = self.time_embedder(torch.as_tensor(times, dtype=torch.float32, device=flat.device))
        return self.vae2llm(flat) + t.repeat_interleave(sizes, dim=0) + self.latent_pos_embed(place)

    def bridge_tokens(self, latents: Sequence[Tensor] | Tensor, place: Tensor) -> Tensor:
        """Denoised latents through the `mlp` bridge to understanding tokens (N, D)."""
        sizes = [len(z) for z in latents]
        grids = [tuple((p[-1] + 1).tolist()) for p in place.split(sizes)]
        if len(set(grids)) == 1:
            stack = latents if isinstance(latents, Tensor) else torch.stack(list(latents))
            tokens = self.bridge(stack, grids[0]).flatten(0, 1)
        else:
            tokens = torch.cat([self.bridge(z[None], g)[0] for z, g in zip(latents, grids, strict=True)])
        return tokens + self.vit_pos_embed(place)

    def embed(self, layout: Layout, contents: Contents) -> Tensor:
        """The input embeddings (B, L, D) of a layout."""
        x = self.language_model.model.embed_tokens(layout.ids)
        device = x.device
        flat, kind, place = x.flatten(0, 1), layout.kind.flatten(), layout.place.flatten(0, 1)
        for which, parts, make in (
            (VIT, contents.vit, lambda p, at: self.vit_tokens(p, at)),
            (LATENT, contents.latent, lambda p, at: self.latent_tokens(p, contents.time, at)),
            (BRIDGE, contents.bridge, lambda p, at: self.bridge_tokens(p, at)),
        ):
            if len(parts):
                parts = parts.to(device) if isinstance(parts, Tensor) else [part.to(device) for part in parts]
                index = (kind == which).nonzero().squeeze(1)
                flat = flat.index_copy(0, index, make(parts, place[index]).to(flat.dtype))
        return flat.reshape(x.shape)

    def forward(
        self,
        layout: Layout,
        contents: Contents,
        cache: KVCache | CacheView | None = None,
        write: bool = False,
        collect: Sequence[int] = (),
    ) -> Hidden:
        """Run a layout; with a cache, as the continuation of its rows (`write`: and remember it).

        Layout and contents may be anywhere; they are moved to the model.
        """
        layout = layout.to(self.vae2llm.weight.device)
        blocks = cache is None and flex.wanted(self.language_model.attention, layout.ids.device)
        return self.language_model(
            self.embed(layout, contents),
            layout.is_gen,
            layout.rope,
            flex.block_mask(layout) if blocks else layout.allowed(),
            cache,
            layout.valid,
            write,
            collect,
        )

    def scored_logits(self, hidden: Hidden, layout: Layout) -> tuple[Tensor, Tensor]:
        """Logits (T, V) at the positions that carry a target, and the targets (T,), in row-major order."""
        target = layout.target.flatten().to(hidden.und.device)[hidden.routing.und]
        at = target != IGNORE
        return self.language_model.lm_head(hidden.und[at]).float(), target[at]

    def velocities(self, hidden: Hidden, layout: Layout) -> Tensor:
        """Predicted velocities (N, C) of all noisy latent tokens, in row-major order, float32."""
        at = layout.noisy.flatten().to(hidden.gen.device)[hidden.routing.gen]
        return self.llm2vae(hidden.gen[at]).float()

    def new_cache(self, rows: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `rows` rows."""
        llm, weight = self.config.llm, self.vae2llm.weight
        like = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
        return KVCache(llm.layers, rows, llm.kv_heads, llm.head_dim, capacity, like)
