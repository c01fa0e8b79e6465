# SPDX-License-Identifier: Apache-2.0
"""Volumes and folders of them: reading, writing, searching, and what a file was made from."""
