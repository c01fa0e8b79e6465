# SPDX-License-Identifier: Apache-2.0
"""Exported files give the library's output in other runtimes, in any batch, or are not kept."""

from __future__ import annotations

import json
import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from grcsf_kernels.cli.commands import app
from grcsf_kernels.engine import DataConfig, InputError, export_model
from grcsf_kernels.engine.inference import export as export_module
from grcsf_kernels.models import GRCSF, MaskedAutoencoder
from grcsf_kernels.reference import export as exportable
from grcsf_kernels.reference import gcu, rcu

CROP = (8, 8, 7)  # neither levels nor patches divide it everywhere


def save(tmp_path, model, crop=CROP):
    data = DataConfig(spacing=(1.0, 1.0, 2.0))
    return model.save_pretrained(tmp_path / "m.safetensors", preprocessing=data, crop_size=crop)


def network(**options):
    return GRCSF(channels=(4, 8), num_heads=2, head_dim=4, rcu_levels=(0,), **options)


def run_onnx(path, **inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == inputs.keys()
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.as_tensor(output), session


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_network_in_onnx_runtime(tmp_path):
    model = network(in_channels=2, patch_size=4)
    path = save(tmp_path, model)
    result = CliRunner().invoke(app, ["export", str(path), "-o", str(tmp_path / "m.onnx")])
    assert result.exit_code == 0, result.output
    image, residual = torch.randn(2, 2, *CROP), torch.rand(2, 2, *CROP)
    found, session = run_onnx(tmp_path / "m.onnx", image=image, maps=residual)
    with torch.no_grad():
        close(found, model.eval()(image, residual))
    description = json.loads(session.get_modelmeta().custom_metadata_map["grcsf"])
    assert description["crop_size"] == list(CROP) and description["kind"] == "GRCSF"
    assert description["data"]["spacing"] == [1.0, 1.0, 2.0]
    assert [value.name for value in session.get_outputs()] == ["logits"]


def test_the_backbone_as_a_program(tmp_path):
    model = network(use_gcu=False, use_rcu=False)
    path = export_model(save(tmp_path, model), tmp_path / "m.pt2")
    extra = {"grcsf.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert not [node for node in program.graph.nodes if "grcsf" in str(node.target)]
    image = torch.randn(4, 1, *CROP)
    with torch.no_grad():
        close(program.module()(image=image), model.eval()(image))
    assert json.loads(extra["grcsf.json"])["config"]["use_gcu"] is False


def test_the_autoencoder_in_onnx_runtime(tmp_path):
    model = MaskedAutoencoder(
        4, embed_dim=12, depth=1, num_heads=2, decoder_dim=12, decoder_depth=1, decoder_heads=2
    )
    path = export_model(save(tmp_path, model, (8, 8, 4)), tmp_path / "m.onnx")
    image = torch.randn(2, 1, 8, 8, 4)
    hidden = torch.tensor([[True, False, True, True], [True, True, True, False]])
    found, _ = run_onnx(path, image=image, hidden=hidden)
    with torch.no_grad():
        close(found, model.eval().reconstruct(image, hidden))


def test_what_differs_is_not_written(tmp_path, monkeypatch):
    path = save(tmp_path, network(use_gcu=False, use_rcu=False))
    (tmp_path / "m.pt2").write_text("as before")
    monkeypatch.setattr(export_module, "_program", lambda *args: None)
    monkeypatch.setattr(torch.export, "save", lambda *args, **options: None)
    for wrong, message in (
        (lambda x: torch.zeros(1, 1, *CROP), "differs by .* more than 0.001 of the largest value"),
        (lambda x: torch.full((1, 1, *CROP), np.nan), "differs by nan"),
        (lambda x: torch.zeros(1), "gives .* after export"),
    ):
        monkeypatch.setattr(export_module, "_runner", lambda *args, wrong=wrong: wrong)
        with pytest.raises(InputError, match=rf"m.safetensors: {message}"):
            export_model(path, tmp_path / "m.pt2")
    monkeypatch.setattr(GRCSF, "forward", lambda self, image: image * np.nan)
    monkeypatch.setattr(export_module, "_runner", lambda *args: lambda x: x["image"])
    with pytest.raises(InputError, match=r"m.safetensors: .* NaN or infinite \(output\)"):
        export_model(path, tmp_path / "m.pt2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt2", "m.safetensors"]
    assert (tmp_path / "m.pt2").read_text() == "as before"


def test_a_network_that_gives_zeros_is_exported(tmp_path):
    """Relative to the largest value, 0, every difference is too large."""
    model = network(use_gcu=False, use_rcu=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert export_model(save(tmp_path, model), tmp_path / "m.pt2").is_file()


def test_a_full_disk_is_one_line_and_leaves_the_former_file(tmp_path):
    """torch's own writer of files ends the process there."""
    path = save(tmp_path, network(use_gcu=False, use_rcu=False))
    output = tmp_path / "out" / "m.pt2"
    output.parent.mkdir()
    output.write_text("as before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
    try:
        result = CliRunner().invoke(app, ["export", str(path), "-o", str(output)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {output}: can't be written (")
    assert [p.name for p in output.parent.iterdir()] == ["m.pt2"]
    assert output.read_text() == "as before"


def test_a_place_where_nothing_can_be_written(tmp_path):
    path = save(tmp_path, network(use_gcu=False, use_rcu=False))
    (tmp_path / "m.onnx").mkdir()
    (tmp_path / "file").write_text("")
    for output, problem in (("m.onnx", "is a folder"), ("file/m.pt2", "can't be written into")):
        with pytest.raises(InputError, match=problem):
            export_model(path, tmp_path / output)


def test_what_can_not_be_exported(tmp_path):
    with pytest.raises(InputError, match=r"has suffix '.pth'; expected .onnx or .pt2"):
        export_model(tmp_path / "m.safetensors", tmp_path / "m.pth")
    path = network().save_pretrained(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="has no preprocessing or crop size"):
        export_model(path, tmp_path / "m.pt2")


@pytest.mark.parametrize(
    ("space", "patch"),
    [((7, 5), (3, 2)), ((9, 6, 5), (4, 4, 4)), ((3, 6, 5), (4, 2, 8)), ((4, 5, 6), None)],
)
@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_graphs_of_rcu_are_its_reference(space, patch, chunk, monkeypatch):
    monkeypatch.setattr(exportable, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps, heads, c, channels, hidden = 2, 3, 1, 4, 5
    arguments = (
        random(2, channels, *space),
        random(2, maps, c, *space),
        random(maps, heads, c, channels),
        random(maps, heads, c),
        random(maps, channels, heads, c),
        random(maps, channels),
        random(hidden, channels + maps * c),
        random(2, hidden),
        random(hidden),
        random(1)[0],
    )
    whole = list(space) if patch is None else [min(p, s) for p, s in zip(patch, space, strict=True)]
    expected = rcu.forward(*arguments, whole)
    for found, wanted in zip(exportable._rcu(*arguments, patch_size=patch), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-12


def test_graphs_of_gcu_and_of_pooling_are_their_references():
    generator = torch.Generator().manual_seed(0)
    skip, deep = (torch.randn(2, 3, *s, generator=generator) for s in ((5, 6, 7), (2, 3, 4)))
    gates = torch.rand(2, 2, 3, generator=generator)
    skip[0, :, 0] = 0
    for compensation in ("dissimilarity", "similarity"):
        found = exportable._gcu(skip, deep, *gates, compensation=compensation)
        wanted = gcu.forward(skip, deep, *gates, compensation, 1e-6)
        assert all(torch.allclose(f, w, atol=1e-6) for f, w in zip(found, wanted, strict=True))
    for size in ((2, 6, 7), (5, 3, 4), (3, 4, 7)):
        wanted = F.adaptive_avg_pool3d(skip, size)
        assert torch.allclose(exportable._adaptive_mean(skip, size), wanted, atol=1e-6)
