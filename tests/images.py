"""Datasets of real digits as image files, in the forms that users have them in."""

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def rows(start, stop, image="img", label="label", label_type=None):
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels[start:stop].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(p).resize((12, 12)) for p in pixels]
    feature = label_type or datasets.ClassLabel(names=NAMES)
    values = labels[start:stop].tolist()
    if label_type is not None and label_type.dtype == "string":
        values = [NAMES[value] for value in values]
    return datasets.Dataset.from_dict(
        {image: images, label: values}, datasets.Features({image: datasets.Image(), label: feature})
    )


def parquet_folder(folder, train=160, test=80, **kwargs):
    """A local copy of a Hub dataset: data/train-….parquet and data/test-….parquet."""
    (folder / "data").mkdir(parents=True)
    rows(0, train, **kwargs).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    rows(train, train + test, **kwargs).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return str(folder)


def image_folder(folder, per_split=40):
    for split, start in (("train", 0), ("test", per_split)):
        for i, row in enumerate(rows(start, start + per_split)):
            path = folder / split / NAMES[row["label"]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["img"].save(path)
    return str(folder)
