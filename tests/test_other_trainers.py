"""Other libraries' trainers, as they are installed: `pip install -e '.[compat]'`.

With ε = 0 each equals its parent to the bit, with ε > 0 a naive loop of two passes, and a resumed
run the uninterrupted one.
"""

import itertools

import pytest
import torch
from datasets import Dataset
from support import always, differing, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from amp_hf import AMPConfig, AMPTrainerMixin

pytestmark = pytest.mark.slow

trl = pytest.importorskip("trl")

WORDS = ["the", "a", "red", "green", "blue", "sign", "stop", "go", "left", "right", "yes", "no"]
TEXTS = [f"{a} {b} {c}" for a, b, c in itertools.product(WORDS[:2], WORDS[2:5], WORDS[5:])]


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def network(cls=GPT2LMHeadModel, **kwargs):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=14,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        **kwargs,
    )
    return cls(config)


PAIRS = {
    "prompt": [f"{text} " for text in TEXTS],
    "chosen": ["yes"] * len(TEXTS),
    "rejected": ["no"] * len(TEXTS),
}
# A trainer of TRL, its arguments, its data and its model.
CASES = {
    "SFT": (trl.SFTTrainer, trl.SFTConfig, {"text": TEXTS}, network),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, PAIRS, network),
    "Reward": (
        trl.RewardTrainer,
        trl.RewardConfig,
        {"chosen": [f"{t} yes" for t in TEXTS], "rejected": [f"{t} no" for t in TEXTS]},
        lambda: network(GPT2ForSequenceClassification, num_labels=1),
    ),
}


class Naive:
    """AMP as one would write it in an afternoon, for one process without accumulation."""

    epsilon = 0.05

    def training_step(self, model, inputs, num_items_in_batch=None):
        state = torch.get_rng_state()
        params = [p for p in model.parameters() if p.requires_grad]
        super().training_step(model, dict(inputs), num_items_in_batch)
        delta = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
        norm = torch.linalg.vector_norm(torch.stack([d.norm() for d in delta]))
        theta = [p.detach().clone() for p in params]
        model.zero_grad()
        torch.set_rng_state(state)
        with torch.no_grad():
            for p, d in zip(params, delta):
                p.add_(d * min(1.0, self.epsilon / norm))
        loss = super().training_step(model, inputs, num_items_in_batch)
        with torch.no_grad():
            for p, t in zip(params, theta):
                p.copy_(t)
        return loss


def trainer_of(name, folder, mixin=None, config=None, **kwargs):
    parent, arguments, data, model = CASES[name]
    cls = parent if mixin is None else type("Mixed", (mixin, parent), {})
    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=0.01,
        optim="sgd",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    own = {"amp_config": config} if config else {}
    own |= {"ref_model": network()} if name == "DPO" else {}
    return cls(
        model=model(),
        args=arguments(**options | kwargs),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        **own,
    )


def trained(*args, resume=None, **kwargs):
    trainer = trainer_of(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return weights(trainer.model)


@pytest.mark.parametrize("name", CASES)
def test_radius_zero_is_the_parent_to_the_bit(tmp_path, name):
    ours = trained(name, tmp_path, AMPTrainerMixin, AMPConfig(epsilon=0))
    assert not differing(ours, trained(name, tmp_path))


@pytest.mark.parametrize("name", CASES)
def test_a_perturbed_run_is_that_of_a_naive_loop_and_a_resumed_one_is_the_same(tmp_path, name):
    config = always(epsilon=Naive.epsilon)
    save = dict(save_strategy="steps", save_steps=2)
    ours = trained(name, tmp_path, AMPTrainerMixin, config, **save)
    naive = trained(name, tmp_path, Naive)
    for key, value in naive.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)
    plain = trained(name, tmp_path)
    assert any((plain[key] - value).abs().max() > 1e-5 for key, value in naive.items())
    checkpoint = str(tmp_path / "checkpoint-2")
    assert not differing(ours, trained(name, tmp_path, AMPTrainerMixin, config, resume=checkpoint))


def test_grpo_is_refused_but_for_radius_zero(tmp_path):
    def grpo(mixin=None, config=None):
        cls = trl.GRPOTrainer if mixin is None else type("Mixed", (mixin, trl.GRPOTrainer), {})
        own = {"amp_config": config} if config else {}
        return cls(
            model=network(),
            args=trl.GRPOConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=4,
                max_steps=2,
                learning_rate=0.01,
                optim="sgd",
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
            ),
            reward_funcs=lambda completions, **kwargs: [float(len(c) % 3) for c in completions],
            train_dataset=Dataset.from_dict({"prompt": TEXTS}),
            processing_class=tokenizer(),
            **own,
        )

    with pytest.raises(ValueError, match="does not support GRPOTrainer"):
        grpo(AMPTrainerMixin, always())
    runs = []
    for own in ((AMPTrainerMixin, AMPConfig(epsilon=0)), ()):
        trainer = grpo(*own)
        trainer.train()
        runs.append(weights(trainer.model))
    assert not differing(*runs)
