"""Latents that stages share on disk: whoever comes first encodes an image, the others read the same bits.

Every stage after `base` reads images through the same frozen autoencoder. What a store is for is encoded in batches of
one size (`ImageBank.encode`), so that a latent's bits do not depend on its company, nor on who made it.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import sys
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from clear.data.io import replacing
from clear.errors import refusal, say
from clear.model.vae import AutoEncoder

STORED_BYTES = 128 * 2**30
"""Latents that a store keeps if half of the disk's room is as much: 130,000 images of 1024 px (1 MiB each)."""

_MAKERS = tuple(Path(__file__).with_name(name) for name in ("images.py", "latents.py", "vae.py"))
_PROCESSOR = "model name", "flags", "CPU part", "Features"


class LatentStore:
    """Latents of one autoencoder in a folder, each under a digest of all that its bits may depend on.

    These are the image, the autoencoder, and what computed it: code, torch, processor, threads. A file is the SHA-256
    of its content and the content (safetensors), so that a damaged one counts as absent; files are replaced whole, so
    that processes may share a folder and be killed. About `STORED_BYTES` are kept at most, and no more than stays free
    on the disk; what was used longest ago leaves first. Where nothing can be written this is said once, and images are
    encoded as without a store.
    """

    def __init__(self, folder: Path | str, vae: AutoEncoder) -> None:
        """Nothing is read or written before the first image. The weights of `vae` must not change any more."""
        self.folder = Path(folder)
        self._vae = vae
        self._room = 0
        self._refused = False

    def read(self, image: str) -> Tensor | None:
        """The latent (z, h, w) of an image, given by a digest; None where there is none, or a damaged one."""
        file = self._file(image)
        try:
            data = file.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        with contextlib.suppress(OSError):
            os.utime(file)
        return load(data[32:])["latent"]

    def write(self, image: str, latent: Tensor) -> None:
        """Keep the latent (z, h, w) of an image, if there is room."""
        if self._refused:
            return
        content = save({"latent": latent.contiguous()})
        data = hashlib.sha256(content).digest() + content
        try:
            self._take(len(data))
            with replacing(self._file(image), several=True, crashes=False) as partial:
                partial.write_bytes(data)
        except OSError as error:
            self._refused = True
            why = str(refusal(error) or f"{self.folder}: {error}").rstrip(".")
            say(f"{why}. Latents are not kept; every stage encodes its images itself.", sys.stderr)

    def _file(self, image: str) -> Path:
        name = hashlib.sha256(f"{self._maker} {image}".encode()).hexdigest()
        return self.folder / name[:2] / name

    @cached_property
    def _maker(self) -> str:
        """Digest of what the latent of an image depends on besides the image."""
        first = next(self._vae.parameters())
        if first.is_cuda:
            where = torch.cuda.get_device_name(first.device), torch.are_deterministic_algorithms_enabled()
        else:
            where = _processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        digest = hashlib.sha256(repr((self._vae.config, torch.__version__, first.device.type, *where)).encode())
        for file in _MAKERS:
            digest.update(file.read_bytes())
        for key, value in self._vae.encoder.state_dict().items():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _take(self, size: int) -> None:
        """Take `size` bytes of the room that is left. Raises OSError if there is none."""
        if self._room < size:
            self._room = self._cleared(size)
        if self._room < size:
            raise OSError("no room for latents; free some space on this disk")
        self._room -= size

    def _cleared(self, size: int) -> int:
        """Bytes that may be written. If `size` are too many, so much leaves that half of the store becomes free."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = []
        for file in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):  # another process makes room too
                stat = file.stat()
                found.append((stat.st_mtime_ns, stat.st_size, file))
        used = sum(length for _, length, _ in found)
        most = min(STORED_BYTES, (used + shutil.disk_usage(self.folder).free) // 2)
        if used + size > most:
            for _, length, file in sorted(found):
                if used <= most // 2:
                    break
                file.unlink(missing_ok=True)
                used -= length
        return most - used


def _processor() -> list[str]:
    """What tells processors apart that compute differently, as far as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return sorted({line for line in lines if line.startswith(_PROCESSOR)})
