# SPDX-License-Identifier: Apache-2.0
"""Train a network of MONAI with the units, then segment volumes in sliding windows."""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet, SegResNet, UNet
from monai.transforms import (
    Compose,
    ConcatItemsd,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    RandCropByPosNegLabeld,
    RandFlipd,
)

from grcsf_kernels.nn import CompensatedUNet

# As one makes them with MONAI: in_channels are those of the image.
NETWORKS = {
    "UNet": lambda: UNet(3, 1, 2, channels=(8, 16, 32, 32), strides=(2, 2, 2), num_res_units=1),
    "DynUNet": lambda: DynUNet(3, 1, 2, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=(8, 16, 32, 32)),
    "SegResNet": lambda: SegResNet(3, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
}


def cases(folder, *, labels):
    """<case>_image.nii.gz with <case>_residual.nii.gz of `grcsf residuals`, and _label.nii.gz."""
    kinds = ["image", "residual"] + ["label"] * labels
    names = sorted(p.name.removesuffix("_image.nii.gz") for p in folder.glob("*_image.nii.gz"))
    return [{kind: folder / f"{name}_{kind}.nii.gz" for kind in kinds} for name in names]


def loading(*, labels):
    """One tensor from image and maps. Maps are 4D, one after the other, and in [0, 1] already."""
    single = ["image"] + ["label"] * labels
    return [
        LoadImaged([*single, "residual"]),
        EnsureChannelFirstd(single, channel_dim="no_channel"),
        EnsureChannelFirstd("residual", channel_dim=-1),
        NormalizeIntensityd("image", nonzero=True),
        ConcatItemsd(["image", "residual"], name="input"),
    ]


def train(model, folder, epochs, crop, device):
    crops = RandCropByPosNegLabeld(["input", "label"], "label", crop, num_samples=2)
    flips = [RandFlipd(["input", "label"], 0.5, axis) for axis in range(3)]
    transform = Compose([*loading(labels=True), crops, *flips])
    loader = DataLoader(
        CacheDataset(cases(folder, labels=True), transform, progress=False),
        batch_size=2,
        shuffle=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    for epoch in range(epochs):
        model.train()
        losses = []
        for batch in loader:
            loss = loss_of(model(batch["input"].to(device)), batch["label"].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}")


@torch.no_grad()
def segment(model, folder, output, crop, device):
    """Masks in the images' own space. A window holds image and maps, which are one tensor."""
    output.mkdir(parents=True, exist_ok=True)
    transform = Compose(loading(labels=False))
    model.eval()
    for case in cases(folder, labels=False):
        sample = transform(case)
        window = sample["input"][None].to(device)
        logits = sliding_window_inference(window, crop, 4, model, overlap=0.5, mode="gaussian")
        mask = logits.argmax(dim=1)[0].cpu().numpy().astype(np.uint8)
        path = output / case["image"].name.replace("_image", "_mask")
        nib.save(nib.Nifti1Image(mask, nib.load(case["image"]).affine), path)
        print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--network", choices=NETWORKS, default="UNet")
    parser.add_argument("--weights", type=Path, help="of the network without the units")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--crop", type=int, nargs=3, default=(96, 96, 96))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    network = NETWORKS[arguments.network]()
    if arguments.weights:
        network.load_state_dict(torch.load(arguments.weights, weights_only=True))
    model = CompensatedUNet(network, num_maps=2).to(arguments.device)

    train(model, arguments.data, arguments.epochs, arguments.crop, arguments.device)
    segment(model, arguments.data, arguments.output, arguments.crop, arguments.device)
    torch.save(model.state_dict(), arguments.output / f"{arguments.network}.pt")


if __name__ == "__main__":
    main()
