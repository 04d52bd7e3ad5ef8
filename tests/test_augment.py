import pytest
import torch
from torch import nn

from amp_hf.images.augment import (
    AlternatingFlip,
    Cutout,
    RandomAffine,
    RandomBlur,
    RandomCrop,
    RandomExposure,
    RandomHorizontalFlip,
    RandomLight,
    RandomMirror,
    RandomShadow,
    eval_transform,
    train_transform,
)


def numbered(count=64, size=8):
    """Images in which every pixel is another number, so that a place can be told from its value."""
    pixels = torch.arange(3 * size * size, dtype=torch.uint8).view(1, 3, size, size)
    return pixels.expand(count, -1, -1, -1).contiguous()


@pytest.mark.parametrize("fill", [255, None])
def test_every_crop_is_a_window_of_its_own_image_at_a_place_of_its_own(fill):
    torch.manual_seed(0)
    images = numbered()
    images[1] = 7
    crops = RandomCrop(2, fill)(images)
    if fill is None:
        padded = nn.functional.pad(images.float(), (2,) * 4, mode="reflect").to(images.dtype)
    else:
        padded = nn.functional.pad(images, (2,) * 4, value=fill)
    places = []
    for image, crop in zip(padded, crops):
        windows = image.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)  # (5, 5, 3, 8, 8)
        matches = (windows == crop).flatten(2).all(-1).nonzero()
        assert len(matches) >= 1
        places.append(tuple(matches[0].tolist()))
    assert len(set(places)) > 15


def test_about_half_of_the_images_are_mirrored_and_the_others_untouched():
    torch.manual_seed(0)
    images = numbered(1000)
    flipped = RandomHorizontalFlip()(images)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 430 < mirrored.sum() < 570


def test_two_epochs_hold_both_views_of_every_image_half_of_them_mirrored_in_each():
    images, chosen = numbered(1000), list(range(1000, 0, -1))
    flip = AlternatingFlip(2000, seed=0)
    mirrored = []
    for epoch in range(3):
        flipped = flip(images, chosen, epoch)
        mirrored.append((flipped == images.flip(-1)).flatten(1).all(1))
        assert ((flipped == images).flatten(1).all(1) ^ mirrored[-1]).all()
    assert torch.equal(mirrored[0], ~mirrored[1]) and torch.equal(mirrored[0], mirrored[2])
    assert 430 < mirrored[0].sum() < 570
    assert torch.equal(flip(images[3:5], chosen[3:5], 1), flip(images, chosen, 1)[3:5])
    assert not torch.equal(AlternatingFlip(2000, seed=1).first, flip.first)


def test_a_mirror_image_gets_its_own_class_and_other_classes_are_left_alone():
    torch.manual_seed(0)
    images, labels = numbered(1000), torch.arange(1000) % 5
    mirror = RandomMirror({0: 0, 2: 3, 3: 2})
    turned, classes = mirror(images, labels)
    mirrored = (turned == images.flip(-1)).flatten(1).all(1)
    assert ((turned == images).flatten(1).all(1) ^ mirrored).all()
    assert not mirrored[(labels == 1) | (labels == 4)].any()
    for one, other in {0: 0, 2: 3, 3: 2}.items():
        assert 70 < mirrored[labels == one].sum() < 130
        assert (classes[mirrored & (labels == one)] == other).all()
    assert torch.equal(classes[~mirrored], labels[~mirrored])


def test_cutout_zeroes_one_square_of_the_size_asked_for_inside_of_the_image():
    torch.manual_seed(0)
    images = torch.ones(500, 3, 32, 32)
    holes = (Cutout(16)(images) == 0).all(1)
    assert holes.sum((1, 2)).max() == 16 * 16
    assert 8 * 8 <= holes.sum((1, 2)).min() < 16 * 16  # cut off at the border
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(rows * columns, holes.sum((1, 2)))  # a rectangle


def test_affine_of_nothing_is_the_identity_and_shifts_stay_within_bounds():
    images = torch.rand(8, 3, 16, 16)
    same = RandomAffine(degrees=0, translate=0, scale=0)(images)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)

    torch.manual_seed(0)
    dot = torch.zeros(500, 1, 21, 21)
    dot[:, :, 10, 10] = 1
    moved = RandomAffine(degrees=0, translate=0.1, scale=0)(dot)
    weight = moved / moved.sum((2, 3), keepdim=True)
    offset = (weight.sum(2) * torch.arange(21)).sum(-1) - 10
    assert offset.abs().max() <= 2.1 + 1e-3
    assert offset.max() > 1.8 and offset.min() < -1.8


def test_a_shear_shifts_each_row_by_its_distance_from_the_middle():
    torch.manual_seed(0)
    line = torch.zeros(200, 1, 41, 41)
    line[..., 20] = 1
    sheared = RandomAffine(degrees=0, translate=0, scale=0, shear=0.2)(line)[:, 0]
    offset = (sheared / sheared.sum(-1, keepdim=True) * torch.arange(41)).sum(-1) - 20
    slope = offset[:, 30] / 10
    assert 0.18 < slope.max() <= 0.2 + 1e-3 and -0.2 - 1e-3 <= slope.min() < -0.18
    rows = torch.arange(10, 31) - 20
    torch.testing.assert_close(offset[:, 10:31], slope[:, None] * rows, atol=0.05, rtol=0)


def test_blur_lies_between_the_image_and_its_blurred_copy():
    torch.manual_seed(0)
    images = torch.rand(200, 3, 16, 16)
    blur = RandomBlur(1.0)
    way, full = blur(images) - images, blur.blur(images) - images
    share = (way * full).sum((1, 2, 3)) / full.square().sum((1, 2, 3))
    torch.testing.assert_close(way, share.view(-1, 1, 1, 1) * full, atol=1e-5, rtol=0)
    assert 0 <= share.min() < 0.05 and 0.95 < share.max() <= 1


def test_light_stays_in_range_and_differs_from_image_to_image():
    torch.manual_seed(0)
    images = torch.full((200, 3, 4, 4), 0.5)
    lit = RandomLight(0.4)(images)
    assert lit.min() >= 0.3 - 1e-6 and lit.max() <= 0.7 + 1e-6
    assert len(lit[:, 0, 0, 0].unique()) > 190


def test_exposure_doubles_or_halves_the_light_at_most_and_clips():
    torch.manual_seed(0)
    images = torch.tensor([0.3, 0.8]).view(1, 1, 1, 2).expand(500, 3, 1, 2)
    dark, bright = RandomExposure(1.0)(images)[:, 0, 0].T
    stops = (dark / 0.3).log2()
    assert -1 <= stops.min() < -0.95 and 0.95 < stops.max() <= 1
    torch.testing.assert_close(bright, (0.8 * 2**stops).clamp(max=1))


def test_a_shadow_lies_on_one_side_of_a_line_in_half_of_the_images():
    torch.manual_seed(0)
    light = RandomShadow(0.8)(torch.ones(1000, 3, 32, 32))
    assert torch.equal(light[:, 0], light[:, 2])
    least = light.amin((1, 2, 3))
    assert 430 < (least == 1).sum() < 570
    assert 0.2 <= least.min() < 0.25 and light.max() <= 1
    # From its darkest pixel to its brightest one, the light never falls: one edge alone.
    for image in light[least < 0.9, 0][:50]:
        rows, columns = image.diff(dim=0), image.diff(dim=1)
        assert (rows >= -1e-6).all() or (rows <= 1e-6).all()
        assert (columns >= -1e-6).all() or (columns <= 1e-6).all()


@pytest.mark.parametrize("kind", ["objects", "light_objects", "signs", "strong_signs", "none"])
def test_every_kind_gives_float_images_of_the_same_shape(kind):
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    transform = train_transform(kind, [0.5] * 3, [0.25] * 3, cutout=8, auto_augment=True)
    out = transform(images)
    assert out.shape == images.shape and out.dtype == torch.float32
    assert out.isfinite().all()


def test_signs_are_never_mirrored():
    # A sign that points right, as a bright half: after any augmentation its right half is brighter.
    torch.manual_seed(0)
    images = torch.zeros(500, 3, 32, 32, dtype=torch.uint8)
    images[..., 16:] = 255
    for kind in ("signs", "strong_signs"):
        out = train_transform(kind, [0.0] * 3, [1.0] * 3)(images)
        assert (out[..., 24:].mean((1, 2, 3)) > out[..., :8].mean((1, 2, 3))).all()


def test_evaluation_only_scales_and_normalizes():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    out = eval_transform([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])(images)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(out, expected)
