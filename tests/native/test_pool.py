# SPDX-License-Identifier: Apache-2.0
"""The pool of large CPU results: memory is used again, and never while it is in use."""

from __future__ import annotations

import pytest
import torch

from grcsf_kernels import gcu, native, use_backend

SPACE = (64, 64, 64)  # with 32 channels of float32: 32 MiB, the smallest that is pooled


@pytest.fixture
def pool(monkeypatch):
    """The module, with an empty pool."""
    monkeypatch.delenv("GRCSF_RESULT_POOL", raising=False)
    module = native.library()
    module.empty_pool()
    yield module
    module.empty_pool()


def large(channels: int = 32) -> torch.Tensor:
    return native.result_like(torch.empty(1, channels, *SPACE, device="cpu"))


def test_small_results_are_not_pooled(pool):
    before = pool.pool_state()
    assert large(channels=31).shape == (1, 31, *SPACE)
    assert pool.pool_state() == before


def test_memory_is_used_again(pool):
    first = large()
    address, alive = first.data_ptr(), pool.pool_state()[0]
    assert alive >= first.nbytes and address % 64 == 0
    del first
    assert pool.pool_state()[1] == alive
    assert large().data_ptr() == address


def test_living_results_never_share_memory(pool):
    one, two = large().fill_(1), large().fill_(2)
    part = one[0, 3, :2]  # a view keeps the memory of the whole
    del one
    three = large().fill_(3)
    assert (part == 1).all() and (two == 2).all() and (three == 3).all()


def test_no_more_is_kept_than_was_once_alive(pool):
    """Alive and kept together never exceed the most that was alive at a time."""
    one, two = large(), large(channels=48)
    most = sum(pool.pool_state())
    del one, two
    for channels in (64, 40, 33, 50, 64):
        result = large(channels)
        assert sum(pool.pool_state()) <= max(most, pool.pool_state()[0])
        most = max(most, pool.pool_state()[0])
        del result
    pool.empty_pool()
    assert pool.pool_state()[1] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_pooled_results_have_dtype_and_layout(pool, dtype):
    like = torch.empty(1, 128, *SPACE, dtype=dtype)
    like = like.contiguous(memory_format=torch.channels_last_3d)
    result = native.result_like(like)
    assert result.dtype == dtype and result.stride() == like.stride()
    assert pool.pool_state()[0] >= result.nbytes


def test_the_switch(pool, monkeypatch):
    monkeypatch.setenv("GRCSF_RESULT_POOL", "0")
    before = pool.pool_state()
    result = large()
    assert pool.pool_state() == before and result.nbytes >= pool.pooled_from


def test_an_operator_gives_the_same_in_used_memory(pool):
    """A result in memory that held another one, and its gradient, have the same bits."""
    skip = torch.randn(1, 32, *SPACE, requires_grad=True)
    deep, gate = torch.randn(1, 32, 32, 32, 32), torch.rand(1, 32)

    def call():
        compensated, _ = gcu(skip, deep, gate, gate)
        (grad,) = torch.autograd.grad(compensated.square().mean(), skip)
        return compensated.detach(), grad

    with use_backend("cpu"):
        first = [result.clone() for result in call()]
        assert pool.pool_state()[1] > 0
        second = call()
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_results_are_ordinary_tensors(pool, tmp_path):
    """In place, saved and loaded, moved to shared memory."""
    result = large().fill_(1)
    result.add_(1).mul_(result)
    torch.save(result, tmp_path / "result.pt")
    assert torch.equal(torch.load(tmp_path / "result.pt"), result)
    assert (result.share_memory_() == 4).all()
