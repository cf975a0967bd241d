"""What the engine is asked for (`Options`) and what it returns: replies and the restorations between them."""

from dataclasses import dataclass, field

from torch import Tensor

from clear.errors import ClearError
from clear.model import flow
from clear.model.tokenizer import decode


@dataclass(frozen=True)
class Options:
    """How to generate.

    restore: "auto" lets the model decide, "always" forces the trigger reply, "never" forces a direct one, "plain" is
    a base model that knows no restoration. feedback: "bridge" (the model's own kind) or "reencode" (decode to pixels,
    read by the ViT). noise_seed gives every restoration of every prompt its own starting noise, whatever the batch:
    of one seed + the prompt's number, or of one per prompt. sigma > 0 records an SDE trajectory instead of the ODE,
    and excludes guidance (ClearError): noise enters in the steps window[0] ≤ k < window[1] only (None: in all), and
    with `shared_noise` the rows of a group start from the same noise, so that only the window tells them apart.
    temperature 0 is greedy.
    """

    restore: str = "auto"
    feedback: str = "bridge"
    flow_steps: int = 30
    shift: float = 3.0
    sigma: float = 0.0
    temperature: float = 0.0
    max_tokens: int = 1024
    max_restorations: int = 1
    batch: int = 64
    noise_seed: int | tuple[int, ...] | None = None
    window: tuple[int, int] | None = None
    shared_noise: bool = False
    guidance: flow.Guidance = field(default_factory=flow.Guidance)

    def __post_init__(self) -> None:
        first, last = self.window or (0, self.flow_steps)
        if not 0 <= first < last <= self.flow_steps:
            raise ClearError(f"window = {self.window} must lie within the {self.flow_steps} flow steps, not empty.")
        if self.restore == "always" and not self.max_restorations:
            raise ClearError("sampling.max_restorations = 0 allows no restoration where one is forced; raise it to 1.")
        if self.sigma > 0 and self.guidance.on:
            raise ClearError(
                f"sigma = {self.sigma} with text guidance {self.guidance.text}: the log-probabilities of a stochastic "
                "rollout are those of the unguided velocity. Set sigma to 0, or the guidance scales to 1."
            )


@dataclass
class Reply:
    """Sampled ids (with eos where it was sampled), their log-probabilities, and how many were forced, not sampled."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    forced: int = 0


@dataclass
class Restoration:
    """A denoised latent x0 (N, C) on `grid`; with SDE, the states (S+1, N, C) and step log-probabilities (S,).

    A step outside the SDE's window has no probability: NaN.
    """

    x0: Tensor
    grid: tuple[int, int]
    states: Tensor | None = None
    log_probs: Tensor | None = None


@dataclass
class Trajectory:
    """Everything one row produced: replies and the restorations between them.

    `vocabulary` is the number of ids its tokens were sampled from (0: all of the model's).
    """

    prompt: int
    vocabulary: int = 0
    replies: list[Reply] = field(default_factory=list)
    restorations: list[Restoration] = field(default_factory=list)

    def texts(self, tokenizer) -> list[str]:
        """The replies as text."""
        return [decode(tokenizer, reply.ids) for reply in self.replies]
