"""The image autoencoder: FLUX's convolutional VAE, with the key names of `ae.safetensors` (METHOD §1).

Departure: `groups` of the group norm is a parameter (32 in the published model), so that narrow models exist.

Posterior, two modes (`model.posterior`): "mean" (default) encodes an image to the mean of its posterior, so the same
image is the same latent wherever it is read; "sample" adds the posterior's own noise, as the reference does
everywhere, at inference too. Here the noise of an image is drawn once, from its own generator (`ImageBank.encode`);
the reference draws anew each time.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VaeConfig:
    """Shapes of the autoencoder; the defaults are the published ones."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    groups: int = 32
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downsample(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.ch_mult) - 1)


class ResnetBlock(nn.Module):
    """norm, swish, conv, twice, beside a (1×1 where the width changes) skip."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Stride-2 convolution, padded right and bottom by one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest ×2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int, groups: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels, groups)
    mid.attn_1 = AttnBlock(channels, groups)
    mid.block_2 = ResnetBlock(channels, channels, groups)
    return mid


class Encoder(nn.Module):
    """Image (B, 3, H, W) to moments (B, 2z, H/d, W/d)."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        c = config.ch
        for level, width in enumerate(widths):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                stage.block.append(ResnetBlock(c, width, config.groups))
                c = width
            if level < len(widths) - 1:
                stage.downsample = Downsample(c)
            self.down.append(stage)
        self.mid = _middle(c, config.groups)
        self.norm_out = nn.GroupNorm(config.groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent (B, z, h, w) to image (B, 3, h·d, w·d); `up` is indexed by level, the last level runs first."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, c, 3, padding=1)
        self.mid = _middle(c, config.groups)
        stages = []
        for level in reversed(range(len(widths))):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                stage.block.append(ResnetBlock(c, widths[level], config.groups))
                c = widths[level]
            if level:
                stage.upsample = Upsample(c)
            stages.insert(0, stage)
        self.up = nn.ModuleList(stages)
        self.norm_out = nn.GroupNorm(config.groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for stage in reversed(self.up):
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoEncoder(nn.Module):
    """Encoder and decoder with the published latent scale and shift."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior of images (B, 3, H, W), both (B, z, H/d, W/d), not normalised."""
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        return mean, log_var

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] to normalised latents (B, z, H/d, W/d).

        The posterior mean, or with `noise` (standard normal, same shape as the latents) a sample of it.
        """
        mean, log_var = self.moments(x)
        if noise is not None:
            mean = mean + torch.exp(0.5 * log_var) * noise
        return self.config.scale_factor * (mean - self.config.shift_factor)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents to images in about [−1, 1]."""
        return self.decoder(z / self.config.scale_factor + self.config.shift_factor)


def patchify(z: Tensor, patch: int) -> Tensor:
    """Latents or pixels (B, C, H, W) to tokens (B, H/p·W/p, p·p·C), features in the order (row, column, channel)."""
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // patch, patch, w // patch, patch)
    return z.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Inverse of `patchify` for a grid of (rows, columns)."""
    b, _, features = tokens.shape
    c = features // patch**2
    z = tokens.reshape(b, grid[0], grid[1], patch, patch, c)
    return z.permute(0, 5, 1, 3, 2, 4).reshape(b, c, grid[0] * patch, grid[1] * patch)
