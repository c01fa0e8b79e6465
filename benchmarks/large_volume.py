# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of one large CT from image to mask, residual maps included.

    python -m benchmarks.large_volume                       # 512 x 512 x 700, tiny networks
    python -m benchmarks.large_volume --size 64 64 80 --window 32

Makes a synthetic CT and untrained networks in a temporary folder, runs ``grcsf predict`` in a
process of its own and prints what the system counted for it (``getrusage``), as JSON. The networks
are tiny: time and activations are theirs, but every volume of a real run exists.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from grcsf_kernels import engine
from grcsf_kernels.models import GRCSF, MaskedAutoencoder
from grcsf_kernels.models.files import save_checkpoint

_CHILD = """
import json, resource, sys
from grcsf_kernels.cli import main
status = 0
try:
    main()
except SystemExit as error:
    status = error.code or 0
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"status": status, "kib": usage.ru_maxrss}))
"""


def make_image(path: Path, size: tuple[int, ...]) -> None:
    """A body in air, int16 Hounsfield units, 0.8 x 0.8 x 1 mm, axes as scanners write them."""
    rng = np.random.default_rng(0)
    x, y = (np.linspace(-1, 1, n, dtype=np.float32) for n in size[:2])
    body = (x[:, None] / 0.9) ** 2 + (y / 0.7) ** 2 < 1
    array = np.empty(size, np.int16, order="F")
    for plane in range(size[2]):
        tissue = rng.integers(-60, 120, size[:2], dtype=np.int16)
        array[..., plane] = np.where(body, tissue, -1000)
    affine = np.array([[-0.8, 0, 0, 200], [0, -0.8, 0, 200], [0, 0, 1.0, -300], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(array, affine), path)


def make_models(
    folder: Path, window: int, spacing: tuple[float, float, float] | None
) -> tuple[Path, list[Path]]:
    """A segmentation network and two autoencoders of a few thousand parameters."""
    data = engine.DataConfig(intensity="window", spacing=spacing)
    crop = (window, window, window)
    torch.manual_seed(0)
    network = GRCSF(channels=(4, 8, 8), rcu_levels=(1,), num_heads=2, head_dim=4, patch_size=8)
    model = save_checkpoint(folder / "model.safetensors", network, data, crop)
    autoencoders = []
    for ratio in (0.5, 0.75):
        autoencoder = MaskedAutoencoder(
            patch_size=16,
            embed_dim=24,
            depth=1,
            num_heads=2,
            decoder_dim=24,
            decoder_depth=1,
            decoder_heads=2,
            mask_ratio=ratio,
        )
        path = folder / f"mae_{ratio}.safetensors"
        autoencoders.append(save_checkpoint(path, autoencoder, data, crop))
    return model, autoencoders


def measure(
    size: tuple[int, ...],
    window: int,
    accumulate: str,
    overlap: float,
    folder: Path,
    spacing: tuple[float, float, float] | None = None,
) -> dict[str, object]:
    """Predict a synthetic CT of ``size`` in a process of its own.

    Returns:
        Size, settings, exit status, seconds, and the peak resident memory in GB.
    """
    image = folder / "ct.nii.gz"
    make_image(image, size)
    model, autoencoders = make_models(folder, window, spacing)
    config = engine.PredictConfig(device="cpu", overlap=overlap, accumulate=accumulate)
    config.residuals.device, config.residuals.overlap = "cpu", overlap
    config.residuals.accumulate = accumulate
    engine.save_config(config, folder / "predict.yaml")
    command = [sys.executable, "-c", _CHILD, "predict", image, "-m", model, "-o", folder / "out"]
    command += ["-c", folder / "predict.yaml"]
    for path in autoencoders:
        command += ["-a", path]
    start = time.perf_counter()
    run = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - start
    told = json.loads(run.stdout.splitlines()[-1])
    mask = nib.load(folder / "out/ct_mask.nii.gz")
    if told["status"] or mask.shape != tuple(size):
        raise RuntimeError(f"prediction failed: {told}, mask of {mask.shape}")
    return {
        "size": list(size),
        "window": window,
        "overlap": overlap,
        "spacing": spacing,
        "accumulate": accumulate,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "seconds": round(seconds, 1),
        "peak_resident_gb": round(told["kib"] * 1024 / 1e9, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=(512, 512, 700))
    parser.add_argument("--window", type=int, default=128, help="voxels per axis")
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--spacing", type=float, nargs=3, help="mm; default: the image's own")
    parser.add_argument("--accumulate", default="auto", choices=["auto", "cpu", "disk"])
    parser.add_argument(
        "--folder", type=Path, help="for files that are removed; default: temporary"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(
            tuple(options.size),
            options.window,
            options.accumulate,
            options.overlap,
            Path(folder),
            options.spacing and tuple(options.spacing),
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
