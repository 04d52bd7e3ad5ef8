"""The recipes' trainer: it takes no step too many, and its evaluations leave nothing out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from ..preserve import temporarily
from .pushing import PushingTrainer


class RecipeTrainer(PushingTrainer):
    """A `PushingTrainer` that evaluates whole sets.

    After `train`, the model is what evaluations measure, with schedule-free optimizers, too.

    `dataloader_drop_last` and `dataloader_persistent_workers` hold in training only. The Trainer
    would drop the last batch of a test set, too, and with persistent workers take the dataloader of
    the first set for all others.
    """

    optimizer: Any  # the Trainer's own

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        # Evaluations move a schedule-free optimizer's parameters to its average: what is saved now
        # is what they will measure.
        self.optimizer.eval()
        return result

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        # The Trainer notices that it has taken all steps only after one more, where a run goes on
        # that had ended in the middle of an epoch.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with self._whole_sets():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with self._whole_sets():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _whole_sets(self) -> Iterator[None]:
        with (
            temporarily(self.args, "dataloader_drop_last", False),
            temporarily(self.args, "dataloader_persistent_workers", False),
        ):
            yield
