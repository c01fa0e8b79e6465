# SPDX-License-Identifier: Apache-2.0
"""Trains and runs GRCSF on folders of NIfTI volumes. Needs the ``train`` extra."""

from __future__ import annotations

from grcsf_kernels.common.errors import InputError
from grcsf_kernels.engine.config import (
    AugmentationConfig,
    AutoencoderConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizationConfig,
    PredictConfig,
    PretrainConfig,
    ResidualsConfig,
    TrainConfig,
    load_config,
    save_config,
)
from grcsf_kernels.engine.evaluation.evaluate import evaluate
from grcsf_kernels.engine.inference.export import export_model
from grcsf_kernels.engine.inference.predict import predict
from grcsf_kernels.engine.inference.residuals import cache_residuals
from grcsf_kernels.engine.report import Report
from grcsf_kernels.engine.training.pretrain import pretrain
from grcsf_kernels.engine.training.train import train
from grcsf_kernels.models.inputs import DataConfig

__all__ = [
    "AugmentationConfig",
    "AutoencoderConfig",
    "DataConfig",
    "EvaluateConfig",
    "InputError",
    "ModelConfig",
    "OptimizationConfig",
    "PredictConfig",
    "PretrainConfig",
    "Report",
    "ResidualsConfig",
    "TrainConfig",
    "cache_residuals",
    "evaluate",
    "export_model",
    "load_config",
    "predict",
    "pretrain",
    "save_config",
    "train",
]
