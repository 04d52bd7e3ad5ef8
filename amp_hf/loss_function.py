"""The loss as a function of a model's parameters, and what can be computed of it anywhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device, set_seed
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers.trainer_pt_utils import find_batch_size

from .blocks import JointTensors
from .compat import foreach_clone
from .preserve import all_buffers, preserved_buffers, preserved_rng, temporarily

if TYPE_CHECKING:
    from transformers import Trainer
    from typing_extensions import Self

Batch = Any  # tensors, or a mapping or a sequence of them
Vector = Sequence[Tensor]  # a tensor for each parameter

# What a pass over the samples takes, in forward passes: with one backward pass, and with two.
GRADIENT_COST, HESSIAN_PRODUCT_COST = 3, 9


class LossFunction:
    """The mean loss over some samples, as a function of the model's trainable parameters θ.

    The model is in evaluation mode at every point: no dropout, and BatchNorm normalizes by the
    running statistics that belong to θ. Parameters, buffers, gradients, the modes of modules and
    the random generators are afterwards what they were, to the bit. What is random comes from
    `seed` alone, on every device. With several processes, each computes its share of the batches,
    and all get the same results.

    Args:
        model: whole on every process, its parameters in float32 or float64.
        batches: a dataloader or any iterable of batches, the same on every process. It is read
            once, up to the batch with which there are `max_samples`; the batches are kept.
        loss: from the model and a batch to the mean loss over the batch's samples, 0-dimensional;
            `None` is `model(**batch)["loss"]`.
        progress: show a bar on the terminal.

    Raises:
        ValueError: a model that is sharded over processes, or in half precision, or without
            trainable parameters; no batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        max_samples: int = 1000,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.model = extract_model_from_parallel(model, keep_torch_compile=False)
        self.params: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("The model has no trainable parameters along which to measure a loss.")
        if any(isinstance(param, DTensor) or hasattr(param, "ds_id") for param in self.params):
            raise ValueError(
                "The model's parameters are sharded over processes: save it and measure the one "
                "that from_pretrained loads."
            )
        if halved := {p.dtype for p in self.params} - {torch.float32, torch.float64}:
            raise ValueError(
                f"Parameters in {halved.pop()} are too coarse to be moved a little: load the model "
                "with dtype=torch.float32."
            )
        self.device = self.params[0].device
        self.seed = seed
        self.progress = progress
        self._loss = loss or (lambda model, batch: model(**batch)["loss"])
        self._bar: tqdm | None = None

        ranks, rank = 1, 0
        if distributed.is_initialized():
            ranks, rank = distributed.get_world_size(), distributed.get_rank()
        self._distributed = ranks > 1
        self.samples = 0
        self._batches: list[tuple[Batch, int]] = []  # with the number of samples
        with preserved_rng(self.device):
            set_seed(seed)  # a dataloader or a collator may draw
            for i, batch in enumerate(batches):
                size = find_batch_size(batch) or 1
                self.samples += size
                if i % ranks == rank:
                    self._batches.append((send_to_device(batch, self.device), size))
                if self.samples >= max_samples:
                    break
        if not self.samples:
            raise ValueError("There are no batches to measure a loss on.")

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        dataset: Any = None,
        model: nn.Module | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> Self:
        """For the trainer's own loss, in mixed precision if its model computes so.

        Args:
            dataset: with a length; `None` is what was trained on. Its samples are drawn by `seed`,
                since many are sorted by class.
            model: `None` is the trainer's.
        """
        dataset = trainer.train_dataset if dataset is None else dataset
        sharing = trainer.get_test_dataloader(dataset)  # each process a part of the batches
        batches = torch.utils.data.DataLoader(
            sharing.dataset,
            trainer.args.eval_batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=sharing.collate_fn,
        )

        def loss(model: nn.Module, batch: Batch) -> Any:
            inputs = dict(batch)  # a copy, because computing the loss may take the labels out
            if trainer.compute_loss_func is None:
                return trainer.compute_loss(model, inputs)
            # Each process has its own batches here, and no more than one device.
            with (
                temporarily(trainer.args, "average_tokens_across_devices", False),
                temporarily(trainer.args, "_n_gpu", 1),
            ):
                count = trainer._get_num_items_in_batch([batch], trainer.args.device)
                return trainer.compute_loss(model, inputs, num_items_in_batch=count)

        model = model or trainer.model
        assert model is not None
        return cls(model, batches, loss, seed=seed, **kwargs)

    def loss(self) -> float:
        """L(θ)."""
        return self._sum(None, 1)[0]

    def hessian_product(self, vector: Vector) -> list[Tensor]:
        """∇²L(θ)·v."""

        def product(loss: Tensor) -> Sequence[Tensor]:
            gradient = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
            # Of a parameter that the loss is linear in, the gradient does not depend on θ.
            terms = [(g, v) for g, v in zip(gradient, vector) if g is not None and g.requires_grad]
            if not terms:
                return ()
            outputs, vectors = zip(*terms)
            return torch.autograd.grad(outputs, self.params, vectors, materialize_grads=True)

        with sdpa_kernel(SDPBackend.MATH):  # the only attention that can be derived twice
            return self._sum(product, HESSIAN_PRODUCT_COST)[1]

    def random(self, draw: Callable[[torch.Size], Tensor]) -> list[Tensor]:
        """A vector of what `draw` makes of each parameter's shape."""
        return [draw(param.shape).to(self.device, param.dtype) for param in self.params]

    def gaussian(self, generator: torch.Generator) -> list[Tensor]:
        return self.random(lambda shape: torch.randn(shape, generator=generator))

    def generator(self) -> torch.Generator:
        """A new one, which draws the numbers of the seed."""
        return torch.Generator().manual_seed(self.seed)  # on the CPU: the same for all devices

    def random_direction(self, generator: torch.Generator | None = None) -> list[Tensor]:
        """Gaussian, each filter scaled to the norm of θ's; zero along biases and norm layers.

        A filter is what makes one output: a row of a matrix, a kernel of a convolution. Li et al.,
        section 4. (In layers whose first dimension is not that of the outputs, as in transformers'
        Conv1D and transposed convolutions, it is what belongs to one input.) Without a generator,
        it is the first direction of the seed.
        """
        direction = self.gaussian(generator or self.generator())
        for d, param in zip(direction, self.params):
            if param.ndim < 2:
                d.zero_()
            else:
                norms, lengths = (t.detach().flatten(1).norm(dim=1) for t in (param, d))
                d.mul_((norms / lengths).view(-1, *[1] * (param.ndim - 1)))
        return direction

    def along(self, direction: Vector, distances: Sequence[float]) -> list[float]:
        """L(θ + a·d) for each distance a."""
        return [losses[0] for losses in self.over(direction, direction, distances, [0.0])]

    @torch.no_grad()
    def over(
        self, first: Vector, second: Vector, rows: Sequence[float], columns: Sequence[float]
    ) -> list[list[float]]:
        """L(θ + a·d₁ + b·d₂) for each a in `rows` and each b in `columns`."""
        theta = foreach_clone(self.params)
        losses: list[list[float]] = []
        try:
            for a in rows:
                losses.append([])
                for b in columns:
                    moved = torch._foreach_add(theta, list(first), alpha=a)
                    torch._foreach_add_(list(moved), list(second), alpha=b)
                    torch._foreach_copy_(self.params, moved)
                    losses[-1].append(self.loss())
        finally:
            torch._foreach_copy_(self.params, theta)
        return losses

    @contextlib.contextmanager
    def announced(self, what: str, forward_passes: int) -> Iterator[None]:
        """Says what the measurements inside cost at most, and shows a bar while they run."""
        first = not self._distributed or distributed.get_rank() == 0
        if self.progress and first:
            print(
                f"{what}: {self.samples:,} samples, at most the time of {forward_passes:,} forward "
                "passes over them.",
                file=sys.stderr,
            )
        hidden = None if self.progress and first else True  # `None` shows it on terminals only
        with tqdm(total=forward_passes, desc=what, unit=" passes", disable=hidden) as bar:
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def loss_and_gradient(self) -> tuple[float, list[Tensor]]:
        """L(θ) and ∇L(θ), in one pass over the samples."""

        def gradient(loss: Tensor) -> Sequence[Tensor]:
            return torch.autograd.grad(loss, self.params, materialize_grads=True)

        return self._sum(gradient, GRADIENT_COST)

    def _sum(
        self, derive: Callable[[Tensor], Sequence[Tensor]] | None, cost: int
    ) -> tuple[float, list[Tensor]]:
        """L, and the sum of what `derive` makes of each batch's part of it."""
        total, sums = 0.0, JointTensors(self.params if derive else [])
        sums.zero_()
        with self._undisturbed(), torch.set_grad_enabled(derive is not None):
            for batch, size in self._batches:
                loss = self._loss(self.model, batch) * (size / self.samples)
                if derive and (parts := derive(loss)):
                    torch._foreach_add_(sums.tensors, list(parts))
                total += loss.item()
        if self._distributed:
            losses = torch.tensor([total], device=self.device, dtype=torch.float64)
            for tensor in [losses, *sums.blocks]:
                distributed.all_reduce(tensor)
            total = losses.item()
        if self._bar is not None:
            self._bar.update(cost)
        return total, sums.tensors

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with preserved_rng(self.device), preserved_buffers(all_buffers(self.model)):
                set_seed(self.seed)  # a model may draw in evaluation, too
                yield
        finally:
            for module, mode in modes:
                module.training = mode
