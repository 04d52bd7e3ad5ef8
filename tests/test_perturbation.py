import copy
import functools

import pytest
import reference
import torch
from support import BALLS, LiveBytes, same
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from amp_hf import blocks
from amp_hf.blocks import JointTensors
from amp_hf.perturbation import Perturbation, shrinkage

FOREACH = [name for name in dir(torch) if name.startswith("_foreach_")]


@pytest.fixture
def small_cache(monkeypatch):
    """Parameters change places in several groups, and those of more than one row in pieces."""
    monkeypatch.setattr(blocks, "_CACHED", 8)


def tensors(seed, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 5), (3,), (2, 3), (), (5, 4)]
    return [scale * torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def joint(*args, **kwargs):
    return JointTensors.copy_of(tensors(*args, **kwargs))


def project(delta, *args):
    """Δ ← the projection of rate · Δ, by the factor that `shrinkage` gives. Returns its norm."""
    factor, norm, _ = shrinkage(delta, *args)
    torch._foreach_mul_(delta.tensors, factor)
    return norm


def displaced(epsilon=0.1, ball="global"):
    """float32 parameters at θ + Δ, and θ."""
    params = tensors(0, torch.float32)
    theta = copy.deepcopy(params)
    perturbation = Perturbation(params, epsilon, ball)
    perturbation.ascend(joint(1, torch.float32), 1.0)
    return perturbation, params, theta


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 2.0, 100.0])
@pytest.mark.parametrize("rate", [1.0, 0.3, torch.tensor(7.0, dtype=torch.float64)])
def test_projection_equals_its_closed_form_on_every_ball(ball, epsilon, rate):
    delta = joint(1)
    expected = reference.project([rate * d for d in delta], epsilon, ball)
    norm = project(delta, epsilon, ball, rate)
    torch.testing.assert_close(delta, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(norm, reference.norm(expected), rtol=1e-14, atol=0)


@pytest.mark.parametrize("ball", BALLS)
def test_what_lies_inside_of_the_ball_is_not_changed_by_a_bit(ball):
    delta = joint(1, scale=1e-3)
    before = copy.deepcopy(delta)
    project(delta, 1.0, ball)
    assert same(delta, before)


@pytest.mark.parametrize("ball", BALLS)
def test_a_gradient_of_zero_stays_zero(ball):
    delta = JointTensors.copy_of([torch.zeros_like(t) for t in tensors(0)])
    for epsilon in (0.0, 0.1):
        assert project(delta, epsilon, ball) == 0
        assert not any(d.any() for d in delta)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", range(5))
def test_one_entry_that_is_not_finite_makes_delta_zero_everywhere(ball, value, place):
    delta = joint(1)
    delta[place].view(-1)[-1] = value
    assert project(delta, 0.1, ball) == 0
    assert not any(d.any() for d in delta)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("epsilon", [0.1, 100.0], ids=["on the ball", "inside"])
def test_a_gradient_scaled_by_a_power_of_two_gives_the_same_delta_to_the_bit(ball, epsilon):
    plain, scaled = joint(1), joint(1, scale=2.0**16)
    norm = project(plain, epsilon, ball, 0.5)
    scaled_norm = project(scaled, epsilon, ball, 0.5 / torch.tensor(2.0**16))
    assert same(plain, scaled)
    assert norm == scaled_norm


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("ball", BALLS)
def test_ascending_adds_delta_and_restoring_gives_theta_back_to_the_bit(ball):
    params, gradient = tensors(0, torch.float32), joint(1, torch.float32)
    theta, units = copy.deepcopy(params), reference.units(params, ball)
    delta = JointTensors.copy_of([u * g for u, g in zip(units, gradient)])
    factor, norm, _ = shrinkage(delta, 0.7, ball, 0.5)
    torch._foreach_mul_(delta.tensors, units)
    torch._foreach_mul_(delta.tensors, factor)
    perturbation = Perturbation(params, 0.7, ball)
    assert perturbation.ascend(gradient, 0.5) == norm
    assert same(params, [t + d for t, d in zip(theta, delta)])
    subtracted = [p - d for p, d in zip(params, delta)]
    perturbation.restore()
    assert same(params, theta)
    assert not same(subtracted, theta)  # going back by subtraction would have been seen
    perturbation.restore()
    assert same(params, theta)


@pytest.mark.usefixtures("small_cache")
def test_suspending_and_resuming_changes_between_theta_and_the_same_displaced_parameters():
    perturbation, params, theta = displaced()
    there = copy.deepcopy(params)
    assert not same(there, theta)
    for _ in range(3):
        perturbation.suspend()
        assert same(params, theta)
        perturbation.resume()
        assert same(params, there)
    perturbation.restore()
    assert same(params, theta)


@pytest.mark.usefixtures("small_cache")
def test_a_delta_that_was_kept_displaces_the_parameters_from_where_they_have_moved_to():
    params, gradient = tensors(0), joint(1)
    perturbation = Perturbation(params, 0.1, "global")
    delta = copy.deepcopy(gradient)
    project(delta, 0.1, "global")
    perturbation.ascend(gradient, 1.0)
    for step in range(1, 4):
        perturbation.suspend(theta_moves=True)
        assert same(params, [t * step for t in tensors(0)])
        for t, start in zip(params, tensors(0)):
            t.add_(start)
        perturbation.resume()
        there = [t * (step + 1) + d for t, d in zip(tensors(0), delta)]
        torch.testing.assert_close(params, there, rtol=0, atol=1e-14)
    perturbation.restore()
    assert same(params, [t * 4 for t in tensors(0)])


@pytest.mark.usefixtures("small_cache")
def test_the_parameters_keep_their_memory_throughout():
    params = tensors(0)
    places = [p.data_ptr() for p in params]
    perturbation = Perturbation(params, 0.1, "global")
    for act in (
        lambda: perturbation.ascend(joint(1), 1.0),
        lambda: perturbation.ascend(joint(2), 1.0),
        perturbation.suspend,
        perturbation.resume,
        perturbation.restore,
    ):
        act()
        assert [p.data_ptr() for p in params] == places


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("epsilon", [0.1, 100.0], ids=["on the ball", "inside"])
def test_several_ascents_add_up_and_are_projected_each_time(ball, epsilon):
    params, theta = tensors(0), tensors(0)
    perturbation = Perturbation(params, epsilon, ball)
    units = reference.units(theta, ball)
    delta = [torch.zeros_like(t) for t in theta]  # in these units
    for seed in (1, 2, 3):
        ascent = joint(seed)
        delta = [d + 0.3 * u * g for d, u, g in zip(delta, units, ascent)]
        delta = reference.project(delta, epsilon, ball)
        norm = perturbation.ascend(ascent, 0.3)
        expected = [t + u * d for t, u, d in zip(theta, units, delta)]
        # Δ is read off from θ + Δ, where it has been rounded at the size of θ.
        torch.testing.assert_close(params, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(norm, reference.norm(delta), rtol=0, atol=1e-13)
    perturbation.restore()
    assert same(params, theta)


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("ball", BALLS)
def test_a_later_ascent_that_is_not_finite_takes_the_parameters_back_to_theta(ball):
    perturbation, params, theta = displaced(ball=ball)
    gradient = joint(2, torch.float32)
    gradient[1][0] = float("nan")
    assert perturbation.ascend(gradient, 1.0) == 0
    assert same(params, theta)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th foreach call: before it, halfway through or after it."""

    def __init__(self, monkeypatch, call, moment):
        self.left, self.moment, self.armed = call, moment, True
        for name in FOREACH:
            monkeypatch.setattr(torch, name, self.interrupting(getattr(torch, name)))

    def interrupting(self, function):
        def call(*args):
            self.left -= self.armed
            if self.left != 0 or not self.armed:
                return function(*args)
            self.armed = False
            if self.moment == "half":
                args = [a[: len(a) // 2 or 1] if isinstance(a, list | tuple) else a for a in args]
            if self.moment != "before":
                function(*args)
            raise KeyboardInterrupt

        return call


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_an_interrupt_at_any_moment_of_any_method_leaves_a_way_back_to_theta(monkeypatch, moment):
    def cycle(perturbation):
        perturbation.ascend(joint(1, torch.float32), 1.0)
        perturbation.ascend(joint(2, torch.float32), 1.0)
        perturbation.suspend()
        perturbation.resume()
        perturbation.suspend()
        perturbation.resume()
        perturbation.suspend(theta_moves=True)
        perturbation.resume()
        perturbation.restore()

    for call in range(1, 1000):
        params, theta = tensors(0, torch.float32), tensors(0, torch.float32)
        perturbation = Perturbation(params, 0.1, "global")
        with monkeypatch.context() as patch:
            interrupt = Interrupt(patch, call, moment)
            try:
                cycle(perturbation)
            except KeyboardInterrupt:
                perturbation.restore()
        assert same(params, theta), f"foreach call {call}"
        if interrupt.armed:
            break
    assert call > 50  # every call was reached, and there are as many


@pytest.mark.parametrize("ball", BALLS)
def test_a_perturbation_takes_one_copy_of_the_parameters_and_the_largest_while_they_move(ball):
    # Parameters of 3 MiB, of which the largest has one; KiB for norms and scales.
    sizes, largest, slack = [2**18, 2**17, 2**17, 2**18], 2**20, 2**12
    params = [torch.randn(size) for size in sizes]
    perturbation = Perturbation(params, 0.1, ball)
    gradients = [JointTensors.copy_of([torch.randn(size) for size in sizes]) for _ in range(2)]
    for act in (
        lambda: perturbation.ascend(gradients[0], 1.0),
        lambda: perturbation.ascend(gradients[1], 1.0),
        perturbation.suspend,
        perturbation.resume,
        functools.partial(perturbation.suspend, theta_moves=True),
        perturbation.resume,
        perturbation.restore,
    ):
        with LiveBytes() as memory:
            act()
        at_once = 2 if ball == "elementwise" else 1  # with the units of the largest
        assert memory.peak <= at_once * largest + slack
        assert sum(memory.sizes.values()) <= slack
        assert memory.peak >= largest or act == perturbation.restore  # it does measure


class Operations(TorchDispatchMode):
    """Those that compute or copy, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in (torch.ops.prim.device.default, torch.ops.aten.alias.default):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_on_a_gpu_an_ascent_waits_for_nothing_and_takes_fewer_operations_than_parameters():
    """Fake tensors compute nothing, and raise where a value would have to be waited for."""
    shapes = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    with FakeTensorMode():
        params = [torch.empty(shape, device="cuda") for shape in shapes * 12]  # ViT-Base's blocks
        rate = torch.ones((), device="cuda")
        with pytest.raises(DataDependentOutputException):
            bool(rate)
        gradient = JointTensors(params)
        perturbation = Perturbation(params, 0.1, "global")
        with Operations() as operations:
            perturbation.ascend(gradient, rate)
            perturbation.restore()
        assert len(operations.names) < len(params)
        assert "aten._foreach_norm.Scalar" in operations.names  # it does count
        for ball in BALLS:
            perturbation = Perturbation(params, 0.1, ball)
            perturbation.slope_of(gradient)
            perturbation.ascend(gradient, rate)
            perturbation.ascend(JointTensors(params), rate)
            perturbation.suspend()
            perturbation.resume()
            perturbation.suspend(theta_moves=True)
            perturbation.resume()
            perturbation.restore()


def test_offloaded_parameters_take_a_rate_from_the_device():
    """Fake tensors raise where two devices meet; on a CPU, values are then looked at."""
    with FakeTensorMode():
        params = [torch.empty(8, 4), torch.empty(8)]
        rate = torch.ones((), device="cuda")
        perturbation = Perturbation(params, 0.1, "global")
        with pytest.raises(DataDependentOutputException):
            perturbation.ascend(JointTensors(params), rate)
