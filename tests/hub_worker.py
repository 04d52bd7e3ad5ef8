"""Trains and pushes at every save, to the Hub in HF_ENDPOINT: `hub_worker.py FOLDER REPOSITORY`."""

import sys

import torch
from support import MLP, make, trainer_for
from torch import distributed

from amp_hf.images.pushing import RecipeTrainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, repository = sys.argv[1:]
    own = dict(push_to_hub=True, hub_model_id=repository, hub_strategy="every_save")
    trainer = trainer_for(
        make(MLP), folder, cls=RecipeTrainer, max_steps=2, save_strategy="steps", save_steps=1,
        **own,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    distributed.barrier()
    distributed.destroy_process_group()
