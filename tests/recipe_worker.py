"""One process of a recipe."""

import os
import runpy
import sys

from distributed_worker import compile_nothing, shard_on_the_cpu


def run_recipe(environment, *words):
    os.environ.update(environment)
    if "ACCELERATE_USE_FSDP" in environment:
        shard_on_the_cpu()
    if "ACCELERATE_USE_DEEPSPEED" in environment or "--deepspeed" in words:
        compile_nothing()
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
