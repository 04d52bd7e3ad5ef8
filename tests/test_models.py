"""The networks for small images: as published, and as timm's other models are used."""

import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from images import NAMES, rows

from amp_hf.images import models
from amp_hf.images.backbones import build_model, preprocessing

# Of the same kinds, small enough for a test.
SMALL = {
    "preactresnet18": dict(channels=[8, 8, 16, 16], stem_chs=8),
    "vgg16_small": dict(cfg=[8, "M", 16, "M"]),
    "wide_resnet28_10": dict(layers=[1, 1, 1], channels=[8, 16, 24]),
    "pyramidnet164_a270": dict(depth=11, alpha=9),
    "resnet18_small": dict(layers=[1, 1, 1, 1], channels=[8, 8, 16, 16]),
    "resnet50_small": dict(layers=[1, 1, 1, 1], channels=[8, 8, 16, 16]),
    "preactresnet10_signs": dict(channels=[8, 8, 16, 16]),
    "convnet7_objects": dict(channels=[8, 8, 16]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "side"),
    [
        ("preactresnet18", 11_172_170, 4),
        ("wide_resnet28_10", 36_479_194, 8),
        ("pyramidnet164_a270", 27_216_021, 8),
        ("vgg16_small", 33_646_666, 1),
        ("resnet18_small", 11_173_962, 4),
        ("resnet34_small", 21_282_122, 4),
        ("resnet50_small", 23_520_842, 4),
        ("resnet101_small", 42_512_970, 4),
        ("preactresnet10_signs", 1_234_824, 2),
        ("convnet7_objects", 1_972_490, 3),
    ],
)
def test_a_network_is_of_the_published_size(name, parameters, side):
    model = timm.create_model(name, num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with torch.no_grad():
        features = model.eval().forward_features(torch.zeros(1, 3, 32, 32))
    assert features.shape == (1, model.num_features, side, side)
    last = model.feature_info[-1]
    assert (last["num_chs"], _size(name) // last["reduction"]) == (model.num_features, side)
    assert model.forward_head(features).shape == (1, 10)
    assert set(models.NAMES) <= set(timm.list_models())


def test_a_preactivation_resnet_is_the_published_one():
    """Against the paper's equations, written down plainly."""
    model = timm.create_model("preactresnet18", num_classes=10, **SMALL["preactresnet18"]).eval()
    state = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn_like(value).abs() * 0.3 + 0.1)
        state[name] = value

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, var, weight, bias))

    images = torch.randn(2, 3, 32, 32)
    x = F.conv2d(images, state["stem.conv.weight"], padding=1)
    for stage in range(4):
        for block in range(2):
            name, stride = f"stages.{stage}.blocks.{block}", 2 if stage and not block else 1
            y = norm(x, f"{name}.norm1")
            shortcut = x
            if f"{name}.downsample.conv.weight" in state:
                shortcut = F.conv2d(y, state[f"{name}.downsample.conv.weight"], stride=stride)
            y = F.conv2d(y, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(norm(y, f"{name}.norm2"), state[f"{name}.conv2.weight"], padding=1)
            x = y + shortcut
    x = norm(x, "norm").mean((2, 3))
    expected = x @ state["head.fc.weight"][:, :, 0, 0].T + state["head.fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected)


def test_a_network_for_signs_sees_no_difference_in_light():
    model = timm.create_model("preactresnet10_signs", **SMALL["preactresnet10_signs"]).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(0.2 * images - 0.3), model(images), rtol=1e-3, atol=1e-3)


def test_a_pyramid_pools_its_shortcut_and_pads_it_with_zeros():
    block = models.PyramidBottleneck(6, 3, stride=2)
    torch.nn.init.zeros_(block.norm4.weight)
    x = torch.randn(2, 6, 5, 5)
    out = block(x)
    assert out.shape == (2, 12, 3, 3)
    torch.testing.assert_close(out[:, :6], F.avg_pool2d(x, 2, ceil_mode=True))
    assert torch.equal(out[:, 6:], torch.zeros(2, 6, 3, 3))


def test_a_pyramid_grows_by_the_same_at_every_block():
    model = timm.create_model("pyramidnet164_a270")
    widths = [block.conv1.out_channels for stage in model.stages for block in stage]
    assert widths == list(range(21, 287, 5))
    assert [block.conv2.stride[0] for stage in model.stages for block in stage].count(2) == 2


def test_activation_checkpointing_changes_no_gradient():
    images = torch.randn(4, 3, 16, 16)
    for name in ("pyramidnet164_a270", "convnet7_objects", "preactresnet18"):
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = timm.create_model(name, **SMALL[name])
            model.set_grad_checkpointing(checkpointing)
            model(images).square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for plain, checkpointed in zip(*gradients):
            torch.testing.assert_close(plain, checkpointed)


RELOAD = """
import sys
sys.modules["amp_hf"] = None  # as if it were not installed
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
image, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    inputs = AutoImageProcessor.from_pretrained(folder)(Image.open(image).convert("RGB"))
    torch.save(model(**inputs).logits.detach(), folder + "/logits.pt")
    predict = pipeline("image-classification", model=folder, trust_remote_code=True)
    print(predict(image, top_k=1)[0]["label"] == model.config.id2label[
        int(model(**inputs).logits.argmax())])
"""


@pytest.mark.slow
def test_saved_models_predict_the_same_without_amp_hf_by_the_code_beside_them(tmp_path):
    image = rows(0, 1)[0]["img"]
    image.save(tmp_path / "digit.png")
    expected = {}
    for name, model_args in SMALL.items():
        model = build_model(name, NAMES, 32, from_scratch=True, model_args=model_args)
        folder = str(tmp_path / name)
        model.save_pretrained(folder)
        again = build_model(folder, NAMES, 32)  # as --model FOLDER does, and saved once more
        again.save_pretrained(folder)
        assert type(again) is models.TimmWrapperForImageClassification
        geometry, mean, std = preprocessing(model)
        pixels = torch.tensor(list(geometry(image.convert("RGB")).getdata())).float() / 255
        pixels = (pixels - torch.tensor(mean)) / torch.tensor(std)
        with torch.no_grad():
            expected[folder] = model.eval()(pixels.reshape(1, 32, 32, 3).permute(0, 3, 1, 2)).logits
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "digit.png"), *expected]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["True"] * len(SMALL), done.stderr
    for folder, logits in expected.items():
        torch.testing.assert_close(torch.load(f"{folder}/logits.pt"), logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.NAMES)
def test_a_network_gives_features_and_takes_a_device_and_a_type(name):
    own = {} if name == "vgg16_small" else SMALL.get(name, {})  # of so many features
    features = timm.create_model(name, features_only=True, dtype=torch.float64, **own).eval()
    maps = features(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    shapes = [(chs, _size(name) // by) for chs, by in zip(*map(features.feature_info.get, _INFO))]
    assert [(len(m[0]), m.shape[-1]) for m in maps] == shapes
    assert len(maps) >= 3 and {m.dtype for m in maps} == {torch.float64}
    assert all(p.is_meta for p in timm.create_model(name, device="meta", **own).parameters())


_INFO = ("num_chs", "reduction")


def _size(name):
    """Of an image of 32 pixels, after the stem."""
    return 31 if name == "convnet7_objects" else 32


def test_a_network_for_objects_begins_with_an_invertible_view_of_2x2_pixels():
    stem = timm.create_model("convnet7_objects", **SMALL["convnet7_objects"]).stem
    basis = stem.basis.flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(12))
    torch.testing.assert_close(basis[0], torch.full((12,), 12**-0.5))  # the mean of all
    assert not list(stem.parameters())
    images = 0.2 + 0.1 * torch.randn(64, 3, 32, 32).cumsum(2)
    found = stem(images)
    assert found.shape == (64, 24, 31, 31)
    contrasts = F.conv2d(images, stem.basis)
    contrasts = (contrasts - contrasts.mean((0, 2, 3), True)) / contrasts.std(
        (0, 2, 3), keepdim=True
    )
    expected = F.gelu(torch.cat([contrasts, -contrasts], 1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_without_classes_a_network_for_objects_gives_its_features():
    model = timm.create_model(
        "convnet7_objects", num_classes=10, **SMALL["convnet7_objects"]
    ).eval()
    features = model.forward_features(torch.rand(2, 3, 32, 32))
    expected = model.forward_head(features, pre_logits=True)
    logits = model.head.fc(expected) / 9
    torch.testing.assert_close(model.forward_head(features), logits)
    model.reset_classifier(0)
    assert torch.equal(model.forward_head(features), expected)


def test_a_depth_that_no_pyramid_has_is_refused():
    with pytest.raises(ValueError, match=r"depth must be 9n \+ 2, got 12\."):
        timm.create_model("pyramidnet164_a270", depth=12)


def test_a_sharded_model_is_saved_with_the_file_of_its_own_class(tmp_path):
    """FSDP2 gives a model a class of its own."""
    model = build_model("resnet18_small", NAMES, 32, True, SMALL["resnet18_small"])
    model.__class__ = type("FSDPModel", (type(model),), {"__module__": "torch.nn"})
    model.save_pretrained(tmp_path)
    assert type(model).__name__ == "FSDPModel"
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "models.py",
    }
    assert build_model(str(tmp_path), NAMES, 32)


def test_the_networks_have_no_pretrained_weights():
    with pytest.raises(ValueError, match=r"could not be loaded .*--from_scratch"):
        build_model("preactresnet18", NAMES, 32)
