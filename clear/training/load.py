"""Loading what the training stages share: degraded pairs and their traces."""

from clear.config import Config
from clear.model.images import ImageBank
from clear.model.vae import AutoEncoder
from clear.reasoning.prompts import SYSTEM
from clear.records import read_samples
from clear.traces.records import read_traces
from clear.training.sft import TraceData


def trace_data(tokenizer, vae: AutoEncoder, config: Config) -> TraceData:
    """The traces of data/traces with the degraded and clean images of data/degraded/sft, encoded once."""
    samples = list(read_samples("data/degraded/sft"))
    shown = ImageBank([s.seen for s in samples], config.model, [s.key for s in samples]).encode(vae)
    clean = ImageBank([s.image for s in samples], config.model, [s.id for s in samples]).encode(vae)
    system = SYSTEM if config.sampling.system_prompt else ""
    return TraceData(tokenizer, read_traces("data/traces"), samples, shown, clean, system)
