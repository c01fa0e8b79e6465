# SPDX-License-Identifier: Apache-2.0
"""Why a network has no usable output on a case: for the message, after it has gone wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grcsf_kernels.common.finite import first_not_finite
from grcsf_kernels.engine.buffers import slabs

# Normalized images and residual maps are nowhere near the largest number of float16.
LARGEST = torch.finfo(torch.float16).max


class NotFiniteError(ArithmeticError):
    """Values that are NaN or infinite, of which no mask and no map can be made.

    Args:
        problem: which values, and what is known of the cause.
        remedy: what the user can do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


@contextmanager
def cause_named(what: str, network: nn.Module, sources: Mapping[str, Tensor]) -> Iterator[None]:
    """A NotFiniteError of the block gets the cause, as far as weights and sources show it.

    Args:
        what: the network is, for the message.
        network: whose values they are.
        sources: what it was given, [C, X, Y, Z], by name.
    """
    try:
        yield
    except NotFiniteError as error:
        named = itertools.chain(network.named_parameters(), network.named_buffers())
        bad = first_not_finite(named)
        ranges = {name: _range(values) for name, values in sources.items()}
        large = [n for n, (low, high) in ranges.items() if not max(-low, high) <= LARGEST]
        given = " and ".join(
            f"{name} from {low:.3g} to {high:.3g}" for name, (low, high) in ranges.items()
        )
        weights = "all its weights are finite" if bad is None else f"its weight {bad} is not finite"
        if bad is not None:
            remedy = "copy the model file again, or train again"
        elif large:
            remedy = f"look for extreme values in the {large[0]}"
        else:
            remedy = "train again with a lower learning_rate or clip_norm"
        problem = f"{what} gives values that are NaN or infinite on {given}; {weights}"
        raise NotFiniteError(problem, remedy) from error


def _range(values: Tensor) -> tuple[float, float]:
    """Least and largest value; NaN for both where there is one."""
    bounds = [
        torch.stack(values[..., planes].float().aminmax()).cpu()
        for planes in slabs(values[..., 0].numel(), values.shape[-1])
    ]
    both = torch.stack(bounds)
    return float(both[:, 0].amin()), float(both[:, 1].amax())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of the device or of the process."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's allocator on the CPU and cuDNN raise plain RuntimeErrors.
    texts = ("allocate memory", "out of memory", "ALLOC_FAILED", "not enough memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
