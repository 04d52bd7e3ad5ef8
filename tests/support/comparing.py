"""What a training leaves behind."""

import random

import numpy as np
import torch


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(a, b):
    """Names of the entries that are not equal to the bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rng_states():
    """Of Python's, NumPy's and torch's generators, comparable by `==`."""
    kind, keys, *rest = np.random.get_state()
    numpy = (kind, keys.tolist(), *rest)
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state().tolist(),
    }


def logs(trainer):
    """The log history without what the clock wrote."""
    timed = ("_runtime", "_per_second")
    return [
        {key: value for key, value in entry.items() if not key.endswith(timed)}
        for entry in trainer.state.log_history
    ]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def outcome(trainer):
    """All that a training leaves behind, comparable by `==`."""
    optimizer = trainer.optimizer.state_dict()
    return {
        "weights": comparable(trainer.model.state_dict()),
        "optimizer": comparable(optimizer),
        "logs": logs(trainer),
        "rng": rng_states(),
    }


def comparable(tree):
    """Tensors as lists: float32 and float64 lose no bit, and `==` says yes or no."""
    if torch.is_tensor(tree):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: comparable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [comparable(value) for value in tree]
    return tree
