import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss
from transformers import EvalPrediction

from amp_hf.metrics import (
    Accuracy,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    compute_metrics,
    temperature_scaled,
)


def logits_and_labels(n=1000, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, classes)).astype(np.float32) * 3, rng.integers(classes, size=n)


def test_accuracy_and_nll_are_those_of_scikit_learn():
    logits, labels = logits_and_labels()
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(1, keepdims=True)
    results = compute_metrics(EvalPrediction(logits, labels))
    assert results["accuracy"] == accuracy_score(labels, logits.argmax(1))
    assert results["nll"] == pytest.approx(log_loss(labels, probs), rel=1e-9)


def test_of_a_model_that_returns_more_than_its_logits_the_logits_are_measured():
    logits, labels = logits_and_labels(n=8)
    hidden = np.zeros((8, 4, 16), np.float32)
    found = compute_metrics(EvalPrediction((logits, hidden), labels))
    assert found == compute_metrics(EvalPrediction(logits, labels))


def test_what_is_no_classification_of_whole_samples_is_refused():
    logits, labels = logits_and_labels(n=8)
    for shape in ((2, 4, 10), (2, 40)):
        with pytest.raises(ValueError, match=r"takes logits, \(n, classes\).*got \(2, "):
            compute_metrics(EvalPrediction(logits.reshape(shape), labels.reshape(2, 4)))


def test_the_metrics_are_those_that_evaluate_computes():
    logits, labels = logits_and_labels()
    found = compute_metrics(EvalPrediction(logits, labels))
    for metric in (Accuracy, NegativeLogLikelihood, ExpectedCalibrationError):
        computed = metric(keep_in_memory=True).compute(predictions=logits, references=labels)
        assert computed.items() <= found.items()


def test_calibration_error_of_a_case_worked_by_hand():
    # Two classes. Confidence .9 four times with three right, confidence .6 six times with five
    # right: 4/10 * |3/4 - .9| + 6/10 * |5/6 - .6| = .06 + .14.
    confidence = np.array([0.9] * 4 + [0.6] * 6)
    logits = np.log(np.stack([confidence, 1 - confidence], 1))
    labels = np.array([0, 0, 0, 1] + [0] * 5 + [1])
    result = ExpectedCalibrationError(keep_in_memory=True).compute(
        predictions=logits, references=labels
    )
    assert result["ece"] == pytest.approx(0.2, abs=1e-9)


def test_calibration_error_takes_the_gap_of_each_bin_and_not_of_each_sample():
    # Confidences .61 and .65 fall into one of 15 bins (.6, .667]; one right, one wrong.
    confidence = np.array([0.61, 0.65])
    logits = np.log(np.stack([confidence, 1 - confidence], 1))
    metric = ExpectedCalibrationError(keep_in_memory=True)
    result = metric.compute(predictions=logits, references=np.array([0, 1]))
    assert result["ece"] == pytest.approx(0.63 - 0.5, abs=1e-9)
    metric = ExpectedCalibrationError(keep_in_memory=True)
    finer = metric.compute(predictions=logits, references=np.array([0, 1]), n_bins=100)
    assert finer["ece"] == pytest.approx((0.39 + 0.65) / 2, abs=1e-9)


def test_certain_and_right_is_perfectly_calibrated():
    logits = np.eye(10) * 1000
    results = compute_metrics(EvalPrediction(logits, np.arange(10)))
    assert results == {"accuracy": 1.0, "nll": 0.0, "ece": 0.0}


def drawn(n=4000, classes=5, seed=0):
    """Logits, and labels drawn from their own softmax: perfectly calibrated."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 2
    return logits, (logits + rng.gumbel(size=logits.shape)).argmax(1)


@pytest.mark.parametrize("factor", [0.15, 0.4, 1.0, 3.0])
def test_temperature_scaling_undoes_what_a_factor_has_done(factor):
    logits, labels = drawn()
    best = compute_metrics(EvalPrediction(logits, labels))
    scaled = temperature_scaled(factor * logits, labels)
    assert scaled["nll"] == pytest.approx(best["nll"], abs=2e-3)
    assert scaled["ece"] < 0.03


def test_each_half_holds_every_class_in_whatever_order_they_come():
    logits, labels = drawn(classes=2)
    order = np.stack([np.flatnonzero(labels == i)[:1500] for i in (0, 1)], axis=1).ravel()
    logits, labels = logits[order], labels[order]  # 0, 1, 0, 1, ...
    best = compute_metrics(EvalPrediction(logits, labels))
    assert temperature_scaled(logits, labels)["nll"] == pytest.approx(best["nll"], abs=2e-3)


def test_a_class_that_is_ruled_out_takes_no_part_in_the_temperature():
    logits, labels = drawn()
    with_another = np.concatenate([logits, np.full((len(logits), 1), -np.inf)], axis=1)
    scaled = temperature_scaled(with_another, labels)
    assert scaled == pytest.approx(temperature_scaled(logits, labels))


def test_no_sample_chooses_its_own_temperature():
    """Half of each class is far too sure, half far too timid: each half spoils the other."""
    logits, labels = drawn()
    by_class = labels.argsort(kind="stable")
    logits[by_class[::2]] *= 4
    logits[by_class[1::2]] /= 4
    given = compute_metrics(EvalPrediction(logits, labels))
    assert temperature_scaled(logits, labels)["nll"] > given["nll"] + 1


def test_where_all_are_right_the_temperature_ends_at_a_tenth():
    logits = np.eye(4)[[0, 1, 2, 3] * 10]
    scaled = temperature_scaled(logits, logits.argmax(1))
    assert scaled["nll"] == pytest.approx(np.log1p(3 * np.exp(-10)))
