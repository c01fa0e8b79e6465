# SPDX-License-Identifier: Apache-2.0
"""Removal of components that are too small to be a lesion."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from grcsf_kernels.engine.buffers import Scratch, slabs
from grcsf_kernels.engine.connectivity import NEIGHBORS


def remove_small(mask: np.ndarray, voxel_mm3: float, least_mm3: float, scratch: Scratch) -> int:
    """Set 26-connected components of less than a volume to 0, in place.

    Args:
        mask: [X, Y, Z] uint8, 0 and 1.
        voxel_mm3: volume of a voxel.
        least_mm3: components of at least this volume stay.
        scratch: gives the memory for the numbers of the components, 4 bytes a voxel.

    Returns:
        How many components were removed.
    """
    labels = scratch.volume(1, mask.shape, np.int32)[0]
    count = ndimage.label(mask, NEIGHBORS, output=labels)
    sizes = np.zeros(count + 1, np.int64)
    planes = list(slabs(mask.shape[0] * mask.shape[1], mask.shape[2]))
    for part in planes:
        # bincount makes integers of 8 bytes: not of the whole volume.
        sizes += np.bincount(labels[..., part].ravel(), minlength=count + 1)
        scratch.release()
    # In voxels, with room for rounding of the affine: 27 voxels of 1 mm are 27 mm^3.
    keep = sizes >= least_mm3 / voxel_mm3 - 1e-3
    keep[0] = False
    for part in planes:
        mask[..., part] = keep[labels[..., part]]
        scratch.release()
    return int(count - keep.sum())
