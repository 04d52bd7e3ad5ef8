"""What a step must leave as it was."""

import pytest
import torch
import torch.nn.functional as F
from support import (
    ADAMW,
    MLP,
    SCOPES,
    ConvNet,
    LiveBytes,
    Recorder,
    always,
    comparable,
    logged,
    make,
    mean_loss,
    on,
    outcome,
    rng_states,
    same,
    train,
    train_language_model,
    trainer_for,
    weights,
)
from torch import nn
from transformers import Trainer

from amp_hf import AMPConfig

# Radius 0, and plain steps, are the stock Trainer


OPTIONS = {
    "nothing else": {},
    "clipping": dict(max_grad_norm=0.1),
    "AdamW and a schedule": ADAMW,
    "label smoothing": dict(label_smoothing_factor=0.1),
    "a loss function": dict(trainer={"compute_loss_func": mean_loss}),
    "bf16": dict(bf16=True),
    "everything": ADAMW | dict(max_grad_norm=0.1, label_smoothing_factor=0.1, bf16=True),
}


def assert_same(ours, stock):
    for key, expected in stock.items():
        assert ours[key] == expected, key


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_radius_zero_is_the_stock_trainer_to_the_bit(tmp_path, options, accumulation):
    results = []
    options = options | dict(gradient_accumulation_steps=accumulation, max_steps=4)
    for own in (dict(config=AMPConfig(epsilon=0)), dict(cls=Trainer)):
        results.append(outcome(train(make(ConvNet), tmp_path, **own, **options)))
    assert_same(*results)


def test_radius_zero_is_the_stock_trainer_to_the_bit_for_a_language_model(tmp_path):
    results = []
    for own in (dict(config=AMPConfig(epsilon=0)), dict(cls=Trainer)):
        trainer = train_language_model(tmp_path, gradient_accumulation_steps=2, **own, **ADAMW)
        results.append(outcome(trainer))
    assert_same(*results)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_steps_before_ascent_start_are_those_of_the_stock_trainer_to_the_bit(tmp_path, scope):
    snapshots = []
    for own in (dict(config=AMPConfig(0.1, ascent_start=0.5, scope=scope)), dict(cls=Trainer)):
        trainer = trainer_for(make(ConvNet), tmp_path, gradient_accumulation_steps=2, **own)

        def look(event, state, control, trainer=trainer):
            snapshots.append((state.global_step, outcome(trainer)))

        trainer.add_callback(on(["on_step_end"], look))
        trainer.train()
    ours, stock = snapshots[:8], snapshots[8:]
    assert ours[:4] == stock[:4]
    assert ours[4] != stock[4]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_too_short_to_learn_its_data_is_the_stock_trainers_to_the_bit(
    tmp_path, accumulation, scope, caplog
):
    ours, stock = (
        train(make(ConvNet), tmp_path, gradient_accumulation_steps=accumulation, **own)
        for own in (dict(config=AMPConfig(scope=scope)), dict(cls=Trainer))
    )
    assert logged(ours, "amp/delta_norm") == []
    assert_same(outcome(ours), outcome(stock))
    assert "No step was perturbed, so this run equals the stock Trainer" in caplog.text


# What the inner passes must not disturb


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_norm_statistics_and_generators_go_on_as_without_a_perturbation(
    tmp_path, accumulation, inner_steps, scope
):
    # At learning rate 0 the weights stay the same, and with them all that the clean passes see.
    results = []
    amp = always(inner_steps=inner_steps, scope=scope)
    for own in (dict(config=amp), dict(cls=Trainer)):
        trainer = train(
            make(ConvNet),
            tmp_path,
            learning_rate=0.0,
            gradient_accumulation_steps=accumulation,
            **own,
        )
        results.append((comparable(trainer.model.state_dict()), rng_states()))
    assert results[0] == results[1]
    assert trainer.model.norm1.num_batches_tracked == 8 * accumulation


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_norm_statistics_of_both_passes_are_taken_on_request(tmp_path, inner_steps):
    trainer = train(make(ConvNet), tmp_path, always(inner_steps=inner_steps, norm_stats="both"))
    assert trainer.model.norm1.num_batches_tracked == 8 * (inner_steps + 1)


def test_norm_statistics_count_one_batch_a_step_where_the_last_delta_is_reused(tmp_path):
    trainer = train(make(ConvNet), tmp_path, always(ascent_every=3, ascent_reuse=True))
    assert trainer.model.norm1.num_batches_tracked == 8


def test_a_step_that_reuses_delta_draws_the_dropout_masks_of_the_stock_trainer(tmp_path):
    results = []
    for own in (dict(config=always(ascent_every=3, ascent_reuse=True)), dict(cls=Trainer)):
        train(make(ConvNet), tmp_path, learning_rate=0.0, **own)
        results.append(rng_states())
    assert results[0] == results[1]


def test_norm_statistics_are_from_theta_while_the_weights_move(tmp_path):
    # The last clean pass of the run, done by hand: momentum 0.1 from the statistics before it.
    model, recorder, befores = make(ConvNet, dtype=torch.float64), Recorder(), []
    look = on(["on_step_begin"], lambda *_: befores.append(weights(model)))
    own = {"data_collator": recorder, "callbacks": [look]}
    train(model, tmp_path, always(), trainer=own, max_steps=3)
    twin = ConvNet().double()
    twin.load_state_dict(befores[2])
    twin(recorder.batches[2]["pixels"])
    names = [name for name in befores[2] if "running" in name or "tracked" in name]
    assert len(names) == 6
    assert all(torch.equal(model.state_dict()[name], twin.state_dict()[name]) for name in names)


class DropoutMLP(MLP):
    """Dropout of what is never zero by itself, so that the mask can be read off."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels, labels=None):
        logits = self.fc2(self.dropout(1 + torch.sigmoid(self.fc1(pixels.flatten(1)))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_all_passes_of_a_micro_batch_draw_the_dropout_masks_of_the_stock_trainer(
    tmp_path, scope, inner_steps
):
    masks = {}
    for kind, own in {
        "ours": dict(config=always(scope=scope, inner_steps=inner_steps)),
        "stock": dict(cls=Trainer),
    }.items():
        model, seen = make(DropoutMLP), masks.setdefault(kind, [])
        model.dropout.register_forward_hook(lambda *a, seen=seen: seen.append(a[2] != 0))
        train(model, tmp_path, max_steps=2, gradient_accumulation_steps=2, **own)
    one, two, three, four = masks["stock"]
    assert not torch.equal(one, two)
    if scope == "batch":
        expected = [one, two] * (inner_steps + 1) + [three, four] * (inner_steps + 1)
    else:
        expected = [mask for mask in (one, two, three, four) for _ in range(inner_steps + 1)]
    assert same(masks["ours"], expected)


# Memory


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("reuse", [False, True])
def test_training_takes_one_copy_of_the_parameters_and_the_largest_more_than_the_stock_trainer(
    tmp_path, accumulation, scope, reuse
):
    peaks = []
    config = always(scope=scope, ascent_every=2 if reuse else 1, ascent_reuse=reuse)
    for own in (dict(config=config), dict(cls=Trainer)):
        model = make(lambda: MLP(hidden=2048))
        trainer = trainer_for(
            model, tmp_path, max_steps=3, gradient_accumulation_steps=accumulation, **own
        )
        with LiveBytes() as memory:
            trainer.train()
        peaks.append(memory.peak)
    sizes = [param.nbytes for param in model.parameters()]
    assert sum(sizes) / 2 < peaks[0] - peaks[1] <= sum(sizes) + max(sizes)
