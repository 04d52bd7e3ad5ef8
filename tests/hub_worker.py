"""Trains and pushes at every save, as one of several processes."""

import pytest
from hub_server import TOKEN, use
from support import MLP, make, trainer_for

from amp_hf.job.recipe_trainer import RecipeTrainer


def push(endpoint, folder, repository):
    use(endpoint, pytest.MonkeyPatch())
    own = dict(push_to_hub=True, hub_model_id=repository, hub_token=TOKEN)
    trainer = trainer_for(
        make(MLP), folder, cls=RecipeTrainer, max_steps=2, save_strategy="steps", save_steps=1,
        hub_strategy="every_save", **own,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
