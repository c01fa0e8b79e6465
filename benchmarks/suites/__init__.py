# SPDX-License-Identifier: Apache-2.0
"""One suite for each operator, for modules, models and scaling."""
