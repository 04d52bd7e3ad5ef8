"""Joint memory, and groups of tensors that fit into a cache."""

import pytest
import torch

from amp_hf import blocks
from amp_hf.blocks import JointTensors, groups_of


def test_joint_memory_is_that_of_empty_like_and_no_two_tensors_share_any_of_it():
    image = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    params = [torch.zeros(8)[::2], torch.zeros(3, 9)[:, :5], image, torch.zeros(2, 3).T]
    params += [torch.zeros(()), torch.zeros(5, dtype=torch.float64)]
    joint = JointTensors(params)
    for i, tensor in enumerate(joint):
        tensor.fill_(i)
    for i, (tensor, param) in enumerate(zip(joint, params, strict=True)):
        like = torch.empty_like(param)
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (
            like.shape,
            like.stride(),
            like.dtype,
        )
        assert (tensor == i).all()


@pytest.mark.parametrize("cached", [1, 8, 12, 1000])
def test_groups_hold_every_entry_once_and_no_more_than_fits(monkeypatch, cached):
    monkeypatch.setattr(blocks, "_CACHED", cached)
    tensors = [torch.zeros(shape) for shape in [(4, 5), (3,), (2, 3), (), (5, 4), (6,)]]
    factors = [torch.tensor(float(i)) for i in range(len(tensors))]
    groups = groups_of(tensors)
    for group in groups:
        views = group.of(tensors)
        assert sum(view.numel() for view in views) <= cached or len(views) == 1
        for view, factor in zip(views, group.factors(factors), strict=True):
            view.add_(1 + factor)
    for i, tensor in enumerate(tensors):
        assert (tensor == 1 + i).all()
    assert (len(groups) == 1) == (cached == 1000)
