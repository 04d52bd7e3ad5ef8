"""What a Trainer does with its `AMPConfig` outside of a step."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from .config import AMPConfig
from .record import delta_norms

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Parent = Trainer
else:
    _Parent = object

AMP_CONFIG_NAME = "amp_config.json"


class ConfiguredMixin(_Parent):
    """The part of `AMPTrainerMixin` that saves the config, compares it, and searches for it."""

    amp_config: AMPConfig

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if resume_from_checkpoint:
            self._compare_with_checkpoint(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._warn_if_never_perturbed()
        return result

    def hyperparameter_search(
        self, hp_space: Callable[[Any], dict[str, Any]] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The parent's; with Optuna, what `hp_space` returns may hold fields of `AMPConfig`, too.

        A field that the trial does not choose is that of `amp_config`, which comes back in the end:
        `trainer.amp_config = dataclasses.replace(trainer.amp_config, epsilon=…)` takes what was
        found over.
        """
        before = self.amp_config
        names = before.to_dict().keys()

        def space(trial: Any) -> dict[str, Any]:
            assert hp_space is not None
            chosen = hp_space(trial)
            own = {name: value for name, value in chosen.items() if name in names}
            self.amp_config = dataclasses.replace(before, **own)
            return {name: value for name, value in chosen.items() if name not in own}

        try:
            return super().hyperparameter_search(hp_space and space, *args, **kwargs)
        finally:
            self.amp_config = before

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's; the config lies beside the weights, once they are written."""
        super().save_model(output_dir, _internal_call=True)  # which leaves out the push at its end
        if self.args.should_save:
            folder = str(output_dir or self.args.output_dir)
            os.makedirs(folder, exist_ok=True)
            self.amp_config.to_json_file(os.path.join(folder, AMP_CONFIG_NAME))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _compare_with_checkpoint(self, checkpoint: str | bool) -> None:
        """Warns where the checkpoint was trained with another `AMPConfig`."""
        folder = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        path = os.path.join(folder or "", AMP_CONFIG_NAME)
        if not os.path.isfile(path):
            return
        if changes := self.amp_config.changes_since(path):
            logger.warning(
                f"Resuming {folder} with a different AMPConfig than it was trained with: "
                f"{'; '.join(changes)}."
            )

    def _warn_if_never_perturbed(self) -> None:
        config, state = self.amp_config, self.state
        norms = delta_norms(state)
        if norms and not any(norms) and config.ascent_below is not None:
            logger.warning(
                f"No loss was below AMPConfig.ascent_below={config.ascent_below:g}, so that "
                "nothing was perturbed: the ascents cost time and changed nothing. Train longer, "
                "raise ascent_below (inf: at any loss), or leave AMP out by epsilon=0."
            )
        steps = range(state.global_step)
        if config.epsilon > 0 and not any(config.perturbs_at(s, state.max_steps) for s in steps):
            logger.warning(
                f"Training ended at step {state.global_step} of {state.max_steps}, before the "
                f"first perturbed one: AMPConfig.ascent_start={config.ascent_start:g}. Where it "
                "may end early, use a smaller one."
            )
