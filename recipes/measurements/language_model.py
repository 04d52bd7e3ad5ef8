"""A tiny language model on the bytes of texts, for erm_comparison.py."""

from typing import Any

import datasets
from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
)

from amp_hf.text.classification import TextJob

NO_TARGET = -100  # torch's own label of a token that the loss leaves out


class LanguageModelJob(TextJob):
    """Two layers of GPT-2's architecture, 0.1 million parameters, from scratch.

    `--model` and the texts' labels mean nothing to it.
    """

    def build_model(self) -> GPT2LMHeadModel:
        self.tokenizer = ByT5Tokenizer(extra_ids=0)
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        config = GPT2Config(
            vocab_size=len(self.tokenizer),
            n_positions=self.arguments.max_length,
            n_embd=64,
            n_layer=2,
            n_head=4,
            pad_token_id=pad,
            bos_token_id=end,
            eos_token_id=end,
        )
        return GPT2LMHeadModel(config)

    def dataset(
        self, name: str, rows: datasets.Dataset, args: TrainingArguments, model: Any
    ) -> datasets.Dataset:
        return super().dataset(name, rows, args, model).remove_columns("labels")

    def trainer_arguments(self) -> dict[str, Any]:
        collator = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)
        return super().trainer_arguments() | dict(data_collator=collator)


def predicted_tokens(texts: EvalPrediction) -> EvalPrediction:
    """Logits, (tokens, vocabulary), and targets, (tokens,), of all tokens but each text's first."""
    logits, labels = texts.predictions[:, :-1], texts.label_ids[:, 1:]
    wanted = labels != NO_TARGET
    return EvalPrediction(logits[wanted], labels[wanted])
