# SPDX-License-Identifier: Apache-2.0
"""Parameters and time of a training step: MONAI's UNet by itself, and with the units."""

import argparse
import statistics
import time

import torch
from monai.networks.nets import UNet

from grcsf_kernels.nn import CompensatedUNet


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edge", type=int, default=64, help="voxels of the cube")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    def unet():
        return UNet(3, 1, 2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2)

    models = {"UNet": unet(), "with GCU and RCU": CompensatedUNet(unet(), num_maps=2)}
    x = torch.rand(1, 3, *[arguments.edge] * 3)
    inputs = {"UNet": x[:, :1], "with GCU and RCU": x}
    times = {name: [] for name in models}
    # In turns, so that whatever else the machine does slows down both. The first one warms up.
    for _ in range(arguments.steps + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(inputs[name]).square().mean().backward()
            times[name].append(time.perf_counter() - start)
    for name, model in models.items():
        count = sum(p.numel() for p in model.parameters())
        print(f"{name}: {count:,} parameters, {statistics.median(times[name][1:]):.3f} s a step")


if __name__ == "__main__":
    main()
