# SPDX-License-Identifier: Apache-2.0
"""The whole model: one training step, and one volume from image to mask.

MONAI's networks stand beside the training step as a yardstick: other networks, the same input, loss
and optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.cases import Case
from benchmarks.harness.rows import BOUNDS, Absent, Row, Session, run_row, worst_error
from grcsf_kernels.dispatch import BACKENDS, OPERATORS, use_backend, why_not
from grcsf_kernels.models import GRCSF, MaskedAutoencoder

STEP, VOLUME = "training step", "image to mask"
# An ATLAS brain at 1 mm.
BRAIN = (197, 233, 189)
WINDOW = (96, 96, 96)
_AUTOMATIC = "automatic"


def cases(device: str) -> list[Case]:
    dtype, edge = ("bfloat16", 128) if device == "cuda" else ("float32", 64)
    return [
        Case(STEP, "network", (edge,) * 3, 1, dtype, quick=True, directions=(True,)),
        Case(VOLUME, "volume", BRAIN, 1, dtype, directions=(False,), quick=device == "cuda"),
    ]


def peers(case: Case) -> list[str]:
    """``automatic``: the best backend for each operator; a name: that one for all of them."""
    library = [_AUTOMATIC, *BACKENDS]
    return library if case.subject == VOLUME else [*library, "backbone", *_YARDSTICKS]


def _swin_unetr(edge: int) -> nn.Module:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(in_channels=1, out_channels=1, feature_size=24)


def _unetr(edge: int) -> nn.Module:
    from monai.networks.nets import UNETR

    return UNETR(in_channels=1, out_channels=1, img_size=(edge,) * 3, feature_size=16)


def _dyn_unet(edge: int) -> nn.Module:
    from monai.networks.nets import DynUNet

    # The five levels and the widths of our backbone.
    strides = [1, 2, 2, 2, 2]
    return DynUNet(3, 1, 1, [3] * 5, strides, strides[1:], filters=[16, 32, 64, 128, 256])


_YARDSTICKS: dict[str, Callable[[int], nn.Module]] = {
    "SwinUNETR": _swin_unetr,
    "UNETR": _unetr,
    "DynUNet": _dyn_unet,
}

# As in the committed results, which are older than the default of today.
_RCU_LEVELS = (1,)


def _network(peer: str, edge: int) -> nn.Module:
    torch.manual_seed(0)
    if peer in _YARDSTICKS:
        try:
            return _YARDSTICKS[peer](edge)
        except ImportError as error:
            raise Absent(f"MONAI is not installed ({error})") from error
    units = peer != "backbone"
    return GRCSF(rcu_levels=_RCU_LEVELS, use_gcu=units, use_rcu=units)


def _backend(peer: str, device: str) -> Any:
    """The context that forces the peer's backend, or ``Absent``."""
    if peer not in BACKENDS:
        return nullcontext()
    for operator in OPERATORS:
        if reason := why_not(peer, operator, device):
            raise Absent(reason)
    return use_backend(peer)


class _TrainingStep:
    """Forward, loss, backward and AdamW on one crop."""

    def __init__(self, case: Case, peer: str, device: str) -> None:
        edge = case.space[0]
        self._network = _network(peer, edge).to(device)
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=1e-4)
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, 1, *case.space)
        self._image = torch.randn(shape, generator=generator, device=device)
        self._label = (torch.rand(shape, generator=generator, device=device) < 0.1).float()
        self._maps = torch.rand((1, 2, *case.space), generator=generator, device=device)
        self._takes_maps = isinstance(self._network, GRCSF)
        self._case, self._peer, self._device = case, peer, device

    def run(self, backward: bool) -> dict[str, Tensor]:
        """One step; the logits, for comparison before anything was learned."""
        dtype = getattr(torch, self._case.dtype)
        self._optimizer.zero_grad(set_to_none=True)
        with _backend(self._peer, self._device):
            with torch.autocast(self._device, dtype, enabled=dtype != torch.float32):
                inputs = (self._image, self._maps) if self._takes_maps else (self._image,)
                logits = self._network(*inputs)
                loss = F.binary_cross_entropy_with_logits(logits.float(), self._label)
            loss.backward()
        self._optimizer.step()
        return {"logits": logits.detach()}


class _ImageToMask:
    """Residual maps of two autoencoders, then the network, in windows, as ``grcsf predict``."""

    def __init__(self, case: Case, peer: str, device: str, folder: Path) -> None:
        try:
            from monai.data import MetaTensor

            from grcsf_kernels.engine.config import ResidualsConfig
            from grcsf_kernels.engine.inference.residuals import VolumeMaps
            from grcsf_kernels.engine.inference.sliding_window import predict_logits
            from grcsf_kernels.models.files import save_checkpoint
            from grcsf_kernels.models.inputs import DataConfig
        except ImportError as error:
            raise Absent(f"the extra [train] is not installed ({error})") from error
        torch.manual_seed(0)
        paths = []
        for ratio in (0.5, 0.75):
            path = folder / f"mae_{ratio}.safetensors"
            autoencoder = MaskedAutoencoder(mask_ratio=ratio)
            save_checkpoint(path, autoencoder, DataConfig(), WINDOW)
            paths.append(path)
        self._maps = VolumeMaps(paths, ResidualsConfig(device=device, overlap=0.25))
        self._network = GRCSF(rcu_levels=_RCU_LEVELS).to(device).eval()
        self._image = MetaTensor(torch.randn((1, *case.space)))
        self._predict, self._case = predict_logits, case
        self._peer, self._device = peer, device

    def run(self, backward: bool) -> dict[str, Tensor]:
        """The mask and the logits that it comes from."""
        dtype = getattr(torch, self._case.dtype)
        autocast = torch.autocast(self._device, dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), _backend(self._peer, self._device), autocast:
            maps = self._maps(self._image, "benchmark")
            logits = self._predict(
                self._network, self._image, maps, WINDOW, torch.device(self._device), 0.25
            )
        return {"logits": logits, "mask": (logits > 0).to(torch.uint8)}


def test_model(
    session: Session,
    benchmark: Any,
    case: Case,
    backward: bool,
    peer: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    device = session.device
    with _backend(peer, device):
        pass  # Absent, where it can't run

    def make(seed: int, peer: str = peer) -> _TrainingStep | _ImageToMask:
        if case.subject == STEP:
            return _TrainingStep(case, peer, device)
        return _ImageToMask(case, peer, device, tmp_path_factory.mktemp("autoencoders"))

    def check(found: dict[str, Tensor]) -> float:
        exact = session.expected((case, backward), lambda: make(0, "reference").run(backward))
        return worst_error({"logits": found["logits"]}, exact, 10 * BOUNDS[case.dtype])

    row = Row.of(case, backward, peer)
    # Minutes on CPU: called twice, not four times, and checked at the smaller size of the step.
    brief = case.subject == VOLUME and device == "cpu"
    other = peer in _YARDSTICKS or peer == "backbone"  # another function: nothing to compare
    run_row(session, benchmark, row, make, check=None if other else check, warm_up=not brief)
