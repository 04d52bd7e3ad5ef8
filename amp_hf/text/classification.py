"""Text classification: the job of recipes/train_text.py.

Arguments are those of `TrainingArguments`, of `AMPConfig` and of `TextArguments`, from the command
line or from a YAML file. The file comes first, and arguments after it override it.
"""

from __future__ import annotations

import math
import os
from functools import partial
from importlib.util import find_spec
from typing import Any

import datasets
import torch
import transformers
from accelerate.logging import get_logger
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
)

from ..card import CardDetails
from ..compat import saved_under_its_own_names
from ..job.data import NUMBER, check_labels, find_column
from ..job.job import Job
from ..job.main import main as run_job
from ..job.saved import first_line, load_weights, origin_on_card
from ..trainer import AMPTrainer
from .arguments import parse

logger = get_logger(__name__)  # of the main process alone

PROBLEM = "single_label_classification"  # whatever the base model was for
USUAL_COLUMNS = ("text", "sentence", "content", "review")
STRINGS = (datasets.Value("string"), datasets.Value("large_string"))


class TextJob(Job):
    """An encoder of transformers, whole or with LoRA adapters, on texts or pairs of them."""

    pipeline = "text-classification"

    def input_columns(self, features: datasets.Features) -> list[str]:
        chosen = self.arguments
        strings = [name for name in features if features[name] in STRINGS]
        # Of several, one with another name could be an id or a title.
        usual = strings if len(strings) == 1 else [x for x in USUAL_COLUMNS if x in strings]
        self.text_columns = [
            find_column(chosen.dataset, features, "text", name, usual, strings)
            for name in chosen.text_column or [None]
        ]
        if not chosen.text_column and len(strings) > 1:
            (text,) = self.text_columns
            rest = [name for name in strings if name != text]
            logger.warning(
                f"The texts are column {text!r}. With --text_column they may also be any of {rest}."
            )
        return self.text_columns

    def build_model(self) -> Any:
        chosen, names = self.arguments, self.rows.label_names
        if chosen.lora and find_spec("peft") is None:
            raise ValueError("--lora needs peft: pip install peft.")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(chosen.model)
            if self.tokenizer.pad_token is None:
                raise ValueError("its tokenizer has no padding token")
            config = AutoConfig.from_pretrained(
                chosen.model,
                num_labels=len(names),
                id2label=dict(enumerate(names)),
                label2id={name: i for i, name in enumerate(names)},
                problem_type=PROBLEM,
            )
            if chosen.from_scratch:
                model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
                return saved_under_its_own_names(model)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                chosen.model,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # a head for other classes
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--model {chosen.model!r} could not be loaded ({first_line(error)}). Pass the "
                "Hub id or the folder of an encoder."
            ) from error
        if chosen.lora:
            return self._with_adapters(model, loading)
        return saved_under_its_own_names(model)

    def _with_adapters(self, model: PreTrainedModel, loading: dict[str, Any]) -> Any:
        from peft import LoraConfig, TaskType, get_peft_model

        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=self.arguments.lora,
            lora_alpha=2 * self.arguments.lora,
            target_modules="all-linear",
            modules_to_save=_new_modules(model, loading),
        )
        return get_peft_model(model, config)

    def origin(self) -> tuple[str | None, str | None]:
        name = self.arguments.model
        if self.arguments.from_scratch:
            return None, None
        return origin_on_card(name) if os.path.isdir(name) else (name, None)

    def dataset(
        self, name: str, rows: datasets.Dataset, args: TrainingArguments, model: Any
    ) -> datasets.Dataset:
        label, tokenizer, columns = self.rows.label_column, self.tokenizer, self.text_columns
        length = min(self.arguments.max_length, tokenizer.model_max_length, _positions(model))
        check_labels(rows, label, rows[NUMBER])

        def encode(batch: dict[str, list]) -> Any:
            texts = ([text or "" for text in batch[column]] for column in columns)
            encoded = tokenizer(*texts, truncation=True, max_length=length)
            return encoded | {"labels": batch[label]}

        with args.main_process_first(desc="tokenizing"):
            return rows.map(
                encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {name}"
            )

    def trainer_arguments(self) -> dict[str, Any]:
        return dict(
            processing_class=self.tokenizer, data_collator=DataCollatorWithPadding(self.tokenizer)
        )

    def new_trainer(self, *args: Any) -> AMPTrainer:
        trainer = super().new_trainer(*args)
        # These models take `num_items_in_batch`, but their loss is the mean of the micro-batch all
        # the same: the Trainer would add up what it has to average, over steps and over ranks.
        trainer.model_accepts_loss_kwargs = False
        return trainer

    def load(self, folder: str) -> nn.Module:
        if self.arguments.lora:
            from peft import AutoPeftModelForSequenceClassification

            labels = len(self.rows.label_names)
            return AutoPeftModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=labels,
                problem_type=PROBLEM,
                ignore_mismatched_sizes=True,  # the base's head: that of the adapters comes after
                is_trainable=True,
                dtype=torch.float32,
            )
        config = AutoConfig.from_pretrained(folder)
        return load_weights(getattr(transformers, config.architectures[0])(config), folder)

    def card_details(self) -> CardDetails:
        details = super().card_details()
        if self.arguments.lora:
            details.how_to_load = self.how_to_load
        return details

    def how_to_load(self, folder: str) -> str:
        if not self.arguments.lora:
            return super().how_to_load(folder)
        return (
            "from peft import AutoPeftModelForSequenceClassification\n"
            "from transformers import AutoTokenizer, pipeline\n"
            f"names = {self.rows.label_names}\n"
            "model = AutoPeftModelForSequenceClassification.from_pretrained(\n"
            f"    {folder},\n"
            "    id2label=dict(enumerate(names)),\n"
            f'    problem_type="{PROBLEM}",\n'
            "    ignore_mismatched_sizes=True,\n"
            ")\n"
            f"tokenizer = AutoTokenizer.from_pretrained({folder})\n"
            'classify = pipeline("text-classification", model=model, tokenizer=tokenizer)'
        )


def _positions(model: nn.Module) -> float:
    """How many tokens have a position, which a tokenizer may have been saved without."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # Those of RoBERTa and its relatives begin behind the one for padding.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - before
    return math.inf


def _new_modules(model: PreTrainedModel, loading: dict[str, Any]) -> list[str]:
    """The modules whose values are not among the pretrained ones: the head, perhaps a pooler."""
    names = [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    body = f"{model.base_model_prefix}."
    return sorted(
        {name.rpartition(".")[0] if name.startswith(body) else name.split(".")[0] for name in names}
    )


main = partial(run_job, TextJob, parse)
