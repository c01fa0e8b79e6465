# SPDX-License-Identifier: Apache-2.0
"""What suites have in common: cases, measuring, rows, result files."""
