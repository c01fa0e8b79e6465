# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch: mixed precision, and a checkpoint that a stopped run goes on from."""

import argparse
import os
from pathlib import Path

import torch
from network import OwnUNet, Volumes, loss_of
from torch.utils.data import DataLoader


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    device = torch.device(arguments.device)
    # bfloat16 has the range of float32; float16, for older GPUs, needs its gradients scaled.
    half = torch.bfloat16 if device.type == "cpu" or torch.cuda.is_bf16_supported() else torch.half
    model = OwnUNet().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.half)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    first = 0
    if arguments.checkpoint.exists():
        stored = torch.load(arguments.checkpoint, map_location=device, weights_only=True)
        first = stored["epochs"]
        for name, part in parts.items():
            part.load_state_dict(stored[name])
        print(f"goes on after {first} epochs")

    loader = DataLoader(Volumes(arguments.data), batch_size=2, shuffle=True)
    for epoch in range(first, arguments.epochs):
        total = 0.0
        for image, maps, label in loader:
            image, maps, label = image.to(device), maps.to(device), label.to(device)
            with torch.autocast(device.type, dtype=half):
                logits = model(image, maps)
            loss = loss_of(logits, label)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / len(loader):.4f}")
        stored = {name: part.state_dict() for name, part in parts.items()}
        # Renamed when it is whole: a run that is stopped meanwhile leaves the one before.
        temporary = arguments.checkpoint.with_suffix(".tmp")
        torch.save(stored | {"epochs": epoch + 1}, temporary)
        os.replace(temporary, arguments.checkpoint)


if __name__ == "__main__":
    main()
