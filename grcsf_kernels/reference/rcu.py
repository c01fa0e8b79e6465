# SPDX-License-Identifier: Apache-2.0
"""The definition of ``rcu`` in eager PyTorch, forward and backward.

The volume is cut into at most 2^axes regions in which all patches have the same size (the bulk, and
the edges where patches are smaller), so that nothing is padded or masked. Inside a region the
attention is computed directly, softmax over the residual voxels of the patch, in chunks of patches
and of queries that keep the logits under a fixed number of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grcsf_kernels.patches import regions

# Logits of one chunk, in values, and backward holds three such tensors. 1 MiB in float32 stays in
# a CPU's cache; a GPU needs more at once to be busy. The textbook form holds K * h * V * P.
_CHUNK = 1 << 18
_CHUNKS_AT_ONCE_ON_GPU = 512


def _chunks(own: Tensor, lanes: int) -> Iterator[tuple[slice, slice]]:
    """Slices of windows and of queries of ``own`` [n, P, C] that keep the logits in bounds."""
    windows, voxels, _ = own.shape
    values = _CHUNK * (1 if own.device.type == "cpu" else _CHUNKS_AT_ONCE_ON_GPU)
    many = max(1, values // (voxels * lanes))
    window_step = max(1, many // voxels)
    query_step = min(voxels, many)
    for window in range(0, windows, window_step):
        for query in range(0, voxels, query_step):
            yield slice(window, window + window_step), slice(query, query + query_step)


def centered(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Residual voxels [..., j, c] relative to the first of their patch, and that one [..., 1, c].

    The softmax is the same, but an offset of the map costs its logits no digits.
    """
    first = keys[..., :1, :]
    return keys - first, first


def _attend(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [n, k, i * h, j] and expectations [n, k, i, h, c] relative to the first key.

    ``queries`` [n, k, i, h, c] are absorbed, ``keys`` [n, k, j, c] are centered residual voxels.
    """
    logits = queries.flatten(2, 3) @ keys.mT
    attention = torch.softmax(logits, dim=-1)
    return attention, (attention @ keys).view_as(queries)


def _added(own: Tensor, keys: Tensor, first: Tensor, *weights: Tensor) -> Tensor:
    """Attention output for the query voxels ``own`` [n, i, C], before the value bias and the score.

    ``keys`` and ``first`` are those of :func:`centered`.
    """
    query_weight, query_bias, value_weight = weights
    queries = torch.einsum("nix,khcx->nkihc", own, query_weight) + query_bias[:, None]
    _, expected = _attend(queries.contiguous(), keys)
    return torch.einsum("nkihc,kxhc->nix", expected + first[:, :, None], value_weight)


def _flat_maps(residual: Tensor) -> Tensor:
    return residual.flatten(1, 2)


def _keys(own_maps: Tensor, maps: int) -> Tensor:
    """Windows [n, j, K * c] of all maps to [n, K, j, c]."""
    return own_maps.unflatten(2, (maps, -1)).transpose(1, 2).contiguous()


def _means(x: Tensor, residual: Tensor) -> Tensor:
    """[B * patches, C + K * c] from windows."""
    return torch.cat([x.mean(dim=1), residual.mean(dim=1)], dim=1)


def _hidden(means: Tensor, weight1: Tensor, bias1: Tensor) -> Tensor:
    """[B * patches, m] before the ReLU; ``bias1`` [B, m] is of the sample of the patch."""
    per_sample = means.shape[0] // max(bias1.shape[0], 1)
    return means @ weight1.T + bias1.repeat_interleave(per_sample, dim=0)


def forward(
    x: Tensor,
    residual: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    score_weight1: Tensor,
    score_bias1: Tensor,
    score_weight2: Tensor,
    score_bias2: Tensor,
    patch_size: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """``(out, scores)``; see :func:`grcsf_kernels.rcu`."""
    maps, heads, _, _ = query_weight.shape
    dtype = query_weight.dtype
    space = x.shape[2:]
    out = torch.empty_like(x)
    grid = [-(-size // patch) for size, patch in zip(space, patch_size, strict=True)]
    scores = query_weight.new_empty((x.shape[0], *grid))
    constant = value_bias.sum(dim=0)

    for region in regions(space, patch_size):
        if 0 in region.counts or x.shape[0] == 0:
            continue
        own = region.windows(x).to(dtype)
        own_maps = region.windows(_flat_maps(residual)).to(dtype)
        hidden = _hidden(_means(own, own_maps), score_weight1, score_bias1).relu_()
        region_scores = torch.sigmoid(hidden @ score_weight2 + score_bias2)
        scores[region.grid] = region_scores.view(x.shape[0], *region.counts)

        keys, first = centered(_keys(own_maps, maps))
        result = torch.empty_like(own)
        for n, i in _chunks(own, maps * heads):
            weights = (query_weight, query_bias, value_weight)
            added = _added(own[n, i], keys[n], first[n], *weights) + constant
            result[n, i] = own[n, i] + region_scores[n, None, None] * added
        region.put(result.to(x.dtype), out)
    return out, scores


def _chunk_gradients(
    own: Tensor,
    keys: Tensor,
    first: Tensor,
    grad: Tensor,
    score: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    value_weight: Tensor,
    constant: Tensor,
    needs_residual: bool,
) -> tuple[Tensor, ...]:
    """What one chunk adds to the gradients of own, score, the four weights and, if asked, keys."""
    queries = torch.einsum("nix,khcx->nkihc", own, query_weight) + query_bias[:, None]
    queries = queries.contiguous()
    attention, relative = _attend(queries, keys)
    expected = relative + first[:, :, None]
    added = torch.einsum("nkihc,kxhc->nix", expected, value_weight) + constant
    grad_score = (grad * added).sum(dim=(1, 2))

    grad_added = grad * score
    grad_value_bias = grad_added.sum(dim=(0, 1)).expand(query_weight.shape[0], -1)
    grad_value_weight = torch.einsum("nix,nkihc->kxhc", grad_added, expected)
    grad_expected = torch.einsum("nix,kxhc->nkihc", grad_added, value_weight).contiguous()
    # p_ij (g_i . r_j - sum_j p_ij g_i . r_j): their sum over j is 0 but for the rounding of the
    # inner sum, which is large beside them where one key has nearly all the weight.
    grad_logits = torch.ops.aten._softmax_backward_data(
        grad_expected.flatten(2, 3) @ keys.mT, attention, -1, attention.dtype
    )
    grad_logits -= attention * grad_logits.sum(dim=-1, keepdim=True)
    grad_queries = (grad_logits @ keys).view_as(queries)
    gradients = (
        torch.einsum("nkihc,khcx->nix", grad_queries, query_weight),
        grad_score,
        torch.einsum("nkihc,nix->khcx", grad_queries, own),
        grad_queries.sum(dim=(0, 2)),
        grad_value_weight,
        grad_value_bias,
    )
    if not needs_residual:
        return gradients
    grad_keys = attention.mT @ grad_expected.flatten(2, 3)
    return *gradients, grad_keys + grad_logits.mT @ queries.flatten(2, 3)


def backward(
    grad_out: Tensor,
    grad_scores: Tensor,
    scores: Tensor,
    x: Tensor,
    residual: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    score_weight1: Tensor,
    score_bias1: Tensor,
    score_weight2: Tensor,
    score_bias2: Tensor,
    patch_size: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    r"""Gradients of all ten tensors, in the order of the operator (None where not needed).

    With attention weights :math:`p_{ij}`, the gradient :math:`g_i` of the expectation gives
    :math:`\partial l_{ij} = p_{ij} (g_i \cdot r_j - g_i \cdot E_i)` for the logits, from which
    :math:`\partial a_i = \sum_j \partial l_{ij} r_j` and
    :math:`\partial r_j = \sum_i \partial l_{ij} a_i + p_{ij} g_i`. The attention is computed again.
    """
    maps, heads, _, channels = query_weight.shape
    dtype = query_weight.dtype
    batch, space = x.shape[0], x.shape[2:]
    needs_residual = needs[1]
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(_flat_maps(residual)) if needs_residual else None
    small = (query_weight, query_bias, value_weight, value_bias)
    grad_small = [torch.zeros_like(weight) for weight in small]
    grad_weight1, grad_bias1, grad_weight2, grad_bias2 = (
        torch.zeros_like(weight)
        for weight in (score_weight1, score_bias1, score_weight2, score_bias2)
    )
    constant = value_bias.sum(dim=0)

    for region in regions(space, patch_size):
        if 0 in region.counts or batch == 0:
            continue
        own = region.windows(x).to(dtype)
        own_maps = region.windows(_flat_maps(residual)).to(dtype)
        grad = region.windows(grad_out).to(dtype)
        keys, first = centered(_keys(own_maps, maps))
        voxels = own.shape[1]
        score = scores[region.grid].reshape(-1)
        grad_score = grad_scores[region.grid].reshape(-1).clone()
        grad_own = grad.clone()
        grad_keys = torch.zeros_like(keys) if needs_residual else None

        for n, i in _chunks(own, maps * heads):
            parts = _chunk_gradients(
                own[n, i],
                keys[n],
                first[n],
                grad[n, i],
                score[n, None, None],
                query_weight,
                query_bias,
                value_weight,
                constant,
                needs_residual,
            )
            grad_own[n, i] += parts[0]
            grad_score[n] += parts[1]
            for total, part in zip(grad_small, parts[2:6], strict=True):
                total += part
            if grad_keys is not None:
                grad_keys[n] += parts[6]

        means = _means(own, own_maps)
        hidden = _hidden(means, score_weight1, score_bias1)
        active = hidden.clamp(min=0)
        grad_logit = grad_score * score * (1 - score)
        grad_bias2 += grad_logit.sum()
        grad_weight2 += grad_logit @ active
        grad_hidden = (grad_logit[:, None] * score_weight2).masked_fill_(hidden <= 0, 0)
        grad_weight1 += grad_hidden.T @ means
        grad_bias1 += grad_hidden.unflatten(0, (batch, -1)).sum(dim=1)
        grad_means = (grad_hidden @ score_weight1)[:, None] / voxels
        region.put((grad_own + grad_means[..., :channels]).to(x.dtype), grad_x)
        if grad_keys is not None and grad_residual is not None:
            total = grad_keys.transpose(1, 2).flatten(2) + grad_means[..., channels:]
            region.put(total.to(x.dtype), grad_residual)

    if grad_residual is not None:
        grad_residual = grad_residual.view_as(residual)
    grads = (
        grad_x,
        grad_residual,
        *grad_small,
        grad_weight1,
        grad_bias1,
        grad_weight2,
        grad_bias2,
    )
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))
