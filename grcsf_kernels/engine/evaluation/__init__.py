# SPDX-License-Identifier: Apache-2.0
"""Measures, figures and reports of predictions."""
