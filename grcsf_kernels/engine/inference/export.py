# SPDX-License-Identifier: Apache-2.0
"""Model files as ONNX and as ``torch.export`` programs, for use without this library."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grcsf_kernels._version import __version__
from grcsf_kernels.common.atomic_files import saving, write_whole
from grcsf_kernels.common.errors import InputError
from grcsf_kernels.common.finite import require_finite
from grcsf_kernels.common.settings import to_dict
from grcsf_kernels.masking import random_masks
from grcsf_kernels.models import GRCSF, MaskedAutoencoder
from grcsf_kernels.models.files import kind_of, load_any
from grcsf_kernels.models.pretrained import Pretrained
from grcsf_kernels.reference.export import decompositions

# Largest difference to the library's own output, relative to the largest value of that output.
# Runtimes sum in other orders, and instance normalization divides by small deviations.
TOLERANCE = 1e-3


def export_model(model: Path, output: Path) -> Path:
    """Write a model for other runtimes: for crops of the training's size, in batches of any size.

    A GRCSF takes ``image`` [B, C, *crop] and, with an RCU, ``maps`` [B, K, *crop], and gives
    ``logits`` [B, 1, *crop]. A MaskedAutoencoder takes ``image`` and ``hidden`` [B, L] bool, which
    hides as many patches of each sample as its mask ratio says, and gives ``prediction``
    [B, L, P * C]. All else is float32. The file is kept only if its outputs equal the library's for
    batches of one and of three, within ``TOLERANCE`` of the largest value.

    Args:
        model: a ``.safetensors`` file of ``grcsf train`` or ``grcsf pretrain``.
        output: ``.onnx`` or ``.pt2``, written whole; kind, preprocessing and crop size are inside
            as JSON: in ONNX as ``grcsf`` of ``metadata_props``, in a program as the extra file
            ``grcsf.json``.

    Returns:
        ``output``.

    Raises:
        InputError: a model file that can't be used, an output that can't be written or has another
            suffix, packages that are missing, or outputs that differ or are not finite. A file that
            was there before is kept.
    """
    output = Path(output)
    _check_output(output)
    network = load_any(model)
    if network.crop_size is None or network.preprocessing is None:
        raise InputError(model, "has no preprocessing or crop size", "give them to save_pretrained")
    description = {
        "kind": kind_of(type(network)),
        "config": network.config,
        "data": to_dict(network.preprocessing),
        "crop_size": list(network.crop_size),
        "maps": network.residual_maps,
        "version": __version__,
    }
    batches = [_inputs(network, batch) for batch in (1, 3)]
    output_name = "prediction" if isinstance(network, MaskedAutoencoder) else "logits"
    text = json.dumps(description)
    exportable: nn.Module = network
    if isinstance(network, MaskedAutoencoder):
        exportable = _FixedMask(network)
    program = _program(exportable.eval(), batches[1])

    # As bytes: torch's writer of files ends the process where a disk is full.
    content = io.BytesIO()
    if output.suffix == ".pt2":
        torch.export.save(program, content, extra_files={"grcsf.json": text})
    else:
        _save_onnx(program, content, list(batches[1]), output_name, text)
    _check(_runner(content, output.suffix), exportable, batches, Path(model))
    with saving(output):
        write_whole(output, lambda temporary: temporary.write_bytes(content.getbuffer()))
    return output


def _check_output(output: Path) -> None:
    """InputError where the file can't be written: before minutes are spent on what is in it."""
    if output.suffix not in (".onnx", ".pt2"):
        raise InputError(output, f"has suffix {output.suffix!r}", "expected .onnx or .pt2")
    if output.is_dir():
        raise InputError(output, "is a folder", "name a file in it")
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(output, f"can't be written into {there}", "name another folder")
    if output.suffix == ".onnx":
        _check_packages(output)


class _FixedMask(nn.Module):
    """``reconstruct`` with a number of hidden patches that is known in advance."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model
        # One mask of the model's own kind says how many patches there are, and how many are shown.
        (mask,) = _masks(model, 1)
        self.patches, self.shown = mask.numel(), int((~mask).sum())
        # The model's own takes the number from the mask, which a graph can't.
        model._visible = self._visible  # type: ignore[method-assign]

    def _visible(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        # Places in grid order: the hidden go to the end, the visible keep their order.
        place = torch.arange(self.patches, device=hidden.device)
        ordered = torch.where(hidden, self.patches + place, place).sort(dim=1).values
        return ordered[:, : self.shown]

    def forward(self, image: Tensor, hidden: Tensor) -> Tensor:
        return self.model.reconstruct(image, hidden)


def _masks(model: MaskedAutoencoder, batch: int) -> Tensor:
    """[B, L] bool by a seed of its own."""
    assert model.crop_size is not None
    patches = math.prod(s // p for s, p in zip(model.crop_size, model.patch_size, strict=True))
    generator = torch.Generator().manual_seed(batch)
    return random_masks(batch, patches, model.mask_ratio, 1, generator)[0]


def _inputs(network: Pretrained, batch: int) -> dict[str, Tensor]:
    """Random inputs by a seed of their own, by the name that they have in the file."""
    crop = tuple(network.crop_size or ())
    generator = torch.Generator().manual_seed(batch)
    channels: Any = network.in_channels
    inputs = {"image": torch.randn(batch, channels, *crop, generator=generator)}
    if isinstance(network, MaskedAutoencoder):
        inputs["hidden"] = _masks(network, batch)
    elif isinstance(network, GRCSF) and network.use_rcu:
        inputs["maps"] = torch.rand(batch, network.num_maps, *crop, generator=generator)
    return inputs


def _program(network: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """The graph in PyTorch's own operators, the first axis of every input free."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        network, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs}, strict=False
    )
    # Whole convolutions and normalizations stay: runtimes have them.
    return program.run_decompositions(decompositions())


def _check_packages(output: Path) -> None:
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if find_spec(n) is None]
    if missing:
        raise InputError(
            output, f"needs {', '.join(missing)}", 'pip install "grcsf-kernels[export]"'
        )


def _save_onnx(
    program: torch.export.ExportedProgram,
    file: io.BytesIO,
    names: list[str],
    output: str,
    text: str,
) -> None:
    exported = torch.onnx.export(
        program, dynamo=True, input_names=names, output_names=[output], verbose=False
    )
    assert exported is not None
    exported.model.metadata_props["grcsf"] = text
    file.write(exported.model_proto.SerializeToString())


def _runner(content: io.BytesIO, suffix: str) -> Callable[[dict[str, Tensor]], Tensor]:
    """What a file with this content computes."""
    content.seek(0)
    if suffix == ".pt2":
        module = torch.export.load(content).module()
        return lambda inputs: module(**inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.as_tensor(output)

    return run


@torch.no_grad()
def _check(
    run: Callable[[dict[str, Tensor]], Tensor],
    network: nn.Module,
    batches: list[dict[str, Tensor]],
    model: Path,
) -> None:
    """InputError where what was exported does not compute what the network does."""
    remedy = "nothing was written; report it to grcsf-kernels"
    for inputs in batches:
        expected, found = network(**inputs), run(inputs)
        # NaN differs from NaN, and there is nothing to compare.
        require_finite(model, [("output", expected)], "values on random input", "train it again")
        if found.shape != expected.shape:
            raise InputError(
                model,
                f"gives {tuple(found.shape)} after export and {tuple(expected.shape)} before",
                remedy,
            )
        largest = float(expected.abs().max())
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCE * largest:
            raise InputError(
                model,
                f"differs by {difference:.2g} after export, more than {TOLERANCE:g} of the largest "
                f"value, {largest:.2g}",
                remedy,
            )
