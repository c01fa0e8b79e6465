# SPDX-License-Identifier: Apache-2.0
"""Synthetic subjects: same seed same subject; lesions inside the brain, sized as said, dark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

nib = pytest.importorskip("nibabel", reason="needs the extra train")
pytest.importorskip("nilearn", reason="needs the extra demo")

from grcsf_kernels.demo import synthetic  # noqa: E402
from grcsf_kernels.demo.synthetic.anatomy import deformed_head  # noqa: E402
from grcsf_kernels.demo.synthetic.lesions import grow_lesion  # noqa: E402

SPACING = 4.0


@pytest.mark.parametrize("seed", [0, (3, 1)])
def test_same_seed_same_subject(seed: int | tuple[int, int]) -> None:
    first = synthetic.make_subject(seed, SPACING)
    second = synthetic.make_subject(seed, SPACING)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_seeds_differ_in_anatomy_and_lesions() -> None:
    (image, label, affine), (other, other_label, other_affine) = (
        synthetic.make_subject(seed, SPACING) for seed in (0, 1)
    )
    np.testing.assert_array_equal(affine, other_affine)
    assert ((image > 0) != (other > 0)).mean() > 0.005  # the shape of the brain
    assert (label != other_label).any()
    both = (image > 0) & (other > 0)
    correlation = np.corrcoef(image[both], other[both])[0, 1]
    assert 0.2 < correlation < 0.99  # both are heads, neither is a copy


@pytest.mark.parametrize("spacing", [4.0, 8.0, (3.0, 4.0, 5.0)])
def test_grid_covers_the_template(spacing: float | tuple[float, ...]) -> None:
    image, label, affine = synthetic.make_subject(0, spacing)
    size = np.broadcast_to(spacing, 3)
    assert image.shape == label.shape == tuple(np.ceil(np.array([197, 233, 189]) / size))
    assert image.dtype == np.float32
    assert label.dtype == np.uint8
    np.testing.assert_allclose(np.diag(affine)[:3], size)
    # The outer corner of voxel 0 is that of the template's: (-98, -134, -72) less half a mm.
    corner = affine @ [-0.5, -0.5, -0.5, 1]
    np.testing.assert_allclose(corner[:3], [-98.5, -134.5, -72.5])
    # The brain's center of gravity lies where the template's does, within a centimetre.
    center = affine @ [*ndimage.center_of_mass(image > 0), 1]
    np.testing.assert_allclose(center[:3], [0, -20, 12], atol=10)


def test_lesions_lie_in_the_brain_apart_and_in_range() -> None:
    voxel = SPACING**3
    volumes = []
    for seed in range(8):
        image, label, _ = synthetic.make_subject(seed, SPACING, lesions=(1, 3))
        assert (image[label > 0] > 0).all()
        assert not image[image <= 0].any()  # air is exactly 0
        parts, count = ndimage.label(label, np.ones((3, 3, 3)))
        assert 1 <= count <= 3
        volumes += [int(n) * voxel for n in np.bincount(parts.ravel())[1:]]
    low, high = synthetic.LESION_VOLUME_MM3["t1"]
    assert min(volumes) >= min(low, voxel)
    assert max(volumes) <= high + voxel
    assert max(volumes) > 20 * min(volumes)  # small and large ones


@pytest.mark.parametrize("volume", [1.0, 30.0, 700.0, 50_000.0])
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.5, 2.0, 6.5)])
def test_volume_is_met_in_one_piece(volume: float, spacing: tuple[float, ...]) -> None:
    size = np.array(spacing)
    free = np.ones([int(100 // s) for s in spacing], bool)
    for seed in range(3):
        lesion = grow_lesion(np.random.default_rng(seed), free, volume, size)
        assert lesion.sum() == max(1, round(volume / size.prod()))
        assert ndimage.label(lesion)[1] == 1


def test_lesion_is_darker_than_the_same_head_without_it() -> None:
    for seed in range(4):
        image, label, _ = synthetic.make_subject(seed, SPACING, lesions=(1, 1))
        healthy, empty, _ = synthetic.make_subject(seed, SPACING, lesions=(0, 0))
        assert not empty.any()
        lesion = label > 0
        assert image[lesion].mean() < 0.95 * healthy[lesion].mean()
        far = ~ndimage.binary_dilation(lesion, iterations=4)
        np.testing.assert_allclose(image[far], healthy[far], rtol=1e-4)


def test_dataset_files(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    paths = synthetic.make_dataset(
        tmp_path / "new" / "data",
        2,
        seed=5,
        spacing=8.0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]
    assert sorted(p.name for p in (tmp_path / "new" / "data").iterdir()) == [
        "subject000_image.nii.gz",
        "subject000_label.nii.gz",
        "subject001_image.nii.gz",
        "subject001_label.nii.gz",
    ]
    image, label, affine = synthetic.make_subject((5, 1), 8.0)
    stored = nib.load(paths[1])
    stored_label = nib.load(str(paths[1]).replace("_image", "_label"))
    np.testing.assert_array_equal(stored.get_fdata(dtype=np.float32), image)
    np.testing.assert_array_equal(np.asarray(stored_label.dataobj), label)
    np.testing.assert_allclose(stored.affine, affine)
    np.testing.assert_allclose(stored_label.affine, affine)
    assert stored.header.get_zooms() == (8.0, 8.0, 8.0)
    assert stored.header.get_xyzt_units()[0] == "mm"


def test_healthy_dataset_has_no_labels(tmp_path: Path) -> None:
    paths = synthetic.make_dataset(tmp_path, 1, spacing=8.0, lesions=(0, 0))
    assert list(tmp_path.iterdir()) == paths


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"spacing": 0.0}, "spacing"),
        ({"lesions": (3, 1)}, "lesions"),
        ({"lesions": (-1, 1)}, "lesions"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        synthetic.make_subject(0, **arguments)
    with pytest.raises(ValueError, match="count"):
        synthetic.make_dataset(Path("unused"), -1)


def test_heads_differ_in_ventricles_and_cortex() -> None:
    heads = [deformed_head(np.random.default_rng(seed), np.full(3, SPACING)) for seed in range(6)]
    ventricles = []
    for head in heads:
        np.testing.assert_allclose(head.gray + head.white + head.fluid, head.brain, atol=1e-6)
        indices = np.moveaxis(np.indices(head.brain.shape), 0, -1)
        places = indices @ head.affine[:3, :3].T + head.affine[:3, 3]
        near = np.linalg.norm(places - [0, -15, 15], axis=-1) < 30
        ventricles.append(head.fluid[near].sum())
    assert max(ventricles) > 1.3 * min(ventricles)


def test_lesions_go_from_barely_visible_to_plain() -> None:
    changes = []
    for seed in range(24):
        image, label, _ = synthetic.make_subject(seed, SPACING, lesions=(1, 1))
        healthy, _, _ = synthetic.make_subject(seed, SPACING, lesions=(0, 0))
        changes.append(1 - image[label > 0].mean() / healthy[label > 0].mean())
    assert min(changes) < 0.1
    assert max(changes) > 0.4


def test_ct_has_bright_lesions_in_the_brain_and_bone_as_bright() -> None:
    volumes = []
    for seed in range(6):
        image, label, affine = synthetic.make_subject(seed, 2.0, (1, 4), modality="ct")
        healthy, _, _ = synthetic.make_subject(seed, 2.0, (0, 0), modality="ct")
        head = deformed_head(np.random.default_rng(seed).spawn(3)[0], np.full(3, 2.0))
        lesion = label > 0
        assert lesion.any()
        assert head.brain[lesion].all()
        assert image[lesion].mean() > healthy[lesion].mean() + 30
        assert image.min() >= -1024
        assert np.median(image[0]) == pytest.approx(-1000, abs=50)  # air at the face
        # In the brain's box there is bone: what is bright is mostly no lesion.
        bright = image > image[lesion].mean()
        assert (bright & ~lesion).sum() > (bright & lesion).sum()
        parts, _ = ndimage.label(lesion, np.ones((3, 3, 3)))
        volumes += [int(n) * 8 for n in np.bincount(parts.ravel())[1:]]
        np.testing.assert_allclose(np.diag(affine)[:3], 2)
    assert max(volumes) <= synthetic.LESION_VOLUME_MM3["ct"][1] + 8


def test_unknown_modality() -> None:
    with pytest.raises(ValueError, match="modality must be 't1' or 'ct', got 'pet'"):
        synthetic.make_subject(0, 8.0, modality="pet")
