# SPDX-License-Identifier: Apache-2.0
"""Damage in model files and states is noticed wherever it is, before it costs anything."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from engine.conftest import make_autoencoders, make_model, rewrite, train_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from grcsf_kernels import engine
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.model_files import load_checkpoint
from grcsf_kernels.engine.training.state import load_state, save_state
from grcsf_kernels.models.files import load_any

ARCHITECTURE = "has weights or settings of another architecture"


def state(**changes):
    values = {
        "identity": json.dumps([{"a": 1}, ["case0"], 1]),
        "model": {"weight": torch.arange(6.0)},
        "average": None,
        "optimizer": {},
        "precision": {},
        "done": 4,
        "total": 0.5,
        "best": 0.25,
    }
    return values | changes


def flipped(path, places):
    """The file with one bit changed, for each of the places, in turn."""
    content = path.read_bytes()
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.unlink()  # a mapped file must not change under its reader
        path.write_bytes(damaged)
        yield place
    path.write_bytes(content)


def test_any_bit_that_changes_in_a_model_file_is_noticed(tmp_path):
    path = make_model(tmp_path / "model.safetensors")
    size = path.stat().st_size
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    places = [*range(8), *range(8, header + 8, 29), *range(header + 8, size, 997), size - 1]
    for place in flipped(path, places):
        with pytest.raises(InputError, match=r"model.safetensors: .*; \w"):
            pytest.fail(f"byte {place}: {load_any(path).config}")
    load_any(path)


def test_any_bit_that_changes_in_a_state_is_noticed(tmp_path):
    path = save_state(tmp_path / "model.state", state())
    size = path.stat().st_size
    for place in flipped(path, [*range(0, size, 3), *range(size - 110, size)]):
        with pytest.raises(InputError, match=r"model.state: .*; remove it to train from the start"):
            pytest.fail(f"byte {place}: {load_state(path, state()['identity'])}")
    assert load_state(path, state()["identity"])["done"] == 4


def test_states_of_earlier_versions_have_no_checksum_and_are_read(tmp_path):
    path = tmp_path / "model.state"
    torch.save(state(), path)
    assert load_state(path, state()["identity"])["best"] == 0.25
    # One that had a checksum when it was written is not taken for such a file.
    torch.save(state(format=2), path)
    with pytest.raises(InputError, match="its checksum is missing"):
        load_state(path, state()["identity"])


@pytest.mark.parametrize("content", [[1], {"identity": "x"}, "text", {"identity": 3, "model": {}}])
def test_a_state_of_another_structure_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.state")
    with pytest.raises(InputError, match=r"model.state: is no training state"):
        load_state(tmp_path / "model.state", "x")


def test_a_state_with_weights_that_are_not_finite_is_refused(tmp_path):
    path = save_state(tmp_path / "s.state", state(model={"weight": torch.tensor(torch.nan)}))
    with pytest.raises(InputError, match=r"s.state: has weights that are NaN .*model.weight"):
        load_state(path, state()["identity"])


def test_equal_models_are_equal_files(tmp_path):
    one, two = (make_model(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    metadata = safe_open(one, "pt").metadata()
    assert list(metadata) == ["grcsf"] and len(json.loads(metadata["grcsf"])["sha256"]) == 64


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("embed_dim", 1200),
        ("depth", 2),
        ("depth", 10**9),
        ("embed_dim", 24 * 10**9),
        ("embed_dim", 10**40),
        ("patch_size", [10**6] * 3),
        ("spatial_dims", 10**9),
        ("depth", "two"),
        ("depth", None),
        ("num_heads", 0),
        ("unheard_of", 1),
    ],
)
def test_no_memory_is_claimed_for_settings_that_do_not_fit_the_header(
    tmp_path, monkeypatch, setting, value
):
    path = make_autoencoders(tmp_path)[0]
    rewrite(path, lambda description: description["config"].update({setting: value}))
    made = []
    reset = nn.Linear.reset_parameters
    monkeypatch.setattr(
        nn.Linear, "reset_parameters", lambda self: made.append(self.weight.device) or reset(self)
    )
    with pytest.raises(InputError, match=f"mae_0.5.safetensors: {ARCHITECTURE}"):
        load_checkpoint(path, "MaskedAutoencoder")
    assert all(device.type == "meta" for device in made)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "has a damaged description"),
        ("[1, 2]", "has a damaged description"),
        ("null", "has a damaged description"),
        ('{"kind": "GRCSF", "config": 3}', "has a damaged description"),
        ('{"kind": {"a": 1}, "config": {}}', "contains a {'a': 1} model"),
        ('{"kind": "GRCSF", "config": {"channels": [[1]]}}', ARCHITECTURE),
    ],
)
def test_a_description_of_another_structure_is_refused(tmp_path, text, message):
    path = make_model(tmp_path / "model.safetensors")
    weights = load_file(path)
    path.unlink()
    save_file(weights, path, metadata={"grcsf": text})
    with pytest.raises(InputError, match=rf"model.safetensors: {message}"):
        load_checkpoint(path, "GRCSF")


@pytest.mark.parametrize(
    "change",
    [
        {"data": []},
        {"data": {"spacing": "near"}},
        {"crop_size": "large"},
        {"crop_size": [10**6] * 3},
        {"crop_size": [0, 8, 8]},
        {"maps": [1]},
        {"maps": {"autoencoders": 3}},
    ],
)
def test_what_belongs_to_the_weights_has_another_structure(tmp_path, change):
    path = rewrite(make_model(tmp_path / "m.safetensors"), lambda d: d.update(change))
    with pytest.raises(InputError, match=r"m.safetensors.*; "):
        load_checkpoint(path, "GRCSF")


def test_weights_that_are_missing_unknown_or_of_another_type_are_named(tmp_path):
    path = make_model(tmp_path / "m.safetensors")
    rewrite(path, weights=lambda weights: weights.pop("head.bias"))
    with pytest.raises(InputError, match=rf"{ARCHITECTURE} \(head.bias is missing\)"):
        load_checkpoint(path, "GRCSF")
    path = make_model(path)
    rewrite(path, weights=lambda weights: weights.update(more=torch.zeros(1)))
    with pytest.raises(InputError, match=r"\(more is unknown\)"):
        load_checkpoint(path, "GRCSF")
    path = make_model(path)
    rewrite(path, weights=lambda weights: weights.update({"head.bias": torch.zeros(1).long()}))
    with pytest.raises(InputError, match=r"\(head.bias has type I64, expected one of F16"):
        load_checkpoint(path, "GRCSF")
    path = make_model(path)
    rewrite(
        path, weights=lambda weights: weights.update({"head.bias": weights["head.bias"].half()})
    )
    load_checkpoint(path, "GRCSF")


def test_a_run_goes_on_from_a_state_of_an_earlier_version(folder, tmp_path):
    config = train_config(use_rcu=False, epochs=1)
    path = engine.train(folder, tmp_path / "run", config)
    state_path = tmp_path / "run/model.state"
    earlier = torch.load(state_path, weights_only=True)
    assert earlier.pop("format") == 2
    torch.save(earlier, state_path)
    assert engine.train(folder, tmp_path / "run", config) == path
