# SPDX-License-Identifier: Apache-2.0
"""What a training step of each arm costs, measured with nothing else running."""

from __future__ import annotations

import statistics

import torch

from benchmarks.harness import measure, memory
from benchmarks.study import protocol, runs
from benchmarks.study.protocol import ARMS
from grcsf_kernels.common.settings import to_dict
from grcsf_kernels.engine.training.train import build

_STEPS = 9


def measure_costs(study: runs.Study, arm: str) -> None:
    """Seconds and extra memory of one training step (forward, backward) on random crops."""
    path = study.out / "costs" / f"{arm}.json"
    scale, chosen = study.scale, ARMS[arm]
    config = protocol.training(scale, chosen, 0)
    identity = protocol.plain(
        {"model": to_dict(config.model), "crop": scale.crop, "batch": scale.batch}
    )
    if runs.is_current(path, identity):
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = len(protocol.MASK_RATIOS)
    network = build(config, count).to(device).train()
    image = torch.randn(scale.batch, 1, *config.crop_size, device=device)
    maps = torch.rand(scale.batch, count, *config.crop_size, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=scale.precision == "bf16-mixed"):
            logits = network(image, maps if chosen.masking else None)
        logits.float().square().mean().backward()
        network.zero_grad()

    step()
    taken = [measure.seconds(step, device) for _ in range(_STEPS)]
    quartiles = statistics.quantiles(taken, n=4)
    peak = memory.measure_peak(step, device, longest=30.0)
    runs.save(
        path,
        {
            "identity": identity,
            "parameters": sum(weight.numel() for weight in network.parameters()),
            "step_seconds": statistics.median(taken),
            "step_quartiles": [quartiles[0], quartiles[2]],
            "allocated_mib": peak.allocated / 2**20,
            "resident_mib": None if peak.resident is None else peak.resident / 2**20,
            "threads": torch.get_num_threads(),
            "machine": runs.machine(),
        },
    )
