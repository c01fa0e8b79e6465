# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of results, and the comparison of two."""
