# SPDX-License-Identifier: Apache-2.0
"""Training of GRCSF and pretraining of its autoencoders."""
