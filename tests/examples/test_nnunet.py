# SPDX-License-Identifier: Apache-2.0
"""docs/examples/nnunet: nnU-Net's own command line, from the raw data set to masks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TRAINER = ROOT / "docs/examples/nnunet/trainers/nnUNetTrainerGRCSF.py"


def without_timm(folder):
    """A stand-in for timm, which nnU-Net's search for a trainer imports with all its networks.

    None of these is made here; nnU-Net as it is installed by default has timm.
    """
    placeholder = "import torch\n\n\ndef __getattr__(name):\n"
    placeholder += "    return type(name, (torch.nn.Module,), {})\n"
    for name in ("timm/__init__.py", "timm/models/__init__.py"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("timm/layers.py", "timm/models/eva.py"):
        (folder / name).write_text(placeholder)
    return folder


def fingerprint(folder, cases):
    """The data set's fingerprint, which nnU-Net keeps where there is one.

    Its own draws 100 million intensities for each channel, however small the data are, which takes
    longer than everything else here.
    """
    keys = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
    folder.mkdir(parents=True)
    description = {
        "foreground_intensity_properties_per_channel": {
            str(channel): dict.fromkeys(keys, 1.0) for channel in range(3)
        },
        "median_relative_size_after_cropping": 1.0,
        "shapes_after_crop": [[16, 16, 24]] * cases,
        "spacings": [[1.2, 1.0, 1.0]] * cases,
    }
    (folder / "dataset_fingerprint.json").write_text(json.dumps(description))


def test_plans_trains_and_predicts(example, tmp_path):
    if importlib.util.find_spec("timm") is None:
        example.environment["PYTHONPATH"] += f":{without_timm(tmp_path / 'standin')}"
    data, train = example.blocks
    fingerprint(example.folder / "preprocessed/Dataset501_Lesion", 5)
    output = example.run(data + train)

    raw = example.folder / "raw/Dataset501_Lesion"
    channels = json.loads((raw / "dataset.json").read_text())["channel_names"]
    assert channels == {"0": "T1", "1": "noNorm", "2": "noNorm"}
    maps = nib.load(example.folder / "maps/case1_residual.nii.gz")
    channel = nib.load(raw / "imagesTr/case1_0002.nii.gz")
    assert np.array_equal(channel.dataobj, maps.dataobj[..., 1])
    assert np.array_equal(channel.affine, nib.load(raw / "imagesTr/case1_0000.nii.gz").affine)

    assert "Using trainer 'nnUNetTrainerGRCSF_2epochs' from:" in output
    assert output.count("train_loss") == 2 and "Validation complete" in output
    trained = (
        example.folder
        / "results/Dataset501_Lesion"
        / ("nnUNetTrainerGRCSF_2epochs__nnUNetResEncUNetMPlans__3d_fullres/fold_0")
    )
    stored = torch.load(trained / "checkpoint_final.pth", weights_only=False, map_location="cpu")
    weights = stored["network_weights"]
    assert stored["trainer_name"] == "nnUNetTrainerGRCSF_2epochs"
    # The network sees the image alone, and the units have learned.
    assert weights["network.encoder.stem.convs.0.conv.weight"].shape[1] == 1
    assert (weights["rcu.0.map_weight"] != 0.5).all()
    assert len(list((trained / "validation").glob("*.nii.gz"))) == 1

    image = nib.load(raw / "imagesTs/case5_0000.nii.gz")
    mask = nib.load(example.folder / "predictions/case5.nii.gz")
    assert mask.shape == image.shape and np.allclose(mask.affine, image.affine, atol=1e-5)
    assert set(np.unique(mask.dataobj)) <= {0, 1}


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_images_without_a_fitting_map_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    def write(name, shape):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.ones(shape, np.float32), np.eye(4)), path)

    for name in ("a", "b", "c"):
        write(f"raw/imagesTr/{name}_0000.nii.gz", (4, 5, 6))
        write(f"raw/imagesTr/{name}_0001.nii.gz", (4, 5, 6))
    # As grcsf residuals names it, with another geometry, and none for c.
    write("maps/a_0000_residual.nii.gz", (4, 5, 6, 2))
    write("maps/b_residual.nii.gz", (4, 5, 7, 2))
    description = tmp_path / "raw/dataset.json"
    description.write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}}))
    script = module_of(ROOT / "docs/examples/nnunet/add_residual_maps.py")
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "maps"), str(tmp_path / "raw")])
    # Twice: the second time the maps are there already, and are no images.
    for _ in range(2):
        assert script.main() == 1
        names = json.loads(description.read_text())["channel_names"]
        assert list(names.values()) == ["T1", "T2", "noNorm", "noNorm"]
        written = sorted(path.name for path in (tmp_path / "raw/imagesTr").glob("*_000[2-9]*"))
        assert written == ["a_0002.nii.gz", "a_0003.nii.gz"]
        errors = capsys.readouterr().err
        assert "b_residual.nii.gz: has shape (4, 5, 7)" in errors
        assert "has no c_residual.nii.gz" in errors


@pytest.fixture(scope="module")
def trainers():
    return module_of(TRAINER)


def settings(*schemes):
    return SimpleNamespace(
        normalization_schemes=list(schemes),
        network_arch_class_name="dynamic_network_architectures.architectures.unet."
        "ResidualEncoderUNet",
        network_arch_init_kwargs={
            "n_stages": 2,
            "features_per_stage": [4, 8],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 2,
            "strides": [[1, 1, 1], [2, 2, 2]],
            "n_blocks_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1],
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"affine": True},
            "nonlin": "torch.nn.LeakyReLU",
        },
        network_arch_init_kwargs_req_import=["conv_op", "norm_op", "nonlin"],
    )


MAPS = ("ZScoreNormalization", "NoNormalization", "NoNormalization")


def test_compiled_as_nnunet_does_it(trainers):
    """nnU-Net compiles the trainer's network, and switches deep supervision in what is compiled."""
    trainer = object.__new__(trainers.nnUNetTrainerGRCSF)
    trainer.is_ddp = False
    network = trainer.build_network_architecture(None, settings(*MAPS), 3, 2, True).eval()
    trainer.network = torch.compile(network, fullgraph=True, backend="eager")
    x = torch.rand(1, 3, 8, 8, 8)
    assert [tuple(out.shape) for out in trainer.network(x)] == [(1, 2, 8, 8, 8)]
    trainer.set_deep_supervision_enabled(False)
    torch.testing.assert_close(trainer.network(x), network(x))
    assert trainer.network(x).shape == (1, 2, 8, 8, 8)


def test_intensities_of_the_maps_are_left_alone(trainers):
    trainer = object.__new__(trainers.nnUNetTrainerGRCSF)
    trainer.configuration_manager = settings(*MAPS)
    torch.manual_seed(0)
    composed = trainer.get_training_transforms((8, 8, 8), (0.0, 0.0), None, (), False)
    wrapped = [t for t in composed.transforms if isinstance(t, trainers._OnImage)]
    # Noise, blur, brightness, contrast, low resolution, and gamma twice.
    assert len(wrapped) == 7
    image = torch.rand(3, 8, 8, 8)
    changed = 0
    for transform in wrapped:
        transform.transform.apply_probability = 1.0
        data = transform(image=image.clone(), segmentation=torch.zeros(1, 8, 8, 8))
        assert torch.equal(data["image"][1:], image[1:])
        changed += not torch.equal(data["image"][:1], image[:1])
    assert changed >= 4


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        (["ZScoreNormalization"], "expected image channels first and then the residual maps"),
        (["NoNormalization", "NoNormalization"], "expected image channels first"),
        (["NoNormalization", "ZScoreNormalization"], "expected image channels first"),
    ],
)
def test_channels_without_maps(trainers, schemes, message):
    with pytest.raises(ValueError, match=message):
        trainers.number_of_maps(settings(*schemes))
    assert trainers.number_of_maps(settings(*MAPS)) == 2


def test_cascades_are_refused(trainers):
    with pytest.raises(ValueError, match="cascade"):
        trainers.nnUNetTrainerGRCSF.build_network_architecture(None, settings(*MAPS), 4, 2)
