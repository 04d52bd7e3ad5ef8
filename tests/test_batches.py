"""A part of a batch, whatever its collator made of it."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from support import always, differing, digits, make, train, trainer_for, weights
from transformers import BatchEncoding

from amp_hf.batches import check_divisible, first_samples

Pair = namedtuple("Pair", "pixels labels")


def rows(count, *shape):
    return torch.arange(count).reshape(-1, *[1] * len(shape)).expand(count, *shape)


def images(count):
    """One a sample, of sizes of their own, and all of three channels."""
    return [torch.full((3, 4 + i, 4), i) for i in range(count)]


def same_tree(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict | BatchEncoding):
        return a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return a == b


HOLDING_PARTS = {
    "a pair": lambda n: (rows(n, 4), rows(n)),
    "a list of two": lambda n: [rows(n, 4), rows(n)],
    "a triple": lambda n: (rows(n, 4), rows(n), rows(n)),
    "a named tuple": lambda n: Pair(rows(n, 4), rows(n)),
    "nested pairs": lambda n: ((rows(n, 4), (rows(n, 2), rows(n))), rows(n)),
    "a pair of dicts": lambda n: ({"a": rows(n, 4)}, {"b": rows(n)}),
    "with a number": lambda n: (rows(n, 4), rows(n), 0.5, None),
    "a dict": lambda n: {"pixels": rows(n, 4), "temperature": torch.tensor(2.0), "none": None},
    "an encoding": lambda n: BatchEncoding({"input_ids": rows(n, 7)}),
    "names": lambda n: {"x": rows(n, 4), "names": [str(i) for i in range(n)]},
    "an array": lambda n: {"x": rows(n, 4), "ids": rows(n, 2).numpy()},
    "layers of pairs": lambda n: {"x": rows(n), "past": ((rows(n, 2), rows(n, 2)),) * 12},
}
HOLDING_SAMPLES = {
    "images": lambda n: {"images": images(n), "labels": rows(n)},
    "boxes": lambda n: {"x": rows(n, 3, 8, 8), "labels": [{"boxes": rows(i, 4)} for i in range(n)]},
}


@pytest.mark.parametrize("size", [3, 8, 12])
@pytest.mark.parametrize("make", HOLDING_PARTS.values(), ids=HOLDING_PARTS)
def test_a_part_of_a_batch_is_that_part_of_all_that_it_holds(make, size):
    batch = make(size)
    assert same_tree(first_samples(batch, 0.5), make(max(2, round(size * 0.5))))
    assert same_tree(batch, make(size))


@pytest.mark.parametrize("size", [3, 8, 12])
@pytest.mark.parametrize("make", HOLDING_SAMPLES.values(), ids=HOLDING_SAMPLES)
def test_a_list_with_an_entry_for_each_sample_is_cut_and_its_entries_are_not(make, size):
    count = max(2, round(size * 0.5))
    batch = make(size)
    assert same_tree(
        first_samples(batch, 0.5), {key: value[:count] for key, value in batch.items()}
    )
    assert same_tree(batch, make(size))


def test_a_list_of_dictionaries_is_a_list_of_samples():
    samples = [{"x": rows(5)} for _ in range(8)]
    assert same_tree(first_samples(samples, 0.25), samples[:2])


@pytest.mark.parametrize(
    "batch",
    [
        (rows(8), rows(10)),
        {"x": rows(8), "class_weight": torch.ones(10)},
        {"x": rows(8), "names": ["a", "b"]},
        torch.tensor(3.0),
        {"text": "no tensor"},
    ],
)
def test_a_batch_whose_samples_cannot_be_told_is_refused_in_one_line(batch):
    with pytest.raises(
        ValueError, match=r"AMPConfig\.ascent_fraction=0\.5 .* Use ascent_frac"
    ) as it:
        first_samples(batch, 0.5)
    assert "\n" not in str(it.value)


def test_at_least_two_samples_are_left_and_never_more_than_there_are():
    assert len(first_samples({"x": rows(3)}, 0.01)["x"]) == 2
    assert len(first_samples({"x": rows(1)}, 0.01)["x"]) == 1


def test_a_run_whose_batches_are_a_single_row_is_refused():
    check_divisible({"x": rows(2)}, 0.5)
    with pytest.raises(ValueError, match="takes batches of two samples or more; this one has"):
        check_divisible({"input_ids": rows(1, 4096)}, 0.5)


def test_a_run_that_resumes_with_an_epochs_last_sample_goes_on(tmp_path):
    options = dict(data=digits()[:9], per_device_train_batch_size=4, max_steps=5)
    config = always(ascent_fraction=0.5)
    save = dict(save_strategy="steps", save_steps=2)
    whole = train(make(), tmp_path, config, **options, **save)
    resumed = trainer_for(make(), tmp_path, config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not differing(weights(resumed.model), weights(whole.model))
