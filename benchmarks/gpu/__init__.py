# SPDX-License-Identifier: Apache-2.0
"""What concerns GPUs: compiler reports that need none, and checks and tuning on one."""
