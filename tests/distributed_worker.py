"""One rank of test_distributed.py: writes its batches and the weights after every step."""

import pickle
import sys
from pathlib import Path

import torch
from support import make, on, recorded
from torch import distributed

from amp_hf import AMPConfig


def run(config, steps, accumulation):
    model = make(dtype=torch.float64)
    weights = []

    def keep(event, state, control):
        weights.append([param.detach().clone() for param in model.parameters()])

    callbacks = [on(["on_step_end"], keep)]
    _, windows = recorded(
        model,
        sys.argv[1],
        AMPConfig(**config),
        steps,
        accumulation,
        trainer={"callbacks": callbacks},
    )
    return windows, weights


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = run(*pickle.loads(Path(sys.argv[1], "run.pkl").read_bytes()))
    Path(sys.argv[1], f"{distributed.get_rank()}.pkl").write_bytes(pickle.dumps(result))
