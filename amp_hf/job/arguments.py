"""The arguments of every recipe for classification, and how they are parsed."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, TrainingArguments

from ..card import LICENSES
from ..compat import computes_in_bf16
from ..config import AMPConfig


@dataclass
class JobArguments:
    """Which rows to train and test on, and what to measure for the model card."""

    model: str = field(metadata={"help": "Where the weights are."})
    dataset: str = field(metadata={"help": "Where the rows are."})
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Which of the dataset's configurations, such as sst2 of nyu-mll/glue."},
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Default: the first column of class labels, or else label or labels."},
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Initial values instead of pretrained weights."}
    )
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of each class of the training set to hold out for validation."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many samples."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on this many samples."}
    )
    eval_splits: list[str] = field(
        default_factory=list,
        metadata={"help": "Further splits of the dataset to evaluate the trained model on."},
    )
    compare_erm: bool = field(
        default=False,
        metadata={"help": "For the model card: train the ERM baseline, too, without perturbation."},
    )
    flatness: bool = field(
        default=False,
        metadata={"help": "For the model card: measure and draw how flat the minimum is."},
    )
    license: str | None = field(
        default=None,
        metadata={"help": "The model's, as the Hub names it. Default: the pretrained weights'."},
    )
    budget: float | None = field(
        default=None,
        metadata={
            "help": "Passes to make, in multiples > 1 of the stock Trainer's: sets AMP as "
            "AMPConfig.for_budget does. Other arguments override it."
        },
    )

    def __post_init__(self) -> None:
        self._check_positive("max_train_samples", "max_eval_samples")
        if self.license is not None and self.license not in LICENSES:
            raise ValueError(
                f"--license must be one of the Hub's identifiers, such as apache-2.0 or other, got "
                f"{self.license!r}: see https://huggingface.co/docs/hub/repositories-licenses."
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"--validation_fraction must be in [0, 1), got {self.validation_fraction}."
            )

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines, and names each argument's default."""


def new_parser(types: Any, description: str | None, **kwargs: Any) -> HfArgumentParser:
    """A parser of the fields of `types`, one dataclass or several."""
    return HfArgumentParser(
        types,
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        **kwargs,
    )


# For every kind of data; the kind, and then the recipe, add their own.
_DEFAULTS: dict[str, Any] = dict(
    do_train=True,
    logging_steps=50,
    logging_nan_inf_filter=False,  # shows when training diverges
    save_strategy="epoch",
    save_total_limit=2,
    warmup_steps=0.05,
)


def parse(
    arguments_class: type[JobArguments],
    defaults: dict[str, Any],
    from_scratch_defaults: dict[str, Any],
    network_defaults: dict[str, Any],
    description: str | None = None,
    argv: list[str] | None = None,
) -> tuple[Any, TrainingArguments, AMPConfig]:
    """Parses the command line, which may begin with the name of a YAML file of arguments.

    Args:
        arguments_class: the kind's, beside `TrainingArguments` and `AMPConfig`.
        defaults: of any argument.
        from_scratch_defaults: further ones, which hold with `--from_scratch`.
        network_defaults: empty, or the `model` that a recipe trains from scratch and what suits it:
            further ones, which hold with `--from_scratch` and that model. A default of bf16 holds
            only where it is fast, and where nothing else is asked of the precision, the device or
            the engine.
        argv: the arguments, if they do not come from the command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = _read_yaml(argv[0]) + argv[1:]
    arguments: Any = (arguments_class, TrainingArguments, AMPConfig)
    parser = new_parser(
        arguments,
        description,
        usage="%(prog)s [config.yaml] [--argument value ...]  (--help lists the arguments)",
    )
    # Asked here, not on import: to ask may begin CUDA, and what is forked later cannot use it then.
    pinned = dict(dataloader_pin_memory=torch.cuda.is_available())
    parser.set_defaults(**pinned | _DEFAULTS | defaults)
    # Asked for help, the parser shows the defaults that hold with the rest.
    without_help = [word for word in argv if word not in ("-h", "--help")]
    known = parser.parse_known_args(without_help)[0]
    if known.from_scratch:
        parser.set_defaults(**from_scratch_defaults)
        if network_defaults:
            parser.set_defaults(model=network_defaults["model"])
            known = parser.parse_known_args(without_help)[0]
            if known.model == network_defaults["model"]:
                parser.set_defaults(**_with_bf16_where_it_is_fast(network_defaults, argv))
    if known.budget is not None and without_help == argv:
        parser.set_defaults(**AMPConfig.for_budget(known.budget).to_dict())
    parser.set_defaults(**_for_the_optimizer(known.optim, parser.get_default("optim")))
    if str(known.metric_for_best_model).removeprefix("eval_") in ("nll", "ece"):
        parser.set_defaults(greater_is_better=False)  # the Trainer knows that only of a loss
    own, args, amp_config = parser.parse_args_into_dataclasses(argv)
    return own, args, amp_config


def _for_the_optimizer(chosen: str, default: str) -> dict[str, Any]:
    """Defaults that hold where another optimizer than the recipe's is chosen."""
    if chosen == default:
        return {}
    # A schedule-free one would divide by a share of the steps, as by a number of them.
    warmup = dict(warmup_steps=0) if chosen.startswith("schedule_free") else {}
    return dict(optim_args=None) | warmup


def _with_bf16_where_it_is_fast(defaults: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    if not defaults.get("bf16"):
        return defaults
    bf16 = computes_in_bf16() and not _asks_for_a_device_or_precision(argv)
    # The Trainer takes bf16 on a CPU only where `use_cpu` says that no GPU is missing.
    use_cpu = bf16 and not torch.accelerator.is_available()
    return defaults | dict(bf16=bf16, use_cpu=use_cpu)


def _asks_for_a_device_or_precision(argv: list[str]) -> bool:
    """Whether the command line or `accelerate launch` does, or for an engine with its own types."""
    options = (word.partition("=")[0] for word in argv if word.startswith("--"))
    given = {option[2:].replace("-", "_") for option in options}
    return (
        not given.isdisjoint({"bf16", "fp16", "use_cpu", "deepspeed", "fsdp"})
        or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
        or any(parse_flag_from_env(f"ACCELERATE_USE_{x}") for x in ("CPU", "DEEPSPEED", "FSDP"))
    )


class _Loader(yaml.SafeLoader):
    """Takes 1e-5 for a number, as everybody does but YAML 1.1."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(path: str) -> list[str]:
    """The file's arguments, as they would be written on the command line."""
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.load(file, _Loader) or {}
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must be YAML, one `argument: value` a line: {reason}") from error
    arguments: list[str] = []
    for name, value in config.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(_word, value)] if value else []
        elif value is False and str(name).endswith("_strategy"):
            arguments += [f"--{name}=no"]  # which YAML reads as false
        elif value is not None:
            arguments += [f"--{name}={_word(value)}"]  # in one, as it may begin with a dash
    return arguments


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)
