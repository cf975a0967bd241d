"""The vision tower: SigLIP with a linear patch embedding and learned positions (METHOD §1 "ViT path").

Key names as in `ema.safetensors` (`vit_model.vision_model.*`). Images of one grid are a batch with full attention, so
no padding and no packed attention kernel is needed.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VitConfig:
    """Shapes of the tower. `layers` counts the layers that are used and stored (26 in BAGEL, not the file's 27)."""

    hidden: int = 1152
    layers: int = 26
    heads: int = 16
    mlp: int = 4304
    patch: int = 14
    side: int = 70


class _Attention(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.hidden, config.hidden)
        self.k_proj = nn.Linear(config.hidden, config.hidden)
        self.v_proj = nn.Linear(config.hidden, config.hidden)
        self.out_proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (f(x).reshape(b, n, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        scores = q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5
        return self.out_proj((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(b, n, d))


class _Mlp(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Layer(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden, eps=1e-6)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden, eps=1e-6)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.patch**2, config.hidden)
        self.position_embedding = nn.Embedding(config.side**2, config.hidden)


class _Encoder(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))


class _VisionModel(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden, eps=1e-6)


class VisionTower(nn.Module):
    """Patches to features; the wrapper exists for the key prefix `vision_model`."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = _VisionModel(config)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        """patches (B, N, 3·p²) in [−1, 1] and table rows (N,) to features (B, N, hidden)."""
        tower = self.vision_model
        x = tower.embeddings.patch_embedding(patches) + tower.embeddings.position_embedding(positions)
        for layer in tower.encoder.layers:
            x = layer(x)
        return tower.post_layernorm(x)
