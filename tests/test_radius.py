"""ε where it sets itself: the rule, and the trainings that it steers."""

import math

import pytest
import reference
import torch
from support import (
    BALLS,
    SCOPES,
    always,
    assert_at,
    average,
    digits,
    learnt,
    logged,
    make,
    mean,
    mlp_loss,
    on,
    outcome,
    recorded,
    train,
    trainer_for,
)

from amp_hf import AMPConfig, AMPTrainer
from amp_hf.radius import Radius

ITSELF = AMPConfig()


def after(*losses, epsilon=None, progress=0.5):
    radius = Radius(epsilon)
    for loss in losses:
        radius.observe(loss, progress)
    return radius


# The rule


def test_the_target_grows_as_the_loss_falls_and_is_whole_where_it_is_zero():
    targets = [Radius(None, 3.0, loss).target(0.1, 40, 0.5) for loss in (3.0, 0.9, 0.3, 0.0)]
    assert targets == pytest.approx([0.0, 0.07, 0.09, 0.1])


def test_nothing_is_perturbed_until_two_thirds_of_the_loss_are_gone():
    for epochs in (1, 40, 1000):
        assert Radius(None, 3.0, 1.01).target(0.1, epochs, 0.99) == 0.0
    assert Radius(None, 3.0, 0.99).target(0.1, 1000, 0.99) == pytest.approx(0.1, rel=1e-3)


def test_the_target_of_a_short_training_waits_until_nearly_all_is_learnt():
    some, most = Radius(None, 3.0, 0.9), Radius(None, 3.0, 0.6)
    assert some.target(0.1, 80, 0.5) == pytest.approx(0.1 * 0.7 ** (1 / 16))
    assert most.target(0.1, 32, 0.5) == pytest.approx(0.1 * 0.8 ** (1.25**4))
    learnt = Radius(None, 3.0, 0.3)
    for epochs in (1, 5, 18):
        assert learnt.target(0.1, epochs, 0.5) == pytest.approx(0.1 * 0.9**20)
    assert some.target(0.1, 1, 0.5) == 0.0  # a thousandth of it: not worth a pass
    assert Radius(None, 3.0, 0.05).target(0.1, 1, 0.5) > 0


def test_the_first_part_of_a_training_is_plain():
    radius = Radius(None, 3.0, 0.0)
    assert [radius.target(0.1, 60, progress) > 0 for progress in (0.0, 0.19, 0.2, 0.99)] == [
        False,
        False,
        True,
        True,
    ]


def test_the_target_is_a_small_share_of_a_first_loss_that_is_small_itself():
    """As that of two classes, or of a regression in large units."""
    assert Radius(None, 0.69, 0.0).target(0.1, 60, 0.5) == pytest.approx(0.69 / 10)
    assert Radius(None, 1e-6, 0.0).target(0.1, 60, 0.5) == pytest.approx(1e-6 / 10)
    assert Radius(None, 1e6, 0.0).target(0.1, 60, 0.5) == pytest.approx(0.1)


@pytest.mark.parametrize("first", [0.0, -3.0])
def test_a_loss_that_begins_at_zero_or_below_is_left_alone(first):
    assert after(first, *[first - 5.0] * 100).target(0.1, 60, 0.9) == 0.0
    assert after(first, *[first + 5.0] * 100).target(0.1, 60, 0.9) == 0.0


def test_a_loss_that_falls_below_zero_has_been_learnt():
    assert after(2.0, *[-50.0] * 100).target(0.1, 60, 0.9) == pytest.approx(0.1)


def test_a_loss_that_rises_is_not_learnt():
    assert after(2.0, *[50.0] * 100).target(0.1, 60, 0.9) == 0.0


def test_a_first_batch_that_happens_to_be_easy_is_not_taken_for_the_first_loss():
    radius = after(0.01, *[7.0] * 100, progress=0.1)
    assert radius.first_loss == pytest.approx(7.0, rel=0.25)
    assert after(2.0, *[2.4] * 100, progress=0.1).first_loss == 2.0  # no outlier
    assert after(2.0, *[7.0] * 100, progress=0.3).first_loss == 2.0  # but a training that diverges


def test_nothing_is_known_before_the_first_loss():
    assert Radius().target(0.1, 60, 0.9) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_and_slopes_that_are_not_finite_say_nothing(bad):
    assert after(bad, 2.0, bad, 1.0) == after(2.0, 1.0)
    radius = after(2.0)
    for loss, slope in ((1.0, bad), (bad, 1.0), (1.0, 0.0)):
        radius.begin(0.1, loss, slope)
        assert radius.epsilon is None
    radius.steer(0.1, 2.0, 0.5, 0.1)
    assert radius.epsilon is None


def test_a_rise_that_is_not_finite_counts_as_far_too_high():
    falls = []
    for rise in (1.6, 1e9, math.inf, math.nan):
        radius = Radius(1.0, 2.0, 1.0)
        radius.steer(0.1, 2.0, rise, 0.1)
        falls.append(radius.epsilon)
        assert math.isfinite(radius.bend)
    assert falls == [pytest.approx(16**-0.2)] * 4


@pytest.mark.parametrize("loss", [1e-6, 1e-3, 1.0, 1000.0])
@pytest.mark.parametrize("slope", [1e-3, 1.0])
def test_the_first_radius_is_right_where_the_loss_grows_exponentially(loss, slope):
    """As a loss does that has been learnt: log loss(θ + Δ) is linear in Δ."""
    radius = Radius()
    radius.begin(0.1, loss, slope)
    assert loss * math.expm1(slope * radius.epsilon / loss) == pytest.approx(0.1)


def test_the_first_radius_of_a_loss_below_zero_is_the_linear_one():
    radius = Radius()
    radius.begin(0.1, -3.0, 0.5)
    assert radius.epsilon == pytest.approx(0.2)


@pytest.mark.parametrize("slope", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_radius_goes_to_where_the_loss_rises_by_the_target(slope, power):
    """From the guess of the first order, on losses that curve."""
    radius = Radius()
    radius.begin(0.1, 2.0, slope)
    for _ in range(60):
        linear = slope * radius.epsilon
        rise = linear + 30 * linear**power
        radius.steer(0.1, 2.0, rise, linear)
    assert rise == pytest.approx(0.1, rel=1e-2)


def bent(loss_of, steps=100):
    """A rule that has steered on a loss, as a function of what is the first order's rise."""
    radius = Radius(0.1, 3.0, 0.0)
    for _ in range(steps):
        linear = radius.epsilon
        loss = loss_of(0.0)
        radius.steer(radius.target(0.1, 60, 0.9), loss, loss_of(linear) - loss, linear)
    return radius


@pytest.mark.parametrize("loss", [1e-3, 1.0, 10.0])
def test_less_is_aimed_at_where_the_loss_rises_faster_than_an_exponential(loss):
    straight = bent(lambda x: loss * math.exp(x / loss))
    assert straight.bend == pytest.approx(0.0, abs=1e-6)
    assert straight.target(0.1, 60, 0.9) == pytest.approx(0.1)
    faster = bent(lambda x: loss * math.exp(1.2 * x / loss))
    assert faster.bend == pytest.approx(0.2, rel=0.02)
    assert faster.target(0.1, 60, 0.9) == pytest.approx(0.1 / 3, rel=0.02)
    slower = bent(lambda x: loss * math.exp(0.8 * x / loss))
    assert slower.bend == pytest.approx(-0.2, rel=0.02)
    assert slower.target(0.1, 60, 0.9) == pytest.approx(0.1)


def test_losses_that_have_no_logarithm_do_not_bend():
    for loss in (0.0, -1.0):
        radius = Radius(1.0, 2.0, 1.0)
        radius.steer(0.1, loss, 0.5, 0.1)
        assert radius.bend == 0.0


# The trainings


def slope_of(loss, theta, ball):
    """How far the longest Δ in a ball of radius 1 raises the loss, were it linear."""
    gradient = zip(reference.gradient(loss, theta), reference.units(theta, ball))
    each = [float(reference.norm([g * unit])) for g, unit in gradient]
    return sum(each) if ball == "tensor" else math.hypot(*each)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("ball", BALLS)
def test_trajectory_equals_the_reference(tmp_path, ball, inner_steps, scope):
    steps, accumulation, rise = 16, 2, 0.02
    known = dict(first_loss=100.0, loss=0.5, bend=0.1)
    model = make(dtype=torch.float64)
    config = AMPConfig(rise=rise, inner_steps=inner_steps, ball=ball, scope=scope)
    theta, windows = recorded(
        model,
        tmp_path,
        config,
        steps,
        accumulation,
        trainer={"callbacks": [learnt(**known)]},
        per_device_train_batch_size=4,
    )
    rule = reference.Rule(rise, steps, 1, **known)
    for step, window in enumerate(windows):
        losses = [mlp_loss(batch) for batch in window]
        seen = [mean(losses)] * accumulation if scope == "batch" else losses
        target = rule.target(step)
        at_delta, linear, gradients = [], [], []
        if target > 0 and rule.epsilon is None:
            loss = float(seen[0](theta))
            rule.epsilon = loss * math.log1p(target / loss) / slope_of(seen[0], theta, ball)
        own = dict(epsilon=rule.epsilon if target > 0 else 0.0, inner_lr=1e9, ball=ball)
        for loss, origin in zip(losses, seen):
            delta = reference.perturbation(origin, theta, inner_steps=inner_steps, **own)
            there = [t + d for t, d in zip(theta, delta)]
            at_delta.append(float(loss(there)))
            linear.append(own["epsilon"] * slope_of(origin, theta, ball))
            gradients.append(reference.gradient(loss, there))
        clean = sum(float(loss(theta)) for loss in losses) / accumulation
        rule.seen.append((target, clean, *(sum(x) / accumulation for x in (at_delta, linear))))
        theta = reference.sgd(theta, average(gradients), 0.1)
    assert sum(target > 0 for target, *_ in rule.seen) > 8
    assert 0.01 < rule.bend < 0.09
    assert_at(model, theta)


def test_the_loss_rises_by_the_target(tmp_path):
    options = dict(max_steps=200, per_device_train_batch_size=32)
    options |= dict(save_strategy="steps", save_steps=200)
    trainer = train(make(), tmp_path, ITSELF, data=digits()[:128], **options)
    rises = logged(trainer, "amp/sharpness")
    assert len(rises) > 50
    radius = trainer.state.stateful_callbacks["amp_hf"]
    assert radius["progress"]["ascent_steps"] == len(rises)
    last = trainer.state.log_history[-2]
    bend = radius["feedback"]["radius"]["bend"]
    target = Radius(None, math.log(10), last["loss"], bend).target(ITSELF.rise, 50, 1.0)
    assert sum(rises[-40:]) / 40 == pytest.approx(target, rel=0.15)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_radius_does_not_depend_on_what_the_trainer_divides_a_loss_by(
    tmp_path, scope, accumulation
):
    """The same batches, in one micro-batch or several. A Δ of a small one's own is shorter."""

    def radius(config, accumulation):
        options = dict(max_steps=20, data=digits()[:128], trainer={"callbacks": [learnt()]})
        options |= dict(gradient_accumulation_steps=accumulation)
        size = 32 // accumulation
        trainer = train(make(), tmp_path, config, per_device_train_batch_size=size, **options)
        return logged(trainer, "amp/delta_norm")[-1]

    tolerance = 1e-4 if scope == "batch" else 0.5
    assert radius(AMPConfig(scope=scope), accumulation) == pytest.approx(
        radius(ITSELF, 1), rel=tolerance
    )


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("cut", [9, 14])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does_to_the_bit(tmp_path, cut, reuse):
    """Cut before the first ascent and after some."""
    config = AMPConfig(ascent_every=2, ascent_reuse=True) if reuse else ITSELF
    options = dict(data=digits()[:64], max_steps=20, save_strategy="steps", save_steps=cut)
    options |= dict(optim="adamw_torch", learning_rate=1e-2)
    begins = {"callbacks": [learnt()]}
    whole = train(make(), tmp_path / "whole", config, trainer=begins, **options)
    resumed = trainer_for(make(), tmp_path / "resumed", config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{cut}"))
    norms = logged(whole, "amp/delta_norm")
    assert len(norms) > 3 and logged(resumed, "amp/delta_norm") == norms
    for key in ("weights", "optimizer", "rng"):
        assert outcome(resumed)[key] == outcome(whole)[key], key


def test_a_stock_checkpoint_counts_from_its_own_loss(tmp_path):
    options = dict(data=digits()[:64], max_steps=20, save_strategy="steps", save_steps=8)
    train(make(), tmp_path, AMPConfig(epsilon=0), **options)
    trainer = trainer_for(make(), tmp_path, ITSELF, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    kept = trainer.state.stateful_callbacks["amp_hf"]["feedback"]["radius"]
    assert kept["first_loss"] == pytest.approx(logged(trainer, "loss")[8], rel=1e-6)


def test_the_state_of_a_fixed_radius_holds_no_losses_and_that_of_the_stock_trainer_nothing(
    tmp_path,
):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    kept = train(make(), tmp_path, always(), **options).state.stateful_callbacks["amp_hf"]
    assert kept["progress"] == {"ascent_steps": 4, "perturbed_steps": 4, "first": 0}
    assert kept["feedback"]["radius"]["loss"] is None
    stock = train(make(), tmp_path, AMPConfig(epsilon=0), **options)
    assert "amp_hf" not in stock.state.stateful_callbacks


FIRST = 3  # the first perturbed step, after a fifth of 14 or 15


def spoiled_norms(tmp_path, value, when=lambda trainer: True, **options):
    """‖Δ‖₂ of the perturbed steps, of which the one after ten others has losses times `value`."""

    class Spoiled(AMPTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * value if self.state.global_step == 10 and when(self) else loss

    def zero_gradients(event, state, control):
        if state.global_step == 10:
            for param in trainer.model.parameters():
                param.grad.zero_()

    own = {"callbacks": [learnt(), on(["on_pre_optimizer_step"], zero_gradients)]}
    trainer = trainer_for(make(), tmp_path, ITSELF, cls=Spoiled, trainer=own, **options)
    trainer.train()
    return logged(trainer, "amp/delta_norm")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_batches_whose_loss_is_not_finite_leave_the_radius_alone(tmp_path, value):
    norms = spoiled_norms(tmp_path, value, max_steps=14)
    assert norms[10 - FIRST] == 0.0
    assert norms[11 - FIRST] > 0 and norms[-1] == pytest.approx(norms[3], rel=0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_micro_batch_beside_a_good_one_leaves_the_radius_alone(tmp_path, value):
    norms = spoiled_norms(
        tmp_path,
        value,
        when=lambda trainer: trainer.accelerator.sync_gradients,
        max_steps=15,
        gradient_accumulation_steps=2,
    )
    assert norms[10 - FIRST] == pytest.approx(
        norms[9 - FIRST] / 2, rel=0.5
    )  # of the good one alone
    assert norms[12 - FIRST] == pytest.approx(norms[11 - FIRST], rel=1e-5)
    assert norms[13 - FIRST] != pytest.approx(norms[12 - FIRST], rel=1e-3)


def test_the_micro_batches_that_a_stream_ends_with_count_for_no_step(tmp_path):
    """The Trainer steps only once the next epoch has begun."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from [*digits()[:16]] * 3

    options = dict(max_steps=6, gradient_accumulation_steps=2, learning_rate=0.0)
    options |= dict(save_strategy="steps", save_steps=6)
    trainer = train(make(), tmp_path, ITSELF, data=Stream(), **options)
    kept = trainer.state.stateful_callbacks["amp_hf"]["feedback"]
    losses = [kept["radius"]["loss"], *(loss for _, loss, *_ in kept["past"])]
    assert losses == pytest.approx([kept["radius"]["first_loss"]] * len(losses), rel=1e-5)


def test_what_streams_without_an_end_is_seen_once(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from digits()[:64]

    options = dict(data=Stream(), max_steps=20)
    assert logged(train(make(), tmp_path, ITSELF, **options), "amp/delta_norm") == []
    own = {"callbacks": [learnt(loss=0.01)]}
    trainer = train(make(), tmp_path, ITSELF, trainer=own, **options)
    assert len(logged(trainer, "amp/delta_norm")) > 5


def test_a_training_that_begins_anew_with_a_smaller_batch_remembers_its_first_loss(tmp_path):
    def run_out_of_memory(module, args, kwargs):
        if len(kwargs["pixels"]) == 16 and trainer.state.global_step == 150:
            raise RuntimeError("CUDA out of memory.")

    options = dict(auto_find_batch_size=True, max_steps=200, data=digits()[:64])
    trainer = trainer_for(make(), tmp_path, ITSELF, **options)
    trainer.model.register_forward_pre_hook(run_out_of_memory, with_kwargs=True)
    trainer.train()
    assert trainer._train_batch_size < 16
    # The weights have been trained, so that nothing is left to wait for but the first fifth.
    assert trainer.state.stateful_callbacks["amp_hf"]["progress"]["first"] == 40


def test_a_callback_may_fix_the_radius_and_let_it_set_itself_again(tmp_path):
    def switch(event, state, control):
        fixed = state.global_step in (12, 13)
        trainer.amp_config = always(epsilon=0.01) if fixed else ITSELF

    own = {"callbacks": [learnt(loss=0.01), on(["on_step_begin"], switch)]}
    trainer = trainer_for(make(), tmp_path, ITSELF, trainer=own, max_steps=20)
    trainer.train()
    norms = logged(trainer, "amp/delta_norm")
    assert [round(norm, 4) == 0.01 for norm in norms] == [step in (8, 9) for step in range(16)]
