"""Trainers derived from the stock one: transformers' own, and those of other libraries.

The others' are skipped where they are not installed: `pip install -e '.[compat]'`. With ε = 0 each
equals its parent to the bit, with ε > 0 a naive loop of two passes, and a resumed run the
uninterrupted one.
"""

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support import always, differing, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from amp_hf import AMPConfig, AMPTrainerMixin

pytestmark = pytest.mark.slow

WORDS = ["the", "a", "red", "green", "blue", "sign", "stop", "go", "left", "right", "yes", "no"]
TEXTS = [f"{a} {b} {c}" for a, b, c in itertools.product(WORDS[:2], WORDS[2:5], WORDS[5:])]
IDS = [[2 + (i * k) % 12 for k in range(1, 7)] for i in range(len(TEXTS))]


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


def bert(cls):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return cls(BertConfig(vocab_size=14, max_position_embeddings=32, **sizes))


def t5():
    torch.manual_seed(0)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(vocab_size=14, decoder_start_token_id=0, **sizes))


def encoder(folder):
    """A SentenceTransformer, which is made of files."""
    from sentence_transformers import SentenceTransformer

    bert(BertModel).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    return SentenceTransformer(str(folder / "bert"), device="cpu")


def cross_encoder(folder):
    from sentence_transformers import CrossEncoder

    bert(BertModel).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    torch.manual_seed(0)
    return CrossEncoder(str(folder / "bert"), num_labels=1, device="cpu")


class QuestionAnsweringTrainer(Trainer):
    """As in the examples of transformers: more arguments, and an evaluation of its own."""

    def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function


@dataclass
class Case:
    """A trainer, its arguments' class, its data, and what makes its model and further arguments."""

    parent: type
    arguments: type
    data: dict
    model: Callable[[Any], Any]
    own: Callable[[Any], dict] = field(default=lambda model: {"processing_class": tokenizer()})


PAIRS = {
    "prompt": [f"{text} " for text in TEXTS],
    "chosen": ["yes"] * len(TEXTS),
    "rejected": ["no"] * len(TEXTS),
}
SPANS = {"input_ids": IDS, "start_positions": [1] * len(IDS), "end_positions": [3] * len(IDS)}
LIKED = {
    "prompt": [f"{text} " for text in TEXTS],
    "completion": ["yes", "no"] * (len(TEXTS) // 2),
    "label": [True, False] * (len(TEXTS) // 2),
}
SCORED = {
    "sentence1": TEXTS,
    "sentence2": TEXTS[::-1],
    "score": [i % 3 / 2 for i in range(len(TEXTS))],
}


def of_transformers(name):
    def nothing(model):
        return {}

    if name == "QA":
        kind = QuestionAnsweringTrainer, TrainingArguments
        return Case(*kind, SPANS, lambda folder: bert(BertForQuestionAnswering), nothing)
    kind = Seq2SeqTrainer, Seq2SeqTrainingArguments
    return Case(*kind, {"input_ids": IDS, "labels": IDS[::-1]}, lambda folder: t5(), nothing)


def of_trl(name):
    trl = pytest.importorskip("trl")
    kind = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")

    def beside_reference(model):
        return {"processing_class": tokenizer(), "ref_model": network()}

    if name == "Reward":
        data = {"chosen": [f"{t} yes" for t in TEXTS], "rejected": [f"{t} no" for t in TEXTS]}
        model = functools.partial(network, GPT2ForSequenceClassification, num_labels=1)
        return Case(*kind, data, lambda folder: model())
    if name == "SFT":
        return Case(*kind, {"text": TEXTS}, lambda folder: network())
    data = {"DPO": PAIRS, "KTO": LIKED}[name]
    return Case(*kind, data, lambda folder: network(), beside_reference)


def of_sentence_transformers(name):
    sentences = pytest.importorskip("sentence_transformers")
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from sentence_transformers.losses import CosineSimilarityLoss, MultipleNegativesRankingLoss

    if name == "cross-encoder":
        kind = sentences.CrossEncoderTrainer, sentences.CrossEncoderTrainingArguments
        return Case(*kind, SCORED, cross_encoder, lambda m: {"loss": BinaryCrossEntropyLoss(m)})
    kind = sentences.SentenceTransformerTrainer, sentences.SentenceTransformerTrainingArguments
    if name == "cosine":
        return Case(*kind, SCORED, encoder, lambda m: {"loss": CosineSimilarityLoss(m)})
    pairs = {column: SCORED[column] for column in ("sentence1", "sentence2")}
    return Case(*kind, pairs, encoder, lambda m: {"loss": MultipleNegativesRankingLoss(m)})


FROM = {
    of_transformers: ["Seq2Seq", "QA"],
    of_trl: ["SFT", "DPO", "KTO", "Reward"],
    of_sentence_transformers: ["cosine", "negatives", "cross-encoder"],
}
NAMES = [name for names in FROM.values() for name in names]


@functools.cache
def case_of(name):
    return next(make(name) for make, names in FROM.items() if name in names)


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
    case = case_of(name)
    cls = case.parent if mixin is None else type("Mixed", (mixin, case.parent), {})
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
    model = case.model(folder)
    return cls(
        model=model,
        args=case.arguments(**options | kwargs),
        train_dataset=Dataset.from_dict(case.data),
        **own,
        **case.own(model),
    )


def trained(*args, resume=None, **kwargs):
    trainer = trainer_of(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return weights(trainer.model)


@pytest.mark.parametrize("name", NAMES)
def test_radius_zero_is_the_parent_to_the_bit(tmp_path, name):
    ours = trained(name, tmp_path, AMPTrainerMixin, AMPConfig(epsilon=0))
    assert not differing(ours, trained(name, tmp_path))


@pytest.mark.parametrize("name", NAMES)
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
    trl = pytest.importorskip("trl")

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


def block_of(page, word):
    """The block of Python in a page of this repository that has the word."""
    text = (Path(__file__).parent.parent / page).read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in b]
    return block


def test_the_fine_tuning_of_the_readme_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    network().save_pretrained("gpt2")
    tokenizer().save_pretrained("gpt2")
    Dataset.from_dict({"text": TEXTS}).to_json("texts.jsonl")
    code = block_of("README.md", "SFTTrainer")
    for here, there in {
        '"gpt2"': '"Qwen/Qwen3-0.6B"',
        '"json", data_files="texts.jsonl", ': '"trl-lib/Capybara", ',
        'report_to="none", use_cpu=True, bf16=False, num_train_epochs=3': "num_train_epochs=3",
    }.items():
        assert there in code
        code = code.replace(there, here)
    names = {}
    exec(code, names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 3 * -(-len(TEXTS) // 8)
    assert trainer.amp_config == AMPConfig()


def test_setfit_perturbs_with_the_three_lines_of_the_documentation(tmp_path, monkeypatch):
    setfit = pytest.importorskip("setfit")
    from sklearn.linear_model import LogisticRegression

    name = "BCSentenceTransformersTrainer"
    stock = getattr(setfit.trainer, name)
    monkeypatch.setattr(setfit.trainer, name, stock)  # as it is, also at the end
    names = {"AMPTrainerMixin": AMPTrainerMixin}
    exec(block_of("amp_hf/README.md", "setfit.trainer"), names)
    ours = getattr(setfit.trainer, name)
    assert ours is names["AMPInner"]
    trained = []
    for config in (None, AMPConfig(epsilon=0), always(epsilon=0.05)):
        inner = functools.partial(ours, amp_config=config) if config else stock
        setattr(setfit.trainer, name, inner)
        body = encoder(tmp_path)
        trainer = setfit.Trainer(
            model=setfit.SetFitModel(model_body=body, model_head=LogisticRegression()),
            args=setfit.TrainingArguments(
                output_dir=str(tmp_path), max_steps=4, report_to="none", save_strategy="no"
            ),
            train_dataset=Dataset.from_dict({"text": TEXTS, "label": [0, 1] * (len(TEXTS) // 2)}),
        )
        trainer.train()
        trained.append(weights(body))
    assert not differing(trained[0], trained[1])
    assert differing(trained[0], trained[2])
