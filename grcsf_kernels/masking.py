# SPDX-License-Identifier: Apache-2.0
"""Which patches a masked autoencoder does not see.

Masks are always drawn on the CPU, so that a seed gives the same masks on every device.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def _check(mask_ratio: float, draws: int, generator: torch.Generator | None) -> None:
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio is {mask_ratio}, expected a number between 0 and 1")
    if draws < 1:
        raise ValueError(f"draws is {draws}, expected at least 1")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator is on {generator.device}, expected a CPU generator: masks are drawn on the "
            "CPU, so that a seed gives the same masks on every device"
        )


def _permutations(rows: int, patches: int, generator: torch.Generator | None) -> Tensor:
    return torch.rand(rows, patches, generator=generator, dtype=torch.float64).argsort(dim=1)


def random_masks(
    batch: int,
    num_patches: int,
    mask_ratio: float,
    draws: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Independent masks that each hide the same number of patches.

    Args:
        batch: samples B.
        num_patches: patches L of a sample, at least 2.
        mask_ratio: the share that is hidden, between 0 and 1; at least one patch is hidden and at
            least one is shown.
        draws: masks N for each sample.
        generator: a CPU generator; None: torch's default one.

    Returns:
        [N, B, L] bool on the CPU, true where a patch is hidden.

    Raises:
        ValueError: a number out of its range, or a generator that is not on the CPU.
    """
    _check(mask_ratio, draws, generator)
    if num_patches < 2:
        raise ValueError(
            f"num_patches is {num_patches}, expected at least 2: one hidden, one shown"
        )
    count = min(max(round(mask_ratio * num_patches), 1), num_patches - 1)
    hidden = torch.zeros(draws * batch, num_patches, dtype=torch.bool)
    hidden.scatter_(1, _permutations(draws * batch, num_patches, generator)[:, :count], True)
    return hidden.view(draws, batch, num_patches)


def masks_per_round(mask_ratio: float) -> int:
    """How many complementary masks hide every patch equally often: 2 at 50 %, 4 at 75 %.

    Raises:
        ValueError: the ratio is not a fraction with a denominator of at most 16.
    """
    fraction = Fraction(mask_ratio).limit_denominator(16)
    if not 0 < mask_ratio < 1 or abs(float(fraction) - mask_ratio) > 1e-6:
        raise ValueError(
            f"mask_ratio is {mask_ratio}, expected a fraction between 0 and 1 with a denominator "
            "of at most 16 for complementary masks, such as 0.5 or 0.75"
        )
    return fraction.denominator


def complementary_masks(
    batch: int,
    num_patches: int,
    mask_ratio: float,
    draws: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Masks in rounds that hide every patch equally often.

    For a ratio of a / b in lowest terms a round has b masks. The patches of a sample are shuffled
    and dealt to b groups, and mask j hides the a groups from j on. At 50 % two masks hide every
    patch once; at 75 % four masks show every patch once.

    Args:
        batch: samples B.
        num_patches: patches L of a sample, at least b.
        mask_ratio: the share that is hidden.
        draws: masks N for each sample, a multiple of b.
        generator: a CPU generator; None: torch's default one.

    Returns:
        [N, B, L] bool on the CPU, true where a patch is hidden. Within a draw, every sample has
        the same number of hidden patches.

    Raises:
        ValueError: a number out of its range, or a generator that is not on the CPU.
    """
    _check(mask_ratio, draws, generator)
    groups = masks_per_round(mask_ratio)
    hiding = round(mask_ratio * groups)
    if draws % groups:
        raise ValueError(
            f"draws is {draws}, expected a multiple of {groups}: at a mask ratio of {mask_ratio} "
            f"{groups} complementary masks make a round"
        )
    if num_patches < groups:
        raise ValueError(f"num_patches is {num_patches}, expected at least {groups}")
    rounds = draws // groups
    order = _permutations(rounds * batch, num_patches, generator)
    dealt = (torch.arange(num_patches) % groups).expand_as(order)
    group = torch.empty_like(order).scatter_(1, order, dealt).view(rounds, 1, batch, num_patches)
    first = torch.arange(groups).view(1, groups, 1, 1)
    return ((group - first) % groups < hiding).flatten(0, 1)
