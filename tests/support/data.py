"""Real digits, as images and as tokens."""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn


@functools.cache
def digits(dtype=torch.float32):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=dtype).reshape(-1, 1, 8, 8)
    return [{"pixels": x, "labels": y} for x, y in zip(images, torch.tensor(labels))]


@functools.cache
def strokes():
    """The inked pixels of each digit in reading order, as tokens: sequences of many lengths."""
    pixels = [(sample["pixels"] * 16).long().flatten() for sample in digits()]
    return [{"input_ids": tokens[tokens > 0]} for tokens in pixels]


def padded(samples):
    tokens = [sample["input_ids"] for sample in samples]
    pad = functools.partial(nn.utils.rnn.pad_sequence, tokens, batch_first=True)
    labels = pad(padding_value=-100)
    return {"input_ids": pad(), "attention_mask": (labels != -100).long(), "labels": labels}


def digit_batches(count, size):
    samples = digits()[:count]
    return [
        {key: torch.stack([s[key] for s in samples[i : i + size]]) for key in samples[0]}
        for i in range(0, count, size)
    ]


class Recorder:
    """A collator that keeps the batches in the order in which the Trainer asks for them."""

    def __init__(self):
        self.batches = []

    def __call__(self, samples):
        batch = {key: torch.stack([s[key] for s in samples]) for key in samples[0]}
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch
