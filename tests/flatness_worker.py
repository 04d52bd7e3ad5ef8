"""What one of several processes measures of a network on digits."""

import torch
from support import ConvNet, digits, make, trainer_for, weights

from amp_hf.flatness import LossSurface, measure

SETTINGS = dict(steps=3, directions=2, max_iterations=4, probes=3)


def found(folder):
    data = digits(torch.float64)[:50]  # batches of eight: the last one is of two
    trainer = trainer_for(make(ConvNet, dtype=torch.float64), folder, data=data)
    before = weights(trainer.model)
    surface = LossSurface.of(trainer, progress=False)
    result = measure(surface, radius=0.5, **SETTINGS).to_dict()
    kept = all(torch.equal(x, before[name]) for name, x in weights(trainer.model).items())
    return result | {"kept": kept, "batches here": len(surface._batches)}
