"""The arguments of the recipe for text classification."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..config import AMPConfig
from ..job import arguments
from ..job.arguments import JobArguments


@dataclass
class TextArguments(JobArguments):
    """Which encoder to train on which texts, and what to measure for its card."""

    model: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "An encoder of the Hub, or a folder that one was saved to."},
    )
    dataset: str = field(
        default="dair-ai/emotion",
        metadata={"help": "A Hub id, a local folder, or a CSV, JSON or parquet file."},
    )
    text_column: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Default: text, sentence, content or review, or the only column of strings. "
            "Two columns are a pair."
        },
    )
    max_length: int = field(
        default=128,
        metadata={"help": "Tokens, at most as many as the model takes; what is longer is cut off."},
    )
    lora: int = field(
        default=0,
        metadata={"help": "Train LoRA adapters of this rank, and the head; 0: all weights."},
    )

    def __post_init__(self) -> None:
        self._check_positive("max_length")
        if self.lora < 0:
            raise ValueError(f"--lora must be at least 0, got {self.lora}.")
        if self.lora and self.from_scratch:
            raise ValueError(
                "--lora adapts pretrained weights, which are not saved: leave --from_scratch out."
            )
        if len(self.text_column) > 2 or len(set(self.text_column)) < len(self.text_column):
            raise ValueError(
                f"--text_column takes one column or two that differ, got {self.text_column}."
            )
        super().__post_init__()


_DEFAULTS: dict[str, Any] = dict(
    num_train_epochs=5,
    learning_rate=1e-4,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=128,
    weight_decay=0.01,
)


def parse(
    defaults: dict[str, Any] | None = None,
    network_defaults: dict[str, Any] | None = None,
    description: str | None = None,
    argv: list[str] | None = None,
) -> tuple[TextArguments, TrainingArguments, AMPConfig]:
    """`amp_hf.job.arguments.parse`, with the recipe's defaults after those for text."""
    return arguments.parse(
        TextArguments,
        _DEFAULTS | (defaults or {}),
        {},
        network_defaults or {},
        description,
        argv,
    )
