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
from clear.model import flow
from clear.model.bagel import Contents
from clear.model.sequence import LATENT, VIT, Image, Layout, Row, Text, layout
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


def conversation(model, golden, name):
    """Segments and contents of a prefill case: system, the image as it says, question."""
    contents, images = Contents(vit=[], latent=[], time=[]), []
    if f"{name}.vae_latent" in golden:
        latent, grid = tokens(model, golden[f"{name}.vae_latent"])
        contents.latent, contents.time = [latent], [0.0]
        images.append(Image(LATENT, grid))
    patches, grid = vit_input(model, golden["inputs.vit_pixels"])
    contents.vit = [patches]
    system, question = golden["inputs.system_ids"].tolist(), golden["inputs.question_ids"].tolist()
    return [Text(system), *images, Image(VIT, grid), Text(question)], contents


def packed_layout(model, golden, name):
    """The layout of packed samples in ONE row, from the reference's index lists."""
    get = {key: golden[f"{name}.packed_{key}"].tolist() for key in ("text_ids", "text_indexes", "vit_token_indexes")}
    text = dict(zip(get["text_indexes"], get["text_ids"], strict=True))
    vit_at, latent_at = set(get["vit_token_indexes"]), set(golden[f"{name}.packed_vae_token_indexes"].tolist())
    scored = set(golden[f"{name}.ce_loss_indexes"].tolist())
    side, sizes = model.config.vit.side, golden[f"{name}.vit_token_seqlens"].tolist()
    last = [int(part[-1]) for part in golden[f"{name}.packed_vit_position_ids"].split(sizes)]
    vit_grids = iter([(at // side + 1, at % side + 1) for at in last])
    latent_grids = iter(map(tuple, golden[f"{name}.latent_shapes"].tolist()))
    ends = list(itertools.accumulate(golden[f"{name}.sample_lens"].tolist()))
    row, segments, start = Row(), [], 0
    lengths, splits = golden[f"{name}.split_lens"].tolist(), CASES[name]["params"]["splits"]
    for length, split in zip(lengths, splits, strict=True):
        if start + 1 in vit_at:
            segments.append(Image(VIT, next(vit_grids)))
        elif start + 1 in latent_at:
            segments.append(Image(LATENT, next(latent_grids), noise=split["mode"] == "noise"))
        else:
            body = [text[j] for j in range(start + 1, start + length - 1)]
            segments.append(Text(body, scored=True if start in scored else None))
        start += length
        if start in ends:
            row.add(segments, model.config.special)
            segments = []
    return Layout.stack([row])


def packed_contents(golden, name, shift=1.0):
    """Pictures of packed samples, noised by the given draws; also the velocity target of the noisy tokens."""
    sizes = [h * w for h, w in golden[f"{name}.latent_shapes"].tolist()]
    clean, noise = golden[f"{name}.packed_latent_clean"].split(sizes), golden[f"{name}.noise"].split(sizes)
    first = [start for start, _ in spans(clean)]
    times = flow.training_times(golden[f"{name}.packed_timesteps_raw"][first], shift)
    noised = [flow.interpolate(x[None], e[None], t[None])[0] for x, e, t in zip(clean, noise, times, strict=True)]
    patches = golden[f"{name}.packed_vit_tokens"].split(golden[f"{name}.vit_token_seqlens"].tolist())
    target = torch.cat([e - x for x, e, t in zip(clean, noise, times, strict=True) if t > 0])
    return Contents(vit=patches, latent=noised, time=times), target
