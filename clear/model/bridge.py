"""The latent representation bridge: how a denoised latent re-enters the reasoning (METHOD §2).

`direct` is the published bridge and has no parameters: the latent is embedded like any conditioning latent at t = 0
and belongs to the generation expert. `mlp` maps each latent token to one understanding token, so the answer reads
it with the expert it was trained to read images with; it is trained by distillation from the ViT tokens of the clean
image. Both replace decode-then-re-encode.
"""

import torch
from torch import Tensor, nn


class LatentBridge(nn.Module):
    """Latent tokens (B, N, C) to understanding tokens (B, N, D): a two-layer map of a 3×3 neighbourhood.

    The neighbourhood lets a token gather what ViT patches of another grid see. The output is added to the frozen
    2-D position table of the grid by the caller, as ViT tokens are.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, hidden, 3, padding=1)
        self.fc1 = nn.Linear(hidden, 2 * hidden)
        self.fc2 = nn.Linear(2 * hidden, hidden)

    def forward(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """latents (B, rows·columns, C) with their grid."""
        b, n, c = latents.shape
        spread = self.mix(latents.transpose(1, 2).reshape(b, c, *grid)).flatten(2).transpose(1, 2)
        return self.fc2(nn.functional.gelu(self.fc1(nn.functional.gelu(spread)), approximate="tanh"))


def token_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of KL(softmax(teacher) ‖ softmax(student)) over the channels, temperature 1 (METHOD §2).

    student, teacher (N, D); the teacher is detached here.
    """
    target = torch.log_softmax(teacher.detach().float(), dim=-1)
    found = torch.log_softmax(student.float(), dim=-1)
    return (target.exp() * (target - found)).sum(-1).mean()


def layer_weights(layers: list[int]) -> dict[int, float]:
    """w_l = (l+1) / Σ(l'+1)."""
    total = sum(layer + 1 for layer in layers)
    return {layer: (layer + 1) / total for layer in layers}


def distilled_layers(count: int, stride: int) -> list[int]:
    """Layers stride−1, 2·stride−1, … of `count`, and always the last one."""
    return sorted({*range(stride - 1, count, stride), count - 1})
