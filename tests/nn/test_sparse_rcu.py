# SPDX-License-Identifier: Apache-2.0
"""``nn.RCU`` on important patches alone, against the whole result masked by hand."""

from __future__ import annotations

import pytest
import torch

from grcsf_kernels.nn import RCU, sparse_rcu

CASES = [((7, 6, 9), 3), ((8, 8, 8), (4, 2, 8)), ((7, 10), 4), ((5, 4, 6), None), ((3, 3), 8)]


def unit(space, patch, map_channels=1):
    torch.manual_seed(0)
    module = RCU(
        6, 2, map_channels=map_channels, patch_size=patch, context_channels=5, score_channels=16
    ).eval()
    with torch.no_grad():  # scores that differ
        module.score_output.weight.mul_(8)
        module.score_hidden.weight.mul_(3)
    maps = (2, map_channels) if map_channels > 1 else (2,)
    return module, torch.randn(3, 6, *space), torch.rand(3, *maps, *space), torch.randn(3, 5)


def by_hand(module, x, out, scores, threshold):
    """Patches of lower scores from x, the others from ``out``."""
    space, patch = x.shape[2:], module.patch_size
    patch = space if patch is None else (patch,) * len(space) if isinstance(patch, int) else patch
    chosen = scores >= threshold
    for axis, (size, step) in enumerate(zip(space, patch, strict=True)):
        index = torch.arange(size) // step
        chosen = chosen.index_select(axis + 1, index)
    return torch.where(chosen[:, None], out, x)


@pytest.mark.parametrize("map_channels", [1, 2])
@pytest.mark.parametrize(("space", "patch"), CASES)
def test_is_the_whole_result_masked(space, patch, map_channels):
    module, x, maps, context = unit(space, patch, map_channels)
    with torch.no_grad():
        out, scores = module(x, maps, context, return_scores=True)
        spread = scores.flatten().sort().values
        assert spread[0] < spread[-1]
        middle = float(spread[len(spread) // 2])
        for threshold in (1e-9, middle - 1e-5, 1.0):
            module.score_threshold = threshold
            found, found_scores = module(x, maps, context, return_scores=True)
            torch.testing.assert_close(found_scores, scores, rtol=1e-5, atol=1e-6)
            expected = by_hand(module, x, out, scores, threshold)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            changed = (found != x).any()
            assert changed == (threshold < 1)
            if threshold == 1.0:
                assert torch.equal(found, x)


@pytest.mark.parametrize(("space", "patch"), CASES)
def test_a_threshold_of_0_is_the_operator_to_the_bit(space, patch, monkeypatch):
    module, x, maps, context = unit(space, patch)
    with torch.no_grad():
        expected = module(x, maps, context)
        monkeypatch.setattr("grcsf_kernels.nn.rcu.sparse_rcu", None)  # it is not even asked
        module.score_threshold = 0.0
        assert torch.equal(module(x, maps, context), expected)


def test_training_is_never_gated():
    module, x, maps, context = unit((6, 6), 3)
    module.score_threshold = 1.0
    assert torch.equal(module(x, maps, context), x)
    assert not torch.equal(module.train()(x, maps, context), x)


def test_only_chosen_patches_are_computed(monkeypatch):
    module, x, maps, context = unit((8, 8, 8), 4)
    with torch.no_grad():
        _, scores = module(x, maps, context, return_scores=True)
        threshold = float(scores.flatten().sort().values[-5]) - 1e-6
        computed = []
        original = sparse_rcu.rcu
        monkeypatch.setattr(
            sparse_rcu, "rcu", lambda x, *a, **k: computed.append(len(x)) or original(x, *a, **k)
        )
        module.score_threshold = threshold
        module(x, maps, context)
    assert sum(computed) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts(dtype):
    module, x, maps, context = unit((7, 6, 9), 3)
    module = module.to(dtype) if dtype == torch.float64 else module
    x = x.to(dtype).to(memory_format=torch.channels_last_3d)
    context = context.to(dtype)
    with torch.no_grad():
        expected = module(x, maps, context)
        module.score_threshold = 1e-9
        found = module(x, maps, context)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last_3d)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-9
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_an_empty_batch():
    module, x, maps, context = unit((6, 6), 3)
    module.score_threshold = 0.5
    out, scores = module(x[:0], maps[:0], context[:0], return_scores=True)
    assert out.shape == (0, 6, 6, 6) and scores.shape == (0, 2, 2)
