"""From encoded images to model inputs: resizing, normalisation, patches, latents (METHOD §1 "Image resize").

Two settings where the reference code is inconsistent; training and inference always share one here:

- `model.resize`: "direct" (default) resizes the source straight to the ViT's size, as the reference does in training;
  "reference" goes through the autoencoder's size first, as it does at inference. That resamples twice and, for about
  one size in five, gives another patch grid.
- `model.posterior`: "mean" (default) or "sample" latents, see clear/model/vae.py. A sample's noise comes from a
  generator seeded by the image's own pixels, so a latent depends neither on the batch nor on the order.

Departure: the pixel cap scales the sides by the square root of the excess (the reference over-shrinks). With
the published sizes only images more than about seven times as long as wide reach it.

Convolutions choose their algorithm by the size of the batch, and round by it. Stages share latents
(clear/model/latents.py), whose bits must not depend on what is encoded beside an image: there every batch is full.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clear.data.images import decode_image
from clear.errors import ClearError
from clear.model.bagel import BagelConfig
from clear.model.vae import AutoEncoder, patchify
from clear.schema import ModelSize

if TYPE_CHECKING:
    from clear.model.latents import LatentStore

MAX_PIXELS = 14 * 14 * 9 * 1024
AUTOENCODER_IMAGES, AUTOENCODER_PIXELS = 16, 2**20
"""The autoencoder encodes or decodes at most so many images at once, and so many pixels (but always one image)."""

KEPT_BYTES = 2**30
"""Decoded pixels that one bank keeps: 270 images of 1024 px, or all that the small profiles have. As much
of latents that can be read again: 1,000 of 1024 px."""


def target_size(height: int, width: int, max_side: int, min_side: int, stride: int) -> tuple[int, int]:
    """Height and width in px after the resize: the long side at most `max_side`, the short one at least `min_side`.

    Sides are multiples of `stride`. Where both bounds cannot hold (a long, thin image), the long side's wins.
    """

    def scaled(h: int, w: int, factor: float) -> tuple[int, int]:
        # Whole pixels first, then whole strides: the reference rounds twice, and halves to even.
        return tuple(max(stride, round(round(side * factor) / stride) * stride) for side in (h, w))

    scale = max(min(max_side / max(height, width), 1.0), min_side / min(height, width))
    h, w = scaled(height, width, scale)
    if h * w > MAX_PIXELS:
        h, w = scaled(h, w, (MAX_PIXELS / (h * w)) ** 0.5)
    limit = max(max_side, min_side)
    if max(h, w) > limit:
        h, w = scaled(h, w, limit / max(h, w))
    return h, w


def resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 RGB (H, W, 3) to (h, w, 3), antialiased bicubic (PIL's, as the reference uses)."""
    if array.shape[:2] == size:
        return array
    from PIL import Image

    return np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BICUBIC))


def vae_array(array: np.ndarray, size: ModelSize) -> np.ndarray:
    """The autoencoder's input of a uint8 image (H, W, 3), before normalisation."""
    return resize(array, target_size(*array.shape[:2], size.vae_size, size.vae_min, latent_stride(size)))


def vit_array(array: np.ndarray, size: ModelSize, grid: tuple[int, int] | None = None) -> np.ndarray:
    """The ViT's input of a uint8 image (H, W, 3), before normalisation; with `grid`, of that many patches.

    With `size.resize` = "reference" it is made from the autoencoder's input instead of from the image itself.
    """
    if size.resize == "reference":
        array = vae_array(array, size)
    if grid is not None:
        return resize(array, (grid[0] * size.vit_patch, grid[1] * size.vit_patch))
    return resize(array, _vit_size(array, size))


def _vit_size(array: np.ndarray, size: ModelSize) -> tuple[int, int]:
    return target_size(*array.shape[:2], size.vit_size, size.vit_min, size.vit_patch)


def vit_patches(array: np.ndarray, size: ModelSize) -> tuple[Tensor, tuple[int, int]]:
    """ViT patches (N, 3p²) float32 of a uint8 image (H, W, 3), and their grid."""
    made = vit_array(array, size)
    grid = (made.shape[0] // size.vit_patch, made.shape[1] // size.vit_patch)
    return _patches(_tensor(made), size.vit_patch), grid


def latent_stride(size: ModelSize) -> int:
    """Pixels per latent token."""
    return 2 ** (len(size.vae_mult) - 1) * size.latent_patch


def check_geometry(size: ModelSize, model: BagelConfig, folder: Path | str) -> None:
    """Refuse a model whose images are cut otherwise than `size` says: its tokens would get the positions of others.

    Raises ClearError that names the setting, its value and that of the model in `folder`.
    """
    for name, found in (
        ("vit_patch", model.vit.patch),
        ("vit_side", model.vit.side),
        ("vae_z", model.vae.z_channels),
        ("vae_mult", list(model.vae.ch_mult)),
        ("latent_patch", model.latent_patch),
        ("max_latent_size", model.max_latent_size),
    ):
        wanted = getattr(size, name)
        if wanted != found:
            raise ClearError(
                f"{folder}: params have model.{name} = {wanted}, the model there has {found}; set model.{name} to it, "
                "or choose the profile that the model belongs to."
            )


def posterior_generator(image: Tensor) -> torch.Generator:
    """The generator of an image's posterior noise, seeded by its pixels (uint8, any shape)."""
    digest = hashlib.sha256(image.contiguous().numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _tensor(array: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to (3, H, W), copied."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def _patches(pack: Tensor, patch: int) -> Tensor:
    return patchify(pack[None].float() / 127.5 - 1, patch)[0]


def to_uint8(image: Tensor) -> np.ndarray:
    """Float (3, H, W) in about [−1, 1] to uint8 (H, W, 3)."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def autoencoder_batch(height: int, width: int) -> int:
    """How many images of this size (px) the autoencoder encodes or decodes at once."""
    return max(1, min(AUTOENCODER_IMAGES, AUTOENCODER_PIXELS // (height * width)))


class Latents(Sequence["Tensor | None"]):
    """Latent tokens (N, C) by image number: those that are kept, and the others by `again`; None before `encode`."""

    def __init__(self, count: int, again: Callable[[int], Tensor | None] = lambda i: None) -> None:
        self._kept: list[Tensor | None] = [None] * count
        self._again = again
        self._bytes = 0

    def put(self, i: int, tokens: Tensor, room: float) -> None:
        """Keep the tokens of an image if all that is kept takes at most `room` bytes with them."""
        if self._bytes + tokens.nbytes <= room:
            self._kept[i] = tokens
            self._bytes += tokens.nbytes

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        kept = self._kept[i]
        return self._again(range(len(self))[i]) if kept is None else kept


class ImageBank:
    """Images of a stage by number: autoencoder and ViT pixels, ViT patches and (once encoded) latents.

    Decoded pixels are kept up to `KEPT_BYTES`, and so are latents that lie in a store. Images beyond are decoded, and
    latents read, anew at every use, so that a bank takes little more memory than the files of its images.
    """

    def __init__(self, images: Sequence[bytes], size: ModelSize, names: Sequence[str] | None = None) -> None:
        """Decode and resize `images` (PNG or JPEG). Raises ClearError with the name of one that cannot be read."""
        self.size = size
        self.latent_stride = latent_stride(size)
        self._images = images
        self._names = names or [f"image {i}" for i in range(len(images))]
        self._room = KEPT_BYTES
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._paired: dict[int, Tensor] = {}
        self._sizes: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self._digests: list[str] = []
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            for i, (vae, vit, digest) in enumerate(pool.map(self._examined, range(len(images)))):
                self._digests.append(digest)
                self._sizes.append((tuple(vae.shape[1:]), tuple(vit.shape[1:])))
                if self._fits(vae.nbytes + (0 if vit is vae else vit.nbytes)):
                    self._kept[i] = vae, vit
        self.latents = Latents(len(images))

    def __len__(self) -> int:
        return len(self._images)

    def _decode(self, i: int) -> tuple[Tensor, Tensor]:
        """Autoencoder and ViT pixels (3, H, W) uint8, one tensor where they are the same."""
        array = decode_image(self._images[i], self._names[i])
        vae = vae_array(array, self.size)
        pack = _tensor(vae)
        if _vit_size(vae if self.size.resize == "reference" else array, self.size) == vae.shape[:2]:
            return pack, pack
        return pack, _tensor(vit_array(array, self.size))

    def _examined(self, i: int) -> tuple[Tensor, Tensor, str]:
        """What `_decode` gives, and a digest of what the latent is made of."""
        vae, vit = self._decode(i)
        digest = hashlib.sha256(repr((tuple(vae.shape), self.size.posterior)).encode())
        digest.update(np.ascontiguousarray(vae.permute(1, 2, 0).numpy()))
        return vae, vit, digest.hexdigest()

    def _fits(self, size: int) -> bool:
        """Whether so many bytes may be kept; if so they are taken from the room that is left."""
        fits = size <= self._room
        self._room -= size if fits else 0
        return fits

    def _loaded(self, i: int) -> tuple[Tensor, Tensor]:
        return self._kept[i] if i in self._kept else self._decode(i)

    def pixels(self, i: int) -> Tensor:
        """Autoencoder input (3, H, W) float32 in [−1, 1]."""
        return self._loaded(i)[0].float() / 127.5 - 1

    def uint8(self, i: int) -> np.ndarray:
        """Autoencoder input as uint8 (H, W, 3)."""
        return self._loaded(i)[0].permute(1, 2, 0).numpy()

    def patches(self, i: int) -> Tensor:
        """ViT patches (N, 3p²) float32."""
        return _patches(self._loaded(i)[1], self.size.vit_patch)

    def paired_patches(self, i: int) -> Tensor:
        """ViT patches (N, 3p²) float32 of the image on its *latent* grid, so that they pair with latent tokens.

        The resized image is made on first use, and kept if there is room. Raises ClearError if the ViT has no positions
        for the grid.
        """
        grid, side = self.latent_grid(i), self.size.vit_side
        if grid == self.vit_grid(i):
            return self.patches(i)
        if max(grid) > side:
            raise ClearError(
                f"{self._names[i]}: its latent grid of {grid[0]} x {grid[1]} tokens exceeds the ViT's "
                f"model.vit_side = {side} positions per side; lower model.vae_size or raise model.vit_side."
            )
        resized = self._paired.get(i)
        if resized is None:
            resized = _tensor(vit_array(decode_image(self._images[i], self._names[i]), self.size, grid))
            if self._fits(resized.nbytes):
                self._paired[i] = resized
        return _patches(resized, self.size.vit_patch)

    def vit_grid(self, i: int) -> tuple[int, int]:
        """Rows and columns of ViT patches."""
        h, w = self._sizes[i][1]
        return h // self.size.vit_patch, w // self.size.vit_patch

    def latent_grid(self, i: int) -> tuple[int, int]:
        """Rows and columns of latent tokens."""
        h, w = self._sizes[i][0]
        return h // self.latent_stride, w // self.latent_stride

    @torch.no_grad()
    def encode(self, vae: AutoEncoder, store: "LatentStore | None" = None) -> "ImageBank":
        """Fill `latents` with tokens (N, C) of the posterior (`size.posterior`), in batches of one image size.

        With the `store` of this autoencoder only what it lacks is encoded, in full batches, and kept there.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        kept = self.latents = Latents(len(self), lambda i: self._again(i, vae, store) if store else None)
        for i, (size, _) in enumerate(self._sizes):
            z = store.read(self._digests[i]) if store else None
            if z is None:
                groups.setdefault(size, []).append(i)
            else:
                kept.put(i, self._tokens(z), KEPT_BYTES)
        for (h, w), members in groups.items():
            step = autoencoder_batch(h, w)
            for start in range(0, len(members), step):
                chunk = members[start : start + step]
                for i, latent in zip(chunk, self._encoded(vae, chunk, step if store else 0), strict=True):
                    if store:
                        store.write(self._digests[i], latent)
                    kept.put(i, self._tokens(latent), KEPT_BYTES if store else math.inf)
        return self

    def _encoded(self, vae: AutoEncoder, chunk: list[int], least: int) -> Tensor:
        """Latents (B, z, h, w) of images of one size, encoded in a batch of `least` at least, on the CPU."""
        device = next(vae.parameters()).device
        filled = chunk + chunk[-1:] * (least - len(chunk))
        x = torch.stack([self.pixels(i) for i in filled]).to(device)
        return vae.encode(x, self._posterior_noise(vae, filled, device))[: len(chunk)].cpu()

    @torch.no_grad()
    def _again(self, i: int, vae: AutoEncoder, store: "LatentStore") -> Tensor:
        """Tokens of an image that were not kept in memory; if they left the store as well, encoded as before."""
        z = store.read(self._digests[i])
        if z is None:
            (z,) = self._encoded(vae, [i], autoencoder_batch(*self._sizes[i][0]))
            store.write(self._digests[i], z)
        return self._tokens(z)

    def _tokens(self, latent: Tensor) -> Tensor:
        """Tokens (N, C) of a latent (z, h, w), in memory always in the same order: noise that is drawn like them is."""
        return patchify(latent[None].contiguous(), self.size.latent_patch)[0]

    def _posterior_noise(self, vae: AutoEncoder, chunk: Sequence[int], device: torch.device) -> Tensor | None:
        """Noise for images of one size, or None where the mean is wanted."""
        if self.size.posterior == "mean":
            return None
        h, w = self._sizes[chunk[0]][0]
        shape = (vae.config.z_channels, h // vae.config.downsample, w // vae.config.downsample)
        noise = [torch.randn(shape, generator=posterior_generator(self._loaded(i)[0])) for i in chunk]
        return torch.stack(noise).to(device)
