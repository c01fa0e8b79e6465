# SPDX-License-Identifier: Apache-2.0
"""The report and the comparison, on results made for the purpose."""

from __future__ import annotations

import json

import pytest

from benchmarks.harness import results
from benchmarks.report import compare, report


def row(peer="cpu", median=0.010, iqr=0.001, voxels=64**3, direction="forward", memory=10**6):
    return {
        "name": f"test[{peer}]",
        "group": f"gcu {direction}: {round(voxels ** (1 / 3))}³",
        "subject": "gcu",
        "case": f"{round(voxels ** (1 / 3))}³ C=8 float32",
        "family": "scaling" if peer == "quadratic" else "size",
        "peer": peer,
        "direction": direction,
        "voxels": voxels,
        "median": median,
        "q1": median - iqr / 2,
        "q3": median + iqr / 2,
        "rounds": 5,
        "launches": None,
        "peak_extra_bytes": memory,
        "peak_resident_bytes": memory,
        "floor_bytes": 10**7,
        "floor_seconds": 0.001,
        "share_of_floor": 0.001 / median,
        "flops": 10**8,
        "copy_bandwidth": 1e10,
        "arithmetic_rate": 1e11,
    }


def write(folder, rows, bandwidth=1e10, device="cpu-test", absent=()):
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmarks": rows,
        "absent": list(absent),
        "roofs": {"copy_bandwidth": bandwidth, "arithmetic_rate": 1e11},
        "quick": False,
        "machine_info": {
            "device": device,
            "threads": 2,
            "versions": {"torch": "2.13.0"},
            "python_version": "3.11.7",
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
    }
    (folder / "gcu.json").write_text(json.dumps(content))
    return folder


def test_a_slowed_operator_is_caught(tmp_path, capsys):
    old = write(tmp_path / "old", [row(), row("reference", 0.5)])
    new = write(tmp_path / "new", [row(median=0.015), row("reference", 0.5)])
    assert compare.main([str(old), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "slower         1.50 x  gcu forward: 64³: cpu: 10.0 ms → 15.0 ms" in printed
    assert "2 rows compared, 1 worse" in printed


@pytest.mark.parametrize(
    ("median", "iqr", "bandwidth"),
    [
        (0.0105, 0.0001, 1e10),  # less than the tolerance
        (0.015, 0.02, 1e10),  # the samples overlap
        (0.015, 0.001, 6e9),  # the whole machine is slower
    ],
)
def test_noise_is_not_blamed(tmp_path, median, iqr, bandwidth):
    old = write(tmp_path / "old", [row()])
    new = write(tmp_path / "new", [row(median=median, iqr=iqr)], bandwidth)
    assert compare.main([str(old), str(new)]) == 0


def test_faster_and_more_memory_are_told(tmp_path, capsys):
    old = write(tmp_path / "old", [row()])
    new = write(tmp_path / "new", [row(median=0.005, iqr=1e-4, memory=2 * 10**6)])
    assert compare.main([str(old), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "faster         0.50 x" in printed
    assert "more memory    2.00 x" in printed


def test_results_of_two_devices_are_not_compared(tmp_path, capsys):
    old = write(tmp_path / "old", [row()])
    new = write(tmp_path / "new", [row()], device="nvidia-h100")
    assert compare.main([str(old), str(new)]) == 2
    assert "cpu-test" in capsys.readouterr().err


def test_an_empty_folder_is_named(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_report_has_tables_plots_and_what_was_left_out(tmp_path):
    sizes = (64**3, 128**3)
    rows = [row(voxels=v, median=1e-8 * v, direction=d) for v in sizes for d in ("forward",)]
    rows += [row("reference", 1e-6 * v, voxels=v) for v in sizes]
    rows += [row("quadratic", 1e-12 * v**2, voxels=v) for v in sizes]
    gone = row("sdpa") | {"reason": "out of memory: a call would need about 2800 GiB of 20 GiB"}
    folder = write(tmp_path / "run", rows, absent=[gone])
    assert report.main([str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "commit: 0123456789ab" in text and "10.0 GB/s" in text
    assert "| gcu | quadratic | 2.00 |" in text
    assert "2800 GiB" in text
    line = next(line for line in text.splitlines() if line.startswith("| reference"))
    assert line.startswith("| reference | 262 ms ± 0 % | 100 |")
    for plot in ("latency.png", "roofline.png", "memory.png"):
        assert (folder / plot).read_bytes()[:4] == b"\x89PNG"
        assert f"({plot})" in text


def test_several_folders_stand_side_by_side(tmp_path):
    old = write(tmp_path / "old", [row()])
    new = write(tmp_path / "new", [row(median=0.005)])
    assert report.main([str(old), str(new)]) == 0
    assert "| gcu forward: 64³ | cpu | 10.0 ms | 5.00 ms |" in (new / "report.md").read_text()


def test_a_part_that_is_measured_again_replaces_only_itself():
    old = {"benchmarks": [row("cpu"), row("reference", 0.5)], "absent": []}
    gone = row("reference") | {"reason": "too slow"}
    new = results.merge(old, {"benchmarks": [row("cpu", 0.02)], "absent": [gone]})
    assert [(entry["peer"], entry["median"]) for entry in new["benchmarks"]] == [("cpu", 0.02)]
    assert [entry["reason"] for entry in new["absent"]] == ["too slow"]
    again = results.merge(new, {"benchmarks": [row("sdpa", 0.04)], "absent": []})
    assert again["benchmarks"][1]["times_slower_than"] == {"cpu": 2.0}
    assert len(again["absent"]) == 1


def test_ratios_to_the_peers_stand_in_each_row():
    stats = dict.fromkeys(("min", "max", "mean", "q1", "q3", "iqr", "stddev"), 1.0) | {"rounds": 3}
    benches = [
        {
            "name": peer,
            "group": "g",
            "extra_info": {"peer": peer, "floor_seconds": 0.5},
            "stats": stats | {"median": median, "data": [median] * 3},
        }
        for peer, median in (("cpu", 1.0), ("reference", 4.0))
    ]
    output = {"benchmarks": benches}
    results.slim(output)
    fast, slow = output["benchmarks"]
    assert slow["times_slower_than"] == {"cpu": 4.0}
    assert fast["times_slower_than"] == {"reference": 0.25}
    assert slow["share_of_floor"] == 0.125
    assert "data" not in fast
