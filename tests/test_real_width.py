"""BAGEL-7B's own widths and vocabulary, two layers deep, on a CPU: what models of a few channels cannot show.

One program does what a user of the published weights does, on a 512 × 512 picture: it loads the folder, answers with a
restoration (prompt, decoding, denoising, the picture decoded), and takes a training step of an adapter.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from clear.model.bagel import Bagel, BagelConfig
from clear.model.checkpoint import special_tokens
from clear.model.checkpoint.save import save_bagel
from clear.model.mot import LlmConfig
from clear.model.runtime import without_weights
from clear.model.tokenizer import word_tokenizer
from clear.model.vae import AutoEncoder, VaeConfig
from clear.model.vit import VitConfig
from clear.reasoning import grammar
from tests.bench import gpu
from tests.conftest import ROOT

LAYERS, PIXELS, LIMIT = 2, 512, 12 * 2**30

PROGRAM = """
import json, resource, sys
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from clear.model import lora
from clear.model.checkpoint import load_bagel
from clear.model.runtime import autocast
from clear.model.sequence import VIT
from clear.model.vae import unpatchify
from clear.reasoning.engine import Options, generate
from clear.schema import Lora
from clear.training import footprint
from tests.bench import gpu
from tests.test_memory import Live



def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


torch.manual_seed(0)
model, vae, tokenizer = load_bagel(sys.argv[1], None)
pixels = int(sys.argv[2])
found = {"parameters": sum(p.numel() for p in model.parameters()), "width": model.config.llm.hidden}
found["loaded"] = peak()

prompt = gpu.prompt(model, pixels)
options = Options(restore="always", flow_steps=2, max_tokens=4, batch=1)
with autocast(model.eval()):
    (trajectory,) = generate(model, tokenizer, [prompt], options, 1, torch.Generator().manual_seed(0))
latent = trajectory.restorations[-1].x0
with torch.inference_mode():
    picture = vae.decode(unpatchify(latent[None].float(), prompt.latent_grid, model.config.latent_patch))
found |= {"replies": len(trajectory.replies), "picture": list(picture.shape), "finite": bool(picture.isfinite().all())}
found["answered"] = peak()
del picture, latent, trajectory

adapter = Lora(16, 32.0, 0.0, gpu.TARGETS, "both")
model.requires_grad_(False)
lora.attach(model, adapter)
model.language_model.gradient_checkpointing = True
model.train()
built, contents, targets = gpu.sft_batch(model, 1, pixels)
known = {StorageWeakRef(t.untyped_storage()).cdata for t in (*model.parameters(), *model.buffers())}
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def loss():
    hidden = model(built, contents)
    return F.cross_entropy(*model.scored_logits(hidden, built)) + F.mse_loss(model.velocities(hidden, built), targets)


losses = []
for step in range(2):
    with autocast(model), Live() as live:
        lost = loss()
        found["held"] = live.held(known)
    losses.append(lost.item())
    lost.backward()
    optimiser.step()
    optimiser.zero_grad()
gen, vit, scored = (int(part.sum()) for part in (built.is_gen, built.kind == VIT, built.target >= 0))
batch = footprint.Batch(*built.valid.shape, gen, scored, len(targets), vit=vit)
train = footprint.Training(2, 2, adapter, True)
found |= {"losses": losses, "estimated": footprint.activations(model.config, batch, train)}
found["peak"] = peak()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of bfloat16 weights with the published shapes, but for the number of the decoder's layers."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), word_tokenizer(grammar.WORDS)
    llm = replace(LlmConfig(), layers=LAYERS)
    config = BagelConfig(llm, VitConfig(), VaeConfig(), special_tokens(tokenizer))
    with without_weights():
        model = Bagel(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        gpu._fill(part, "cpu", generator)
    save_bagel(folder, model, AutoEncoder(config.vae), tokenizer)
    return folder


@pytest.mark.slow
def test_a_picture_is_restored_and_an_adapter_trained_at_the_published_widths(folder):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(PIXELS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["width"] == 3584 and found["parameters"] > 2e9
    assert found["replies"] == 2 and found["picture"] == [1, 3, PIXELS, PIXELS] and found["finite"]
    assert found["losses"][1] < found["losses"][0], "a step on the same batch has learned"
    assert found["peak"] <= LIMIT, found  # `loaded` and `answered`: the peak until then
    assert 0.75 <= found["estimated"] / found["held"] <= 1.25, found  # what lives between forward and backward
