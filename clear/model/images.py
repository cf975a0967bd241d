"""From encoded images to model inputs: resizing, normalisation, patches, latents (METHOD §1 "Image resize").

The ViT input is resized from the original in training and at inference alike; the reference's inference resizes
twice, once through the autoencoder's size.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from clear.config import ModelSize
from clear.model.vae import AutoEncoder, patchify
from clear.records import decode_image

MAX_PIXELS = 14 * 14 * 9 * 1024


def target_size(height: int, width: int, max_side: int, min_side: int, stride: int) -> tuple[int, int]:
    """Height and width in px after the resize: the long side at most `max_side`, the short one at least `min_side`.

    Sides are rounded to `stride`; the pixel cap scales by the square root (the reference over-shrinks).
    """
    scale = max(min(max_side / max(height, width), 1.0), min_side / min(height, width))
    scale = min(scale, (MAX_PIXELS / (height * width)) ** 0.5, max(max_side, min_side) / max(height, width))
    h, w = (max(stride, round(side * scale / stride) * stride) for side in (height, width))
    return h, w


def resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 RGB (H, W, 3) to (h, w, 3), antialiased bicubic (PIL's, as the reference uses)."""
    if array.shape[:2] == size:
        return array
    from PIL import Image

    return np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BICUBIC))


def to_uint8(image: Tensor) -> np.ndarray:
    """Float (3, H, W) in about [−1, 1] to uint8 (H, W, 3)."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


class ImageBank:
    """Images of a stage by number: autoencoder and ViT pixels, ViT patches and (once encoded) latents.

    Small models keep everything decoded; it is the owner's job not to put more images into one bank than fit.
    """

    def __init__(self, images: Sequence[bytes], size: ModelSize, names: Sequence[str] | None = None) -> None:
        self.size = size
        stride = 2 ** (len(size.vae_mult) - 1) * size.latent_patch
        names = names or [f"image {i}" for i in range(len(images))]

        def load(i: int) -> tuple[Tensor, Tensor]:
            array = decode_image(images[i], names[i])
            shape = array.shape[:2]
            vae = resize(array, target_size(*shape, size.vae_size, size.vae_min, stride))
            vit_shape = target_size(*shape, size.vit_size, size.vit_min, size.vit_patch)
            vit = vae if vit_shape == vae.shape[:2] else resize(array, vit_shape)
            pack = torch.from_numpy(vae.copy()).permute(2, 0, 1)
            return pack, pack if vit is vae else torch.from_numpy(vit.copy()).permute(2, 0, 1)

        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            loaded = list(pool.map(load, range(len(images))))
        self._vae = [pair[0] for pair in loaded]
        self._vit = [pair[1] for pair in loaded]
        self.latents: list[Tensor | None] = [None] * len(images)
        self.latent_stride = stride

    def __len__(self) -> int:
        return len(self._vae)

    def pixels(self, i: int) -> Tensor:
        """Autoencoder input (3, H, W) float32 in [−1, 1]."""
        return self._vae[i].float() / 127.5 - 1

    def uint8(self, i: int) -> np.ndarray:
        """Autoencoder input as uint8 (H, W, 3)."""
        return self._vae[i].permute(1, 2, 0).numpy()

    def patches(self, i: int) -> Tensor:
        """ViT patches (N, 3p²) float32."""
        return patchify(self._vit[i][None].float() / 127.5 - 1, self.size.vit_patch)[0]

    def vit_grid(self, i: int) -> tuple[int, int]:
        """Rows and columns of ViT patches."""
        _, h, w = self._vit[i].shape
        return h // self.size.vit_patch, w // self.size.vit_patch

    def latent_grid(self, i: int) -> tuple[int, int]:
        """Rows and columns of latent tokens."""
        _, h, w = self._vae[i].shape
        return h // self.latent_stride, w // self.latent_stride

    @torch.no_grad()
    def encode(self, vae: AutoEncoder, batch: int = 64) -> "ImageBank":
        """Fill `latents` with posterior means as tokens (N, C), in batches of equal size."""
        groups: dict[tuple, list[int]] = {}
        for i, image in enumerate(self._vae):
            groups.setdefault(tuple(image.shape), []).append(i)
        device = next(vae.parameters()).device
        for members in groups.values():
            for start in range(0, len(members), batch):
                chunk = members[start : start + batch]
                z = vae.encode(torch.stack([self.pixels(i) for i in chunk]).to(device))
                for i, tokens in zip(chunk, patchify(z, self.size.latent_patch).cpu(), strict=True):
                    self.latents[i] = tokens
        return self
