# SPDX-License-Identifier: Apache-2.0
"""Sliding windows against MONAI's, and what happens when memory runs out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference

from grcsf_kernels.engine import buffers as scratch
from grcsf_kernels.engine.diagnosis import NotFiniteError, is_out_of_memory
from grcsf_kernels.engine.inference.sliding_window import SlidingWindow, mirrors_of

CPU = torch.device("cpu")


def network(windows, numbers=None):
    """Depends on the whole window, so that every window gives other values for a voxel."""
    blurred = F.avg_pool3d(windows, 3, 1, 1, count_include_pad=False)
    return torch.cat([blurred, windows * windows.mean((1, 2, 3, 4), keepdim=True)], dim=1)


def run(windows, sources, predictor=network, channels=4):
    out = torch.full((channels, *sources[0].shape[1:]), torch.nan)
    seen = []

    def take(planes, values):
        seen.extend(range(planes.start, planes.stop))
        out[..., planes] = values

    windows(predictor, sources, channels, take)
    assert seen == list(range(out.shape[-1]))  # every plane once, in order
    return out


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize(
    ("space", "size"), [((13, 9, 17), (6, 5, 4)), ((3, 12, 5), (8, 4, 8)), ((4, 4, 4), (4, 4, 4))]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_is_what_monai_gives(monkeypatch, overlap, space, size, batch):
    monkeypatch.setattr(scratch, "_SLAB", 200)
    image, maps = torch.randn(1, *space), torch.rand(1, *space)
    expected = sliding_window_inference(
        torch.cat([image, maps])[None], size, 2, network, overlap=overlap, mode="gaussian"
    )[0]
    found = run(SlidingWindow(size, overlap, batch, CPU), [image, maps])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sources_of_other_precision_and_layout():
    image = torch.randn(1, 9, 8, 7)
    windows = SlidingWindow((4, 4, 4), 0.5, 2, CPU)
    expected = run(windows, [image, image.half().float()])
    strided = image.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    assert torch.equal(run(windows, [strided, image.half()]), expected)


def test_only_planes_that_wait_are_kept():
    """The sums hold as many planes as a window has, whatever the depth of the volume."""
    largest = 0
    original = torch.Tensor.new_zeros

    def counted(self, *args, **kwargs):
        nonlocal largest
        made = original(self, *args, **kwargs)
        largest = max(largest, made.numel())
        return made

    image = torch.randn(1, 6, 6, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", counted)
        run(SlidingWindow((4, 4, 4), 0.5, 2, CPU), [image], channels=2)
    assert largest == 3 * 6 * 6 * 4


class TestMemory:
    def test_a_batch_that_does_not_fit_is_halved(self, capsys):
        sizes = []

        def predictor(windows, numbers):
            sizes.append(len(windows))
            if len(windows) > 2:
                torch.empty(1 << 60)  # what torch's allocator itself says
            return network(windows)

        image = torch.randn(1, 9, 8, 7)
        windows = SlidingWindow((4, 4, 4), 0.5, 8, CPU)
        found = run(windows, [image], predictor, 2)
        assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2
        assert torch.equal(found, run(SlidingWindow((4, 4, 4), 0.5, 2, CPU), [image], channels=2))
        assert capsys.readouterr().err.count("out of memory") == 2
        run(windows, [image], predictor, 2)  # and it stays so
        assert max(sizes[3:]) == 2 and "memory" not in capsys.readouterr().err

    def test_one_window_that_does_not_fit(self):
        def predictor(windows, numbers):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

        with pytest.raises(MemoryError, match=r"one window of 4 x 5 x 6 .*20 GiB"):
            run(SlidingWindow((4, 5, 6), 0.5, 2, CPU), [torch.ones(1, 8, 8, 8)], predictor)

    def test_other_errors_are_not_taken_for_it(self):
        def predictor(windows, numbers):
            raise RuntimeError("shapes do not fit")

        with pytest.raises(RuntimeError, match="shapes do not fit"):
            run(SlidingWindow((4, 4, 4), 0.5, 2, CPU), [torch.ones(1, 8, 8, 8)], predictor)
        assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("out of memory"))


def test_windows_of_air_are_left_out():
    image = torch.zeros(1, 12, 12, 40)
    image[:, 2:9, 3:8, 25:30] = torch.rand(1, 7, 5, 5) + 0.1
    numbers = []

    def predictor(windows, which):
        assert all(window.any() for window in windows)
        numbers.extend(which)
        return windows

    size = (4, 4, 4)
    found = run(SlidingWindow(size, 0.5, 3, CPU, skip_air=True), [image], predictor, 1)
    total = len(SlidingWindow(size, 0.5, 3, CPU).windows(image.shape[1:]))
    assert 0 < len(numbers) < total / 4
    lesion = image > 0
    torch.testing.assert_close(found[lesion], image[lesion])
    assert (found >= 0).all()
    marked = run(SlidingWindow(size, 0.5, 3, CPU, skip_air=True, air=-9.0), [image], predictor, 1)
    assert (marked[..., :20] == -9).all() and (marked[..., 35:] == -9).all()
    assert torch.equal(found, marked.clamp(min=0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("skip_air", [False, True])
@pytest.mark.parametrize("size", [(4, 4, 4), (12, 9, 30)])  # also larger than the volume
def test_values_that_are_not_finite_are_refused(value, skip_air, size):
    """Of one window's one voxel; NaN is not taken for a voxel that no window covers."""
    image = torch.rand(1, 9, 8, 17) + 0.1
    image[..., 12:] = 0

    def predictor(windows, numbers):
        return torch.where(windows == image.max(), value, windows)

    with pytest.raises(NotFiniteError):
        run(SlidingWindow(size, 0.5, 3, CPU, skip_air=skip_air), [image], predictor, 1)


def test_mirrors():
    assert list(mirrors_of(())) == [()]
    assert set(mirrors_of((0, 2))) == {(), (0,), (2,), (0, 2)}
