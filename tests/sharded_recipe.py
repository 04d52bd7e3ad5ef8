"""A recipe under FSDP on the CPU: `sharded_recipe.py RECIPE [ARGUMENT ...]`."""

import runpy
import sys

from distributed_worker import shard_on_the_cpu

if __name__ == "__main__":
    shard_on_the_cpu()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
