# SPDX-License-Identifier: Apache-2.0
"""``rcu``: the Region Compensation Unit, cross-attention to residual maps in absorbed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grcsf_kernels import dispatch
from grcsf_kernels.ops import checks, registration


class RCUWeights(NamedTuple):
    """The weights of :func:`rcu`, absorbed as :meth:`grcsf_kernels.nn.RCU.absorbed` gives them.

    float32, or float64 with float64 data. K maps of c channels, h heads, C channels of the
    features, m hidden units, B samples.
    """

    query_weight: Tensor
    """[K, h, c, C], with 1 / sqrt(head dimension) folded in."""
    query_bias: Tensor
    """[K, h, c]"""
    value_weight: Tensor
    """[K, C, h, c]"""
    value_bias: Tensor
    """[K, C]"""
    score_hidden_weight: Tensor
    """[m, C + K * c]"""
    score_hidden_bias: Tensor
    """[B, m]; it carries the global descriptor, projected outside."""
    score_output_weight: Tensor
    """[m]"""
    score_output_bias: Tensor
    """A scalar tensor."""


WEIGHTS = RCUWeights._fields
# In the schema of torch.ops.grcsf.rcu, which exported programs name.
_SCHEMA = (*WEIGHTS[:4], "score_weight1", "score_bias1", "score_weight2", "score_bias2")


def rcu(
    x: Tensor,
    maps: Tensor,
    weights: RCUWeights,
    *,
    patch_size: int | Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    r"""Cross-attend from features to the residual maps of the same patch, and add the result.

    What is added is weighed by an importance score per patch. Voxels i of ``x`` attend to the
    residual voxels j of the same patch, for each map k and head h, in absorbed form (the key and
    value projections are folded into the query and the output projection, so that keys and values
    are the residual voxels themselves):

    .. math::
        a_{ikh} &= query\_weight_{kh} \, x_i + query\_bias_{kh} \\
        E_{ikh} &= \sum_j \mathrm{softmax}_j(a_{ikh} \cdot r_{jk}) \, r_{jk} \\
        y_i &= \sum_k \Big( \sum_h value\_weight_{kh} E_{ikh} + value\_bias_k \Big) \\
        out_i &= x_i + scores_{patch(i)} \, y_i

    with one score per patch from the means of the patch,
    ``sigmoid(score_output_weight . relu(score_hidden_weight [mean(x); mean(maps)]
    + score_hidden_bias) + score_output_bias)``. Edge patches are smaller: only voxels that exist
    take part. Differentiable once in every tensor. Under autocast ``x`` and ``maps`` are cast to
    the region's dtype and all weights to float32; logits and softmax are computed in float32
    (float64 for float64 data).

    Args:
        x: [B, C, H, W] or [B, C, D, H, W]; float32, float64, bfloat16 or float16.
        maps: residual maps [B, K, c, \*S] of the dtype of ``x``, K maps of c channels;
            [B, K, \*S] is read as c = 1.
        weights: the absorbed weights.
        patch_size: voxels per axis, an integer or one for each axis; None: the whole volume is one
            patch (global attention).

    Returns:
        ``out`` [B, C, \*S] in the dtype and layout of ``x``, and ``scores`` [B, \*G] in the dtype
        of the weights, G = ceil(S / patch_size).

    Raises:
        TypeError: an argument is no tensor, or of a dtype other than the above.
        ValueError: shapes or devices that do not fit, or a patch size below 1.

    Source: GRCSF (Pattern Recognition 2025, doi 10.1016/j.patcog.2025.112461), region compensation
    unit; absorbed form: docs/operators.md.
    """
    if not isinstance(weights, tuple) or len(weights) != len(WEIGHTS):
        raise TypeError(
            f"rcu: weights is a {type(weights).__name__}, expected an RCUWeights: "
            f"{', '.join(WEIGHTS)}"
        )
    checks.require_tensors("rcu", x=x, maps=maps, **dict(zip(WEIGHTS, weights, strict=True)))
    if maps.ndim == x.ndim:
        maps = maps.unsqueeze(2)
    sizes = checks.patch_tuple("rcu", patch_size, x.ndim - 2)
    return torch.ops.grcsf.rcu(x, maps, *weights, patch_size=sizes)


def _check(x: Tensor, maps: Tensor, *weights: Tensor, patch_size: Any) -> None:
    name = "rcu"
    checks.check_data(name, "x", x)
    if maps.ndim != x.ndim + 1 or any(size < 1 for size in maps.shape[1:3]):
        raise ValueError(
            f"{name}: maps has shape {tuple(maps.shape)}, expected [B, K, *S] or "
            f"[B, K, c, *S] with K >= 1 and c >= 1 for x of shape {tuple(x.shape)}"
        )
    batch, channels, *space = x.shape
    count, map_channels = maps.shape[1:3]
    expected = (batch, count, map_channels, *space)
    checks.check_shape(name, "maps", maps, expected, "[B, K, c, *S] of x")
    checks.check_like(name, "x", x, maps=maps)

    named = dict(zip(WEIGHTS, weights, strict=True))
    query_weight, score_hidden_weight = named["query_weight"], named["score_hidden_weight"]
    if query_weight.ndim != 4 or query_weight.shape[1] < 1:
        raise ValueError(
            f"{name}: query_weight has shape {tuple(query_weight.shape)}, expected [K, h, c, C]"
        )
    if score_hidden_weight.ndim != 2 or score_hidden_weight.shape[0] < 1:
        raise ValueError(
            f"{name}: score_hidden_weight has shape {tuple(score_hidden_weight.shape)}, "
            "expected [m, C + K * c]"
        )
    heads, hidden = query_weight.shape[1], score_hidden_weight.shape[0]
    shapes = {
        "query_weight": ((count, heads, map_channels, channels), "[K, h, c, C]"),
        "query_bias": ((count, heads, map_channels), "[K, h, c]"),
        "value_weight": ((count, channels, heads, map_channels), "[K, C, h, c]"),
        "value_bias": ((count, channels), "[K, C]"),
        "score_hidden_weight": ((hidden, channels + count * map_channels), "[m, C + K * c]"),
        "score_hidden_bias": ((batch, hidden), "[B, m]"),
        "score_output_weight": ((hidden,), "[m]"),
        "score_output_bias": ((), "a scalar"),
    }
    for weight, (shape, meaning) in shapes.items():
        checks.check_shape(name, weight, named[weight], shape, meaning)
    checks.check_weights(name, "x", x, **named)
    checks.patch_tuple(name, patch_size, len(space))


def _check_backward(
    grad_out: Tensor,
    grad_scores: Tensor,
    scores: Tensor,
    x: Tensor,
    maps: Tensor,
    *weights_and_options: Any,
) -> None:
    *weights, patch_size, needs = weights_and_options
    _check(x, maps, *weights, patch_size=patch_size)
    name = "rcu_backward"
    checks.check_shape(name, "grad_out", grad_out, x.shape, "the shape of x")
    checks.check_like(name, "x", x, grad_out=grad_out)
    grid = (x.shape[0], *_grid(x, patch_size))
    for score, tensor in {"grad_scores": grad_scores, "scores": scores}.items():
        checks.check_shape(name, score, tensor, grid, "[B, *G], G = ceil(S / patch_size)")
        checks.check_weights(name, "x", x, **{score: tensor})
    checks.check_needs(name, needs, 2 + len(WEIGHTS))


def _patch_sizes(x: Tensor, patch_size: Sequence[int] | None) -> list[int]:
    """The patch size per axis, never larger than the volume; the whole volume for None."""
    sizes = checks.patch_tuple("rcu", patch_size, x.ndim - 2) or list(x.shape[2:])
    return [min(patch, size) for patch, size in zip(sizes, x.shape[2:], strict=True)]


def _grid(x: Tensor, patch_size: Sequence[int] | None) -> list[int]:
    patches = _patch_sizes(x, patch_size)
    return [-(-size // patch) for size, patch in zip(x.shape[2:], patches, strict=True)]


def _forward(
    x: Tensor, maps: Tensor, *weights: Tensor, patch_size: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    _check(x, maps, *weights, patch_size=patch_size)
    layout = checks.layout_of(x)
    out, scores = dispatch.implementation("rcu", x).forward(
        checks.dense(x, layout),
        checks.dense(maps),
        *(checks.dense(weight) for weight in weights),
        _patch_sizes(x, patch_size),
    )
    return checks.dense(out, layout), checks.dense(scores)


def _forward_fake(
    x: Tensor, maps: Tensor, *weights: Tensor, patch_size: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    _check(x, maps, *weights, patch_size=patch_size)
    scores = weights[0].new_empty((x.shape[0], *_grid(x, patch_size)))
    return checks.empty(x.shape, x, checks.layout_of(x)), scores


def _backward(
    grad_out: Tensor,
    grad_scores: Tensor,
    scores: Tensor,
    x: Tensor,
    maps: Tensor,
    *weights_and_options: Any,
) -> tuple[Tensor, ...]:
    _check_backward(grad_out, grad_scores, scores, x, maps, *weights_and_options)
    *weights, patch_size, needs = weights_and_options
    layout = checks.layout_of(x)
    grads = dispatch.implementation("rcu", x).backward(
        checks.dense(grad_out, layout),
        checks.dense(grad_scores),
        checks.dense(scores),
        checks.dense(x, layout),
        checks.dense(maps),
        *(checks.dense(weight) for weight in weights),
        _patch_sizes(x, patch_size),
        needs,
    )
    layouts = [layout] + [torch.contiguous_format] * (1 + len(weights))
    return tuple(
        registration.none_to_empty(grad, like, own)
        for grad, like, own in zip(grads, (x, maps, *weights), layouts, strict=True)
    )


def _backward_fake(
    grad_out: Tensor,
    grad_scores: Tensor,
    scores: Tensor,
    x: Tensor,
    maps: Tensor,
    *weights_and_options: Any,
) -> tuple[Tensor, ...]:
    _check_backward(grad_out, grad_scores, scores, x, maps, *weights_and_options)
    *weights, _, needs = weights_and_options
    layouts = [checks.layout_of(x)] + [torch.contiguous_format] * (1 + len(weights))
    return tuple(
        checks.empty(like.shape, like, layout) if need else like.new_empty((0,))
        for like, layout, need in zip((x, maps, *weights), layouts, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    # The scores are an output, and small: kept, so that backward needs the means only once.
    ctx.save_for_backward(output[1], *inputs)
    ctx.patch_size = keyword_only_inputs["patch_size"]


def _autograd(ctx: Any, grad_out: Tensor, grad_scores: Tensor) -> Any:
    needs = list(ctx.needs_input_grad)
    grads = torch.ops.grcsf.rcu_backward(
        grad_out, grad_scores, *ctx.saved_tensors, ctx.patch_size, needs
    )
    return registration.empty_to_none(grads, needs)


def _autocast(dtype: torch.dtype, *args: Tensor) -> tuple[Tensor, ...]:
    data = (registration.cast_data(tensor, dtype) for tensor in args[:2])
    return (*data, *(registration.cast_weight(weight) for weight in args[2:]))


_WEIGHT_SCHEMA = ", ".join(f"Tensor {name}" for name in _SCHEMA)

registration.define(
    "rcu",
    f"(Tensor x, Tensor residual, {_WEIGHT_SCHEMA}, *, int[1]? patch_size) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
registration.define(
    "rcu_backward",
    "(Tensor grad_out, Tensor grad_scores, Tensor scores, Tensor x, Tensor residual, "
    f"{_WEIGHT_SCHEMA}, int[]? patch_size, bool[] needs) "
    f"-> ({', '.join(['Tensor'] * (2 + len(WEIGHTS)))})",
    _backward,
    _backward_fake,
)
registration.register_autograd("rcu", _autograd, _setup_context)
registration.register_autocast("rcu", _autocast)
