"""Which photographs show the same thing: a validation split that divides them flatters."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 8  # pixels of a thumbnail; enough for the light, the colours and the background
LARGEST = 30_000  # images of a class: their distances take 3.6 GB


def thumbnail(image: Image.Image) -> Image.Image:
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def find_tracks(thumbnails: np.ndarray, labels: np.ndarray, length: int) -> np.ndarray:
    """The number of the track that each image belongs to, (n,).

    The frames of a video have the same light, colours and background. So the images of each class
    are divided, with Ward's method, into as many clusters as the class has tracks, but at least
    two.

    Args:
        thumbnails: of the images, (n, ...).
        labels: (n,).
        length: how many images a track has, on average.

    Raises:
        ValueError: a class has too many images to compare every two of them.
    """
    from sklearn.cluster import AgglomerativeClustering

    tracks = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        if len(members) > LARGEST:
            raise ValueError(
                f"--track_length compares every two images of a class, up to {LARGEST:,} of them, "
                f"and class {label} has {len(members):,}: pass --track_length 1."
            )
        tracks[members] = tracks.max() + 1
        if len(members) > 1:
            clusters = AgglomerativeClustering(max(2, round(len(members) / length)))
            images = thumbnails[members].reshape(len(members), -1)
            tracks[members] += clusters.fit_predict(images)
    return tracks
