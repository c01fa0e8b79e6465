# SPDX-License-Identifier: Apache-2.0
"""Networks in overlapping windows of volumes of any size."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor, nn

from grcsf_kernels.common.errors import InputError, one_line
from grcsf_kernels.common.finite import is_finite
from grcsf_kernels.engine.buffers import slabs
from grcsf_kernels.engine.devices import make_fabric
from grcsf_kernels.engine.diagnosis import NotFiniteError, cause_named, is_out_of_memory
from grcsf_kernels.engine.io.datasets import Case
from grcsf_kernels.engine.report import warn

Window = tuple[slice, ...]
# predictor(windows [B, C, *window], their numbers) -> [B, channels, *window]
Predictor = Callable[[Tensor, Sequence[int]], Tensor]
# take(planes of the last axis, blended values [channels, X, Y, planes])
Take = Callable[[slice, Tensor], None]


def report_out_of_memory(work: Callable[[Case], Path]) -> Callable[[Case], Path]:
    """Values that are not finite, and running out of memory, become an InputError of the case.

    Neither says anything of other cases.
    """

    @functools.wraps(work)
    def run(case: Case) -> Path:
        try:
            return work(case)
        except NotFiniteError as error:
            raise InputError(case.image, error.problem, error.remedy) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                case.image,
                f"memory ran out ({one_line(error, 200)})",
                "set accumulate to disk, or use a device with more memory",
            ) from error

    return run


def inference_device(name: str) -> torch.device:
    """The device of a setting ``device``; on several GPUs that of ``LOCAL_RANK``.

    Raises:
        InputError: an unknown device, or one that is not there.
    """
    device = make_fabric(name).device
    rank = os.environ.get("LOCAL_RANK", "0")
    if device.type != "cuda" or not rank.isdigit():
        return device
    # More processes than GPUs share them.
    return torch.device("cuda", int(rank) % torch.cuda.device_count())


class SlidingWindow:
    """Blends windows with Gaussian weights and hands over finished planes, in order.

    Windows are placed and weighted as MONAI's ``sliding_window_inference`` does it. Sums are kept
    only for the planes that some window still adds to: as many planes of the last axis as a
    window has, in float32 whatever the precision of the volumes.

    Args:
        size: voxels of a window per axis.
        overlap: share of a window that the next one covers again, from 0 to below 1.
        batch: windows at once. Halved for good where memory runs out.
        device: where the network runs.
        sums: where the sums are; None: on ``device``.
        skip_air: leave out windows in which the first source is 0 everywhere. Their neighbors
            alone decide the voxels that they cover; a voxel that no window covers gets ``air``.
        air: the value of such voxels.
    """

    def __init__(
        self,
        size: Sequence[int],
        overlap: float,
        batch: int,
        device: torch.device,
        sums: torch.device | None = None,
        skip_air: bool = False,
        air: float = 0.0,
    ) -> None:
        self.size, self.overlap, self.batch = tuple(size), overlap, batch
        self.device, self.skip_air, self.air = device, skip_air, air
        self._sums = device if sums is None else sums

    def windows(self, space: Sequence[int]) -> list[tuple[int, Window]]:
        """Numbers and places, ordered by the last axis; larger than the volume where it is small.

        The number is the place in MONAI's order.
        """
        padded = [max(size, least) for size, least in zip(space, self.size, strict=True)]
        steps = [
            window if window == size else max(1, int(window * (1 - self.overlap)))
            for window, size in zip(self.size, padded, strict=True)
        ]
        # MONAI gives starts as numpy integers.
        places = [
            tuple(slice(int(axis.start), int(axis.stop)) for axis in window)
            for window in dense_patch_slices(padded, self.size, steps)
        ]
        return sorted(enumerate(places), key=lambda window: (window[1][-1].start, window[0]))

    @torch.no_grad()
    def __call__(
        self,
        predictor: Predictor,
        sources: Sequence[Tensor],
        channels: int,
        take: Take,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Run ``predictor`` over the volume of ``sources``.

        Args:
            predictor: the network; gets the sources of each window, one channel after the other.
            sources: [C, X, Y, Z] each, of any floating dtype; windows are float32.
            channels: that the predictor returns.
            take: gets every plane once, in order; its values are finite, but for ``air``.
            done: called whenever planes are finished.

        Raises:
            MemoryError: there is no room for a single window.
            NotFiniteError: the predictor gives NaN or Inf somewhere in the volume.
        """
        space = tuple(sources[0].shape[1:])
        padding = [max(least - size, 0) // 2 for size, least in zip(space, self.size, strict=True)]
        weight = compute_importance_map(self.size, mode="gaussian", device=self._sums)
        air = self.air if self.skip_air else None
        planes = _Planes(space, padding, channels, weight, take, air)
        waiting = self.windows(space)
        while waiting:
            batch = waiting[: self.batch]
            inputs = [(n, w, self._cut(sources, w, padding)) for n, w in batch]
            kept = [i for i in inputs if not (self.skip_air and not i[2][0].any())]
            results = self._run(predictor, kept)
            if results is None:
                continue
            waiting = waiting[len(batch) :]
            for (_, window, _), result in zip(kept, results, strict=True):
                if planes.advance(window[-1].start):
                    done()
                planes.add(window, result.to(self._sums, torch.float32))
        planes.advance(None)
        done()

    def _cut(self, sources: Sequence[Tensor], window: Window, padding: Sequence[int]) -> Tensor:
        """[C, *window] float32 on the device; outside of the volume 0."""
        inside, missing = [], []
        for axis, before, size in zip(window, padding, sources[0].shape[1:], strict=True):
            start, stop = axis.start - before, axis.stop - before
            inside.append(slice(max(start, 0), min(stop, size)))
            missing.append((max(-start, 0), max(stop - size, 0)))
        place = (slice(None), *inside)
        parts = [source[place].to(self.device, torch.float32) for source in sources]
        # F.pad counts axes from the last.
        flat = [n for pair in reversed(missing) for n in pair]
        return F.pad(torch.cat(parts), flat)

    def _run(
        self, predictor: Predictor, inputs: Sequence[tuple[int, Window, Tensor]]
    ) -> Tensor | Sequence[Tensor] | None:
        """The results of a batch, or None where it is to be tried again with a smaller one."""
        if not inputs:
            return ()
        try:
            windows = torch.stack([window for _, _, window in inputs])
            return predictor(windows, [number for number, _, _ in inputs])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = one_line(error, 120)
        # Outside of the handler: the exception holds the frames, and they hold tensors.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(inputs) == 1:
            shape = " x ".join(str(size) for size in self.size)
            raise MemoryError(f"no room for one window of {shape} voxels ({reason})")
        self.batch = max(1, len(inputs) // 2)
        warn(f"out of memory with {len(inputs)} windows per batch; retrying with {self.batch}")
        return None


class _Planes:
    """Weighted sums of the planes that are not finished yet.

    ``air`` is the value where no window was added; None: windows are everywhere.
    """

    def __init__(
        self,
        space: Sequence[int],
        padding: Sequence[int],
        channels: int,
        weight: Tensor,
        take: Take,
        air: float | None,
    ) -> None:
        padded = [max(size, least) for size, least in zip(space, weight.shape, strict=True)]
        self._sums = weight.new_zeros((channels + 1, *padded[:-1], weight.shape[-1]))
        self._first, self._depth = 0, padded[-1]
        self._space, self._padding = tuple(space), tuple(padding)
        self._weight, self._take, self._air = weight, take, air

    def add(self, window: Window, result: Tensor) -> None:
        """Add [channels, *window]; nothing before the planes that are kept."""
        depth = slice(window[-1].start - self._first, window[-1].stop - self._first)
        place = (slice(None), *window[:-1], depth)
        sums = self._sums[place]
        sums[:-1].addcmul_(result, self._weight)
        sums[-1] += self._weight

    def advance(self, first: int | None) -> bool:
        """Hand over the planes before ``first``, or all; whether there were any."""
        count = (self._depth if first is None else first) - self._first
        if count <= 0:
            return False
        kept = self._sums.shape[-1]
        # A window that was left out may leave a gap of more planes than are kept.
        for start in range(0, count, kept):
            self._hand_over(min(kept, count - start))
        return True

    def _hand_over(self, count: int) -> None:
        *axes, last = zip(self._padding, self._space, strict=True)
        inside = tuple(slice(before, before + size) for before, size in axes)
        start = max(self._first - last[0], 0)
        stop = min(self._first + count - last[0], last[1])
        shift = last[0] - self._first
        for planes in slabs(math.prod(self._space[:-1]), stop - start):
            first, end = start + planes.start, start + planes.stop
            place = (slice(None), *inside, slice(first + shift, end + shift))
            self._take(slice(first, end), self._blended(self._sums[place]))
        rest = self._sums.shape[-1] - count
        for channel in self._sums:  # one by one: the copies between would take as much memory
            channel[..., :rest] = channel[..., count:].clone()
            channel[..., rest:] = 0
        self._first += count

    def _blended(self, sums: Tensor) -> Tensor:
        weights = sums[-1:]
        # Told by the weights: a NaN says nothing of where windows were.
        empty = None if self._air is None else weights == 0
        values = sums[:-1] / (weights if empty is None else weights.masked_fill(empty, 1))
        if not is_finite(values):
            raise NotFiniteError("has NaN or infinite logits", "look at image and weights")
        if empty is not None and self._air:
            values.masked_fill_(empty, self._air)
        return values


def mirrors_of(axes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every subset of ``axes``, the empty one first."""
    for bits in range(1 << len(axes)):
        yield tuple(axis for index, axis in enumerate(axes) if bits >> index & 1)


def network_predictor(network: nn.Module, maps: int, mirrored: Sequence[int] = ()) -> Predictor:
    """Logits in float32 of windows [B, C + maps, *window], image first.

    Args:
        network: called with image and maps; the maps are None where ``maps`` is 0.
        maps: channels of residual maps.
        mirrored: axes of the volume along which the network sees the window mirrored.
    """
    dims = [axis + 2 for axis in mirrored]

    def run(windows: Tensor, numbers: Sequence[int]) -> Tensor:
        seen = windows.flip(dims) if dims else windows
        image, residual = seen.split([seen.shape[1] - maps, maps], dim=1)
        logits = network(image, residual if maps else None).float()
        return logits.flip(dims) if dims else logits

    return run


def predict_logits(
    network: nn.Module,
    image: Tensor,
    residual: Tensor | None,
    crop_size: tuple[int, int, int],
    device: torch.device,
    overlap: float = 0.5,
) -> Tensor:
    """Logits [1, *S] on the CPU of an image [C, *S] and maps [K, *S], in blended windows.

    Raises:
        NotFiniteError: some are NaN or infinite.
    """
    given = {"image": torch.as_tensor(image).as_subclass(Tensor)}
    if residual is not None:
        given["residual maps"] = torch.as_tensor(residual).as_subclass(Tensor)
    logits = torch.empty((1, *image.shape[1:]))

    def take(planes: slice, values: Tensor) -> None:
        logits[..., planes] = values.cpu()

    maps = 0 if residual is None else residual.shape[0]
    windows = SlidingWindow(crop_size, overlap, 2, device)
    with cause_named("the network", network, given):
        windows(network_predictor(network, maps), list(given.values()), 1, take)
    return logits
