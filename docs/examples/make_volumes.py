# SPDX-License-Identifier: Apache-2.0
"""Tiny made-up volumes with lesions and residual maps, for the examples to run on.

The maps are a stand-in for those of `grcsf residuals`: how far a voxel is from its surroundings.
"""

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

# Tilted and not isotropic, as scanners make them; nnU-Net's reader wants it without shear.
AFFINE = np.array([[-0.8, -0.6, 0, 20.0], [-0.6, 0.8, 0, -30.0], [0, 0, 1.2, 5.0], [0, 0, 0, 1.0]])
SHAPE = (24, 16, 16)


def case(seed):
    """An ellipsoid with a bright lesion: image, label, and maps [*SHAPE, 2] in [0, 1]."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    lesion = ((grid - rng.uniform(-0.3, 0.3, 3)[:, None, None, None]) ** 2).sum(0) < 0.08
    image = np.where((grid**2).sum(0) < 0.9, 100 + 5 * rng.standard_normal(SHAPE), 0) + 60 * lesion
    maps = np.stack([np.abs(image - gaussian_filter(image, sigma)) for sigma in (1, 2)], axis=-1)
    maps /= maps.max((0, 1, 2))
    return image.astype(np.float32), lesion.astype(np.uint8), maps.astype(np.float32)


def write(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="gets <case>_image, _label and _residual.nii.gz")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument(
        "--nnunet",
        type=Path,
        help="folder DatasetXXX_Name: images and labels go there as nnU-Net"
        " has them, the last image for prediction; the folder gets the maps",
    )
    arguments = parser.parse_args()
    folder, dataset = arguments.folder, arguments.nnunet
    for index in range(arguments.cases):
        name = f"case{index}"
        image, label, maps = case(index)
        write(maps, folder / f"{name}_residual.nii.gz")
        if dataset is None:
            write(image, folder / f"{name}_image.nii.gz")
            write(label, folder / f"{name}_label.nii.gz")
        elif index < arguments.cases - 1:
            write(image, dataset / f"imagesTr/{name}_0000.nii.gz")
            write(label, dataset / f"labelsTr/{name}.nii.gz")
        else:
            write(image, dataset / f"imagesTs/{name}_0000.nii.gz")
    if dataset is not None:
        description = {
            "channel_names": {"0": "T1"},
            "labels": {"background": 0, "lesion": 1},
            "numTraining": arguments.cases - 1,
            "file_ending": ".nii.gz",
        }
        (dataset / "dataset.json").write_text(json.dumps(description, indent=4))


if __name__ == "__main__":
    main()
