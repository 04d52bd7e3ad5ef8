"""`AMPTrainer`: the one place that knows the Trainer's step.

The Trainer calls `get_batch_samples` once an optimizer step, with all its micro-batches, and
`training_step` for each of them; clipping, the scaler, the optimizer and the scheduler follow.
AMP happens within `training_step`: every forward and backward pass goes through the parent's own,
and when it returns the parameters are θ to the bit and the gradient at θ + Δ has been accumulated.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState

from .batches import first_samples
from .card import CardDetails, write
from .config import AMPConfig
from .configured import ConfiguredMixin
from .engine import Engine, engine_for, temporarily
from .parameters import ModelTensors, perturbed_parameters
from .perturbation import Perturbation
from .record import TrainingRecord
from .statistics import gradients_set_aside, preserved_buffers, preserved_rng


class AMPTrainerMixin(ConfiguredMixin):
    """Trains with Adversarial Model Perturbation. Mix it into any subclass of `Trainer`, in front:

        class AMPSFTTrainer(AMPTrainerMixin, SFTTrainer): ...

    Args:
        amp_config: the perturbation; `None` is `AMPConfig()`. With `epsilon=0` the trainer is its
            parent, bit for bit. `trainer.amp_config` may be replaced between two steps, by a
            callback that follows a schedule, say; `scope` and `perturb` stay for the whole run.

    Every other argument is the parent's. The logged `loss` is the clean one, at θ. Beside it stand
    `amp/loss` (at θ + Δ), `amp/sharpness` (their difference) and `amp/delta_norm` (‖Δ‖₂), each the
    mean over the steps with an ascent since the last log. Where `ascent_reuse` perturbs a step that
    has none, there is no pass at θ: its part of `loss` and of BatchNorm's statistics is from θ + Δ.

    `create_model_card`, and so `push_to_hub`, writes down what was done and what came of it; what
    only the script knows goes into `card_details` (`amp_hf.card.CardDetails`).

    Raises:
        ValueError: an engine, optimizer, parameter type or `perturb` that AMP would be wrong with.
    """

    # The micro-batches of this optimizer step, and its Δ as far as it is computed.
    _window: list
    _perturbation: Perturbation
    _delta_norm: Tensor
    _loss_is_share: bool | None  # see `_is_share`; found out once a run
    _clean_losses: list[Tensor]  # at θ, of the micro-batches that Δ holds for and that are to come

    # The run that what follows is about, its last perturbed step and its last one with an ascent,
    # and the parameters and the Δ of that, where it can be reused.
    _run: TrainerState | None
    _last_perturbed: int
    _last_ascent: int
    _perturbed: list[nn.Parameter]
    _reusable: Perturbation | None

    # Sums over the steps with an ascent since the last log.
    _sums: Tensor | float
    _ascended_steps: float

    _engine: Engine
    _tensors: ModelTensors | None

    # The Trainer's own.
    model: Any
    current_gradient_accumulation_steps: int

    def __init__(self, *args: Any, amp_config: AMPConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(amp_config, AMPConfig | None):
            raise ValueError(f"amp_config must be an AMPConfig or None, got {amp_config!r}.")
        self.amp_config = amp_config or AMPConfig()
        self.card_details = CardDetails()
        self._tensors = None
        self._loss_is_share = None
        self._run = None
        self._reusable = None
        self._start_window([])
        super().__init__(*args, **kwargs)
        self._start_statistics()
        if self.amp_config.epsilon > 0:
            engine_for(self.amp_config, self.accelerator, self.args, self.model)
            perturbed_parameters(self.model, self.amp_config.perturb)  # for its refusals

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        self._tensors = None
        self._loss_is_share = None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._perturbation.restore()  # where an interrupt hit the one in training_step
            self._start_window([])
            self._tensors = self._reusable = None  # and the memory that they keep

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md into the output folder: the parent's card, completed by `card.write`.

        Results are those that `evaluate` logged last for each prefix, for example `test` after
        `trainer.evaluate(dataset, metric_key_prefix="test")`; `card_details` adds what only the
        script knows.
        """
        if not hasattr(self.model, "config"):  # where the parent looks for a base model
            kwargs.setdefault("finetuned_from", "")
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir), "README.md")
            known = {name: kwargs.get(name) for name in ("model_name", "tasks")}
            record = TrainingRecord.of(self, self.amp_config, **known)
            details = self.card_details
            if details.dataset is None and isinstance(dataset := kwargs.get("dataset"), str):
                details = replace(details, dataset=dataset)
            write(path, record, details)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        window, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._start_window(window)
        return window, num_items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One micro-batch: accumulates its gradient at θ + Δ; the parameters end as θ.

        Returns:
            The parent's loss at θ, 0-dimensional.
        """
        step, config = self.state.global_step, self.amp_config
        if not config.perturbs_at(step, self.state.max_steps):
            return super().training_step(model, inputs, num_items_in_batch)
        if self._run is not self.state:  # a new run, or a smaller batch size is tried
            self._start_run()
        # As the parent's step does, but before Δ is added: an evaluation may have moved the
        # parameters of a schedule-free optimizer, and what this brings them back to is θ.
        train = getattr(self.optimizer, "train", None)
        if callable(train):
            train()
        if step != self._last_perturbed:  # its first micro-batch
            self._last_perturbed = step
            self._clean_losses = []
            if self._must_ascend():
                self._last_ascent = step
        try:
            if self._last_ascent == step:
                return self._ascending_step(model, inputs, num_items_in_batch)
            return self._reusing_step(model, inputs, num_items_in_batch)
        except BaseException:
            self._last_perturbed = -1  # a subclass may go on: with an ascent
            raise
        finally:
            self._perturbation.restore()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._ascended_steps and self._run is self.state:
            means = self.accelerator.reduce(self._sums / self._ascended_steps, reduction="mean")
            logs |= zip(("amp/loss", "amp/sharpness", "amp/delta_norm"), means.tolist())
            self._start_statistics()
        super().log(logs, *args, **kwargs)

    def _must_ascend(self) -> bool:
        """Whether there is no Δ that this step could reuse."""
        if self._reusable is None:
            return True
        assert self._tensors is not None
        # Callbacks may have frozen parameters or unfrozen them.
        changed = list(map(id, self._perturbed)) != list(map(id, self._tensors.perturbed()))
        return changed or self.state.global_step - self._last_ascent >= self.amp_config.ascent_every

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Δ is in no checkpoint: the next step ascends anew, as the first one after resuming does.
        self._reusable = None
        super()._save_checkpoint(*args, **kwargs)

    def _ascending_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Two passes or more, unless Δ is that of the whole window. Returns the loss at θ."""
        if self._clean_losses:
            self._perturbation.enter()
        else:
            self._ascend(model, inputs, num_items_in_batch)
        with self._norm_stats_kept(), self._engine.descent(model, self._put_aside):
            loss = super().training_step(model, inputs, num_items_in_batch)
        clean_loss = self._clean_losses.pop(0)
        if self._clean_losses:
            self._perturbation.leave()
        else:
            self._put_aside()
        share = 1 / max(1, len(self._window))
        self._ascended_steps += share
        dtype = torch.promote_types(loss.dtype, torch.float32)
        values = (loss, loss - clean_loss, self._delta_norm * share)
        self._sums = self._sums + torch.stack([value.to(dtype) for value in values])
        return clean_loss

    def _reusing_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """One pass, with the Δ of the last ascent. Returns the loss at θ + Δ."""
        assert self._reusable is not None
        self._perturbation, self._reusable = self._reusable, None
        self._perturbation.enter()
        with self._engine.descent(model, self._put_aside):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._put_aside()
        return loss

    def _put_aside(self) -> None:
        """θ back into the parameters; Δ stays only if steps to come reuse it."""
        if self.amp_config.ascent_reuse and self.amp_config.ascent_every > 1:
            self._perturbation.leave(theta_moves=True)
            self._reusable = self._perturbation
        else:
            self._perturbation.restore()

    def _ascend(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> None:
        """All ascents: Δ from `inputs` or the whole window, and the parameters to θ + Δ.

        Leaves in `_clean_losses` the losses at θ of the micro-batches that Δ was computed on.
        """
        config = self.amp_config
        if self._tensors is None or self._tensors.model is not self.model:
            self._engine = engine_for(config, self.accelerator, self.args, self.model)
            self._tensors = ModelTensors(
                self.model, config.perturb, self.optimizer, self._engine.shard
            )
            if self._engine.learns_graph(model):
                self._traceless_pass(model, inputs, num_items_in_batch)
        engine = self._engine
        perturbed = self._perturbed = self._tensors.perturbed()
        if not self._window and getattr(self, "current_gradient_accumulation_steps", 1) > 1:
            raise ValueError(
                f"{type(self).__name__}.get_batch_samples must call its parent's, where AMP takes "
                "the micro-batches of a step from."
            )
        batches = self._window if engine.scope == "batch" and self._window else [inputs]
        window, ranks = max(1, len(self._window)), self.accelerator.num_processes
        joined = window * ranks > 1
        alone = joined and engine.scope == "micro_batch"
        if joined and self._loss_is_share is None:
            self._loss_is_share = self._is_share(model, inputs, num_items_in_batch)

        # The Trainer multiplies a loss that was divided by what all ranks counted.
        counted = num_items_in_batch is not None and self.args.average_tokens_across_devices
        factor = ranks if counted else 1
        num_items: Any = num_items_in_batch
        share = 1.0  # of a batch's loss in that of all `batches`
        scale: Any = 1
        with self._alone() if alone else contextlib.nullcontext():
            if alone:
                num_items = self._count_items(batches)
                if self._loss_is_share is not False:
                    scale = window if num_items is None else num_items_in_batch / num_items
                scale = scale / factor
            elif self._loss_is_share is False:
                share = 1 / (window * factor)
            if config.ascent_fraction < 1:
                batches = [first_samples(batch, config.ascent_fraction) for batch in batches]
                num_items = self._count_items(batches)
            losses = self._ascents(model, perturbed, batches, num_items, share)
        self._clean_losses = [loss / scale for loss in losses]

    def _ascents(
        self,
        model: nn.Module,
        perturbed: list[nn.Parameter],
        batches: list,
        num_items: Tensor | int | None,
        share: float,
    ) -> list[Tensor]:
        """From θ to θ + Δ. Returns the losses of `batches` at θ.

        Their sum times `share` is the mean loss of all of them.
        """
        assert self._tensors is not None
        rate = self.amp_config.inner_lr * share / self._engine.loss_scale()
        self._perturbation = self._engine.perturbation(perturbed, model, self.amp_config)
        self._reusable = None  # its Δ is where the gradient comes to
        clean_losses: list[Tensor] = []
        for ascent in range(self.amp_config.inner_steps):
            # θ is in the memory of the last one.
            gradient = self._tensors.zeros(perturbed, fresh=ascent > 0)
            with (
                preserved_rng(self.args.device),
                self._norm_stats_kept() if ascent else contextlib.nullcontext(),
                gradients_set_aside(self._tensors.trainable()),
                self._engine.ascent(model, perturbed, gradient, self._is_last()),
            ):
                for batch in batches:
                    # A copy, because computing the loss may take the labels out.
                    loss = super().training_step(model, copy.copy(batch), num_items)
                    if ascent == 0:
                        clean_losses.append(loss)
            if ascent == 0 and self.amp_config.ascent_below is not None:
                loss = self._engine.joint_mean(share * torch.stack(clean_losses).sum())
                learnt = (1 - loss / self.amp_config.ascent_below).nan_to_num(0.0).clamp(0, 1)
                self._perturbation.scale_radius(learnt)
            self._delta_norm = self._perturbation.ascend(gradient, rate)
        return clean_losses

    def _is_share(
        self, model: nn.Module, batch: dict[str, Any], num_items: Tensor | int | None
    ) -> bool | None:
        """Whether a micro-batch's loss is its share of the window's: half as much in one of twice.

        Some models (BERT's for sequences, say) and loss functions are given `num_items_in_batch`
        and return the micro-batch's own mean all the same; the Trainer then adds up means. `None`
        where a loss of zero does not tell.
        """
        if num_items is None and self.compute_loss_func is None and not self.loss_is_scaled_for_ga:
            return True  # the Trainer divides it
        losses = []
        for size in (1, 2):
            count = None if num_items is None else num_items * size
            with self._accumulating(size), self._engine.ascent(model, [], [], self._is_last()):
                losses.append(self._traceless_pass(model, batch, count))
        # One answer for all ranks: further passes of one alone would leave the others waiting.
        once, twice = self.accelerator.reduce(torch.stack(losses)).tolist()
        return twice / once < 0.75 if once and math.isfinite(once) else None

    def _traceless_pass(
        self, model: nn.Module, batch: dict[str, Any], num_items: Tensor | int | None
    ) -> Tensor:
        assert self._tensors is not None
        with (
            preserved_rng(self.args.device),
            preserved_buffers(self._tensors.norm_buffers),
            gradients_set_aside(self._tensors.trainable()),
        ):
            return super().training_step(model, copy.copy(batch), num_items)

    def _is_last(self) -> bool:
        """Whether a micro-batch that is ascended on under `scope="batch"` is its window's last."""
        return len(self._window) <= 1

    def _count_items(self, batches: list) -> Tensor | None:
        """`num_items_in_batch` as the parent counts it, were `batches` the whole window; >= 1."""
        count = super().get_batch_samples(iter(batches), len(batches), self.args.device)[1]
        return None if count is None else torch.as_tensor(count).clamp(min=1)

    def _norm_stats_kept(self) -> contextlib.AbstractContextManager[None]:
        """Around every pass that is not the clean one."""
        if self.amp_config.norm_stats == "both":
            return contextlib.nullcontext()
        assert self._tensors is not None  # there was an ascent
        return preserved_buffers(self._tensors.norm_buffers)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """To the Trainer, the micro-batches inside are those of a step on one process."""
        with (
            self._accumulating(1),
            temporarily(self.args, "average_tokens_across_devices", False),
        ):
            yield

    @contextlib.contextmanager
    def _accumulating(self, micro_batches: int) -> Iterator[None]:
        """A loss is divided by the number of micro-batches: inside, it is this one.

        The Trainer reads the first, a `compute_loss` that divides of its own the second.
        """
        with (
            temporarily(self, "current_gradient_accumulation_steps", micro_batches),
            temporarily(self.args, "gradient_accumulation_steps", micro_batches),
        ):
            yield

    def _start_window(self, window: list) -> None:
        """Forgets the optimizer step before, which a callback may have ended early."""
        self._window = window
        self._clean_losses = []
        self._perturbation = Perturbation([], 0.0, "global")

    def _start_run(self) -> None:
        self._run = self.state
        self._last_perturbed = -1
        self._reusable = None
        self._start_statistics()

    def _start_statistics(self) -> None:
        self._sums = 0.0
        self._ascended_steps = 0.0


class AMPTrainer(AMPTrainerMixin, Trainer):
    """`transformers.Trainer` with Adversarial Model Perturbation: see `AMPTrainerMixin`."""
