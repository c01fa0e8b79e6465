# SPDX-License-Identifier: Apache-2.0
"""nnU-Net trainers whose network has a GCU on every skip and RCUs in the decoder.

nnU-Net finds them by name in the folder that the environment variable ``nnUNet_extTrainer`` names.
"""

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._dynamo import OptimizedModule

from grcsf_kernels.nn import CompensatedUNet


def number_of_maps(configuration_manager):
    """The residual maps: the last input channels, which dataset.json calls "noNorm"."""
    schemes = configuration_manager.normalization_schemes
    images = [i for i, scheme in enumerate(schemes) if scheme != "NoNormalization"]
    if not images or len(schemes) - 1 == images[-1]:
        raise ValueError(
            f"nnUNetTrainerGRCSF: the channels are normalized by {list(schemes)}, expected image "
            'channels first and then the residual maps, which dataset.json names "noNorm"'
        )
    return len(schemes) - 1 - images[-1]


class _OnImage(BasicTransform):
    """A change of intensities that leaves the residual maps alone."""

    def __init__(self, transform, num_maps):
        super().__init__()
        self.transform, self.num_maps = transform, num_maps

    def __call__(self, **data):
        maps = data["image"][-self.num_maps :]
        data["image"] = data["image"][: -self.num_maps]
        data = self.transform(**data)
        data["image"] = torch.cat([data["image"], maps])
        return data


def _changes_intensities(transform):
    inner = transform.transform if isinstance(transform, RandomTransform) else transform
    return isinstance(inner, ImageOnlyTransform)


class nnUNetTrainerGRCSF(nnUNetTrainer):
    """The network of the plans, compensated. Subclass it to change ``units``."""

    # Arguments of grcsf_kernels.nn.CompensatedUNet.
    units = {"rcu_levels": (0,), "patch_size": 8}  # noqa: RUF012

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager,
        configuration_manager,
        num_input_channels,
        num_output_channels,
        enable_deep_supervision=True,
    ):
        num_maps = number_of_maps(configuration_manager)
        if num_input_channels != len(configuration_manager.normalization_schemes):
            # A cascade puts the segmentation of its first stage behind the maps.
            raise ValueError("nnUNetTrainerGRCSF: a cascade can't be trained; use 3d_fullres or 2d")
        network = super().build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels - num_maps,
            num_output_channels,
            enable_deep_supervision,
        )
        return CompensatedUNet(network, num_maps, **cls.units)

    def set_deep_supervision_enabled(self, enabled):
        model = self.network.module if self.is_ddp else self.network
        model = model._orig_mod if isinstance(model, OptimizedModule) else model
        model.network.decoder.deep_supervision = enabled

    def get_training_transforms(self, *args, **kwargs):
        """nnU-Net's, but noise, blur, brightness, contrast and gamma are for the image alone.

        The residual maps are in [0, 1], and rotated, scaled and mirrored along with the image.
        """
        num_maps = number_of_maps(self.configuration_manager)
        composed = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        composed.transforms = [
            _OnImage(transform, num_maps) if _changes_intensities(transform) else transform
            for transform in composed.transforms
        ]
        return composed


class nnUNetTrainerGRCSF_2epochs(nnUNetTrainerGRCSF):
    """To try out whether everything runs, as nnU-Net's own trainers for some epochs are made."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = 2
        self.num_val_iterations_per_epoch = 1
