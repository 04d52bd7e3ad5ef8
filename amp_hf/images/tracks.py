"""Which photographs show the same thing: a validation split that divides them flatters."""

from __future__ import annotations

import numpy as np


def find_tracks(images: np.ndarray, labels: np.ndarray, length: int) -> np.ndarray:
    """The number of the track that each image belongs to, (n,).

    The frames of a video have the same light, colours and background. So the images of each class
    are divided, with Ward's method, into as many clusters as the class has tracks, but at least
    two.

    Args:
        images: thumbnails, (n, ...).
        labels: (n,).
        length: how many images a track has, on average.
    """
    from sklearn.cluster import AgglomerativeClustering

    tracks = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        count = min(len(members), max(2, round(len(members) / length)))
        tracks[members] = tracks.max() + 1
        if count > 1:
            clusters = AgglomerativeClustering(count).fit_predict(
                images[members].reshape(len(members), -1)
            )
            tracks[members] += clusters
    return tracks
