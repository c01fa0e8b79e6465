# SPDX-License-Identifier: Apache-2.0
"""``residual_map`` on the native kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from grcsf_kernels.native import capsule, library, resources, result_like, sizes_3d, volume


def forward(
    image: Tensor,
    prediction: Tensor,
    hidden: Tensor | None,
    patch_size: Sequence[int],
    normalized_target: bool,
    average: str,
    eps: float,
) -> Tensor:
    """``residual`` [B, C, *S]; see :func:`grcsf_kernels.residual_map`."""
    residual = result_like(image)
    library().residual_map_forward(
        capsule(volume(image)),
        capsule(prediction),
        capsule(hidden),
        sizes_3d(list(patch_size)),
        normalized_target,
        average == "reconstructions",
        eps,
        resources(image),
        capsule(volume(residual)),
    )
    return residual


def backward(
    grad_residual: Tensor,
    image: Tensor,
    prediction: Tensor,
    hidden: Tensor | None,
    patch_size: Sequence[int],
    normalized_target: bool,
    average: str,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of image and prediction (None where not needed)."""
    grad_image = result_like(image) if needs[0] else None
    grad_prediction = result_like(prediction) if needs[1] else None
    library().residual_map_backward(
        capsule(volume(image)),
        capsule(prediction),
        capsule(hidden),
        sizes_3d(list(patch_size)),
        normalized_target,
        average == "reconstructions",
        eps,
        resources(image),
        capsule(volume(grad_residual)),
        capsule(None if grad_image is None else volume(grad_image)),
        capsule(grad_prediction),
    )
    return grad_image, grad_prediction
