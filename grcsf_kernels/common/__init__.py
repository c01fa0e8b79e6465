# SPDX-License-Identifier: Apache-2.0
"""What every layer above the operators uses: errors, files written whole, settings, checksums."""
