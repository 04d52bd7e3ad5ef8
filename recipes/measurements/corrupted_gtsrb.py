"""Writes a copy of GTSRB with seven corrupted test splits, named as those of the Hub's copy.

    pip install imagecorruptions 'setuptools<81'
    python recipes/measurements/corrupted_gtsrb.py --dataset path/to/gtsrb --output path/to/copy

The functions are ImageNet-C's (Hendrycks and Dietterich, arXiv 1903.12261), as the package
imagecorruptions has them. The Hub's splits are not made by this script, and differ.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import zlib
from pathlib import Path

import datasets
import numpy as np
from plan import CORRUPTIONS, GTSRB

from amp_hf.job.data import load_splits

SMALLEST = 32  # pixels
SEVERITY = 3  # of 5


def corrupted(rows: datasets.Dataset, name: str) -> datasets.Dataset:
    """`rows` with each image corrupted; the same for the same image and name."""
    from imagecorruptions import corrupt

    def one(row: dict, number: int) -> dict:
        np.random.seed(zlib.crc32(f"{name} {number}".encode()))  # imagecorruptions takes no seed
        pixels = np.array(row["image"].convert("RGB"))
        return {"image": corrupt(pixels, severity=SEVERITY, corruption_name=name)}

    return rows.map(
        one, with_indices=True, features=rows.features, num_proc=os.cpu_count(), desc=name
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default=GTSRB, help="a Hub id or a folder")
    parser.add_argument("--output", required=True, help="a folder, which is created")
    options = parser.parse_args()
    if importlib.util.find_spec("imagecorruptions") is None:
        sys.exit(
            "corrupted_gtsrb.py: error: a package is missing. Run: pip install imagecorruptions "
            "'setuptools<81'"
        )
    folder = Path(options.output, "data")  # where datasets looks for splits of any name
    if folder.exists():
        sys.exit(f"corrupted_gtsrb.py: error: --output: {folder} exists. Name a new folder.")
    try:
        splits = load_splits(options.dataset)
    except ValueError as error:
        sys.exit(f"corrupted_gtsrb.py: error: {error}")
    if not {"train", "test"} <= splits.keys() or "image" not in splits["test"].features:
        sys.exit(
            f"corrupted_gtsrb.py: error: --dataset {options.dataset} must have splits train and "
            "test with a column 'image', as the Hub's GTSRB has."
        )
    if any(min(image.size) < SMALLEST for image in splits["test"]["image"]):
        sys.exit(
            f"corrupted_gtsrb.py: error: --dataset {options.dataset} has images of less than "
            f"{SMALLEST} pixels a side, which imagecorruptions does not take. Resize them first."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        part = Path(temporary, "data")  # nobody takes a half of it for the whole
        part.mkdir()
        for name in ("train", "test"):
            splits[name].to_parquet(part / f"{name}-00000-of-00001.parquet")
        for name in CORRUPTIONS:
            rows = corrupted(splits["test"], name)
            rows.to_parquet(part / f"{name}-00000-of-00001.parquet")
        part.rename(folder)
    print(f"Saved {options.output}: train, test, {', '.join(CORRUPTIONS)}")


if __name__ == "__main__":
    main()
