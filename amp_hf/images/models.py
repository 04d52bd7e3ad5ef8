# SPDX-License-Identifier: MIT
"""Networks for small images, registered with timm: the AMP paper's, ResNets, and our own two.

    import amp_hf.images.models, timm

    timm.create_model("preactresnet18", num_classes=10)

They are built from timm's own networks and layers, but timm alone cannot build them. So this file
is saved and pushed beside the weights, and imports nothing else of amp_hf. Numbers of parameters
are for 10 classes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from timm.layers import BatchNormAct2d, ClassifierHead, create_conv2d
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    is_model,
    register_model,
)
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.vgg import VGG, ConvMlp, cfgs
from torch import Tensor, nn

NAMES = (
    "preactresnet18",
    "vgg16_small",
    "wide_resnet28_10",
    "pyramidnet164_a270",
    "resnet18_small",
    "resnet34_small",
    "resnet50_small",
    "resnet101_small",
    "preactresnet10_signs",
    "convnet7_objects",
)

_CFG = dict(input_size=(3, 32, 32), interpolation="bicubic", crop_pct=1.0, license="mit")
default_cfgs = generate_default_cfgs({name: _CFG for name in NAMES})


class TimmWrapperForImageClassification(transformers.TimmWrapperForImageClassification):
    """transformers' class of this name, for the networks in `NAMES`: saves this file with them.

    Without amp_hf, `AutoModelForImageClassification.from_pretrained(…, trust_remote_code=True)` and
    `pipeline(…, trust_remote_code=True)` load what it saves. It keeps its parent's name because
    transformers chooses a model's loss, its task on the Hub and its pipelines by that name.
    """

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        # transformers saves the file that defines the class, and FSDP2 replaces the class.
        sharded = self.__class__
        self.__class__ = TimmWrapperForImageClassification
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = sharded


TimmWrapperForImageClassification.register_for_auto_class("AutoModelForImageClassification")


class PreActResNet(ResNetV2):
    """Pre-activation ResNet of basic blocks for small images (He et al., arXiv 1603.05027).

    timm's ResNetV2 with BatchNorm and a stem that keeps the size: one 3x3 convolution.
    """

    def __init__(self, layers: list[int], channels: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(
            layers,
            channels,
            basic=True,
            bottle_ratio=1.0,
            norm_layer=BatchNormAct2d,
            conv_layer=create_conv2d,
            **kwargs,
        )
        width = self.feature_info[0]["num_chs"]
        self.stem = nn.Sequential()
        self.stem.add_module(
            "conv", create_conv2d(self.in_chans, width, 3, **_factory_kwargs(kwargs))
        )
        self.init_weights(zero_init_last=False)
        _keep_size(self)


class SignResNet(PreActResNet):
    """A `PreActResNet` for photographs in any light, such as signs cut out of pictures of a street.

    Each image is standardized over its pixels and channels, so that dark and pale ones look alike.
    A stem of two 3x3 convolutions halves the size once.
    """

    def __init__(self, layers: list[int], channels: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(layers, channels, stem_chs=channels[0], **kwargs)
        factory = _factory_kwargs(kwargs)
        width = 3 * channels[0] // 4
        self.stem = nn.Sequential(
            OrderedDict(
                standardize=nn.GroupNorm(1, self.in_chans, **factory),
                conv1=create_conv2d(self.in_chans, width, 3, **factory),
                norm1=BatchNormAct2d(width, **factory),
                conv=create_conv2d(width, channels[0], 3, stride=2, **factory),
            )
        )
        self.stem_feat_idx = 3
        self.init_weights(zero_init_last=False)
        for info in cast("list[dict[str, Any]]", self.feature_info):
            info["reduction"] *= 2


class SmallResNet(ResNet):
    """timm's ResNet with a stem that keeps the size of small images: one 3x3 convolution."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width = self.feature_info[0]["num_chs"]
        stem: Any = create_conv2d(self.in_chans, width, 3, **_factory_kwargs(kwargs))
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.conv1 = stem
        self.add_module("maxpool", nn.Identity())
        _keep_size(self)


class SmallVGG(VGG):
    """timm's VGG with a head for maps of any size, as small images need it (arXiv 1409.1556)."""

    def __init__(self, cfg: list[int | str], **kwargs: Any) -> None:
        # The parent makes a head for 7x7 maps, which is replaced: this ratio keeps it small.
        super().__init__(cfg, mlp_ratio=1 / 4096, norm_layer=nn.BatchNorm2d, **kwargs)
        self.pre_logits = ConvMlp(
            self.num_features, kernel_size=1, drop_rate=self.drop_rate, **_factory_kwargs(kwargs)
        )
        self._initialize_weights()


class PyramidBottleneck(nn.Module):
    """Bottleneck with a BatchNorm before each convolution and one after the last.

    The shortcut has no parameters: it is pooled where the stride asks for it, and padded with
    channels of zeros.
    """

    expansion = 4

    def __init__(self, in_chs: int, width: int, stride: int, **factory_kwargs: Any) -> None:
        super().__init__()
        out_chs = width * self.expansion
        self.norm1 = nn.BatchNorm2d(in_chs, **factory_kwargs)
        self.conv1 = create_conv2d(in_chs, width, 1, **factory_kwargs)
        self.norm2 = BatchNormAct2d(width, **factory_kwargs)
        self.conv2 = create_conv2d(width, width, 3, stride=stride, **factory_kwargs)
        self.norm3 = BatchNormAct2d(width, **factory_kwargs)
        self.conv3 = create_conv2d(width, out_chs, 1, **factory_kwargs)
        self.norm4 = nn.BatchNorm2d(out_chs, **factory_kwargs)
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True) if stride > 1 else nn.Identity()
        self.more_chs = out_chs - in_chs

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(self.norm1(x))
        residual = self.conv2(self.norm2(residual))
        residual = self.norm4(self.conv3(self.norm3(residual)))
        return residual + F.pad(self.pool(x), (0, 0, 0, 0, 0, self.more_chs))


class StagedNet(nn.Module):
    """A stem, stages, a norm and a head, with the methods that timm's networks have.

    Args:
        channels: output channels of each stage.
        reductions: total stride after each stage.
        logit_scale: the head's output is multiplied by it.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: list[nn.Module],
        channels: list[int],
        reductions: list[int],
        norm: nn.Module,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        logit_scale: float = 1.0,
        **factory_kwargs: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.logit_scale = logit_scale
        self.grad_checkpointing = False
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            dict(num_chs=channels[i], reduction=reductions[i], module=f"stages.{i}")
            for i in range(len(stages))
        ]
        self.norm = norm
        self.num_features = self.head_hidden_size = channels[-1]
        self.head = ClassifierHead(
            channels[-1], num_classes, global_pool, drop_rate, **factory_kwargs
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" + ("" if coarse else r"\.(\d+)"))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head(x, pre_logits=pre_logits)
        return x if pre_logits or not self.num_classes else x * self.logit_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class PyramidNet(StagedNet):
    """PyramidNet: bottlenecks that get wider by the same at every block (arXiv 1610.02915).

    Args:
        depth: layers, 9n + 2 of them.
        alpha: how much wider the last block is than the stem, before the bottlenecks' expansion.

    Raises:
        ValueError: `depth` is not 9n + 2.
    """

    def __init__(
        self,
        depth: int,
        alpha: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        **factory_kwargs: Any,
    ) -> None:
        if depth < 11 or depth % 9 != 2:
            raise ValueError(f"depth must be 9n + 2, got {depth}.")
        chs, width, blocks = 16, 16.0, (depth - 2) // 9
        stem = nn.Sequential(
            create_conv2d(in_chans, chs, 3, **factory_kwargs),
            nn.BatchNorm2d(chs, **factory_kwargs),
        )
        stages: list[nn.Module] = []
        channels = []
        for stride in (1, 2, 2):
            stage = nn.Sequential()
            for j in range(blocks):
                width += alpha / (3 * blocks)
                step = stride if j == 0 else 1
                stage.append(PyramidBottleneck(chs, round(width), step, **factory_kwargs))
                chs = round(width) * PyramidBottleneck.expansion
            stages.append(stage)
            channels.append(chs)
        super().__init__(
            stem,
            stages,
            channels,
            [1, 2, 4],
            BatchNormAct2d(chs, **factory_kwargs),
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            **factory_kwargs,
        )


class ContrastStem(nn.Module):
    """Colours and contrasts of each 2x2 pixels, and their negatives, all of the same variance.

    Twelve numbers describe 2x2 pixels of three channels: their discrete cosine transform along
    channels, rows and columns. The transform is fixed; so is the scale, but for running statistics.
    """

    basis: Tensor

    def __init__(self, in_chans: int, **factory_kwargs: Any) -> None:
        super().__init__()
        channels, side = _cosines(in_chans), _cosines(2)
        basis = torch.einsum("ai,bj,ck->abcijk", channels, side, side).flatten(0, 2)
        self.register_buffer("basis", basis.float().to(**factory_kwargs))
        self.norm = nn.BatchNorm2d(len(basis), affine=False, **factory_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.conv2d(x, self.basis))
        return F.gelu(torch.cat([x, -x], 1))


class ConvNet(StagedNet):
    """For small photographs of objects and few epochs, after airbench94 (Jordan, arXiv 2404.00498).

    A `ContrastStem`, which loses a row and a column, and stages of two 3x3 convolutions, the first
    of which halves the size. The logits are scaled down, so that high learning rates are stable.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "max",
        drop_rate: float = 0.0,
        **factory_kwargs: Any,
    ) -> None:
        stem = ContrastStem(in_chans, **factory_kwargs)
        stages: list[nn.Module] = []
        before = 2 * len(stem.basis)
        for width in channels:
            stages.append(
                nn.Sequential(
                    create_conv2d(before, width, 3, **factory_kwargs),
                    nn.MaxPool2d(2),
                    BatchNormAct2d(width, act_layer=nn.GELU, **factory_kwargs),
                    create_conv2d(width, width, 3, **factory_kwargs),
                    BatchNormAct2d(width, act_layer=nn.GELU, **factory_kwargs),
                )
            )
            before = width
        super().__init__(
            stem,
            stages,
            list(channels),
            [2 ** (i + 1) for i in range(len(channels))],
            nn.Identity(),
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            logit_scale=1 / 9,
            **factory_kwargs,
        )


def _cosines(count: int) -> Tensor:
    """The orthonormal discrete cosine transform (DCT-II) of `count` numbers, as a matrix."""
    k, n = torch.arange(count, dtype=torch.float64).view(-1, 1), torch.arange(count)
    matrix = torch.cos(math.pi * k * (2 * n + 1) / (2 * count)) * math.sqrt(2 / count)
    matrix[0] /= math.sqrt(2)
    return matrix


def _factory_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of timm's arguments, the device and the data type."""
    return {name: kwargs[name] for name in ("device", "dtype") if name in kwargs}


def _features(count: int) -> dict[str, Any]:
    """Tells timm where to find `count` feature maps, for `features_only`."""
    return dict(feature_cfg=dict(flatten_sequential=True, out_indices=tuple(range(count))))


def _register(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Registers with timm what no other copy of this file, saved with a model, has registered."""
    return entrypoint if is_model(entrypoint.__name__) else register_model(entrypoint)


def _keep_size(model: Any) -> None:
    """Corrects timm's description of the features: the stem no longer divides the size by 4."""
    for info in model.feature_info:
        info["reduction"] = max(1, info["reduction"] // 4)


@_register
def preactresnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """PreActResNet-18, 11.2 million parameters."""
    args: dict[str, Any] = dict(layers=[2, 2, 2, 2], channels=(64, 128, 256, 512))
    return build_model_with_cfg(
        PreActResNet, "preactresnet18", pretrained, **_features(5), **args | kwargs
    )


@_register
def wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """WRN-28-10 without dropout (Zagoruyko and Komodakis, arXiv 1605.07146), 36.5 million."""
    args: dict[str, Any] = dict(layers=[4, 4, 4], channels=(160, 320, 640), stem_chs=16)
    return build_model_with_cfg(
        PreActResNet, "wide_resnet28_10", pretrained, **_features(4), **args | kwargs
    )


@_register
def pyramidnet164_a270(pretrained: bool = False, **kwargs: Any) -> PyramidNet:
    """PyramidNet of 164 layers with α = 270, 27.2 million parameters."""
    args: dict[str, Any] = dict(depth=164, alpha=270)
    return build_model_with_cfg(
        PyramidNet, "pyramidnet164_a270", pretrained, **_features(3), **args | kwargs
    )


@_register
def vgg16_small(pretrained: bool = False, **kwargs: Any) -> SmallVGG:
    """VGG-16 with BatchNorm, as in the AMP authors' code: 33.6 million parameters."""
    args: dict[str, Any] = dict(cfg=cfgs["vgg16"])
    return build_model_with_cfg(
        SmallVGG, "vgg16_small", pretrained, **_features(6), **args | kwargs
    )


@_register
def resnet18_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """timm's resnet18 with a stem for small images."""
    args: dict[str, Any] = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return build_model_with_cfg(SmallResNet, "resnet18_small", pretrained, **args | kwargs)


@_register
def resnet34_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """timm's resnet34 with a stem for small images."""
    args: dict[str, Any] = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return build_model_with_cfg(SmallResNet, "resnet34_small", pretrained, **args | kwargs)


@_register
def resnet50_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """timm's resnet50 with a stem for small images."""
    args: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return build_model_with_cfg(SmallResNet, "resnet50_small", pretrained, **args | kwargs)


@_register
def resnet101_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """timm's resnet101 with a stem for small images."""
    args: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return build_model_with_cfg(SmallResNet, "resnet101_small", pretrained, **args | kwargs)


@_register
def preactresnet10_signs(pretrained: bool = False, **kwargs: Any) -> SignResNet:
    """A basic block in each of four stages, 1.2 million parameters.

    18 million multiply-adds for 32 pixels a side, 41 million for 48.
    """
    args: dict[str, Any] = dict(layers=[1, 1, 1, 1], channels=(32, 64, 128, 256))
    return build_model_with_cfg(
        SignResNet, "preactresnet10_signs", pretrained, **_features(5), **args | kwargs
    )


@_register
def convnet7_objects(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Seven convolutions, one of them fixed; 2.0 million parameters, 118 million multiply-adds."""
    args: dict[str, Any] = dict(channels=(64, 256, 256))
    return build_model_with_cfg(
        ConvNet, "convnet7_objects", pretrained, **_features(3), **args | kwargs
    )
