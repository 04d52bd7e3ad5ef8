"""Accuracy, likelihood and calibration of a classifier, as `evaluate` modules that need no network.

`predictions` are logits, (n, classes); `references` are class indices, (n,). The Trainer gathers
both from all processes (without the samples that fill up the last batch) before it calls
`compute_metrics`, so the numbers are those of the whole set on any number of processes.
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

_LOGITS = "`predictions`: logits, (n, classes); `references`: class indices, (n,)."


def _log_softmax(logits: Any) -> np.ndarray:
    return torch.as_tensor(np.asarray(logits), dtype=torch.float64).log_softmax(1).numpy()


class _LogitsMetric(evaluate.Metric):
    description: str
    citation: str = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=_LOGITS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )


class Accuracy(_LogitsMetric):
    description = "Share of the samples whose largest logit is their class's, in [0, 1]."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.argmax(predictions, 1) == np.asarray(references)))}


class NegativeLogLikelihood(_LogitsMetric):
    description = "Mean negative log-probability of the true class, in nats."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        log_probs = _log_softmax(predictions)
        return {"nll": float(-np.mean(log_probs[np.arange(len(references)), references]))}


class ExpectedCalibrationError(_LogitsMetric):
    description = (
        "Mean distance between confidence and accuracy over equal-width bins of the confidence "
        "(the largest probability), weighted by the samples in each bin, in [0, 1]."
    )
    citation = (
        "Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), "
        "equation 3, with its 15 bins."
    )

    def _compute(self, predictions: Any, references: Any, n_bins: int = 15) -> dict[str, float]:
        _, confidence, correct = calibration_bins(predictions, references, n_bins)
        return {"ece": float(np.abs(correct - confidence).sum() / len(references))}


def calibration_bins(
    logits: Any, labels: Any, n_bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per bin ((m−1)/M, m/M] of the confidence: samples, their summed confidence, correct ones.

    Three arrays, (n_bins,).

    Where logits are not finite, the confidences are NaN.
    """
    probs = np.exp(_log_softmax(logits))
    confidence = probs.max(1)
    correct = np.argmax(logits, 1) == np.asarray(labels)
    if np.isnan(confidence).any():
        return np.zeros(n_bins), np.full(n_bins, np.nan), np.zeros(n_bins)
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    count, summed, right = (
        np.bincount(bins, weights=weights, minlength=n_bins)
        for weights in (np.ones(len(bins)), confidence, correct)
    )
    return count, summed, right


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy`, `nll` and `ece`: for the Trainer's `compute_metrics`.

    `TrainingArguments(metric_for_best_model="nll", …)` needs `greater_is_better=False`: the Trainer
    knows that of a loss only. (The recipes add it.)

    Raises:
        ValueError: they are not one label and one row of logits a sample.
    """
    logits = logits_of(prediction.predictions)
    labels = prediction.label_ids
    if np.ndim(logits) != 2 or np.ndim(labels) != 1:
        raise ValueError(
            "compute_metrics takes logits, (n, classes), and class indices, (n,), got "
            f"{np.shape(logits)} and {np.shape(labels)}."
        )
    results: dict[str, float] = {}
    for metric in (Accuracy, NegativeLogLikelihood, ExpectedCalibrationError):
        # Not by `compute`, which makes a Python object of every logit: a minute for ImageNet's.
        results |= metric(keep_in_memory=True)._compute(logits, labels)
    return results


def logits_of(predictions: Any) -> Any:
    """A model's first output: BART, say, returns what its encoder has made of the text as well."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def temperature_scaled(logits: Any, labels: Any) -> dict[str, float]:
    """`nll` and `ece` once the logits are divided by the temperature that suits them best.

    It costs no training (Guo et al., section 4.2), so whatever improves calibration has to be
    compared with it. Every other sample of each class chooses the temperature of the rest, and the
    rest theirs: none is judged by a temperature that it has helped to choose.

    Args:
        logits: (n, classes), n >= 2.
        labels: class indices, (n,).
    """
    scaled = torch.as_tensor(np.asarray(logits), dtype=torch.float64).clone()
    classes = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    by_class = classes.argsort(stable=True)
    halves = by_class[::2], by_class[1::2]
    temperatures = [_temperature(scaled[half], classes[half]) for half in halves]
    for half, temperature in zip(halves, reversed(temperatures)):
        scaled[half] /= temperature
    results = compute_metrics(EvalPrediction(scaled.numpy(), classes.numpy()))
    return {name: results[name] for name in ("nll", "ece")}


def _temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """In [0.1, 10]: where all are right, the likelihood alone would lower it without an end."""
    right = logits.gather(1, labels[:, None])[:, 0]
    lowest, highest = 0.1, 10.0  # of 1 / temperature, in which the NLL is convex
    for _ in range(40):
        inverse = math.sqrt(lowest * highest)
        shares = (inverse * logits).softmax(1)
        # A class that is ruled out has a logit of −inf, and no share.
        mean = torch.where(shares > 0, shares * logits, 0.0).sum(1).mean()
        slope = mean - right.mean()
        lowest, highest = (lowest, inverse) if slope > 0 else (inverse, highest)
    return 1 / inverse
