"""Registers our attention with transformers, and patches a model to use it.

Nothing of a model is replaced. transformers calls a registered attention function with q, k, v and the mask that the mask
function registered under the same name built; ours send a prefill to ``sparse_attention`` and everything else to the dense
computation that transformers itself would do.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.modeling_utils import AttentionInterface

from . import ops
from .attention import Attended, attend_args, sparse_attention
from .config import SparseAttnConfig, as_selector
from .dual_chunk import DualChunk, dual_chunk_attention
from .errors import ContractError, NotServed, require, warn_once
from .handle import PATCHED, Handle, Patched, cache_installer, layer_of
from .kept import FEW_QUERIES, KeptKV, Queries, attend_kept, take
from .layout import Layout, allowed_traced, encode, layout_of, layout_of_one
from .masked import masked_attention, only_listed
from .own_blocks import attend_own_blocks
from .patterns import PATTERNS, Dense
from .profile import ModelId, Profile
from .profile import load as load_profile
from .report import LayerLog
from .rotary import Rotation, rotations
from .types import KVView, LayerContext, ReadPlan, ResidentKV, Selector

# bool entries of a mask that SDPA may be given; beyond that the full list is walked without one (8K x 8K is 64 MiB)
_MASK_ENTRIES = 1 << 26
# fewer queries than this over softcapped or sink logits are computed in plain torch, without building a list
_FEW_QUERIES = 16


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of an attention function, and how it ends."""

    module: torch.nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    dropout: float
    softcap: float
    sinks: Tensor | None
    kwargs: dict
    patched: Patched | None
    segment_ids: Tensor | None

    @property
    def log(self) -> LayerLog | None:
        return self.patched.log if self.patched else None

    def by_sdpa(self, mask: Tensor | None, causal: bool, reason: str, n_seen: int | None = None) -> Tensor:
        """Exactly what transformers' sdpa would return, or its eager formula where SDPA has no word for it."""
        if self.softcap or self.sinks is not None:
            out, backend = masked_attention(self.q, self.k, self.v, mask, self.scale, self.softcap, self.sinks, self.dropout), "torch"
        else:
            out, backend = sdpa_attention_forward(self.module, self.q, self.k, self.v, mask, dropout=self.dropout,
                                                  scaling=self.scale, is_causal=causal, **self.kwargs)[0], "sdpa"
        self._note(backend, reason, n_seen if n_seen is not None else self.k.shape[2])
        return out

    def by_layout(self, layout: Layout, reason: str) -> Tensor:
        """Dense, with the mask that the layout describes."""
        n_q = self.q.shape[2]
        n_seen = layout.q_start + n_q
        special = bool(self.softcap) or self.sinks is not None
        large = special or (not layout.plain(n_q) and n_q * layout.n_k > _MASK_ENTRIES)
        ours = n_q >= _FEW_QUERIES and self.ours_can() is None and not layout.holes and not torch.compiler.is_compiling()
        if large and ours:
            attended = self._attend(layout, Dense())
            self._note(self._backend(attended, layout)[0], reason, n_seen)
            return attended.out.transpose(1, 2).contiguous()
        if special or not layout.plain(n_q) or self.kwargs.get("position_bias") is not None:
            return self.by_sdpa(layout.allowed(n_q, self.q.device), False, reason, n_seen)
        return self.by_sdpa(None, True, reason, n_seen)

    def by_selector(self, layout: Layout, selector: Selector) -> Tensor:
        """Over what the selector chooses."""
        return self._noted(self._attend(layout, selector), layout)

    def by_own_blocks(self, layout: Layout, indices: Tensor, block: int, method: Selector) -> Tensor:
        """Over the key blocks that the model itself chose, which leaves the method no choice."""
        attended = attend_own_blocks(self.q, ResidentKV(self.k, self.v), self._context(layout), indices, block)
        dense = isinstance(method, Dense)
        return self._noted(attended, layout, [] if dense else [f"{type(method).__name__}: the model chooses its own key blocks"])

    def _noted(self, attended: Attended, layout: Layout, refusals: Sequence[str] = ()) -> Tensor:
        """The output in transformers' layout, once the report knows how it came about."""
        if self.log is not None and not torch.compiler.is_compiling():
            n_q, n_seen = self.q.shape[2], layout.q_start + self.q.shape[2]
            backend, slower = self._backend(attended, layout)
            if attended.plan.blocks is None:
                self._note(backend, attended.refusal or "the method reads everything", n_seen)
            else:
                density = attended.plan.head_density()
                self.log.sparse(backend, [*slower, *refusals], density.repeat_interleave(self.q.shape[1] // len(density)), n_q, n_seen)
        return attended.out.transpose(1, 2).contiguous()

    def by_dual_chunk(self, layout: Layout, selector: Selector, dual: DualChunk, rotation: Rotation,
                      reason: str | None) -> Tensor:
        """Over what the selector chooses, no key farther than ``dual`` allows; ``reason`` says why the selector is Dense."""
        found = dual_chunk_attention(self.q, ResidentKV(self.k, self.v), self._context(layout), selector, dual, rotation)
        if self.log is not None and found.first is not None:
            part, ctx, attended = found.first
            backend, refusals = _explained(part.q, ResidentKV(part.k, part.v), ctx, attended)
            n_seen = layout.q_start + self.q.shape[2]
            if found.density is None:
                self._note(f"dual_chunk {backend}", reason or attended.refusal or "the method reads everything", n_seen)
            else:
                self.log.sparse(f"dual_chunk {backend}", refusals, found.density, self.q.shape[2], n_seen)
        return found.out.transpose(1, 2).contiguous()

    def by_kept(self, kept: KeptKV, mask: Tensor | None, config: SparseAttnConfig, refusal: str | None) -> Tensor:
        """Over what a cache kept of the text, which then learns what attention saw; or the refusal, and the cache as it was."""
        n_q, refusal = self.q.shape[2], refusal or self.ours_can()
        if mask is not None and mask.dim() != 2:
            refusal = refusal or "its mask is neither causal nor padded"
        layout = layout_of(mask if refusal is None else None, n_q, n_q)
        if layout.holes:
            refusal = refusal or "a row's real tokens are not one run; pad on one side only"
        if self.patched and self.patched.rotation is not None:
            refusal = refusal or "dual_chunk moves keys that the cache has let go of"
        if refusal is not None:
            kept.withdraw()
            raise ContractError(f"{type(self.module).__name__} cannot attend over an evicting cache: {refusal}")
        kept.admit(layout.first, layout.last)
        n_seen = kept.n_tokens
        unwanted = _why_dense(config, self.module, n_q, n_seen)
        whole = Layout(n_seen - n_q, n_seen, n_seen)
        ctx = replace(self._context(whole), first=layout.first, last=layout.last, segments=None)
        found = attend_kept(self.q, kept, ctx, Dense() if unwanted else config.prefill, Dense())
        kept.observe(Queries(self.q, found.lse, layout.first, layout.last, self.scale, self.softcap, self.sinks))
        if self.log is not None:
            if not found.calls:
                self._note("paged_attention", unwanted or f"no more than {FEW_QUERIES} queries", n_seen)
            for q, kv, own, attended in found.calls:
                backend, refusals = _explained(q, kv, own, attended)
                if attended.plan.blocks is None:
                    self.log.dense(backend, unwanted or attended.refusal or "heads keep different tokens", q.shape[2], q.shape[1], kv.n_tokens)
                else:
                    density = attended.plan.head_density()
                    self.log.sparse(backend, refusals, density.repeat_interleave(q.shape[1] // len(density)), q.shape[2], kv.n_tokens)
        return found.out.transpose(1, 2).contiguous()

    def ours_can(self) -> str | None:
        """None if our op can compute this call, else why not."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in (self.q, self.k, self.v, self.sinks) if t is not None):
            return "an input requires grad; run under torch.no_grad() or torch.inference_mode()"
        if self.dropout:
            return "attention dropout is on; call model.eval()"
        if self.kwargs.get("position_bias") is not None:
            return "the layer adds a position bias"
        if self.sinks is not None and self.sinks.dim() != 1:
            return "its sink logits differ per query"
        return None

    def _context(self, layout: Layout) -> LayerContext:
        config = getattr(self.module, "config", None)
        told = 0 if getattr(config, "is_encoder_decoder", False) else getattr(config, "num_hidden_layers", 0)
        return LayerContext(layer_of(self.module), self.scale, layout.q_start, True, layout.first, layout.last, layout.window,
                            self.softcap, self.sinks, self.patched.n_layers if self.patched else told, self._segments(layout),
                            self.patched.forward.carry if self.patched else None)

    def _segments(self, layout: Layout) -> Tensor | None:
        """The documents of these keys and of what follows them in the prompt."""
        ids, before = self.segment_ids, self.patched.forward.segments if self.patched else None
        require(ids is None or before is None, "segment_ids came twice, from handle.segments and with the call; give them once")
        ids = before if ids is None else ids
        if ids is None:
            return None
        batch, end = self.q.shape[0], layout.offset + layout.n_seen
        require(ids.dim() == 2 and ids.shape[0] == batch,
                f"segment ids {list(ids.shape)} do not fit a prompt of {batch} rows; give [{batch}, N], beams being rows of their own")
        require(ids.shape[1] >= end, f"segment ids cover {ids.shape[1]} of {end} tokens; give one per token, -1 for no document")
        ids = ids[:, layout.offset :].to(self.q.device, torch.int32)
        return torch.nn.functional.pad(ids, (0, max(0, layout.n_k - ids.shape[1])), value=-1)

    def _attend(self, layout: Layout, selector: Selector) -> Attended:
        return sparse_attention(self.q, ResidentKV(self.k, self.v), self._context(layout), selector)

    def _backend(self, attended: Attended, layout: Layout) -> tuple[str, list[str]]:
        if self.log is None:
            return "", []
        return _explained(self.q, ResidentKV(self.k, self.v), self._context(layout), attended)

    def _note(self, backend: str, reason: str, n_seen: int) -> None:
        if self.log is not None and not torch.compiler.is_compiling():
            self.log.dense(backend, reason, self.q.shape[2], self.q.shape[1], n_seen)


def _explained(q: Tensor, kv: ResidentKV, ctx: LayerContext, attended: Attended) -> tuple[str, list[str]]:
    """Which backend computed ``attended``, and why faster ones did not."""
    args = attend_args(q, kv, ctx, attended.plan, attended.blocks)
    op = ops.block_sparse_attention
    chosen, refusals = op.chosen(*args), []
    for name, refusal in op.explain(*args).items():
        if name == chosen:
            break
        if refusal is not None:
            refusals.append(f"{op.name}: {name}: {refusal}")
    return chosen, refusals


def _attention(default: SparseAttnConfig, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
               softcap: float | None = None, s_aux: Tensor | None = None, sinks: Tensor | None = None,
               indices: Tensor | None = None, block_indices: Tensor | None = None, segment_ids: Tensor | None = None,
               **kwargs) -> tuple[Tensor, None]:
    """The attention function: ``[B, Nq, H, Dv]`` and no weights."""
    patched = module.__dict__.get("_sparse_attn")
    config = patched.config if patched else default
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    call = _Call(module, query, key, value, scale, dropout, softcap or 0.0, s_aux if s_aux is not None else sinks, kwargs, patched,
                 segment_ids)
    kept, given = take(key)
    if kept is not None:
        own_way = not given or indices is not None or block_indices is not None
        return call.by_kept(kept, attention_mask, config, "it changes its keys after the cache, or chooses among them" if own_way else None), None
    n_q, n_k = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    chosen = indices if indices is not None else block_indices

    if torch.compiler.is_compiling() and attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = allowed_traced(attention_mask, n_q, n_k)
    if not causal and chosen is None and (attention_mask is None or attention_mask.dtype != torch.int64):
        # an encoder or a cross-attention; a code says by itself that it is causal
        padding = attention_mask is not None and attention_mask.dim() == 2
        return call.by_sdpa(attention_mask[:, None, None].bool() if padding else attention_mask, False, "not causal"), None
    unwanted = _why_dense(config, module, n_q, n_k)
    refusal = call.ours_can()
    layout, rotation = None, patched.rotation if patched else None
    if rotation is not None and torch.compiler.is_compiling():
        refusal = "torch.compile is tracing it"
    exact = attention_mask is not None and attention_mask.dim() != 2
    one = exact and rotation is not None and refusal is None and attention_mask.shape[1:3] == (1, 1)
    one = one and attention_mask.dtype == torch.bool  # decoding with a StaticCache
    if one or not exact:
        layout = layout_of_one(attention_mask) if one else layout_of(attention_mask, n_q, n_k)
        if unwanted is None and layout.n_seen < config.dense_below:
            unwanted = f"fewer than {config.dense_below} keys"
        if layout.holes:
            refusal = refusal or "a row's real tokens are not one run; pad on one side only"
    else:
        refusal = refusal or "its mask is not plain causal, sliding or padded"
    if chosen is not None:
        why = refusal or ("token by token" if block_indices is None else _why_masked(module, block_indices, layout))
        short = _too_short(config, n_q, layout.n_seen if layout else n_k)
        if why is None and short is None and n_q > 1:
            return call.by_own_blocks(layout, block_indices, module.indexer.block_size, config.prefill), None
        refusal = f"the model chooses its own keys ({short or why or 'decoding'})"
        attention_mask = layout.allowed(n_q, query.device) if layout else attention_mask
        if indices is not None:
            attention_mask = only_listed(attention_mask, indices, n_k)
        else:
            positions = kwargs.get("position_ids")
            positions = torch.arange(n_k - n_q, n_k, device=query.device)[None] if positions is None else positions
            attention_mask = module.indexer.build_block_mask(block_indices, attention_mask, n_k, query.dtype, query.device,
                                                             positions.expand(query.shape[0], -1))
        layout = None
    if rotation is not None and config.dual_chunk.changes(layout.offset + layout.n_seen if layout else n_k):
        refusal = "its cache let go of the first keys" if layout is not None and layout.offset else refusal
        require(refusal is None,
                f"dual_chunk cannot serve a call over {n_k} keys: {refusal}; a plain one would leave the trained range")
        return call.by_dual_chunk(layout, Dense() if unwanted else config.prefill, config.dual_chunk, rotation, unwanted), None
    if unwanted is None and refusal is None:
        return call.by_selector(layout, config.prefill), None
    if unwanted is None and not torch.compiler.is_compiling():
        warn_once(f"{type(module).__name__} runs dense: {refusal}")
    reason = unwanted or refusal
    return (call.by_layout(layout, reason) if layout else call.by_sdpa(attention_mask, False, reason)), None


def _why_dense(config: SparseAttnConfig, module: torch.nn.Module, n_q: int, n_k: int) -> str | None:
    """Why this call was not meant to be sparse; None if it was."""
    if n_q == 1:
        return "decoding"
    if isinstance(config.prefill, Dense):
        return "prefill is dense"
    if layer_of(module) in config.dense_layers:
        return "layer is in dense_layers"
    return _too_short(config, n_q, n_k)


def _too_short(config: SparseAttnConfig, n_q: int, n_k: int) -> str | None:
    """Why reading less would not pay; None if it would."""
    if n_q < config.min_queries:
        return f"fewer than {config.min_queries} queries"
    if n_k < config.dense_below:
        return f"fewer than {config.dense_below} keys"
    return None


def _why_masked(module: torch.nn.Module, block_indices: Tensor, layout: Layout | None) -> str | None:
    """Why the key blocks that a model chose cannot be walked as they are; None if they can."""
    if torch.compiler.is_compiling():
        return "inside a compiled graph"
    size, local = (getattr(module.indexer, name, 0) for name in ("block_size", "local_blocks"))
    if size < 1 or local < 1:
        return f"its indexer has block_size={size} and local_blocks={local}; every query must read its own block"
    if layout is None:
        return "its mask is not plain causal, sliding or padded"
    if layout.window or layout.offset:
        return "the layer has a sliding window"
    if layout.first is not None:
        return "left padding shifts the blocks it counts from key 0"
    return None


def _mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
          mask_function=causal_mask_function, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True,
          device="cpu", config=None, **kwargs) -> Tensor | None:
    """The mask function: None, a code (see layout.py), or the exact 4-D mask for any pattern that is neither causal nor sliding."""
    _require_drivable(config)

    def exact():
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
                         mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False, device=device,
                         config=config, **kwargs)

    end = kv_offset + kv_length
    if torch.compiler.is_compiling():
        # reading a value would break the graph: only what the sizes tell can be skipped
        plain = mask_function is causal_mask_function and attention_mask is None and not isinstance(q_offset, Tensor)
        return None if allow_is_causal_skip and plain and q_offset == 0 and q_length == end else exact()
    window = _window_of(mask_function)
    if window is None or not allow_is_causal_skip:
        return exact()
    q_start = int(q_offset)
    stop = q_start + q_length
    if stop > end:
        return exact()
    real = attention_mask
    if real is not None:
        real = torch.nn.functional.pad(real, (0, max(0, stop - real.shape[1])))[:, :stop].bool()
        real = None if bool(real.all()) else real
    window = window if window < stop - kv_offset else 0
    if real is None and not window and stop == end and q_length in (1, kv_length):
        return None
    return encode(real, batch_size, q_start, q_length, end, window, device)


def _window_of(mask_function) -> int | None:
    """0 for the plain causal pattern, the window of a sliding one, None for anything else."""
    if mask_function is causal_mask_function:
        return 0
    if getattr(mask_function, "__code__", None) is not and_masks(causal_mask_function).__code__:
        return None
    parts = mask_function.__closure__[0].cell_contents
    windows = [f.__closure__[0].cell_contents for f in parts if getattr(f, "__code__", None) is sliding_window_overlay(1).__code__]
    only_these = len(parts) == 2 and len(windows) == 1 and causal_mask_function in parts
    return windows[0] if only_these else None


def _require_drivable(config) -> None:
    """A model that asks for our mask but never calls an attention function would run without any mask."""
    if config is not None and not torch.compiler.is_compiling():
        family = _undrivable(type(config))
        require(family is None, f"{family} computes attention itself and cannot be driven; load it without attn_implementation")


@functools.cache
def _undrivable(config_class: type) -> str | None:
    modeling = sys.modules.get(config_class.__module__.replace(".configuration_", ".modeling_"))
    for cls in vars(modeling).values() if modeling else ():
        ours = inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == modeling.__name__
        if ours and cls.config_class is config_class and not cls._can_set_attn_implementation():
            return cls.__name__
    return None


def patch(model: PreTrainedModel, prefill: Selector | str | dict | None = None, dense_layers: tuple[int, ...] = (),
          dense_below: int = 4096, min_queries: int = 16, dual_chunk: DualChunk | dict | None = None,
          profile: Profile | str | Path | None = None, kv_cache: object = None) -> Handle:
    """Make ``model`` read during prefill only what ``prefill`` chooses.

    Only the text model of a composite model is touched. Prompts over fewer than ``dense_below`` tokens (padding aside, longest
    row of the batch), layers in ``dense_layers``, decoding and whatever cannot be expressed run dense as transformers would.

    Args:
        model: a transformers model whose class calls transformers' attention interface.
        prefill: a selector, a method's name, or its JSON form ``{"name": "xattention", "threshold": 0.9}``; None for auto, or
            for the method of the profile.
        dense_layers: indices of layers that stay dense.
        dense_below: tokens.
        min_queries: tokens; calls with fewer queries run dense.
        dual_chunk: lets layers with RoPE and without a sliding window read texts longer than the model was trained for, in
            prefill and decoding, dense or sparse; a ``DualChunk`` or a dict of its fields.
        profile: what ``python -m sparse_attn.calibrate`` wrote for this model, or the file it wrote; excludes ``prefill``.
        kv_cache: what every fresh cache of this model becomes: a ``kvcache.CacheConfig``, or a dict such as
            ``{"name": "snapkv", "budget": 2048}``; None leaves caches alone. Needs ``import kvcache``. Assisted decoding wants a
            cache of its own, ``past_key_values=kvcache.make_cache(...)``: a fresh one is not told that it will be cropped.

    Raises:
        ContractError: on a model that cannot be driven or is patched already, on bad arguments, or on the profile of another model;
            the model is then untouched.

    Example (not run here)::

        with sparse_attn.patch(model, prefill=XAttention(threshold=0.9), dense_layers=(0, 1)) as patched:
            model.generate(**inputs)
            print(patched.report())
    """
    require(isinstance(model, PreTrainedModel),
            f"patch needs a transformers model, got {type(model).__name__}; patch before compiling or wrapping it")
    require(prefill is None or profile is None, "give prefill or profile, not both; a profile names its own method")
    if profile is not None:
        profile = profile if isinstance(profile, Profile) else load_profile(profile)
        prefill = profile.selector()
    selector = as_selector("auto" if prefill is None else prefill)
    config = SparseAttnConfig(selector, dense_layers, dense_below, min_queries, dual_chunk)
    tower = _text_model(model)
    for cls in (type(model), type(tower)):
        require(cls._can_set_attn_implementation(), f"{cls.__name__} computes attention itself and cannot be driven; "
                "it does not use transformers' attention interface")
    modules = _attention_of(tower)
    require(bool(modules), f"{type(tower).__name__} has no attention layer to patch")
    require(not any("_sparse_attn" in m.__dict__ for m in modules.values()),
            f"this {type(model).__name__} is patched already; call undo() on its handle first")
    n_layers = 1 + max(layer_of(m) for m in modules.values())
    over = [i for i in config.dense_layers if i >= n_layers]
    require(not over, f"dense_layers names layer {over[0] if over else ''} but the model has {n_layers}")
    if profile is not None:
        profile.require_model(model_id(model))
    turns = rotations(tower, modules) if config.dual_chunk else {}
    install = cache_installer(model, kv_cache)
    configs = {id(c): c for m in tower.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation_internal")}
    return Handle(_around(tower, modules), modules, list(configs.values()), config, turns, install)


def _around(tower: PreTrainedModel, layers: dict[str, torch.nn.Module]) -> torch.nn.Module:
    """The smallest model that holds all ``layers``: its forward runs whether it is called itself or by a head on top."""
    wanted = set(layers.values())
    return [m for m in tower.modules() if isinstance(m, PreTrainedModel) and wanted <= set(m.modules())][-1]


def runs_ours(config) -> bool:
    """Does a model with this (text) config send its attention to us?"""
    return config._attn_implementation in (PATCHED, *PATTERNS)


def model_rotations(model: PreTrainedModel, wanted_by: str, none: bool = False) -> dict[int, Rotation]:
    """How each attention layer of a model rotates, by layer; raises ContractError, naming ``wanted_by``, where that cannot be repeated.

    A model none of whose layers rotates and sees all keys is refused too, unless ``none``.
    """
    tower = _text_model(model)
    modules = _attention_of(tower)
    return {layer_of(modules[name]): rotation for name, rotation in rotations(tower, modules, wanted_by, none).items()}


def model_id(model: PreTrainedModel) -> ModelId:
    """What a profile says about the model it was made for."""
    tower = _text_model(model)
    modules = _attention_of(tower)
    require(bool(modules), f"{type(tower).__name__} has no attention layer to calibrate")
    return ModelId.of(_around(tower, modules), 1 + max(layer_of(m) for m in modules.values()))


def load(path: str, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Causal language model and tokenizer from a local folder or a hub id.

    Raises:
        ContractError: if nothing can be loaded from there.
    """
    require(Path(path).exists() or path.count("/") == 1 and path[0] not in "./~",
            f"model path {path} does not exist; give a folder with config.json or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ContractError(f"model {path} cannot be loaded ({reason}); give a folder with config.json or a hub id") from error
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def observe(model: PreTrainedModel, ids: Tensor, see: Callable[[Tensor, KVView, LayerContext], None]) -> None:
    """Prefill ``ids`` ``[1, N]`` dense, showing ``see`` the q, keys, values and context of each attention layer in turn.

    Raises:
        ContractError: if the attention of some layer is not one that a method could serve.
    """
    looking = _Looking(see, set())
    with patch(model, prefill=looking, dense_below=0, min_queries=0) as patched:
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
        for row in patched.report().layers:
            why = "; ".join(row.reasons) or "it was not called"
            require(row.layer in looking.layers, f"layer {row.layer} cannot be calibrated: {why}")


@dataclass(frozen=True)
class _Looking:
    """Reads everything, and shows what it was given."""

    see: Callable[[Tensor, KVView, LayerContext], None]
    layers: set[int]

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        try:
            self.see(q, kv, ctx)
        except NotServed as reason:
            raise ContractError(f"layer {ctx.layer} cannot be calibrated: {reason}") from reason
        self.layers.add(ctx.layer)
        return ReadPlan()


def _text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a composite model that reads text; the model itself otherwise."""
    try:
        text = model.config.get_text_config(decoder=True)
    except ValueError as error:
        raise ContractError(f"{type(model).__name__} has several text models; patch the one you mean: {error}") from error
    if text is model.config:
        return model
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is text), model)


def _attention_of(tower: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Its attention modules by path."""
    return {name: m for name, m in tower.named_modules() if "Attention" in type(m).__name__ and hasattr(m, "layer_idx")}


def _register() -> None:
    # transformers reads these in a name as a request for something else
    trapped = [name for name in PATTERNS if any(trap in name for trap in ("flash", "sdpa", "flex_attention", "eager", "/", ":", "|"))]
    require(not trapped, f"the method name {trapped[0] if trapped else ''} means something else to transformers; rename it")
    configs = {name: SparseAttnConfig(prefill=cls()) for name, cls in PATTERNS.items()} | {PATCHED: SparseAttnConfig()}
    for name, config in configs.items():
        AttentionInterface.register(name, functools.partial(_attention, config))
        AttentionMaskInterface.register(name, _mask)


_register()
