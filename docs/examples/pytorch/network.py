# SPDX-License-Identifier: Apache-2.0
"""A U-Net of one's own with both units in its forward, and a data set for it."""

import nibabel as nib
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from grcsf_kernels.nn import GCU, RCU


def block(before, channels, stride=1):
    return nn.Sequential(
        nn.Conv3d(before, channels, 3, stride, 1, bias=False),
        nn.InstanceNorm3d(channels, affine=True),
        nn.LeakyReLU(0.01),
    )


class OwnUNet(nn.Module):
    """Three levels. The lines with a unit are what one adds to a network."""

    def __init__(self, channels=(8, 16, 32), num_maps=2):
        super().__init__()
        one, two, three = channels
        self.down1, self.down2, self.down3 = block(1, one), block(one, two, 2), block(two, three, 2)
        self.up2, self.up1 = block(three + two, two), block(two + one, one)
        self.head = nn.Conv3d(one, 1, 1)
        self.gcu1, self.gcu2 = GCU(one, deep_channels=two), GCU(two, deep_channels=three)
        self.rcu = RCU(one, num_maps, patch_size=8, context_channels=three)

    def forward(self, image, maps):
        skip1 = self.down1(image)
        skip2 = self.down2(skip1)
        deep = self.down3(skip2)
        context = deep.mean(dim=(2, 3, 4))
        skip1, skip2 = self.gcu1(skip1, skip2), self.gcu2(skip2, deep)
        x = self.up2(torch.cat([skip2, F.interpolate(deep, skip2.shape[2:])], dim=1))
        x = self.up1(torch.cat([skip1, F.interpolate(x, skip1.shape[2:])], dim=1))
        return self.head(self.rcu(x, maps, context))


def loss_of(logits, label):
    """Cross-entropy and soft Dice."""
    logits = logits.float()
    chance = logits.sigmoid()
    dice = 2 * (chance * label).sum() / (chance.sum() + label.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, label) + 1 - dice


class Volumes(Dataset):
    """Image [1, *S], maps [K, *S] and label [1, *S] of every <case>_image.nii.gz of a folder."""

    def __init__(self, folder):
        self.paths = sorted(folder.glob("*_image.nii.gz"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        def read(kind):
            path = str(self.paths[index]).replace("_image", kind)
            return torch.from_numpy(nib.load(path).get_fdata(dtype="float32"))

        image, maps, label = read("_image"), read("_residual"), read("_label")
        # Air is 0 and stays 0.
        brain = image[image > 0]
        image = torch.where(image > 0, (image - brain.mean()) / brain.std(), 0)
        return image[None], maps.movedim(-1, 0), label[None]
