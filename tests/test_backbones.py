import subprocess
import sys

import pytest
import timm
import torch
from images import NAMES, rows

from amp_hf.images.augment import eval_transform
from amp_hf.images.backbones import build_model, preprocessing
from amp_hf.images.data import ImageDataset

ARCHITECTURE = "test_resnet"


def test_a_model_from_scratch_has_the_initial_values_of_timm():
    torch.manual_seed(3)
    expected = timm.create_model("resnet18", num_classes=10).state_dict()
    torch.manual_seed(3)
    model = build_model("resnet18", NAMES, 32, from_scratch=True)
    state = model.timm_model.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], state[name])] == []


RELOAD = """
import sys
sys.modules["amp_hf"] = None  # as if it were not installed
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
image, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForImageClassification.from_pretrained(folder)
    inputs = AutoImageProcessor.from_pretrained(folder)(Image.open(image).convert("RGB"))
    torch.save(model(**inputs).logits.detach(), folder + "/logits.pt")
    best = pipeline("image-classification", model=folder)(image, top_k=1)[0]["label"]
    print(best == model.config.id2label[int(model(**inputs).logits.argmax())], best)
"""


@pytest.mark.slow
def test_saved_models_predict_the_same_in_a_process_without_amp_hf(tmp_path):
    data = rows(0, 1)
    data[0]["img"].save(tmp_path / "digit.png")
    expected = {}
    for architecture, model_args in [(ARCHITECTURE, None), ("test_vit", {"patch_size": 8})]:
        model = build_model(architecture, NAMES, 32, from_scratch=True, model_args=model_args)
        folder = tmp_path / architecture
        model.to(memory_format=torch.channels_last).save_pretrained(folder)
        geometry, *normalization = preprocessing(model)
        dataset = ImageDataset(data, "img", "label", geometry, eval_transform(*normalization))
        with torch.no_grad():
            expected[folder] = model.eval()(dataset[0]["pixel_values"][None]).logits
    command = [sys.executable, "-c", RELOAD, tmp_path / "digit.png", *expected]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == len(expected), done.stderr
    for (folder, logits), line in zip(expected.items(), done.stdout.splitlines()):
        assert line.split() == ["True", NAMES[int(logits.argmax())]]
        torch.testing.assert_close(torch.load(folder / "logits.pt"), logits)


def test_an_unknown_model_suggests_near_names():
    with pytest.raises(ValueError, match=r"'resnet8' is neither.*did you mean .*resnet18"):
        build_model("resnet8", NAMES, 32, from_scratch=True)


def test_pretrained_weights_out_of_reach_say_how_to_go_on():
    with pytest.raises(ValueError, match="Pass --from_scratch"):
        build_model("resnet18", NAMES, 32)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "inception_v3"])
def test_images_too_small_for_the_backbone_are_refused(architecture):
    with pytest.raises(ValueError, match=r"does not work on images of 9x9 pixels.*--image_size"):
        build_model(architecture, NAMES, 9, from_scratch=True)


def test_a_saved_model_with_another_head_is_refused_and_one_that_fits_is_loaded(tmp_path):
    model = build_model(ARCHITECTURE, NAMES, 24, from_scratch=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifies 10 labels.*the dataset has 3 \(a, b, c"):
        build_model(str(tmp_path), ["a", "b", "c"], 24)
    with pytest.raises(ValueError, match=r"^--from_scratch is for a new model.*leave"):
        build_model(str(tmp_path), NAMES, 24, from_scratch=True)
    for size, expected in ((None, 24), (32, 32)):
        config = build_model(str(tmp_path), NAMES, size).config
        assert config.pretrained_cfg["input_size"] == [3, expected, expected]
    model.config.pretrained_cfg.pop("input_size")
    model.config.save_pretrained(tmp_path)
    config = build_model(str(tmp_path), NAMES, None).config
    assert config.pretrained_cfg["input_size"] == [3, 128, 128]
    state = build_model(str(tmp_path), NAMES, 24).state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
