# SPDX-License-Identifier: Apache-2.0
"""Trained networks on whole volumes: residual maps, prediction, export."""
