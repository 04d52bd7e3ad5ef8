"""The perturbation among what wandb, TensorBoard and the other trackers show of a run."""

from __future__ import annotations

import functools
from typing import Any

from transformers import TrainerCallback, TrainingArguments


class ShowConfig(TrainerCallback):
    """Puts the fields of `AMPConfig` beside those of `TrainingArguments`, as `amp/epsilon` etc.

    Every tracker asks `TrainingArguments.to_dict` for what it shows, when the training begins
    (transformers.integrations.integration_utils). This has to be the first callback, and ends when
    all of them have begun, so that the arguments are saved as they are.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        arguments, config = args.to_dict(), self._trainer.amp_config
        shown = arguments | {f"amp/{name}": value for name, value in config.to_dict().items()}
        args.to_dict = functools.partial(dict, shown)  # type: ignore[method-assign]

    def on_epoch_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self.end(args)

    @staticmethod
    def end(args: TrainingArguments) -> None:
        vars(args).pop("to_dict", None)
