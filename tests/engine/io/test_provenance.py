# SPDX-License-Identifier: Apache-2.0
"""Masks and maps say what they were made from, and others are not used in their place."""

from __future__ import annotations

import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from engine.conftest import (
    blob,
    cases,
    load,
    make_autoencoders,
    make_model,
    predict_config,
    residuals_config,
    train_config,
    write,
)

from grcsf_kernels import engine
from grcsf_kernels.engine.io.fingerprint import Fingerprint, image_digest, read_origin


def predicted(folder, tmp_path):
    model = make_model(tmp_path / "m.safetensors", use_rcu=True)
    return engine.predict(
        folder, model, tmp_path / "masks", predict_config(), residuals=tmp_path / "maps"
    )


def trained(folder, tmp_path):
    report = engine.Report()
    config = train_config(epochs=1, cache_dir=str(tmp_path / "cache"))
    engine.train(folder, tmp_path / "run", config, tmp_path / "maps", report)
    return report


USES = {"predict": predicted, "train": trained}


@pytest.fixture
def maps(tmp_path):
    """Cases, autoencoders, and the maps of both."""
    folder, paths = cases(tmp_path / "data"), make_autoencoders(tmp_path)
    engine.cache_residuals(folder, paths, tmp_path / "maps", residuals_config())
    return folder, paths


@pytest.mark.parametrize("use", USES)
class TestMapsOfOthers:
    def test_maps_of_other_settings_are_refused(self, maps, tmp_path, monkeypatch, use, capsys):
        """What a run of ``grcsf residuals`` leaves that was stopped after its first case."""
        folder, paths = maps
        settings = residuals_config()
        settings.overlap = 0.25
        monkeypatch.setattr(
            "grcsf_kernels.engine.inference.residuals.shard", lambda found: found[:1]
        )
        engine.cache_residuals(folder, paths, tmp_path / "maps", settings)
        said = " ".join(capsys.readouterr().err.split())
        assert "residuals.json: the maps there were made with overlap 0.5 (now 0.25)" in said
        report = USES[use](folder, tmp_path)
        assert len(report.failed) == 2
        for number, (_, reason) in zip((1, 2), report.failed, strict=True):
            path = tmp_path / f"maps/case{number}_residual.nii.gz"
            assert reason.startswith(f"{path}: was made with other settings or models than")
            assert "run grcsf residuals on this data" in reason

    def test_maps_of_another_image_are_refused(self, maps, tmp_path, use):
        """Of the same name and geometry."""
        folder, _ = maps
        write(folder / "case1_image.nii.gz", blob(7)[0])
        ((_, reason),) = USES[use](folder, tmp_path).failed
        assert f"was made from another image than {folder / 'case1_image.nii.gz'}" in reason
        assert reason.startswith(str(tmp_path / "maps/case1_residual.nii.gz"))

    def test_without_a_description_of_the_folder_most_maps_decide(self, maps, tmp_path, use):
        folder, paths = maps
        other = engine.ResidualsConfig(device="cpu", seed=5)
        engine.cache_residuals(folder / "case0_image.nii.gz", paths, tmp_path / "other", other)
        shutil.copy(tmp_path / "other/case0_residual.nii.gz", tmp_path / "maps")
        (tmp_path / "maps/residuals.json").unlink()
        ((_, reason),) = USES[use](folder, tmp_path).failed
        assert "case0_residual.nii.gz: was made with other settings" in reason

    def test_maps_that_say_nothing_are_used_with_a_word(self, maps, tmp_path, use, capsys):
        folder, _ = maps
        for path in sorted((tmp_path / "maps").glob("*.nii.gz")):
            image = nib.load(path)
            array = np.asarray(image.dataobj)
            image.header["descrip"] = "grcsf 0.1.0 " + 40 * "a"  # as it was
            nib.save(nib.Nifti1Image(array, image.affine, image.header), path)
        capsys.readouterr()
        assert not USES[use](folder, tmp_path).failed
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("does not say from which image") == 1

    @pytest.mark.parametrize("value", [-3e38, 1e6, float("nan")])
    def test_maps_out_of_range_are_refused(self, maps, tmp_path, use, value):
        folder, _ = maps
        path = tmp_path / "maps/case1_residual.nii.gz"
        image = nib.load(path)
        array = np.asarray(image.dataobj).copy()
        array[3, 4, 5, 1] = value
        nib.save(nib.Nifti1Image(array, image.affine, image.header), path)
        ((_, reason),) = USES[use](folder, tmp_path).failed
        assert reason.startswith(f"{path}: ")
        assert not list(tmp_path.glob("masks/*case1*"))


class TestFinished:
    def test_an_image_that_is_compressed_again_is_the_same(self, folder, tmp_path, model):
        one = folder / "case0_image.nii.gz"
        plain = tmp_path / "plain.nii"
        plain.write_bytes(gzip.decompress(one.read_bytes()))
        again = tmp_path / "again.nii.gz"
        again.write_bytes(gzip.compress(plain.read_bytes(), 1))
        assert again.read_bytes() != one.read_bytes()
        assert image_digest([one]) == image_digest([plain]) == image_digest([again])
        other = folder / "case1_image.nii.gz"
        assert image_digest([one, other]) != image_digest([other, one]) != image_digest([one])

    def test_the_description_fits_a_header(self, folder, model, monkeypatch):
        monkeypatch.setattr(
            "grcsf_kernels.engine.io.fingerprint.__version__", "10.20.30rc4.dev5+abcdef"
        )
        description = Fingerprint(predict_config(), [model]).of(
            "case \udce4\n", [folder / "case0_image.nii.gz"], folder / "case1_image.nii.gz"
        )
        assert len(description) <= 79 and len(description.split()) == 5

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "header"])
    def test_a_damaged_mask_is_made_again_with_a_word(
        self, folder, tmp_path, model, capsys, damage
    ):
        out = tmp_path / "m"
        engine.predict(folder, model, out, predict_config())
        mask = out / "case1_mask.nii.gz"
        good, content = load(mask), mask.read_bytes()
        inside = bytearray(gzip.decompress(content))
        inside[70:72] = b"\x0f\x27"  # data type 9999
        mask.write_bytes(
            {
                "cut": content[:-20],
                "flipped": content[:60] + bytes([content[60] ^ 8]) + content[61:],
                "empty": b"",
                "text": b"not a volume",
                "header": gzip.compress(bytes(inside)),
            }[damage]
        )
        capsys.readouterr()
        report = engine.predict(folder, model, out, predict_config())
        assert len(report.done) == 3 and not report.failed
        assert f"{mask}: is damaged, and made again" in capsys.readouterr().err
        assert np.array_equal(load(mask), good)

    def test_damaged_maps_are_made_again_with_a_word(self, maps, tmp_path, capsys):
        folder, paths = maps
        path = tmp_path / "maps/case1_residual.nii.gz"
        good = load(path).tobytes()
        path.write_bytes(path.read_bytes()[:300])
        (tmp_path / "maps/residuals.json").write_text('{"autoencoders": 3}')
        capsys.readouterr()
        report = engine.cache_residuals(folder, paths, tmp_path / "maps", residuals_config())
        assert len(report.done) == 3 and not report.failed
        said = capsys.readouterr().err
        assert f"{path}: is damaged, and made again" in said
        assert "residuals.json: is damaged" in said
        assert load(path).tobytes() == good
        assert "run" in json.loads((tmp_path / "maps/residuals.json").read_text())

    def test_a_case_that_fails_says_that_its_older_mask_is_of_another_call(
        self, folder, tmp_path, model
    ):
        out = tmp_path / "m"
        engine.predict(folder, model, out, predict_config())
        image = folder / "case1_image.nii.gz"
        image.write_bytes(image.read_bytes()[:700])
        report = engine.predict(folder, model, out, predict_config(threshold=0.4))
        ((path, reason),) = report.failed
        assert path == image
        assert f"{out / 'case1_mask.nii.gz'} is there from an earlier call" in reason

    def test_the_order_of_autoencoders_makes_no_other_maps(self, maps, tmp_path):
        folder, paths = maps
        path = tmp_path / "maps/case0_residual.nii.gz"
        before = path.stat().st_mtime_ns
        engine.cache_residuals(folder, paths[::-1], tmp_path / "maps", residuals_config())
        assert path.stat().st_mtime_ns == before
        assert read_origin(path).image == image_digest([folder / "case0_image.nii.gz"])
