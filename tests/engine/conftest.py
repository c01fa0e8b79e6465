# SPDX-License-Identifier: Apache-2.0
"""A tiny data set of blobs, and settings that train on it in a second."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grcsf_kernels.engine import (
    AutoencoderConfig,
    DataConfig,
    ModelConfig,
    OptimizationConfig,
    PredictConfig,
    PretrainConfig,
    ResidualsConfig,
    TrainConfig,
)
from grcsf_kernels.engine.training.pretrain import build as build_autoencoder
from grcsf_kernels.engine.training.train import build as build_network
from grcsf_kernels.models.files import save_checkpoint

# Left-anterior-superior, oblique, anisotropic: everything that a careless reader gets wrong.
AFFINE = np.array(
    [[-0.9, 0.1, 0.0, 20.0], [0.1, 0.9, 0.2, -30.0], [0.0, -0.2, 1.9, 5.0], [0.0, 0.0, 0.0, 1.0]]
)


def write(path, array, affine=AFFINE):
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def blob(seed, shape=(21, 18, 13)):
    """A dim ellipsoid with a bright lesion in it."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    image = np.where((grid**2).sum(0) < 0.9, 100 + 5 * rng.standard_normal(shape), 0)
    center = rng.uniform(-0.3, 0.3, 3)[:, None, None, None]
    label = ((grid - center) ** 2).sum(0) < 0.08
    return (image + 80 * label).astype(np.float32), label.astype(np.uint8)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are split by threads: with one, what a training reaches is the same on every run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cases(folder):
    """Three cases: <case>_image.nii.gz and <case>_label.nii.gz."""
    for index in range(3):
        image, label = blob(index)
        write(folder / f"case{index}_image.nii.gz", image)
        write(folder / f"case{index}_label.nii.gz", label)
    return folder


@pytest.fixture
def folder(tmp_path):
    """The folder of :func:`cases`."""
    return cases(tmp_path / "data")


def optimization(**changes):
    values = {"epochs": 2, "steps_per_epoch": 2, "batch_size": 1, "device": "cpu"}
    return OptimizationConfig(**(values | changes))


def pretrain_config(**changes):
    return PretrainConfig(
        data=DataConfig(),
        model=AutoencoderConfig(
            patch_size=(4, 4, 4),
            embed_dim=24,
            depth=1,
            num_heads=2,
            decoder_dim=24,
            decoder_depth=1,
            decoder_heads=2,
        ),
        optimization=optimization(**changes),
        crop_size=(16, 16, 8),
    )


def train_config(use_rcu=True, use_gcu=True, **changes):
    return TrainConfig(
        data=DataConfig(),
        model=ModelConfig(
            channels=(4, 8, 8),
            patch_size=(4, 4, 4),
            num_heads=2,
            head_dim=4,
            use_rcu=use_rcu,
            use_gcu=use_gcu,
        ),
        optimization=optimization(**changes),
        crop_size=(16, 16, 8),
        validation_fraction=0.0,
    )


def residuals_config():
    return ResidualsConfig(device="cpu")


def make_model(path, seed=0, use_rcu=False, data=None):
    """A network that was not trained: what it gives differs between voxels, and that is enough."""
    config = train_config(use_rcu=use_rcu)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_network(config, 2)
    return save_checkpoint(path, model, data or config.data, config.crop_size)


def make_autoencoders(folder):
    """Two that were not trained, for the residual maps of :func:`make_model`'s network."""
    paths, config = [], pretrain_config()
    for ratio in (0.5, 0.75):
        torch.manual_seed(int(ratio * 100))
        model = build_autoencoder(config, ratio)
        path = folder / f"mae_{ratio}.safetensors"
        paths.append(save_checkpoint(path, model, config.data, config.crop_size))
    return paths


def rewrite(path, description=lambda description: None, weights=lambda weights: None):
    """Change a model file, and write it as earlier versions did: without a checksum."""
    with safe_open(path, "pt") as file:
        text = file.metadata()["grcsf"]
    content, tensors = json.loads(text), load_file(path)
    content.pop("format", None)
    content.pop("sha256", None)
    description(content)
    weights(tensors)
    path.unlink()  # a mapped file must not change under its reader
    save_file(tensors, path, metadata={"grcsf": json.dumps(content)})
    return path


@pytest.fixture
def model(tmp_path):
    """A file of :func:`make_model`."""
    return make_model(tmp_path / "model.safetensors")


def predict_config(**changes):
    return PredictConfig(device="cpu", residuals=residuals_config(), **changes)


def load(path):
    """The voxels of a file."""
    return np.asarray(nib.load(path).dataobj)
