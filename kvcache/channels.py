"""Which channels of the keys say most about the products with queries: measured on texts, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn.errors import ContractError, require

# layer -> per KV head the numbers of its channels, ascending
Channels = dict[int, list[list[int]]]


def calibrate_channels(model, texts: Sequence[Tensor], width: int = 16) -> Channels:
    """The channels of each KV head with the largest mean of |q_c k_c|, q and k of the same token (Double Sparsity,
    arXiv:2408.07092).

    Differs from its code: the mean is over all texts, where only the last one counts there; and over the query heads of a group.

    Args:
        model: a transformers causal language model; left as it was.
        texts: token ids, int64 ``[1, N]`` each, start token included.
        width: channels per KV head.

    Raises:
        ContractError: if there is no text, width is more than the channels of a key, or a layer's attention cannot be observed.
    """
    from sparse_attn.hf import observe

    require(len(texts) > 0, "there is no text to measure; give one or more")
    total: dict[int, Tensor] = {}

    def look(q, kv, ctx) -> None:
        k = kv.fetch()[0].float()
        size = q.float().abs().unflatten(1, (k.shape[1], -1)).mean(2)
        total[ctx.layer] = total.get(ctx.layer, 0) + (size * k.abs()).sum((0, 2)).cpu()

    for ids in texts:
        observe(model, ids, look)
    dim = min(weight.shape[1] for weight in total.values())
    require(1 <= width <= dim, f"width={width} is not between 1 and the {dim} channels of a key")
    return {layer: largest(weight, width).tolist() for layer, weight in sorted(total.items())}


def largest(weight: Tensor, width: int) -> Tensor:
    """int64 ``[..., width]``: numbers of the largest entries of ``[..., D]``, ascending."""
    return weight.topk(width).indices.sort().values


def write_channels(path: str | Path, channels: Channels) -> None:
    """A JSON object: layer numbers, as text, to lists of channels per KV head."""
    Path(path).write_text(json.dumps({str(layer): heads for layer, heads in channels.items()}))


def read_channels(path: str | Path) -> Channels:
    """What ``write_channels`` wrote.

    Raises:
        ContractError: if the file cannot be read or is something else.
    """
    try:
        found = json.loads(Path(path).read_text())
        table = {int(layer): torch.tensor(heads, dtype=torch.int64) for layer, heads in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ContractError(f"channels {path} cannot be read ({error}); write them with kvcache.channels.write_channels") from error
    for layer, heads in table.items():
        good = heads.dim() == 2 and heads.numel() > 0 and bool((heads >= 0).all()) and bool((heads.diff() > 0).all())
        require(good, f"channels {path}: layer {layer} has no list of ascending channels per KV head, all of one length")
    return {layer: heads.tolist() for layer, heads in table.items()}
