# SPDX-License-Identifier: Apache-2.0
"""What a scanner shows of a head: contrasts, distractors, and the faults of the acquisition."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from grcsf_kernels.demo.synthetic.anatomy import Array, Head, Mask, draw_tubes, smooth_field


class T1:
    """T1 MRI of the brain, skull-stripped: fluid dark, white matter bright.

    Args:
        rng: of the tissues' contrast and the vessels: they belong to the subject.
        head: the anatomy.

    Attributes:
        signal: [X, Y, Z] without noise, white matter about 1; lesions are drawn into it.
        may_have_lesions: voxels that are mostly gray or white matter.
        lesion_target: the signal of fluid, which an old infarct turns into.
        strengths: of lesions, from barely visible (about twice the noise) to plain.
    """

    strengths = (0.12, 0.95)

    def __init__(self, rng: np.random.Generator, head: Head) -> None:
        gray, fluid = rng.uniform(0.62, 0.84), rng.uniform(0.15, 0.4)
        self._head = head
        self.lesion_target = fluid
        tissues = head.white + gray * head.gray + fluid * head.fluid
        starts = np.argwhere(head.brain)
        starts = starts[rng.integers(len(starts), size=rng.integers(4, 13))]
        vessels = draw_tubes(rng, head.brain.shape, starts, head.spacing)
        bright = rng.uniform(1.0, 1.4)
        signal = tissues + rng.uniform(0.5, 1.5) * head.detail
        signal = signal + vessels * np.maximum(bright - signal, 0)
        self.signal: Array = np.where(head.brain, signal, 0).astype(np.float32)
        self.may_have_lesions: Mask = head.brain & (head.gray + head.white > 0.5)

    def acquire(self, rng: np.random.Generator) -> Array:
        """The image, 0 outside of the brain.

        Blurred by up to 1 mm (standard deviation) along one axis more than along the others, bent
        by a bias field of 2 to 15 %, with stripes of motion, Rician noise of 1 to 4 % and a gain.
        """
        shape, spacing = self.signal.shape, self._head.spacing
        blur = rng.uniform(0, 0.4, 3)
        blur[rng.integers(3)] += rng.uniform(0, 1.0)
        image = ndimage.gaussian_filter(self.signal, blur / spacing)
        image = image * np.exp(rng.uniform(0.02, 0.15) * smooth_field(rng, shape, 4))
        image = image + _stripes(rng, self._head, rng.uniform(0.0, 0.04))
        sigma = np.float32(rng.uniform(0.01, 0.04))
        real, imaginary = rng.standard_normal((2, *shape), np.float32) * sigma
        gain = np.exp(rng.uniform(np.log(100), np.log(3000)))
        shown = np.hypot(np.maximum(image, 0) + real, imaginary) * gain
        return np.where(self._head.brain, shown, 0).astype(np.float32)


class CT:
    """CT of the head without contrast in the brain: calcifications bright, bone brighter.

    Args:
        rng: of skull, spurs and vessels: they belong to the subject.
        head: the anatomy; what the template does not have of a skull is a shell around it.

    Attributes:
        signal: [X, Y, Z] in Hounsfield units, without noise.
        may_have_lesions: brain at some distance from bone.
        lesion_target: of the densest calcification, Hounsfield units.
        strengths: of lesions, as shares of ``lesion_target``.
    """

    strengths = (0.12, 0.9)
    lesion_target = 900.0

    def __init__(self, rng: np.random.Generator, head: Head) -> None:
        self._head = head
        outside = ndimage.distance_transform_edt(~head.brain, sampling=head.spacing)
        inner, thickness = rng.uniform(0.5, 2.5), rng.uniform(5, 9)
        skull = (outside > inner) & (outside <= inner + thickness)
        scalp = (outside > inner + thickness) & (outside <= inner + thickness + 6)
        signal = 36 * head.gray + 28 * head.white + 8 * head.fluid + 20 * head.detail
        signal = np.where(head.brain | (outside <= inner), np.maximum(signal, 5), -1000)
        signal = np.where(scalp, 20, signal)
        signal = np.where(skull, rng.uniform(700, 1500) * (1 + 0.2 * _texture(rng, head)), signal)

        # Spurs grow inwards from the skull's inner face, vessels anywhere: both are as bright as
        # calcifications. Only what they are connected to, and their shape, tells them apart.
        depth = ndimage.distance_transform_edt(head.brain, sampling=head.spacing)
        rim = np.argwhere(head.brain & (depth <= 2 * head.spacing.max()))
        places = rim[rng.integers(len(rim), size=rng.integers(6, 19))]
        spurs = draw_tubes(rng, head.brain.shape, places, head.spacing, (1.0, 3.0), (3.0, 12.0))
        signal = signal + spurs * np.maximum(rng.uniform(150, 900) - signal, 0)
        starts = np.argwhere(head.brain & (depth > 10))
        starts = starts[rng.integers(len(starts), size=rng.integers(3, 11))]
        vessels = draw_tubes(rng, head.brain.shape, starts, head.spacing)
        signal = signal + vessels * np.maximum(rng.uniform(80, 300) - signal, 0)
        self.signal: Array = signal.astype(np.float32)
        bone = ndimage.binary_dilation((spurs > 0.05) | (vessels > 0.05), iterations=2)
        self.may_have_lesions: Mask = head.brain & (depth > 6) & ~bone

    def acquire(self, rng: np.random.Generator) -> Array:
        """The image in Hounsfield units: blurred by up to 0.6 mm, streaks, noise of 3 to 15."""
        shape, spacing = self.signal.shape, self._head.spacing
        image = ndimage.gaussian_filter(self.signal, rng.uniform(0.2, 0.6) / spacing)
        image = image + _stripes(rng, self._head, rng.uniform(0, 15))
        image = image + rng.standard_normal(shape, np.float32) * np.float32(rng.uniform(3, 15))
        return np.maximum(image, -1024).astype(np.float32)


def _texture(rng: np.random.Generator, head: Head) -> Array:
    return np.clip(smooth_field(rng, head.brain.shape, 20), -2, 2)


def _stripes(rng: np.random.Generator, head: Head, amplitude: float) -> Array:
    """Waves across the head, 5 to 20 mm long, stronger in some regions than in others."""
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    waves = 2 * np.pi * direction * head.spacing / rng.uniform(5, 20)
    first, second, third = (
        wave * np.arange(size) for wave, size in zip(waves, head.brain.shape, strict=True)
    )
    phase = first[:, None, None] + second[:, None] + third + rng.uniform(0, 2 * np.pi)
    where = np.clip(smooth_field(rng, head.brain.shape, 4), 0, 2)
    return (amplitude * where * np.sin(phase)).astype(np.float32)
