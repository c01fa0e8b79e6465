# SPDX-License-Identifier: Apache-2.0
"""The network of ../pytorch in Lightning: a module, a data module, a checkpoint that reloads."""

import argparse
from pathlib import Path

import lightning
import torch
from network import OwnUNet, Volumes, loss_of
from torch.utils.data import DataLoader, random_split


class Segmentation(lightning.LightningModule):
    def __init__(self, channels=(8, 16, 32), num_maps=2, learning_rate=1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.network = OwnUNet(channels, num_maps)

    def forward(self, image, maps):
        return self.network(image, maps)

    def training_step(self, batch, _):
        image, maps, label = batch
        loss = loss_of(self(image, maps), label)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        image, maps, label = batch
        mask, label = self(image, maps) > 0, label > 0
        dice = 2 * (mask & label).sum() / (mask.sum() + label.sum()).clamp(min=1)
        self.log("dice", dice, on_epoch=True, batch_size=len(image))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.learning_rate)


class LesionData(lightning.LightningDataModule):
    def __init__(self, folder, batch_size=2):
        super().__init__()
        self.folder, self.batch_size = folder, batch_size

    def setup(self, stage):
        split = torch.Generator().manual_seed(0)
        self.train, self.held_out = random_split(Volumes(self.folder), [0.75, 0.25], split)

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.held_out, self.batch_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="bf16-mixed")
    arguments = parser.parse_args()
    lightning.seed_everything(0)

    module, data = Segmentation(), LesionData(arguments.data)
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs,
        accelerator=arguments.accelerator,
        precision=arguments.precision,
        default_root_dir=arguments.output,
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    checkpoint = arguments.output / "model.ckpt"
    trainer.save_checkpoint(checkpoint)

    again = Segmentation.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    image, maps, _ = (tensor[None] for tensor in data.held_out[0])
    with torch.no_grad():
        difference = (again(image, maps) - module.cpu().eval()(image, maps)).abs().max()
    print(f"dice {trainer.callback_metrics['dice']:.3f}; reloaded, it differs by {difference}")


if __name__ == "__main__":
    main()
