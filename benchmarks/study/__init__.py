# SPDX-License-Identifier: Apache-2.0
"""What the units add to one backbone under one budget: the paper's ablation on synthetic subjects.

``python -m benchmarks.study --scale cpu`` makes the subjects, pretrains, trains every arm with
every seed, measures held-out subjects and writes the tables. PROTOCOL.md says what was decided
before the first run.
"""
