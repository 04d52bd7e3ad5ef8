import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from support import ConvNet, differing, digit_batches, make, quadratic_surface, weights

from amp_hf.flatness import LossSurface
from amp_hf.pictures import (
    draw_loss_contours,
    draw_loss_curves,
    draw_reliability,
    loss_contours,
    loss_curves,
    reliability,
    save,
)


def surfaces():
    return {
        name: LossSurface(make(ConvNet, seed), digit_batches(16, 16), progress=False)
        for name, seed in (("ERM", 0), ("AMP", 1))
    }


def test_loss_curves_of_a_bowl_are_parabolas():
    bowl = {"bowl": quadratic_surface([2.0] * 6)}  # its filters have the norms 5 and 3
    numbers = loss_curves(bowl, radius=0.5, scale=0.2, points=5, directions=2)
    assert numbers["distances"] == [-0.2, -0.1, 0, 0.1, 0.2]
    for curve in numbers["models"]["bowl"]["random"]:
        assert curve == pytest.approx([1.36, 0.34, 0, 0.34, 1.36])
    assert numbers["worst_distances"] == [-1, -0.5, 0, 0.5, 1]
    assert numbers["models"]["bowl"]["worst"] == pytest.approx([1, 0.25, 0, 0.25, 1])


def test_loss_contours_hold_the_loss_over_the_plane():
    numbers = loss_contours({"bowl": quadratic_surface([2.0] * 6)}, scale=0.2, points=3)
    plane = np.array(numbers["models"]["bowl"])
    assert plane[1] == pytest.approx([1.36, 0, 1.36])  # along the first direction
    assert plane[:, 1] == pytest.approx([1.36, 0, 1.36])
    # |d₁ ± d₂|² = 2·34 ± 2·d₁·d₂, so the corners' mean tells nothing of their angle.
    assert plane[[0, 0, 2, 2], [0, 2, 0, 2]].mean() == pytest.approx(2.72)


def test_the_contours_rows_are_the_second_direction():
    surface = quadratic_surface([3.0, 1.0, 0.5, 0.2, 0.0, 0.0])
    numbers = loss_contours({"bowl": surface}, scale=0.2, points=3)
    along_first = surface.along(surface.random_direction(), [-0.2, 0.0, 0.2])
    assert numbers["models"]["bowl"][1] == pytest.approx(along_first)
    assert [row[1] for row in numbers["models"]["bowl"]] != pytest.approx(along_first)


def test_a_reliability_diagram_holds_confidence_and_accuracy_by_bin():
    # Two samples that are half sure and half right, two that are sure and right.
    logits = torch.tensor([[0.2, 0.0], [0.0, 0.2], [5.0, 0.0], [0.0, 5.0]]).double()
    labels = torch.tensor([0, 0, 0, 1])
    found = reliability({"model": (logits, labels)}, n_bins=4)["models"]["model"]
    low, high = logits[0].softmax(0)[0].item(), logits[2].softmax(0)[0].item()
    assert found["share"] == [0, 0, 0.5, 0.5]
    assert found["confidence"] == pytest.approx([low, high])
    assert found["accuracy"] == [0.5, 1.0]
    assert found["ece"] == pytest.approx((low - 0.5 + 1 - high) / 2)


@pytest.mark.slow
def test_pictures_are_saved_with_their_numbers_and_leave_the_models_alone(tmp_path):
    models = surfaces()
    before = {name: weights(surface.model) for name, surface in models.items()}
    logits = torch.randn(50, 10)
    predictions = {name: (logits, torch.arange(50) % 10) for name in models}
    drawn = {
        "curves": (draw_loss_curves, loss_curves(models, points=3, directions=2)),
        "contours": (draw_loss_contours, loss_contours(models, points=3)),
        "reliability": (draw_reliability, reliability(predictions)),
    }
    for name, (draw, numbers) in drawn.items():
        path = save(draw(numbers), numbers, tmp_path / "new" / name)
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        read = json.loads(path.with_suffix(".json").read_text())
        assert read == numbers and list(read["models"]) == ["ERM", "AMP"]
    for name, surface in models.items():
        assert differing(before[name], weights(surface.model)) == []


def test_a_name_with_a_dot_is_kept_whole(tmp_path):
    for name in ("eps0.1", "eps0.2.png"):
        save(Figure(), {}, tmp_path / name)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"eps0.1.png", "eps0.1.json", "eps0.2.png", "eps0.2.json"}


def test_what_is_not_a_number_is_null_in_the_json(tmp_path):
    numbers = {"distances": [0.0, 1.0], "models": {"a": [[0.0, np.nan], [1.0, np.inf]]}}
    path = save(draw_loss_contours(numbers), numbers, tmp_path / "x.png")
    read = json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert read["models"]["a"] == [[0.0, None], [1.0, None]]


@pytest.mark.parametrize("lowest", [0.0, -0.5, 0.3, np.inf, np.nan])
@pytest.mark.parametrize("highest", [0.3, 1.0, np.nan])
def test_contours_of_any_losses_can_be_drawn(lowest, highest):
    models = {"a": [[lowest, 0.3], [0.3, highest]], "b": [[highest] * 2] * 2}
    numbers = {"distances": [0.0, 1.0], "models": models}
    figure = draw_loss_contours(numbers)
    figure.canvas.draw()
    assert [axis.get_title() for axis in figure.axes[:2]] == ["a", "b"]
