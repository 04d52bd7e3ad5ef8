"""How flat is this minimum: the loss around a model's parameters, measured.

    surface = LossSurface(model, dataloader)
    surface.worst_case_rise(0.1)
    measure(surface)                          # all of it, with a progress bar

Four measures, none of which stands for the others:

    worst-case rise   max of L(θ + Δ) − L(θ) over ‖Δ‖₂ ≤ r, by the ascents of Algorithm 1 of Zheng
                      et al., CVPR 2021 (arXiv 2010.04925)
    random rise       mean of L(θ + s·d) − L(θ) over random directions d that are as long as θ is,
                      filter by filter: Li et al., NeurIPS 2018 (arXiv 1712.09913), section 4
    top eigenvalue    of the Hessian of L, by power iteration on Hessian-vector products
                      (Pearlmutter 1994)
    trace             of the Hessian of L, by Hutchinson's estimator (1990)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device, set_seed
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from .blocks import JointTensors
from .perturbation import Perturbation
from .preserve import all_buffers, preserved_buffers, preserved_rng

if TYPE_CHECKING:
    from transformers import Trainer

Batch = Mapping[str, Any]
Vector = Sequence[Tensor]  # one tensor a parameter

# What a pass over the samples takes, in forward passes: with one backward pass, and with two.
_GRADIENT, _HESSIAN_PRODUCT = 3, 9


@dataclass(frozen=True)
class Rise:
    """Of the loss, in its unit, over random directions; `std` is the standard deviation."""

    mean: float
    std: float
    values: list[float]


@dataclass(frozen=True)
class Eigenvalue:
    """Some eigenvalue lies within `residual`, ‖Hv − λv‖₂ for the unit vector v that was found."""

    value: float
    residual: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Trace:
    """The mean of `values`, one a probe, and its standard error."""

    mean: float
    standard_error: float
    values: list[float]


@dataclass(frozen=True)
class Flatness:
    """What `measure` found; losses in the unit of the loss, distances in that of the parameters."""

    samples: int
    seed: int
    loss: float
    radius: float
    worst_case_rise: float
    scale: float
    random_rise: Rise
    top_eigenvalue: Eigenvalue
    trace: Trace

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class LossSurface:
    """The mean loss over some samples, as a function of the model's trainable parameters θ.

    The model is in evaluation mode at every point: no dropout, and BatchNorm normalizes by the
    running statistics that belong to θ. Parameters, buffers, gradients, the modes of modules and
    the random generators are afterwards what they were, to the bit. What is random comes from
    `seed` alone, on every device. Of several processes each computes its share of the batches, and
    all of them get the same results.

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
        if distributed.is_available() and distributed.is_initialized():
            ranks, rank = distributed.get_world_size(), distributed.get_rank()
        self._distributed = ranks > 1
        self.samples = 0
        self._batches: list[tuple[Batch, int]] = []  # with the number of samples
        with preserved_rng(self.device):
            set_seed(seed)  # a dataloader or a collator may draw
            for i, batch in enumerate(batches):
                size = _size(batch)
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
    ) -> LossSurface:
        """Of the trainer's own loss, in mixed precision if its model computes so.

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
            return trainer.compute_loss(model, dict(batch))  # which may take the labels out

        model = model or trainer.model
        assert model is not None
        return cls(model, batches, loss, seed=seed, **kwargs)

    def loss(self) -> float:
        """L(θ)."""
        return self._sum(lambda loss: (), 1)[0]

    def gradient(self) -> list[Tensor]:
        """∇L(θ)."""
        return self._loss_and_gradient()[1]

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
            return self._sum(product, _HESSIAN_PRODUCT)[1]

    def worst_case_rise(self, radius: float, steps: int = 10) -> float:
        """The largest L(θ + Δ) − L(θ) that `worst_case` finds."""
        return self.worst_case(radius, steps)[0]

    @torch.no_grad()
    def worst_case(self, radius: float, steps: int = 10) -> tuple[float, list[Tensor]]:
        """The largest L(θ + Δ) − L(θ) that `steps` ascents find within ‖Δ‖₂ ≤ `radius`, and its Δ.

        Δ ← project(Δ + ζ·∇L(θ + Δ)), with ascents as long as the radius: ζ = r / ‖∇L‖₂. The rise is
        a lower bound of the maximum, >= 0, and a NaN as soon as a loss is one. Where ∇L(θ) is zero,
        the first ascent goes in a random direction.

        Args:
            radius: > 0, in parameter units, over all trainable parameters together.
            steps: >= 1.
        """
        _check_positive(radius=radius)
        _check_at_least(1, steps=steps)
        theta = list(torch._foreach_clone(self.params))
        perturbation = Perturbation(self.params, radius, "global")
        clean, gradient = self._loss_and_gradient()
        loss, worst, delta = clean, clean, [torch.zeros_like(param) for param in theta]
        try:
            for step in range(1, steps + 1):
                if math.isnan(loss):
                    return math.nan, delta
                if not (length := norm(gradient)):
                    gradient = self._gaussian(self.generator())
                    length = norm(gradient)
                perturbation.ascend(JointTensors.copy_of(gradient), radius / length)
                if step < steps:
                    loss, gradient = self._loss_and_gradient()
                else:
                    loss = self.loss()
                if not loss <= worst:
                    worst, delta = loss, list(torch._foreach_sub(list(self.params), theta))
        finally:
            perturbation.restore()
        return worst - clean, delta

    def random_rise(self, scale: float, directions: int = 10) -> Rise:
        """L(θ + s·d) − L(θ) over filter-normalized random directions d, and its spread.

        Args:
            scale: s, the distance in lengths of θ: 0.1 moves every filter by a tenth of its norm.
            directions: how many, >= 2.
        """
        _check_at_least(2, directions=directions)
        generator = self.generator()
        clean = self.loss()
        values = [
            self.along(self.random_direction(generator), [scale])[0] - clean
            for _ in range(directions)
        ]
        return Rise(*_mean_and_std(values), values)

    def top_eigenvalue(self, max_iterations: int = 50, tolerance: float = 0.01) -> Eigenvalue:
        """The largest eigenvalue λ of the Hessian, until ‖Hv − λv‖₂ <= `tolerance`·|λ|.

        Power iteration finds the eigenvalue of largest magnitude. Is it negative, the iteration
        goes on with H − λI, whose largest eigenvalue belongs to H's largest.
        """
        _check_at_least(1, max_iterations=max_iterations)
        generator = self.generator()
        vector = _unit(self._gaussian(generator))
        shift, value, residual, converged = 0.0, 0.0, 0.0, False
        iterations = 0
        while iterations < max_iterations:
            iterations += 1
            product = self.hessian_product(vector)
            value = _dot(vector, product)
            residual = norm(torch._foreach_sub(product, torch._foreach_mul(vector, value)))
            converged = residual <= tolerance * abs(value)
            if converged and (value >= 0 or shift):
                break
            if converged:
                shift, vector = value, _unit(self._gaussian(generator))
            else:
                torch._foreach_sub_(product, torch._foreach_mul(vector, shift))
                vector = _unit(product)
        return Eigenvalue(value, residual, iterations, converged and (value >= 0 or shift != 0))

    def trace(self, probes: int = 20) -> Trace:
        """The Hessian's trace: the mean of vᵀHv over vectors v of random signs.

        Args:
            probes: how many, >= 2.
        """
        _check_at_least(2, probes=probes)
        generator = self.generator()
        values = []
        for _ in range(probes):
            coins = self._random(lambda shape: torch.randint(2, shape, generator=generator))
            signs = [2 * coin - 1 for coin in coins]
            values.append(_dot(signs, self.hessian_product(signs)))
        mean, std = _mean_and_std(values)
        return Trace(mean, std / probes**0.5, values)

    def generator(self) -> torch.Generator:
        """A new one, which draws the numbers of the seed."""
        return torch.Generator().manual_seed(self.seed)  # on the CPU: the same for all devices

    def random_direction(self, generator: torch.Generator | None = None) -> list[Tensor]:
        """Gaussian, each filter scaled to the norm of θ's; zero along biases and norm layers.

        A filter is what makes one output: a row of a matrix, a kernel of a convolution. Li et al.,
        section 4. Without a generator, it is the first direction of the seed.
        """
        direction = self._gaussian(generator or self.generator())
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
        theta = list(torch._foreach_clone(self.params))
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

    def _loss_and_gradient(self) -> tuple[float, list[Tensor]]:
        return self._sum(
            lambda loss: torch.autograd.grad(loss, self.params, materialize_grads=True), _GRADIENT
        )

    def _sum(
        self, derive: Callable[[Tensor], Sequence[Tensor]], cost: int
    ) -> tuple[float, list[Tensor]]:
        """L, and the sum of what `derive` makes of each batch's part of it."""
        total, sums = 0.0, JointTensors(self.params if cost > 1 else [])
        sums.zero_()
        with self._undisturbed(), torch.set_grad_enabled(cost > 1):
            for batch, size in self._batches:
                loss = self._loss(self.model, batch) * (size / self.samples)
                if parts := derive(loss):
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

    def _random(self, draw: Callable[[torch.Size], Tensor]) -> list[Tensor]:
        return [draw(param.shape).to(self.device, param.dtype) for param in self.params]

    def _gaussian(self, generator: torch.Generator) -> list[Tensor]:
        return self._random(lambda shape: torch.randn(shape, generator=generator))


def measure(
    surface: LossSurface,
    radius: float = 0.1,
    scale: float = 0.2,
    steps: int = 10,
    directions: int = 10,
    max_iterations: int = 50,
    probes: int = 20,
) -> Flatness:
    """All measures of `surface`; what they cost at most is said before they start.

    Args:
        radius, steps: of `LossSurface.worst_case_rise`.
        scale, directions: of `LossSurface.random_rise`.
        max_iterations: of `LossSurface.top_eigenvalue`.
        probes: of `LossSurface.trace`.

    Raises:
        ValueError: a radius or a count that is too small, before anything is measured.
    """
    _check_positive(radius=radius)
    _check_at_least(1, steps=steps, max_iterations=max_iterations)
    _check_at_least(2, directions=directions, probes=probes)
    cost = 2 + worst_case_cost(steps) + directions + (max_iterations + probes) * _HESSIAN_PRODUCT
    with surface.announced("Flatness", cost):
        return Flatness(
            samples=surface.samples,
            seed=surface.seed,
            loss=surface.loss(),
            radius=radius,
            worst_case_rise=surface.worst_case_rise(radius, steps),
            scale=scale,
            random_rise=surface.random_rise(scale, directions),
            top_eigenvalue=surface.top_eigenvalue(max_iterations),
            trace=surface.trace(probes),
        )


def worst_case_cost(steps: int) -> int:
    """Of `LossSurface.worst_case`, in forward passes."""
    return steps * _GRADIENT + 1


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value!r}.")


def _check_at_least(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count!r}.")


def _size(batch: Batch) -> int:
    tensors = (value for value in batch.values() if torch.is_tensor(value) and value.ndim)
    return next((len(tensor) for tensor in tensors), 1)


def _mean_and_std(values: list[float]) -> tuple[float, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.mean().item(), tensor.std().item()


def _dot(a: Vector, b: Vector) -> float:
    return torch.stack([(x * y).sum() for x, y in zip(a, b)]).sum().item()


def norm(vector: Vector) -> float:
    return torch.nn.utils.get_total_norm(list(vector)).item()


def _unit(vector: Vector) -> list[Tensor]:
    return list(torch._foreach_div(list(vector), norm(vector)))
