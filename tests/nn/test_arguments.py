# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of modules and networks: what came, what was expected, and the remedy."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DynUNet

import grcsf_kernels
from grcsf_kernels.models import GRCSF, MaskedAutoencoder, ResidualUNet
from grcsf_kernels.nn import GCU, RCU, CompensatedUNet, SqueezeExcitation

X, MAP = torch.zeros(1, 4, 4, 4), torch.zeros(1, 1, 4, 4)
REMEDY = r"expected one tensor \[B, num_maps, \*S\]: torch.cat\(maps, dim=1\)"


def compensated(**options):
    return CompensatedUNet(DynUNet(2, 1, 2, [3] * 3, [1, 2, 2], [2] * 2), **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # MONAI's networks begin with the number of axes.
        (
            lambda: GCU(3, 32)(torch.zeros(1, 32, 4, 4, 4), torch.zeros(1, 32, 2, 2, 2)),
            ValueError,
            r"skip has shape \(1, 32, 4, 4, 4\), expected \[B, 3, .*not the number of spatial axes",
        ),
        (lambda: GRCSF(rcu_levels=0), TypeError, r"rcu_levels is 0, .*: \(0,\) for level 0"),
        (lambda: compensated(rcu_levels=1), TypeError, r"rcu_levels is 1, .*: \(1,\) for level 1"),
        (lambda: compensated(rcu_levels=(0.5,)), TypeError, r"rcu_levels is \(0.5,\)"),
        (lambda: RCU(4)(X, [MAP, MAP]), TypeError, f"RCU: maps is a list, {REMEDY}"),
        (
            lambda: GRCSF(channels=(4, 8), spatial_dims=2)(MAP, (MAP, MAP)),
            TypeError,
            f"GRCSF: maps is a tuple, {REMEDY}",
        ),
        (lambda: compensated()([MAP, MAP]), TypeError, "CompensatedUNet: x is a list"),
        (lambda: RCU(4)(None, MAP), TypeError, "RCU: x is a NoneType"),
        (lambda: GCU(4)(X, None), TypeError, "GCU: deep is a NoneType"),
        (lambda: GCU(4)(X, X[0]), ValueError, "GCU: deep has shape"),
        (
            lambda: GCU(4)(X, torch.zeros(1, 4, 2, 2, 2)),
            ValueError,
            "GCU: deep has shape .* number of axes of skip",
        ),
        (lambda: GCU(4)(X, X.repeat(2, 1, 1, 1)), ValueError, "deep has shape .* the batch"),
        (lambda: GCU(4.0), TypeError, "channels is 4.0, a float, expected an integer >= 1"),
        (lambda: GCU(True), TypeError, "channels is True, a bool"),
        (lambda: GCU(4, -1), ValueError, "deep_channels is -1, expected at least 1"),
        (lambda: GCU(4, reduction=0.5), TypeError, "GCU: reduction is 0.5"),
        (lambda: SqueezeExcitation(4, "2"), TypeError, "reduction is '2', a str"),
        (lambda: RCU(4, num_heads=-1), ValueError, "num_heads is -1"),
        (lambda: RCU(4, head_dim=8.0), TypeError, "head_dim is 8.0"),
        (lambda: RCU(4, patch_size=2.5), TypeError, "RCU: patch_size is 2.5"),
        (lambda: RCU(4, patch_size=(2, 0)), ValueError, r"RCU: patch_size is \(2, 0\)"),
        (lambda: ResidualUNet(1.0), TypeError, "ResidualUNet: in_channels is 1.0"),
        (lambda: ResidualUNet(channels=(4, 8.0)), TypeError, r"channels\[1\] is 8.0"),
        (lambda: GRCSF(channels=4), ValueError, "channels is 4, expected at least two levels"),
        (lambda: MaskedAutoencoder(depth=-1), ValueError, "depth is -1"),
        (lambda: MaskedAutoencoder(embed_dim=48.0), TypeError, "embed_dim is 48.0"),
        (lambda: MaskedAutoencoder(num_heads=0), ValueError, "num_heads is 0"),
    ],
)
def test_errors_say_what_came_what_was_expected_and_the_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_three_channels_are_three_channels():
    """What the hint for MONAI's habit guesses is a legal unit."""
    unit = GCU(3, 32)
    assert unit(torch.zeros(1, 3, 4, 4), torch.zeros(1, 32, 2, 2)).shape == (1, 3, 4, 4)


def test_rooms_that_are_loaded_late_are_listed():
    assert {"nn", "models", "gcu"} <= set(dir(grcsf_kernels))
