"""A program for `accelerate launch -m tests.sharded STAGE`: the stage, sharded between processes of the CPU."""

from clear.cli import main
from tests.helpers.ranks import shard_on_cpu

if __name__ == "__main__":
    shard_on_cpu()
    main()
