import datasets
import numpy as np
import pytest
import torch
from images import NAMES, image_folder, parquet_folder, rows
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, Trainer, TrainingArguments

from amp_hf.images import data as image_data
from amp_hf.images.augment import AlternatingFlip, eval_transform, train_transform
from amp_hf.images.backbones import build_model, preprocessing
from amp_hf.images.data import (
    EpochCallback,
    ImageDataset,
    ImageDecodeError,
    as_is,
)
from amp_hf.job.data import find_column, load_splits, with_labels

ARCHITECTURE = "test_resnet"


def load_images(name, label_column=None):
    splits = load_splits(name)
    images = [n for n, f in splits["train"].features.items() if isinstance(f, datasets.Image)]
    image = find_column(name, splits["train"].features, "image", None, images)
    splits, label = with_labels(name, splits, label_column)
    return splits, image, label


def image_dataset(data=None, transform=None, size=24, **kwargs):
    model = build_model(ARCHITECTURE, NAMES, size, from_scratch=True)
    geometry, mean, std = preprocessing(model)
    transform = transform or eval_transform(mean, std)
    data = rows(0, 64) if data is None else data
    return ImageDataset(data, "img", "label", geometry, transform, **kwargs)


def test_training_sees_what_the_saved_image_processor_will_make_of_an_image(tmp_path):
    build_model(ARCHITECTURE, NAMES, 24, from_scratch=True).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    data = rows(0, 3)
    wide = data[0]["img"].resize((40, 17))
    expected = processor([wide.convert("RGB")])["pixel_values"][0]
    dataset = image_dataset(datasets.Dataset.from_list([{"img": wide, "label": 0}], data.features))
    torch.testing.assert_close(dataset[0]["pixel_values"], expected, atol=1e-6, rtol=0)


def test_columns_are_found_in_parquet_files_and_image_folders(tmp_path):
    splits, image, label = load_images(parquet_folder(tmp_path / "a", image="photo", label="digit"))
    assert (image, label, splits["train"].features[label].names) == ("photo", "digit", NAMES)
    splits, image, label = load_images(image_folder(tmp_path / "b"))
    assert (image, label) == ("image", "label")
    assert splits["train"].features[label].names == sorted(NAMES)
    assert len(splits["test"]) == 40


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_plain_labels_become_classes_that_agree_between_the_splits(tmp_path, kind):
    folder = parquet_folder(tmp_path, label="labels", label_type=datasets.Value(kind))
    splits, _, label = load_images(folder)
    feature = splits["train"].features[label]
    assert feature == splits["test"].features[label]
    assert feature.names == ([str(i) for i in range(10)] if kind == "int64" else sorted(NAMES))
    for split, (start, stop) in {"train": (0, 160), "test": (160, 240)}.items():
        digits = [row["label"] for row in rows(start, stop)]
        names = digits if kind == "int64" else [NAMES[digit] for digit in digits]
        assert [feature.int2str(i) for i in splits[split][label]] == [str(n) for n in names]


def test_a_plain_label_of_minus_one_is_no_class(tmp_path):
    data = {"img": rows(0, 3)["img"], "label": [0, 5, -1]}
    features = datasets.Features(img=datasets.Image(), label=datasets.Value("int64"))
    datasets.Dataset.from_dict(data, features).to_parquet(tmp_path / "train.parquet")
    splits, _, label = load_images(str(tmp_path))
    assert splits["train"].features[label].names == ["0", "5"]
    assert splits["train"][label][:] == [0, 1, None]


def test_a_missing_column_is_named_beside_those_that_exist(tmp_path):
    folder = tmp_path / "data"
    datasets.Dataset.from_dict({"text": ["a"], "stars": [1]}).to_parquet(folder / "train.parquet")
    with pytest.raises(
        ValueError,
        match=r"no image column; it has text \(.*\), stars \(int64\): none of these types",
    ):
        load_images(str(folder))
    folder = parquet_folder(tmp_path / "b", label="digit", label_type=datasets.Value("int64"))
    with pytest.raises(
        ValueError, match=r"no label column; it has img.*, digit \(int64\): .*--label_column"
    ):
        load_images(folder)
    assert load_images(folder, label_column="digit")[2] == "digit"
    with pytest.raises(ValueError, match=r"no label column 'nope'; it has img.*, digit \(int64\)"):
        load_images(folder, label_column="nope")


@pytest.mark.parametrize("name", ["uoft-cs/cifar10", "no/such/folder"])
def test_a_dataset_out_of_reach_says_how_to_go_on(name):
    with pytest.raises(ValueError, match=r"Pass --dataset a local folder.*train_digits.py"):
        load_images(name)


def test_an_image_of_16_bits_is_refused_instead_of_clipped():
    deep = Image.fromarray(np.full((12, 12), 40000, dtype=np.uint16))
    data = datasets.Dataset.from_dict({"img": [deep], "label": [0]}, rows(0, 1).features)
    with pytest.raises(ImageDecodeError, match=r"Image 0 .*: it has more than 8 bits a channel"):
        image_dataset(data)


def test_a_corrupt_image_is_named_by_its_index(tmp_path):
    data = rows(0, 20).cast_column("img", datasets.Image(decode=False))
    cells = data[:]
    cells["img"][13] = {"bytes": cells["img"][13]["bytes"][:40], "path": None}
    broken = datasets.Dataset.from_dict(cells, rows(0, 1).features)
    with pytest.raises(ImageDecodeError, match=r"^Image 13 of column 'img' cannot be decoded"):
        image_dataset(broken)


def lazily(monkeypatch):
    monkeypatch.setattr(image_data, "IN_MEMORY_BYTES", 0)


def test_images_decoded_lazily_are_those_decoded_once(monkeypatch):
    once = image_dataset()
    lazily(monkeypatch)
    assert torch.equal(
        image_dataset().__getitems__([5, 0, 63])["pixel_values"],
        once.__getitems__([5, 0, 63])["pixel_values"],
    )


def augmented(seed=0):
    return image_dataset(transform=train_transform("objects", [0.5] * 3, [0.5] * 3), seed=seed)


def test_augmentations_depend_on_seed_epoch_and_batch_and_on_nothing_else(monkeypatch):
    dataset = augmented()
    state = torch.random.get_rng_state()
    first = dataset.__getitems__([1, 2, 3])["pixel_values"]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(dataset.__getitems__([1, 2, 3])["pixel_values"], first)
    dataset.epoch = 1
    assert not torch.equal(dataset.__getitems__([1, 2, 3])["pixel_values"], first)
    assert not torch.equal(augmented(seed=1).__getitems__([1, 2, 3])["pixel_values"], first)


def test_a_dataset_that_flips_shows_each_image_as_it_is_and_mirrored_in_turn():
    plain = image_dataset(transform=nn.Identity())
    dataset = image_dataset(transform=nn.Identity(), flip=AlternatingFlip(64, seed=0))
    chosen = [5, 0, 63, 7, 8, 9]
    expected = plain.__getitems__(chosen)["pixel_values"]
    mirrored = dataset.flip.first[chosen].view(-1, 1, 1, 1)
    assert mirrored.any() and not mirrored.all()
    for epoch in range(3):
        dataset.epoch = epoch
        found = dataset.__getitems__(chosen)["pixel_values"]
        assert torch.equal(found, torch.where(mirrored, expected.flip(-1), expected))
        mirrored = ~mirrored


@pytest.mark.parametrize("lazy", [False, True])
def test_workers_give_the_batches_that_the_main_process_gives(tmp_path, monkeypatch, lazy):
    if lazy:
        lazily(monkeypatch)
    batches = []
    for workers in (0, 2):
        dataset = augmented()
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=16,
            dataloader_num_workers=workers,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            use_cpu=True,
        )
        model = build_model(ARCHITECTURE, NAMES, 24, from_scratch=True)
        trainer = Trainer(model, args, data_collator=as_is, train_dataset=dataset)
        batches.append([batch["pixel_values"] for batch in trainer.get_train_dataloader()])
    assert len(batches[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_each_epoch_has_augmentations_of_its_own_also_in_workers_that_live_on(tmp_path):
    seen = {}
    for workers in (0, 1):
        args = TrainingArguments(
            str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=64,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        model = build_model(ARCHITECTURE, NAMES, 24, from_scratch=True)
        images = seen[workers] = []
        model.register_forward_pre_hook(
            lambda model, args, kwargs, images=images: images.append(kwargs["pixel_values"]),
            with_kwargs=True,
        )
        trainer = Trainer(
            model,
            args,
            data_collator=as_is,
            train_dataset=augmented(),
            callbacks=[EpochCallback()],
        )
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    # An epoch is a batch: in another order, but the images' sums would be the same.
    sums = [images.sum((1, 2, 3)).sort().values for images in seen[0]]
    assert len(sums) == 3
    assert not torch.allclose(sums[0], sums[1]) and not torch.allclose(sums[1], sums[2])


def test_grey_and_transparent_images_come_as_three_channels():
    data = [
        {"img": Image.new("L", (20, 20), 100), "label": 0},
        {"img": Image.new("RGBA", (30, 10), (100, 100, 100, 255)), "label": 1},
    ]
    dataset = image_dataset(datasets.Dataset.from_list(data, rows(0, 1).features))
    pixels = dataset.__getitems__([0, 1])["pixel_values"]
    assert pixels.shape == (2, 3, 24, 24)
    torch.testing.assert_close(pixels[0], pixels[1])
