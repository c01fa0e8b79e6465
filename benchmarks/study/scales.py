# SPDX-License-Identifier: Apache-2.0
"""How large a study is: on two CPU cores, or on a GPU."""

from __future__ import annotations

from benchmarks.study.protocol import MASK_RATIOS, Scale
from grcsf_kernels import engine

SCALES = {
    "cpu": Scale(
        name="cpu",
        spacing=2.0,
        training=32,
        held_out=24,
        channels=(8, 16, 32, 64),
        widened=(9, 17, 33, 66),
        crop=32,
        batch=2,
        steps=800,
        learning_rate=3e-3,
        rcu_levels=(0,),
        rcu_patch=4,
        reduction=4,
        autoencoder=engine.AutoencoderConfig(
            mask_ratios=MASK_RATIOS,
            patch_size=(8, 8, 8),
            embed_dim=96,
            depth=3,
            num_heads=4,
            decoder_dim=96,
            decoder_depth=2,
            decoder_heads=4,
            normalized_target=False,
        ),
        # Not the whole brain: an autoencoder that knows where it is learns a mean head.
        autoencoder_crop=(64, 64, 64),
        autoencoder_steps=1200,
    ),
    "gpu": Scale(
        name="gpu",
        spacing=1.0,
        training=64,
        held_out=48,
        channels=(16, 32, 64, 128, 256),
        widened=(17, 33, 65, 130, 258),
        crop=128,
        batch=2,
        steps=1500,
        learning_rate=3e-3,
        rcu_levels=(0,),
        rcu_patch=8,
        reduction=8,
        autoencoder=engine.AutoencoderConfig(
            mask_ratios=MASK_RATIOS,
            patch_size=(16, 16, 16),
            embed_dim=384,
            depth=6,
            normalized_target=False,
        ),
        autoencoder_crop=(128, 128, 128),
        autoencoder_steps=3000,
        precision="bf16-mixed",
    ),
}
