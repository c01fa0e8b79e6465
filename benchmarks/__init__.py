# SPDX-License-Identifier: Apache-2.0
"""Latency and memory of every operator, module and network, beside what one would use instead."""
