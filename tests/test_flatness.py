import functools
import json
import math

import flatness_worker
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import on_ranks
from support import (
    THETA,
    ConvNet,
    Quadratic,
    differing,
    digit_batches,
    digits,
    language_model,
    make,
    padded,
    quadratic_surface,
    rng_states,
    strokes,
    trainer_for,
    weights,
)
from torch import nn
from torch.utils._pytree import tree_flatten_with_path
from transformers import ViTConfig, ViTForImageClassification

from amp_hf.flatness import LossSurface, measure


def test_the_worst_case_rise_from_the_bottom_of_a_bowl_is_half_the_top_eigenvalue_times_r_squared():
    surface = quadratic_surface([5.0, 2.0, 1.0, 0.5, 0.0, 0.0])
    assert surface.worst_case_rise(0.3, steps=60) == pytest.approx(5 * 0.3**2 / 2, rel=1e-9)


def test_the_worst_case_rise_on_a_slope_of_equal_curvature_is_the_closed_form():
    """Straight up: ½h((‖θ − c‖ + r)² − ‖θ − c‖²)."""
    surface = quadratic_surface([4.0] * 6, torch.zeros(6).double())
    distance = THETA.norm().item()
    rise = 2.0 * ((distance + 0.1) ** 2 - distance**2)
    assert surface.worst_case_rise(0.1, steps=1) == pytest.approx(rise, rel=1e-12)


def test_more_ascents_find_a_point_at_least_as_bad():
    surface = quadratic_surface([10.0, 1.0, 1.0, 0, 0, 0], torch.zeros(6).double())
    one, five, many = (surface.worst_case_rise(3.0, steps=n) for n in (1, 5, 100))
    # The maximum on the sphere: (λI − H)Δ = H(θ − c) with ‖Δ‖ = r, for the λ above all eigenvalues.
    x, hessian = THETA, surface.model.hessian
    low, high = 10.0, 1e3
    for _ in range(200):
        rate = (low + high) / 2
        delta = torch.linalg.solve(rate * torch.eye(6).double() - hessian, hessian @ x)
        low, high = (rate, high) if delta.norm() > 3 else (low, rate)
    worst = ((x + delta) @ hessian @ (x + delta) - x @ hessian @ x) / 2
    assert one < five <= many
    assert many == pytest.approx(worst.item(), rel=1e-9)


def test_the_worst_case_is_the_loss_at_the_point_that_it_names():
    surface = quadratic_surface([5.0, 2.0, 1.0, 0.5, 0.0, -1.0], torch.zeros(6).double())
    rise, delta = surface.worst_case(0.3, steps=4)
    assert delta[0].norm().item() == pytest.approx(0.3)
    assert surface.along(delta, [1.0])[0] - surface.loss() == pytest.approx(rise, rel=1e-9)


def test_random_directions_are_as_long_as_the_filters():
    """So in a bowl of curvature h all of them rise by ½h(s‖θ‖)²."""
    surface = quadratic_surface([2.0] * 6)
    rise = surface.random_rise(0.1, directions=5)
    assert rise.values == pytest.approx([0.01 * (25 + 9)] * 5)
    assert rise.mean == pytest.approx(0.34)
    assert rise.std == pytest.approx(0, abs=1e-12)
    first, again = surface.random_direction(), surface.random_direction()
    assert torch.equal(first[0], again[0])
    assert first[0].norm(dim=1).tolist() == pytest.approx([5, 3])


def test_random_directions_leave_biases_and_norm_layers_alone():
    model = make(ConvNet)
    direction = LossSurface(model, digit_batches(4, 4), progress=False).random_direction()
    moves = [d.ndim for d in direction if d.any()]
    assert moves == [4, 4, 2]
    norms = direction[0].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, model.conv1.weight.detach().flatten(1).norm(dim=1))


@pytest.mark.parametrize("lowest", [0.0, -3.0, -7.0])
def test_the_top_eigenvalue_is_the_largest_also_where_a_negative_one_is_of_larger_magnitude(lowest):
    surface = quadratic_surface([5.0, 2.0, 1.0, 0.5, 0.0, lowest])
    found = surface.top_eigenvalue(max_iterations=500, tolerance=1e-6)
    assert found.converged and found.iterations < 500
    assert found.value == pytest.approx(5.0, rel=1e-9)
    assert found.residual < 1e-5


@pytest.mark.parametrize("iterations", range(1, 12))
def test_a_negative_eigenvalue_that_is_not_the_largest_never_counts_as_converged(iterations):
    found = quadratic_surface([2.0, 1.0, 0.5, 0.2, 0.0, -10.0]).top_eigenvalue(iterations)
    assert not found.converged or found.value == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("lowest", [-10.0, -3.0])
def test_the_top_eigenvalue_is_found_among_very_many_that_are_zero(lowest):
    """A random vector is nearly one of the null space, and must not be taken for the answer."""

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(100_000, dtype=torch.float64))
            self.register_buffer("curvature", torch.zeros_like(self.theta))
            self.curvature[:3] = torch.tensor([lowest, 2.5, 2.0])

        def forward(self, x):
            return {"loss": x.mean() + (self.curvature * self.theta**2).sum() / 2}

    found = LossSurface(Bowl(), [{"x": torch.zeros(1)}], progress=False).top_eigenvalue(500)
    assert found.converged
    assert found.value == pytest.approx(2.5, rel=1e-3)


def test_a_power_iteration_that_has_not_converged_says_so():
    surface = quadratic_surface([5.0, 4.99, 4.98, 0.5, 0.0, 0.0])
    found = surface.top_eigenvalue(max_iterations=3, tolerance=1e-6)
    assert not found.converged and found.iterations == 3
    assert found.residual > 1e-5


@pytest.mark.slow
def test_the_trace_is_estimated_with_its_standard_error():
    surface = quadratic_surface([5.0, 2.0, 1.0, 0.5, 0.0, -1.0])
    found = surface.trace(probes=300)
    assert 0 < found.standard_error < 0.5
    assert abs(found.mean - 7.5) < 4 * found.standard_error
    assert found.mean == pytest.approx(np.mean(found.values))
    assert found.standard_error == pytest.approx(np.std(found.values, ddof=1) / 300**0.5)
    # Of a diagonal matrix, random signs give the trace itself.
    diagonal = Quadratic(torch.diag(THETA), THETA, THETA)
    exact = LossSurface(diagonal, [{"weight": torch.ones(1)}], progress=False).trace(probes=2)
    assert (exact.mean, exact.standard_error) == (pytest.approx(12), pytest.approx(0, abs=1e-12))


def test_hessian_products_of_a_network_are_those_of_its_whole_hessian():
    model = make(functools.partial(nn.Sequential, nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10)))
    model.double()
    batches = digit_batches(10, 4)

    def loss(model, batch):
        logits = model(batch["pixels"].double().flatten(1))
        return nn.functional.cross_entropy(logits, batch["labels"])

    surface = LossSurface(model, batches, loss, progress=False)
    whole = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    names = [name for name, _ in model.named_parameters()]

    def of(vector):
        parts = vector.split([p.numel() for p in surface.params])
        theta = {n: x.view_as(p) for n, x, p in zip(names, parts, surface.params)}
        return loss(functools.partial(torch.func.functional_call, model, theta), whole)

    theta = torch.cat([p.detach().flatten() for p in surface.params])
    hessian = torch.autograd.functional.hessian(of, theta)
    vector = surface.random_direction()
    product = torch.cat([p.flatten() for p in surface.hessian_product(vector)])
    torch.testing.assert_close(product, hessian @ torch.cat([v.flatten() for v in vector]))
    top = torch.linalg.eigvalsh(hessian)[-1].item()
    found = surface.top_eigenvalue(max_iterations=500, tolerance=1e-5)
    assert found.value == pytest.approx(top, rel=1e-6)


def test_a_loss_that_is_linear_has_no_curvature():
    class Linear(nn.Linear):
        def forward(self, x):
            return {"loss": super().forward(x).mean()}

    surface = LossSurface(Linear(4, 1), [{"x": torch.ones(2, 4)}], progress=False)
    assert surface.top_eigenvalue().value == 0
    assert surface.top_eigenvalue().converged
    assert surface.trace().mean == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10])
def test_a_loss_that_is_nan_is_no_flat_one(steps):
    model = make(ConvNet)
    theta = model.fc.weight.detach().clone()

    def loss(model, batch):
        moved = not torch.equal(model.fc.weight, theta)
        return model(**batch)["loss"] * (float("nan") if moved else 1.0)

    surface = LossSurface(model, digit_batches(8, 8), loss, progress=False)
    assert math.isnan(surface.worst_case_rise(0.1, steps))
    assert math.isnan(surface.random_rise(0.1, 2).mean)


def test_a_gradient_that_is_nan_tells_of_no_flat_loss():
    class Kink(nn.Linear):
        def forward(self, x):
            return {"loss": (0 * self.weight).square().sum().sqrt() + super().forward(x).mean()}

    surface = LossSurface(Kink(4, 1), [{"x": torch.ones(2, 4)}], progress=False)
    assert math.isfinite(surface.loss())
    assert math.isnan(surface.worst_case_rise(0.1))


def test_the_worst_case_is_never_below_the_loss_itself():
    """All around a maximum the loss falls."""
    surface = quadratic_surface([-1.0] * 6)
    assert surface.worst_case_rise(0.5, steps=3) == 0


def test_what_a_model_draws_in_evaluation_comes_from_the_seed_too():
    class Noisy(ConvNet):
        def forward(self, pixels, labels=None):
            return super().forward(pixels + torch.randn_like(pixels), labels)

    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(torch.seed())  # wherever the generator stands
        surface = LossSurface(make(Noisy), digit_batches(16, 8), seed=seed, progress=False)
        torch.rand(7)
        found.append(surface.loss())
    assert found[0] == found[1] != found[2]


def test_measuring_twice_gives_the_same_and_another_seed_something_else():
    model, batches = make(ConvNet), digit_batches(48, 16)
    settings = dict(steps=2, directions=2, max_iterations=3, probes=2)
    first, again, other = (
        measure(LossSurface(model, batches, seed=seed, progress=False), **settings).to_dict()
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first["trace"] != other["trace"]
    assert first["random_rise"] != other["random_rise"]
    assert json.loads(json.dumps(first)) == first


def test_measuring_leaves_everything_as_it_was():
    model = make(ConvNet).train()
    model.norm2.eval()  # some users freeze theirs
    before, modes = weights(model), [module.training for module in model.modules()]
    loader = torch.utils.data.DataLoader(digits()[:64], batch_size=16, shuffle=True)
    states = rng_states()
    surface = LossSurface(model, loader, progress=False)
    measure(surface, radius=0.5, steps=2, directions=2, max_iterations=2, probes=2)
    surface.over(surface.random_direction(), surface.random_direction(), [0.1], [0.2, 0.3])
    assert differing(before, weights(model)) == []
    assert [module.training for module in model.modules()] == modes
    assert all(param.grad is None for param in model.parameters())
    assert rng_states() == states


@pytest.mark.parametrize("at", [1, 3, 8])
def test_an_interrupt_leaves_the_weights_as_they_were(at):
    model = make(ConvNet)
    before = weights(model)
    calls = iter(range(1, 100))

    def loss(model, batch):
        if next(calls) == at:
            raise KeyboardInterrupt
        return model(**batch)["loss"]

    surface = LossSurface(model, digit_batches(16, 16), loss, progress=False)
    with pytest.raises(KeyboardInterrupt):
        surface.worst_case_rise(0.5, steps=4)
        surface.random_rise(0.5, directions=4)
    assert differing(before, weights(model)) == []


def test_how_the_samples_are_batched_makes_no_difference():
    model = make(ConvNet, dtype=torch.float64)

    def found(size):
        batches = [b | {"pixels": b["pixels"].double()} for b in digit_batches(50, size)]
        surface = LossSurface(model, batches, progress=False)
        settings = dict(steps=3, directions=2, max_iterations=2, probes=2)
        return measure(surface, **settings)

    whole, parts = found(50), found(16)
    assert parts.worst_case_rise == pytest.approx(whole.worst_case_rise, rel=1e-9)
    assert parts.random_rise.values == pytest.approx(whole.random_rise.values, rel=1e-9)
    assert parts.trace.mean == pytest.approx(whole.trace.mean, rel=1e-9)


@pytest.mark.parametrize("kind", [tuple, list, lambda pair: pair[0]])
def test_a_loss_of_ones_own_takes_batches_of_any_kind(kind):
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    model = nn.Linear(4, 3)

    def loss(model, batch):
        return model(batch if torch.is_tensor(batch) else batch[0]).square().mean()

    batches = [kind((x[:8], y[:8])), kind((x[8:], y[8:]))]
    found = measure(LossSurface(model, batches, loss=loss))
    assert found.samples == 12
    assert found.loss == pytest.approx(model(x).square().mean().item(), rel=1e-6)


def test_a_trainer_is_measured_by_its_own_loss_and_collator(tmp_path):
    data = digits()[:32]
    trainer = trainer_for(make(ConvNet), tmp_path, data=data, label_smoothing_factor=0.3)
    surface = LossSurface.of(trainer, progress=False)
    with torch.no_grad():
        trainer.model.fc.weight.mul_(100)  # sure of itself, as no smoothed label is
    assert surface.samples == 32
    first, other = (
        LossSurface.of(trainer, max_samples=10, seed=seed, progress=False) for seed in (0, 1)
    )
    assert first.samples == 16  # whole batches
    classes = [[b["labels"].tolist() for b, _ in surface._batches] for surface in (first, other)]
    assert classes[0] != classes[1]
    assert [sample["labels"].item() for sample in data[:8]] not in classes[0]
    batches = digit_batches(32, 8)
    trainer.model.eval()
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, dict(batch)).item() for batch in batches]
    assert surface.loss() == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert surface.loss() != pytest.approx(LossSurface(trainer.model, batches).loss(), rel=0.01)


@pytest.mark.parametrize("kind", ["language model", "vision transformer"])
def test_attention_has_a_curvature(kind):
    if kind == "language model":
        model, batches = make(language_model), [padded(strokes()[:4])]
    else:
        small = dict(image_size=8, patch_size=4, num_channels=1, hidden_size=16)
        more = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        model = ViTForImageClassification(ViTConfig(**small, **more, num_labels=10))
        (batch,) = digit_batches(4, 4)
        batches = [{"pixel_values": batch["pixels"], "labels": batch["labels"]}]
    surface = LossSurface(model, batches, progress=False)
    vector = surface.random_direction()
    product = surface.hessian_product(vector)
    # Against the difference of two gradients.
    step = 1e-2
    theta = [param.detach().clone() for param in surface.params]
    gradients = []
    for sign in (1, -1):
        with torch.no_grad():
            for param, start, move in zip(surface.params, theta, vector):
                param.copy_(start + sign * step * move)
        gradients.append(surface.loss_and_gradient()[1])
    expected = [(a - b) / (2 * step) for a, b in zip(*gradients)]
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (product, expected))
    assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_find_what_one_finds(tmp_path):
    """Each on its share of the batches, the last of which is smaller."""
    two = on_ranks(flatness_worker.found, tmp_path)
    one = flatness_worker.found(tmp_path)
    assert one.pop("batches here") == sum(result.pop("batches here") for result in two) == 7
    assert two[0] == two[1]
    assert one.pop("kept") and two[0].pop("kept")
    flat = [dict(tree_flatten_with_path(result)[0]) for result in (one, two[0])]
    assert flat[0] == pytest.approx(flat[1], rel=1e-9)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("radius", -0.1, "a finite number > 0, got -0.1"),
        ("radius", 0.0, "a finite number > 0, got 0.0"),
        ("steps", 0, "at least 1, got 0"),
        ("directions", 1, "at least 2, got 1"),
        ("max_iterations", 0, "at least 1, got 0"),
        ("probes", 1, "at least 2, got 1"),
    ],
)
def test_measures_of_nothing_are_refused_before_anything_is_measured(name, value, said):
    surface = LossSurface(make(), digit_batches(1, 8), progress=False)
    measures = {
        "radius": surface.worst_case_rise,
        "steps": lambda steps: surface.worst_case_rise(0.1, steps),
        "directions": lambda directions: surface.random_rise(0.2, directions),
        "max_iterations": surface.top_eigenvalue,
        "probes": surface.trace,
    }
    surface.model.register_forward_pre_hook(lambda *_: pytest.fail("measured"))
    for call in (measures[name], lambda value: measure(surface, **{name: value})):
        with pytest.raises(ValueError, match=f"^{name} must be {said}"):
            call(value)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no trainable parameters"):
        LossSurface(make(ConvNet).requires_grad_(False), digit_batches(4, 4))
    with pytest.raises(ValueError, match=r"Parameters in torch.bfloat16 are too coarse"):
        LossSurface(make(ConvNet, dtype=torch.bfloat16), digit_batches(4, 4))
    with pytest.raises(ValueError, match="no batches"):
        LossSurface(make(ConvNet), [])


def test_the_cost_is_said_before_it_arises(capsys):
    passes = 0

    def loss(model, batch):
        nonlocal passes
        if not passes:
            assert "Flatness: 16 samples, at most the time of 65 forward" in capsys.readouterr().err
        passes += 1
        return model(**batch)["loss"]

    surface = LossSurface(make(ConvNet), digit_batches(16, 16), loss)
    measure(surface, steps=2, directions=2, max_iterations=3, probes=3)
    assert passes == 1 + 3 + 3 + 3 + 3  # each measure begins at θ


def test_a_loss_function_that_counts_items_is_given_the_count(tmp_path):
    def counting(outputs, labels, num_items_in_batch):
        logits = outputs["logits"]
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    data = digits()[:48]
    own = {"compute_loss_func": counting, "eval_dataset": data}
    counted = trainer_for(make(), tmp_path, trainer=own, per_device_eval_batch_size=20)
    mean = trainer_for(make(), tmp_path, per_device_eval_batch_size=20)
    found = LossSurface.of(counted, data).loss()
    assert found == pytest.approx(LossSurface.of(mean, data).loss(), rel=1e-6)
    assert found == pytest.approx(counted.evaluate()["eval_loss"], rel=1e-6)
