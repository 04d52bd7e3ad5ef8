"""One perturbed step: Algorithm 1 around a Trainer's own forward and backward pass.

The Trainer takes an optimizer step for each *window* of micro-batches. For each of them it calls
`training_step`, which is `PerturbedStep` here:

    inner passes   the parent's pass at θ; its gradient is the ascent that makes Δ
    outer pass     the parent's pass at θ + Δ; its gradient is what the optimizer gets
    θ              is back, to the bit, before the Trainer goes on

Every pass is the parent's own, so that its loss, its precision and its options are honoured.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .batches import check_divisible, first_samples
from .checks import check_trainer
from .config import AMPConfig
from .engine import Engine, engine_for
from .feedback import Feedback
from .parameters import StepTensors, check_no_hooks
from .passes import Count, LossKind, ParentPasses
from .preserve import gradients_set_aside, preserved_buffers, preserved_rng
from .progress import Progress, keep
from .run import LogMeans, Run, Window, stacked

# A ζ so large that any Δ leaves the ball and is projected onto it, yet far from float32's limits.
# The last ascent then decides alone where on the sphere Δ lies.
_ONTO_THE_SPHERE = 1e9


class PerturbedStep:
    """What `AMPTrainerMixin.training_step` does, and the state that it keeps.

    Args:
        trainer: of which it reads the config, the engine's state and the progress.
        parent: the passes of the class that the trainer derives from.
    """

    def __init__(self, trainer: Any, parent: ParentPasses) -> None:
        self.trainer = trainer
        self.parent = parent
        self.run = Run()
        self.window = Window()
        self.means = LogMeans()
        # Held while the parameters may not be θ. A signal handler runs in the thread that holds it.
        self._moves = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_moves"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _moves=threading.RLock())

    def begin_window(self, batches: list) -> None:
        """Drops the window before, which a callback may have cut short."""
        self.window = Window(batches)

    def end_run(self) -> None:
        self.window.perturbation.restore()  # where an interrupt hit the one in `__call__`
        self.window = Window()
        state = self.run.state
        if state is not None and self.run.checked:
            keep(state, progress=self._progress)
        self.run = Run(state)  # frees the engine, the memory of the gradients and Δ

    def before_checkpoint(self) -> None:
        """All that a resumed run needs goes into the Trainer's state."""
        run, state = self.run, self.run.state
        if state is None or state is not self.trainer.state or not run.checked:
            return
        if self._is_within_step:  # a resumed run repeats it
            keep(state, progress=self._progress, feedback=self._feedback.state_before())
            return
        # Δ is in no checkpoint: the next step ascends anew, as the first one after resuming does.
        run.reusable = None
        keep(state, progress=self._progress, feedback=self._feedback.state())

    @property
    def _is_within_step(self) -> bool:
        """Whether a step has begun that the optimizer has not taken yet."""
        return self.run.state is not None and self.run.current_step == self.run.state.global_step

    @property
    def _progress(self) -> dict[str, Any]:
        """Of the steps that were taken."""
        return self.run.progress_before if self._is_within_step else vars(self.run.progress)

    def __call__(self, model: nn.Module, inputs: Any, num_items: Count) -> Tensor:
        """One micro-batch: accumulates its gradient at θ + Δ; the parameters end as θ.

        Returns:
            The parent's loss at θ, 0-dimensional; at θ + Δ where an earlier Δ is reused.
        """
        state, config = self.trainer.state, self._config
        if self.run.state is not state:  # a new run, or a smaller batch size is tried
            self.run = Run.of(state, self.trainer.accelerator, self.run.feedback)
            self.means = LogMeans()
        run, step = self.run, state.global_step
        if config.epsilon != 0 and not run.checked:
            self._check(inputs)
            run.checked = True
        if step != run.current_step:
            run.current_step = step
            run.progress_before = dict(vars(run.progress))
            if config.epsilon is None:
                self._feedback.next_step(config.rise, run.epochs, step / max(1, state.max_steps))
        is_plain = config.epsilon is None and self._feedback.target == 0
        if is_plain or not config.perturbs_at(step, state.max_steps):
            return self._without_delta(model, inputs, num_items)
        # As the parent's pass does, but before Δ is added: an evaluation may have moved the
        # parameters of a schedule-free optimizer, and what this brings them back to is θ.
        train = getattr(self.trainer.optimizer, "train", None)
        if callable(train):
            train()
        if step != run.last_perturbed:  # the window's first micro-batch
            run.last_perturbed = step
            self.window.clean_losses = []
            if self._needs_new_delta():
                run.last_ascent = step
            # A subclass may repeat a step that failed.
            run.progress = Progress(**run.progress_before)
            run.progress.count(step, ascends=run.last_ascent == step)
        with self._moves:
            try:
                if run.last_ascent == step:
                    return self._with_new_delta(model, inputs, num_items)
                return self._with_last_delta(model, inputs, num_items)
            except BaseException:
                run.last_perturbed = None  # a subclass may go on: with a new Δ
                raise
            finally:
                self.window.perturbation.restore()

    @contextlib.contextmanager
    def at_theta(self) -> Iterator[None]:
        """The parameters are θ inside, where a signal handler, say, interrupts a step.

        Another thread waits for the end of the pass.
        """
        with self._moves:
            perturbation = self.window.perturbation
            is_displaced = perturbation.is_displaced
            with self._engine.at_theta(perturbation) if is_displaced else contextlib.nullcontext():
                yield

    @property
    def _config(self) -> AMPConfig:
        return self.trainer.amp_config  # callbacks may replace it

    @property
    def _feedback(self) -> Feedback:
        assert self.run.feedback is not None  # from the first step on
        return self.run.feedback

    @property
    def _engine(self) -> Engine:
        assert self.run.engine is not None  # from the first ascent on
        return self.run.engine

    @property
    def _tensors(self) -> StepTensors:
        assert self.run.tensors is not None
        return self.run.tensors

    def _check(self, inputs: Any) -> None:
        """Refuses what `__init__` could not see: a config, hooks or batches that came later."""
        trainer, config = self.trainer, self._config
        check_trainer(trainer, config)
        if not trainer.is_deepspeed_enabled:  # which has hooks of its own by now
            check_no_hooks(trainer.model)
        accumulates = getattr(trainer, "current_gradient_accumulation_steps", 1) > 1
        if not self.window.batches and accumulates:
            raise ValueError(
                f"{type(trainer).__name__}.get_batch_samples must call super(): AMP takes the "
                "step's micro-batches from there."
            )
        # A run that resumes may begin with an epoch's last batch, which may be a single sample.
        if config.ascent_fraction < 1 and trainer.state.global_step == 0:
            check_divisible(inputs, config.ascent_fraction)

    def _needs_new_delta(self) -> bool:
        """Whether there is no Δ that this step could reuse."""
        run, config = self.run, self._config
        if run.reusable is None or not config.ascent_reuse:
            return True
        assert run.last_ascent is not None
        are_others = self._tensors.update()  # a callback may have (un)frozen some since
        since = self.trainer.state.global_step - run.last_ascent
        return are_others or since >= config.ascent_every

    def _without_delta(self, model: nn.Module, inputs: Any, num_items: Count) -> Tensor:
        """The parent's step. Returns its loss."""
        if self._config.epsilon is not None:
            return self.parent(model, inputs, num_items)
        if self._asks_for_loss_kind():
            self._prepare(model, inputs, num_items)
            self._find_loss_kind(model, inputs, num_items)
        loss = self.parent(model, inputs, num_items)
        self._feed(num_items, loss, loss, torch.zeros_like(loss))
        return loss

    def _with_new_delta(self, model: nn.Module, inputs: Any, num_items: Count) -> Tensor:
        """Two passes or more, unless Δ is that of the whole window. Returns the loss at θ."""
        window = self.window
        if window.clean_losses:
            window.perturbation.resume()
        else:
            self._find_delta(model, inputs, num_items)
        engine = self._engine
        with (
            self._norm_stats_kept(),
            engine.outer_pass(model),
            engine.before_optimizer_step(model, self._put_aside),
        ):
            loss = self.parent(model, inputs, num_items)
        clean_loss = window.clean_losses.pop(0)
        if window.clean_losses:
            window.perturbation.suspend()
        else:
            self._put_aside()
        assert window.delta_norm is not None
        share = 1 / window.size
        self.means.add(loss, clean_loss, window.delta_norm, share)
        if self._config.epsilon is None:
            assert window.linear_rise is not None
            self._feed(num_items, clean_loss, loss, share * window.linear_rise)
        return clean_loss

    def _with_last_delta(self, model: nn.Module, inputs: Any, num_items: Count) -> Tensor:
        """One pass, at the Δ of an earlier step. Returns the loss at θ + Δ."""
        assert self.run.reusable is not None
        self.window.perturbation, self.run.reusable = self.run.reusable, None
        self.window.perturbation.resume()
        engine = self._engine
        with engine.outer_pass(model), engine.before_optimizer_step(model, self._put_aside):
            loss = self.parent(model, inputs, num_items)
        self._put_aside()
        return loss

    def _put_aside(self) -> None:
        """θ back into the parameters; Δ stays only if steps to come reuse it."""
        config, perturbation = self._config, self.window.perturbation
        if config.ascent_reuse and config.ascent_every > 1:
            perturbation.suspend(theta_moves=True)
            self.run.reusable = perturbation
        else:
            perturbation.restore()

    def _find_delta(self, model: nn.Module, inputs: Any, num_items: Count) -> None:
        """The inner passes, on `inputs` or the whole window, and the parameters go to θ + Δ.

        Leaves in `clean_losses` the losses at θ of the micro-batches that Δ was computed on.
        """
        self._prepare(model, inputs, num_items)
        config, parent, engine, window = self._config, self.parent, self._engine, self.window
        # A subclass may have changed `inputs`, which is all of the window where it is one batch.
        batches = window.batches if engine.scope == "batch" and window.size > 1 else [inputs]
        if self._asks_for_loss_kind():
            self._find_loss_kind(model, inputs, num_items)
        scale = parent.loss_scale(engine.scope, window.size, batches, num_items, self._loss_kind)
        num_items = scale.num_items
        on_its_own = self._is_only_a_part() and engine.scope == "micro_batch"
        with parent.as_a_step_of_its_own() if on_its_own else contextlib.nullcontext():
            if config.ascent_fraction < 1:
                batches = [first_samples(batch, config.ascent_fraction) for batch in batches]
                num_items = parent.count_items(batches)
            losses = self._inner_passes(model, batches, num_items, scale.gradient_factor)
        window.clean_losses = [loss / scale.loss_divisor for loss in losses]

    def _is_only_a_part(self) -> bool:
        """Whether the step's batch has more than this micro-batch."""
        return self.window.size * self.trainer.accelerator.num_processes > 1

    def _asks_for_loss_kind(self) -> bool:
        # On a window's first micro-batch: only there, `_is_last` is right about what follows.
        return (
            self._is_only_a_part() and self.run.loss_kind is None and self.window.measured is None
        )

    @property
    def _loss_kind(self) -> LossKind:
        return self.run.loss_kind or LossKind()

    def _find_loss_kind(self, model: nn.Module, inputs: Any, num_items: Count) -> None:
        self.run.loss_kind = self.parent.find_loss_kind(
            model, inputs, num_items, self._engine, self._tensors, self._is_last()
        )

    def _feed(
        self, num_items: Count, loss: Tensor, perturbed_loss: Tensor, linear_rise: Tensor
    ) -> None:
        """Measures a micro-batch for the rule: its losses, as logged, and its part of the rise."""
        window = self.window
        factor = self.parent.mean_factor(window.size, num_items, self._loss_kind)
        measured = stacked(factor * loss.detach(), factor * perturbed_loss.detach(), linear_rise)
        window.measured = measured if window.measured is None else window.measured + measured
        if self.trainer.accelerator.sync_gradients:  # the last one: the optimizer steps next
            self._feedback.add(window.measured)
            window.measured = None

    def _prepare(self, model: nn.Module, inputs: Any, num_items: Count) -> None:
        """What the first ascent of a run sets up, and what callbacks have changed since."""
        trainer, run = self.trainer, self.run
        if run.tensors is None or run.tensors.model is not trainer.model:
            run.engine = engine_for(self._config, trainer.accelerator, trainer.model)
            run.tensors = StepTensors(
                trainer.model, self._config.perturb, trainer.optimizer, run.engine
            )
            if getattr(model, "static_graph", False):  # DDP must see it in a synchronized pass
                self.parent.without_side_effects(model, inputs, num_items, run.tensors)
        run.tensors.update()

    def _inner_passes(
        self, model: nn.Module, batches: list, num_items: Count, gradient_scale: float
    ) -> list[Tensor]:
        """From θ to θ + Δ, by Algorithm 1. Returns the losses of `batches` at θ.

        Their sum times `gradient_scale` is the mean loss of all of them.
        """
        engine, tensors, config = self._engine, self._tensors, self._config
        epsilon, inner_lr = config.epsilon, config.inner_lr
        if epsilon is None:
            epsilon, inner_lr = self._feedback.radius.epsilon or 0.0, _ONTO_THE_SPHERE
        factor = gradient_scale / engine.grad_scale()
        window = self.window
        window.perturbation = engine.perturbation(tensors.perturbed, model, epsilon, config.ball)
        self.run.reusable = None  # its Δ is where the gradient comes to
        clean_losses: list[Tensor] = []
        for inner_step in range(config.inner_steps):
            # θ is in the memory of the last one.
            gradient = tensors.zeros(fresh=inner_step > 0)
            with (
                preserved_rng(self.trainer.args.device),
                self._norm_stats_kept() if inner_step else contextlib.nullcontext(),
                gradients_set_aside(tensors.trainable),
                engine.inner_passes(model, tensors.perturbed, gradient, self._is_last()),
            ):
                tensors.join_gradients()
                for batch in batches:
                    # A copy, because computing the loss may take the labels out.
                    loss = self.parent(model, copy.copy(batch), num_items)
                    if inner_step == 0:
                        # A copy: a CUDA graph writes the next pass's loss into the same memory.
                        clean_losses.append(loss.clone())
            if config.epsilon is None and self._feedback.radius.epsilon is None:
                loss = gradient_scale * torch.stack(clean_losses).sum()
                self._begin_radius(loss, factor * window.perturbation.slope_of(gradient))
            window.delta_norm = window.perturbation.ascend(gradient, inner_lr * factor)
        if config.epsilon is None:
            epsilon = window.perturbation.epsilon  # that of the first ascent is not known before
            window.linear_rise = window.perturbation.slope * (epsilon / inner_lr)
        return clean_losses

    def _begin_radius(self, loss: Tensor, slope: Tensor) -> None:
        """The first ascent of a run waits for the device, once: nothing is known before."""
        feedback, accelerator = self._feedback, self.trainer.accelerator
        found = accelerator.reduce(stacked(loss, slope).to(accelerator.device), "mean")
        feedback.radius.begin(feedback.target, *found.tolist())
        self.window.perturbation.epsilon = feedback.radius.epsilon or 0.0

    def _is_last(self) -> bool:
        """Whether the window ends with the micro-batch that Δ is computed on."""
        return self.window.size == 1

    def _norm_stats_kept(self) -> contextlib.AbstractContextManager[None]:
        """Around every pass that is not the clean one."""
        if self._config.norm_stats == "both":
            return contextlib.nullcontext()
        return preserved_buffers(self._tensors.norm_buffers)
