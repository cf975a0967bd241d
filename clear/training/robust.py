"""A vision tower that sees the clean picture in a damaged one: an alternative to restoring, and a start for it.

Robust encoders are trained so elsewhere (features of a damaged picture are pulled to those that the encoder had for the
clean one). No text is involved, so unlabelled pairs will do. Not published for CLEAR; with it, what a restoration still
adds can be measured (docs/RESULTS.md).
"""

import copy

import torch
from torch import Tensor, nn

from clear.model.bagel import Bagel
from clear.training.loop.trainer import Loss
from clear.training.sft import TraceData, likeness


def robust_loss(model: Bagel, data: TraceData) -> Loss:
    """Distance (`likeness`) to the features that the vision tower now has for the clean picture.

    The sample numbers count the pictures as they are shown, then the clean ones, whose features should stay. A picture
    without a clean partner, and one whose grids differ, is its own target.
    """
    tower = copy.deepcopy(model.vit_model).requires_grad_(False).eval()
    side, shown = model.config.vit.side, len(data.shown)
    paired = {data.image[n] for n in data.paired}

    def features(vit: nn.Module, patches: list[Tensor], grid: tuple[int, int]) -> Tensor:
        place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
        positions = (place[:, 0] * side + place[:, 1]).expand(len(patches), -1)
        device = model.vae2llm.weight.device
        return vit(torch.stack(patches).to(device), positions.to(device)).float().flatten(0, 1)

    def loss(index: list[int]) -> tuple[Tensor, dict[str, float]]:
        grids: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for n in index:
            seen, i = (data.shown, n) if n < shown else (data.clean, n - shown)
            grid = seen.vit_grid(i)
            own = data.clean if i in paired and data.clean.vit_grid(i) == grid else seen
            grids.setdefault(grid, []).append((seen.patches(i), own.patches(i)))
        found, target = [], []
        for grid, pairs in grids.items():
            found.append(features(model.vit_model, [seen for seen, _ in pairs], grid))
            with torch.no_grad():
                target.append(features(tower, [own for _, own in pairs], grid))
        return likeness(torch.cat(found), torch.cat(target))

    return loss
