"""The reference's numbers and what the parity tests share: reading them, and comparing with their tolerances.

`tests/golden/` holds inputs and outputs of the reference implementation on a tiny random model (float32, CPU);
`cases.json` says with which parameters. Nothing in the tests depends on the shapes of one set: CLEAR_GOLDEN may name
a folder with another.
"""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from clear.config import compose, from_dict
from clear.model.bagel import Contents
from clear.model.sequence import Text, layout
from clear.model.vae import patchify

GOLDEN = Path(os.environ.get("CLEAR_GOLDEN", Path(__file__).parent / "golden"))
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]


def close(found, expected, tolerance):
    """Equal up to an absolute tolerance."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def tokens(model, z):
    """Latents (1, z, h, w) to tokens (N, C) and their grid."""
    p = model.config.latent_patch
    return patchify(z, p)[0], (z.shape[2] // p, z.shape[3] // p)


def vit_input(model, pixels):
    """Pixels (3, H, W) to patches (N, 3p²) and their grid."""
    p = model.config.vit.patch
    return patchify(pixels[None], p)[0], (pixels.shape[1] // p, pixels.shape[2] // p)


def spans(parts):
    """(start, end) of consecutive parts."""
    return itertools.pairwise(itertools.accumulate((len(part) for part in parts), initial=0))


def image_size(params, way):
    """A ModelSize with the image transforms of a case, [long side, short side, stride] each."""
    (vae, vae_min, stride), (vit, vit_min, patch) = params["vae_transform"], params["vit_transform"]
    size = from_dict(compose(["profile=smoke"])).model
    size = replace(size, vae_size=vae, vae_min=vae_min, latent_patch=stride // 2 ** (len(size.vae_mult) - 1))
    return replace(size, vit_size=vit, vit_min=vit_min, vit_patch=patch, vit_side=70, resize=way)


def greedy(model, cache, rope, golden, name):
    """Feed the golden tokens one by one and compare the logits of every step."""
    for step, token in enumerate(golden[f"{name}.sequence"].tolist()):
        one, _ = layout([[Text([token], bos=False, eos=False)]], model.config.special, rope=[rope + step])
        if f"{name}.position_ids" in golden:
            assert one.rope.flatten().tolist() == [int(golden[f"{name}.position_ids"][step])]
        logits = model.language_model.lm_head(model(one, Contents(), cache, write=True).und[-1])
        close(logits, golden[f"{name}.logits"][step], 1e-4)
        following = golden[f"{name}.sequence"][step + 1 : step + 2].tolist()
        assert following in ([], [int(logits.argmax())])
