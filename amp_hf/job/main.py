"""The main job: train a model with AMP, evaluate it and save it, measure it, push it.

The recipes in recipes/ are this with a kind of data and a dataset's defaults.
"""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..markdown import literal
from ..trainer import AMPTrainer
from .data import DataError
from .folder import EarlierRun
from .job import Job
from .pushing import HubError


def main(
    job_class: type[Job],
    parse: Callable[..., tuple],
    defaults: dict[str, Any] | None = None,
    network_defaults: dict[str, Any] | None = None,
    description: str | None = None,
    argv: list[str] | None = None,
) -> dict[str, float]:
    """Parses the arguments, trains, evaluates, saves, and says where.

    Args:
        job_class: the kind of data.
        parse: called with the next four; returns the job's own arguments, `TrainingArguments` and
            `AMPConfig`, which `job_class` takes.
        defaults: this recipe's, of any argument.
        network_defaults: further ones, of the `model` that it trains from scratch.
        argv: the arguments, if they do not come from the command line.

    Returns:
        What `all_results.json` holds.

    Where something is wrong, exits with one line: with status 2 if it is the arguments, the data or
    the repository; with status 1 if the push failed, or if the training diverged, which is not
    pushed at its end.
    """
    try:
        job = job_class(*parse(defaults, network_defaults, description, argv))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _exit(error)
    earlier_run = EarlierRun()
    job.trainer.add_callback(earlier_run)
    try:
        results = _train_and_evaluate(job, earlier_run)
    except DataError as error:  # from a dataloader's worker, with its traceback inside
        _exit(error)
    except HubError as error:
        _exit(error, 1)
    except (ValueError, OSError, ImportError) as error:
        if earlier_run.steps is not None:  # not the arguments' fault: the training had begun
            raise
        _exit(error)
    if not _all_finite(results):
        print("The training diverged: lower --learning_rate, --rise or --epsilon.", file=sys.stderr)
        sys.exit(1)
    return results


def _train_and_evaluate(job: Job, earlier_run: EarlierRun) -> dict[str, float]:
    """Saves after each step, so that a later one that fails loses nothing."""
    trainer = job.trainer
    evaluated: dict[str, Any] = dict(job.tests)
    if trainer.eval_dataset is not None:
        evaluated = {"eval": trainer.eval_dataset} | evaluated
    results = _train_and_save(trainer, earlier_run)
    _evaluate(trainer, evaluated, results)
    trainer.create_model_card(tasks=job.pipeline)
    failure = None
    if (job.arguments.compare_erm or job.arguments.flatness) and _all_finite(results):
        failure = _measure_for_card(job, evaluated)
        trainer.create_model_card(tasks=job.pipeline)
    if trainer.is_world_process_zero():
        folder = str(trainer.args.output_dir)
        code = textwrap.indent(job.how_to_load(literal(folder)), "    ")
        print(_SUMMARY.format(folder=folder, code=code))
    if trainer.args.push_to_hub and _all_finite(results):
        trainer.push_to_hub(tasks=job.pipeline)
    if failure is not None:
        raise failure
    return results


def _train_and_save(trainer: AMPTrainer, earlier_run: EarlierRun) -> dict[str, float]:
    metrics = trainer.train(trainer.args.resume_from_checkpoint).metrics
    trainer.save_model(_internal_call=True)  # pushed later, with all that its card will say
    trainer.save_state()
    if trainer.state.global_step == earlier_run.steps:
        # That one was killed after its last step: its loss and time are in the file that it wrote.
        written = Path(str(trainer.args.output_dir), "train_results.json")
        return json.loads(written.read_text()) if written.exists() else {}
    trainer.log_metrics("train", metrics)
    _save_metrics(trainer, "train", metrics, metrics)
    return metrics


def _evaluate(trainer: AMPTrainer, evaluated: dict[str, Any], results: dict[str, float]) -> None:
    """Adds what it measures to `results`."""
    training = dict(results)
    for name, dataset in evaluated.items():
        metrics = trainer.evaluate(dataset, metric_key_prefix=name)
        trainer.log_metrics(name, metrics)
        if name == "train":  # of which the training's own loss and time keep their names
            metrics |= training
        results |= metrics
        _save_metrics(trainer, name, metrics, results)


def _save_metrics(
    trainer: AMPTrainer, name: str, metrics: dict[str, float], results: dict[str, float]
) -> None:
    """Not by `combined`, which would keep the results of an earlier run in the same folder."""
    trainer.save_metrics(name, metrics, combined=False)
    trainer.save_metrics("all", results, combined=False)


def _measure_for_card(job: Job, evaluated: dict[str, Any]) -> Exception | None:
    """Returns what it raised, for the model to be pushed first."""
    from .comparison import measure_for_card  # needs matplotlib

    try:
        measure_for_card(job, evaluated)
    except Exception as error:
        print(f"The model card lacks what could not be measured: {error}", file=sys.stderr)
        return error
    return None


def _all_finite(results: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in results.values())


_SUMMARY = """
Saved in {folder}: the model, README.md (its card), amp_config.json, all_results.json.
It loads without amp_hf:

{code}
"""


def _exit(error: Exception, status: int = 2) -> NoReturn:
    # An error from a dataloader's worker carries the worker's traceback, and its own line ends it.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # The Trainer's arguments list what they found below what they asked for.
    found = [line for line in lines[1:] if line.startswith("- ")]
    message = lines[-1] if isinstance(error, DataError) else " ".join([lines[0], *found])
    message = message.rpartition(f"{type(error).__name__}: ")[2]
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    sys.exit(status)
