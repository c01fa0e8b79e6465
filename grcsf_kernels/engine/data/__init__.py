# SPDX-License-Identifier: Apache-2.0
"""From volumes to training crops: preprocessing, caches, splits."""
