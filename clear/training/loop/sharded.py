"""Sharded weights (FSDP2): how a process was launched, and what GRPO needs in addition: a whole copy and a reference.

Sharded layers are gathered by all processes together when they compute, which works for scoring but not for rollouts:
a rollout takes as many forwards as its own longest reply has tokens. `Policies.whole` therefore gathers every weight
once into a copy of the model without hooks; it is valid until the next optimiser step changes the weights, and is
freed when scoring begins. Each device must hold the whole weights next to its shards (`clear memory --gpus`).

The reference is taken from the shards of the incoming policy, so that no process ever holds a second whole model.
"""

import copy
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from clear.errors import ClearError
from clear.model.bagel import Bagel
from clear.model.mot import LanguageModel


def enabled() -> bool:
    """Whether this process was launched to shard its weights."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def require_fresh(module: nn.Module, what: str) -> None:
    """Raise ClearError where this process has trained `module` sharded already: its weights are no longer its own."""
    if enabled() and any(hasattr(part, "unshard") for part in module.modules()):
        raise ClearError(f"{what}: under FSDP a process trains one phase; repeat the command to continue.")


def from_first() -> bool:
    """Whether only the first process needs the weights, and gives the others their shards."""
    return os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"


def empty_copy(module: nn.Module) -> nn.Module:
    """A copy of a module without its weights: every parameter on the meta device, frozen."""
    known = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, known)


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _layers(module: nn.Module) -> list[nn.Module]:
    return [layer for part in module.modules() if isinstance(part, LanguageModel) for layer in part.model.layers]


class Policies:
    """The policy in training, sharded, with its whole copy and its reference. `policy` holds a Bagel as `bagel`."""

    def __init__(self, policy: nn.Module) -> None:
        """Before the policy is sharded."""
        self._policy, self._copy, self._reference = policy, empty_copy(policy.bagel).eval(), None
        self._empty = empty_copy(policy)
        for layer in _layers(policy):
            layer.always_both = True

    @torch.no_grad()
    def whole(self) -> Bagel:
        """A model with the policy's weights of now, in eval mode. All processes must ask."""
        self.split_reference()
        sharded = dict(self._policy.bagel.named_parameters())
        for name in [name for name, _ in self._copy.named_parameters()]:
            part, _, last = name.rpartition(".")
            full = sharded[name].detach()
            full = full.full_tensor() if isinstance(full, DTensor) else full
            self._copy.get_submodule(part)._parameters[last] = nn.Parameter(full, requires_grad=False)
        return self._copy

    def drop(self) -> None:
        """Free the whole copy."""
        self._copy.to("meta")

    @torch.no_grad()
    def split_reference(self) -> None:
        """Make the reference of the policy's shards as they are now, once. All processes must ask."""
        if self._reference is not None:
            return
        from torch.distributed.fsdp import fully_shard

        shards = dict(self._policy.named_parameters())
        mesh = next(p.device_mesh for p in shards.values() if isinstance(p, DTensor))
        reference = self._empty
        for layer in _layers(reference):
            fully_shard(layer, mesh=mesh)
        fully_shard(reference, mesh=mesh)
        reference.to_empty(device=_local(next(iter(shards.values()))).device)
        for name, value in reference.named_parameters():
            _local(value).copy_(_local(shards[name]))
        self._reference = reference.eval()

    def anchor(self) -> torch.Tensor:
        """Zero, with a gradient for every parameter outside the layers: they are exchanged as one group.

        To be asked for inside the policy's forward; frees the whole copy.
        """
        self.drop()
        gathered = (p for p in self._policy.parameters() if p.requires_grad and not isinstance(p, DTensor))
        return 0.0 * sum(p.float().sum() for p in gathered)

    def reference(self) -> Callable:
        """What calls a function with the incoming policy's Bagel."""
        return self._reference

    def join(self) -> None:
        """Training is over: the policy's Bagel becomes an ordinary model with whole weights, in every process."""
        bagel, device = self._policy.bagel, _local(next(self._policy.parameters())).device
        self.drop()
        for part in bagel.modules():
            for name, value in list(part._parameters.items()):
                if isinstance(value, DTensor):
                    full = value.detach().full_tensor().to(device)
                    part._parameters[name] = nn.Parameter(full, requires_grad=value.requires_grad)
        for layer in _layers(bagel):
            layer.always_both = False
        for part in bagel.modules():
            if hasattr(part, "unshard"):
                part.__class__ = type(part).__bases__[1]
                for hooks in (part._forward_pre_hooks, part._forward_hooks):
                    hooks.clear()
