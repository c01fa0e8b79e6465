# SPDX-License-Identifier: Apache-2.0
"""Real lesions, end to end through the command line: pretrain, maps, train, predict, evaluate.

A network that can learn at all overfits a single case. The cases and their notice are in
``tests/data``; the whole images are used where a checkout has them beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from grcsf_kernels import engine
from grcsf_kernels.cli.commands import app
from grcsf_kernels.engine.data.preprocessing import Preprocessing
from grcsf_kernels.engine.io.nifti import read_volume

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "data"
WHOLE = ROOT.parent / "shared" / "data"


def grcsf(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def overfit(
    source: Path, case: str, folder: Path, steps: int, spacing: tuple[float, ...] | None = None
) -> float:
    """Dice on the one case that everything was trained on; geometry is checked on the way."""
    data = folder / "data"
    data.mkdir()
    for kind in ("image", "label"):
        shutil.copy(source / f"{case}_{kind}.nii.gz", data)
    config = engine.DataConfig(spacing=spacing)
    volume = read_volume(data / f"{case}_image.nii.gz")
    space = Preprocessing(config).image(volume).shape[1:]
    # Crops are the whole volume, rounded up to whole patches.
    patch = (8, 8, 4)
    x, y, z = (-(-size // step) * step for size, step in zip(space, patch, strict=True))
    pretraining = engine.PretrainConfig(
        data=config,
        model=engine.AutoencoderConfig(
            patch_size=patch,
            embed_dim=48,
            depth=2,
            num_heads=4,
            decoder_dim=48,
            decoder_depth=1,
            decoder_heads=4,
        ),
        optimization=engine.OptimizationConfig(
            epochs=1, steps_per_epoch=20, batch_size=1, learning_rate=1e-3, device="cpu"
        ),
        crop_size=(x, y, z),
    )
    training = engine.TrainConfig(
        data=config,
        model=engine.ModelConfig(channels=(8, 16, 32), rcu_levels=(1,), patch_size=(4, 4, 4)),
        optimization=engine.OptimizationConfig(
            epochs=2,
            steps_per_epoch=steps // 2,
            batch_size=1,
            learning_rate=1e-2,
            warmup_epochs=0.2,
            device="cpu",
        ),
        augmentation=engine.AugmentationConfig(enabled=False),  # one case is to be overfitted
        crop_size=(x, y, z),
        validation_fraction=0.0,
    )
    engine.save_config(pretraining, folder / "pretrain.yaml")
    engine.save_config(training, folder / "train.yaml")
    grcsf("pretrain", data, "-o", folder / "mae", "-c", folder / "pretrain.yaml")
    maes = [x for n in (50, 75) for x in ("-a", folder / f"mae/mae_{n}.safetensors")]
    grcsf("residuals", data, "-o", folder / "maps", *maes, "--device", "cpu")
    run = folder / "run"
    maps = ("--residuals", folder / "maps")
    grcsf("train", data, "-o", run, "-c", folder / "train.yaml", *maps)
    image = data / f"{case}_image.nii.gz"
    grcsf("predict", image, "-o", folder / "masks", "-m", run / "model.safetensors", *maes)

    mask = nib.load(folder / f"masks/{case}_mask.nii.gz")
    label = nib.load(image)
    assert mask.shape == label.shape
    assert np.array_equal(mask.affine, label.affine)
    assert nib.aff2axcodes(mask.affine) == nib.aff2axcodes(label.affine)
    assert set(np.unique(np.asarray(mask.dataobj))) == {0, 1}
    return engine.evaluate(folder / "masks", data)["mean"]["dice"]


def test_overfits_a_brain_tumor(tmp_path):
    assert overfit(CASES, "brain1_crop", tmp_path, steps=90) > 0.8


def test_overfits_a_breast_lesion(tmp_path):
    """143 voxels of 2.1 mm slices: about as small as lesions that matter come."""
    assert overfit(CASES, "breast1", tmp_path, steps=150) > 0.8


needs_whole = pytest.mark.skipif(
    not WHOLE.is_dir(), reason="the whole images are not beside this checkout"
)


@needs_whole
def test_overfits_a_whole_image(tmp_path):
    """256 x 256 x 25 voxels of 0.78 x 0.78 x 6.5 mm, trained at 2 mm in the plane."""
    assert overfit(WHOLE, "brain1", tmp_path, steps=160, spacing=(2.0, 2.0, 6.5)) > 0.8


@needs_whole
def test_another_whole_image_goes_all_the_way(tmp_path):
    """256 x 256 x 23 voxels: every stage runs and the geometry is kept; too short to overfit."""
    assert overfit(WHOLE, "brain2", tmp_path, steps=4, spacing=(3.0, 3.0, 6.5)) >= 0
