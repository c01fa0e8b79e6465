# SPDX-License-Identifier: Apache-2.0
"""docs/examples/monai."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import torch
from monai.networks.nets import UNet

from grcsf_kernels.nn import CompensatedUNet


def test_trains_and_segments(example):
    data, train = example.blocks[0].strip().splitlines()
    example.run(data)
    # As the README says of --weights: those of the network without the units.
    plain = UNet(3, 1, 2, channels=(8, 16, 32, 32), strides=(2, 2, 2), num_res_units=1)
    torch.save(plain.state_dict(), example.folder / "plain.pt")
    output = example.run(f"{train} --weights plain.pt")
    assert output.count("loss") == 2
    for index in range(4):
        image = nib.load(example.folder / f"data/case{index}_image.nii.gz")
        mask = nib.load(example.folder / f"out/case{index}_mask.nii.gz")
        assert mask.shape == image.shape and np.array_equal(mask.affine, image.affine)
        assert set(np.unique(mask.dataobj)) <= {0, 1}
    model = CompensatedUNet(plain, 2)
    model.load_state_dict(torch.load(example.folder / "out/UNet.pt", weights_only=True))
