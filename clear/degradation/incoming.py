"""Naturally degraded images (data/incoming), read in the same way by the stages degrade and mmd_bench."""

from functools import partial
from pathlib import Path

from clear.data.pool import parallel
from clear.degradation.corruptions import CORRUPTIONS
from clear.errors import ClearError
from clear.schema import Config
from clear.sources.incoming import FOLDER, names
from clear.sources.intake import Intake, known_images, read
from clear.sources.scenes.words import VOCABULARY

SAMPLES = Path("data/samples")


def planned(config: Config, only: str = "", folder: Path = FOLDER) -> Intake:
    """All sets of `folder` (or one), every row judged. Where there is no set, nothing else is read.

    Raises ClearError for a set that cannot be read, is not pulled, or has the name of a corruption.
    """
    here = names(folder)
    for name in [only] if only else here:
        if name in CORRUPTIONS:
            raise ClearError(f"{folder / name}: '{name}' is the name of a corruption; rename the folder.")
    if not here and not only:
        return Intake(folder, (), (), {}, {})
    # A model trained from scratch knows the words of the scenes; one from a checkpoint can read any text.
    words = None if config.model.checkpoint else VOCABULARY
    shares = config.incoming.bench_share, config.incoming.rl_share
    over = partial(parallel, workers=config.degrade.workers, label="incoming")
    return read(folder, only, *shares, known_images(SAMPLES), words, over)
