"""Caches that transformers takes for its own: ``past_key_values=`` of any call, or ``patch(model, kv_cache=...)``."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sparse_attn.errors import ContractError, require, warn_once
from sparse_attn.hf import model_id, model_rotations, runs_ours
from sparse_attn.kept import leave
from sparse_attn.layout import layout_of

from .budget import Budget
from .cache import CacheLayer
from .config import METHODS, CacheConfig, as_config
from .report import CacheReport
from .store import Meter
from .types import CachePolicy


class KVPolicyLayer(DynamicLayer):
    """One attention layer of a ``KVCache``: what transformers calls, in terms of ``CacheLayer``.

    It reports the length that the model believes in (``get_seq_length``) and the one it keeps (``get_mask_sizes``), so positions
    and masks are those of the whole text.
    """

    is_compileable = False

    def __init__(self, core: CacheLayer, cache: KVCache):
        self.core, self._cache = core, cache
        super().__init__()

    keys = property(lambda self: self._shown(0), lambda self, _: None)
    values = property(lambda self: self._shown(1), lambda self, _: None)

    def _shown(self, which: int) -> Tensor | None:
        return None if self.core.store.k is None else self.core.store.rectangle()[which]

    @property
    def record_past(self) -> bool:
        return self.core.recording

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append; what is returned is everything kept, the new tokens last.

        Raises:
            ContractError: if the policy needs queries and the model's attention will not show them, or nobody said what is padding.
        """
        watched = self._cache.require_served(self.core, key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        core, n = self.core, key_states.shape[2]
        core.append(key_states, value_states)
        if watched:
            # attention reads the runs themselves; the tensors only have to be there
            leave(core, key_states)
            return key_states, value_states
        first, last = self._cache.real_of(core.n_columns, n)
        core.admit(first, last)
        shown = core.store.rectangle()
        core.observe(None, in_place=False)
        return shown

    def get_seq_length(self) -> int:
        return self.core.n_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.core.settle(query_length)
        kept = self.core.store.longest
        return kept + query_length, self.core.n_columns - kept

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.core.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises:
            ContractError: if an eviction has seen them, or on a positive number.
        """
        require(tokens_to_remove <= 0, f"crop({tokens_to_remove}) names a length; give minus the number of tokens to take back")
        self.core.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        self.core.record()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.core.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        batch = 0 if self.core.n_seen is None else len(self.core.n_seen)
        self.core.select(torch.arange(batch)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.core.n_seen is not None:
            self.core.select(torch.arange(len(self.core.n_seen)).repeat_interleave(repeats))

    def offload(self) -> None:
        raise ContractError("an evicting cache is not offloaded by transformers; build it without offloading=True")

    prefetch = offload


class KVCache(Cache):
    """A transformers cache whose full-attention layers keep no more than a budget, or read no more than one of all they keep; other
    layers keep transformers' own classes.

    Args:
        model: the model, or its config where no layer has to be rolled.
        config: what stays.
        attention_mask: ``[B, >= N]`` padding mask of the prompt; needed only for padded batches under an attention implementation
            that is not ours, which tells us itself.

    Raises:
        ContractError: on a model without full-attention layers, or settings that do not fit it.
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, config: CacheConfig, attention_mask: Tensor | None = None):
        whole = model.config if isinstance(model, PreTrainedModel) else model
        self.kept, self.meter = config, Meter()
        self._model_config = whole.get_text_config(decoder=True)
        self._mask = None if attention_mask is None else layout_mask(attention_mask)
        turns = {}
        wanted_by = "roll=True" if config.roll else type(config.policy).__name__
        if config.roll or "turn" in getattr(config.policy, "needs", ()):
            require(isinstance(model, PreTrainedModel),
                    f"{wanted_by} needs the model, not its config: its rotary embedding turns the keys")
            turns = {index: rotation.move for index, rotation in model_rotations(model, wanted_by).items()}
        if isinstance(model, PreTrainedModel) and hasattr(config.policy, "require_model"):  # trained or measured for one
            config.policy.require_model(model_id(model))
        layers = DynamicCache(config=self._model_config).layers
        own = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        require(bool(own), f"{type(whole).__name__} has no full-attention layer to evict from; use transformers' own cache")
        reader = config.decode
        require(reader is None or not all(map(reader.reads_all, own)),
                f"{type(reader).__name__} would read everything: of this model only layers {', '.join(map(str, own))} attend to the whole text; "
                "leave one of them out of its dense_layers")
        if config.budget is not None:
            config.budget.require_model(len(layers), getattr(self._model_config, "num_key_value_heads", None))
        for i in own:
            layers[i] = KVPolicyLayer(CacheLayer(config, i, len(layers), self.meter, turns.get(i)), self)
        self._own = own
        super().__init__(layers=layers)

    def require_served(self, core: CacheLayer, k: Tensor) -> bool:
        """Whether our attention will read this layer; raises before anything changes where somebody has to and cannot."""
        latent = bool(getattr(self._model_config, "kv_lora_rank", None))
        ours = runs_ours(self._model_config)
        if ours and not latent:
            return True
        reader = core.config.decode
        require(reader is None, f"{type(reader).__name__} reads pages of keys, " + ("but this model caches latents; leave decode= out" if latent else
                f"which attention {self._model_config._attn_implementation!r} cannot; call sparse_attn.patch(model, prefill='dense')"))
        policy = type(core.config.policy).__name__
        require(not core.config.policy.needs, f"{policy} ranks tokens by queries, and " + (
            "this model caches latents that have none; use streaming, knorm, keydiff or random" if latent else
            f"attention {self._model_config._attn_implementation!r} does not show them; call sparse_attn.patch(model, prefill='dense'), or "
            "load the model with attn_implementation='dense'"))
        require(core.config.budget.alike, f"{type(core.config.budget).__name__} keeps different numbers per layer or head, which "
                f"attention {self._model_config._attn_implementation!r} cannot read; call sparse_attn.patch(model, prefill='dense')")
        require(k.shape[0] == 1 or self._mask is not None,
                f"a batch of {k.shape[0]} may be padded, and neither " + ("a cache of latents" if latent else f"attention "
                f"{self._model_config._attn_implementation!r}") + " says where; give attention_mask= to the cache, all ones if nothing is")
        return False

    def real_of(self, start: int, n: int) -> tuple[Tensor | None, Tensor | None]:
        """Bounds of the real tokens among columns ``start`` to ``start + n``, by the mask that the cache was given."""
        if self._mask is None or start >= self._mask.shape[1]:
            return None, None
        piece = self._mask[:, start : start + n]
        piece = torch.nn.functional.pad(piece, (0, n - piece.shape[1]), value=1)
        layout = layout_of(piece, n, n)
        require(not layout.holes, "a row's real tokens are not one run; pad on one side only")
        return layout.first, layout.last

    def fork(self) -> KVCache:
        """A second cache with the same contents in memory of its own: ask several questions of one prefilled text."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.meter = Meter()
        twin.layers = []
        for layer in self.layers:
            if isinstance(layer, KVPolicyLayer):
                copied = KVPolicyLayer(layer.core.fork(twin.meter), twin)
                copied.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in ("core", "_cache")})
            else:
                copied = copy.deepcopy(layer)
            twin.layers.append(copied)
        return twin

    def reset(self) -> None:
        """Forget the request; also the padding mask, which was that request's."""
        super().reset()
        self._mask = None

    def report(self) -> CacheReport:
        """Kept tokens and bytes, measured and by formula."""
        return CacheReport.of([self.layers[i].core for i in self._own], self.meter)


def layout_mask(mask: Tensor) -> Tensor:
    """A padding mask as int64 ``[B, N]`` of 0 and 1; raises ContractError on anything else."""
    require(mask.dim() == 2, f"attention_mask must be [B, N], 1 for real tokens, got {mask.dim()} dimensions")
    return (mask != 0).long()


def make_cache(model: PreTrainedModel, policy: CachePolicy | str | dict | CacheConfig | None = None,
               budget: Budget | int | float | dict | None = None, *, attention_mask: Tensor | None = None, **settings) -> KVCache:
    """A cache for ``model`` that keeps what ``policy`` ranks highest, within ``budget``; or keeps everything and reads little of it.

    Args:
        model: a transformers model, patched or not.
        policy: a method's name (``kvcache.METHODS``), a policy, its JSON form, or a whole CacheConfig. None is snapkv, or with
            ``decode=`` everything.
        budget: tokens per KV head; a share of the tokens seen so far if not above 1.0; a budget; or its JSON form. Where everything
            is kept, the tokens per KV head that a generated token reads.
        attention_mask: see KVCache.
        settings: fields of CacheConfig (sinks, recent, grace, evict, prompt_length, roll, decode), of the policy and of its budget.

    Raises:
        ContractError: on unknown names or arguments, or sizes that contradict each other.

    Example (not run here)::

        cache = kvcache.make_cache(model, "snapkv", budget=2048)
        with sparse_attn.patch(model, prefill="xattention"):
            model.generate(**inputs, past_key_values=cache, prefill_chunk_size=2048)
        print(cache.report())
        cache = kvcache.make_cache(model, decode="quest", budget=2048)  # keeps everything
        cache = kvcache.make_cache(model, "snapkv", 16384, decode={"name": "quest", "budget": 1024})  # evicts, then reads little
    """
    if isinstance(policy, CacheConfig):
        require(budget is None and not settings, "a CacheConfig says everything; leave budget and the other settings out")
        return KVCache(model, policy, attention_mask)
    if policy is None and settings.get("decode") is None:
        policy = "snapkv"
    return KVCache(model, as_config(policy, budget, **settings), attention_mask)


@torch.inference_mode()
def prefill(model: PreTrainedModel, input_ids: Tensor, cache: Cache, chunk: int, attention_mask: Tensor | None = None) -> Tensor:
    """Read a prompt ``[B, N]`` in chunks of ``chunk`` tokens into ``cache``; float logits ``[B, V]`` behind its last token.

    The cache may hold earlier turns; ``attention_mask`` then covers them too, as in ``generate``.

    Raises:
        ContractError: on a chunk below 1 or a mask that does not fit.
    """
    require(chunk >= 1, f"chunk={chunk} must be 1 or more tokens")
    before, n = cache.get_seq_length(), input_ids.shape[1]
    require(n >= 1, "the prompt is empty; give one token or more")
    if attention_mask is not None:
        require(attention_mask.shape[1] == before + n,
                f"attention_mask covers {attention_mask.shape[1]} tokens but there are {before} cached and {n} new ones")
    for start in range(0, n, chunk):
        piece = input_ids[:, start : start + chunk]
        end = before + start + piece.shape[1]
        mask = None if attention_mask is None else attention_mask[:, :end]
        positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)[:, -piece.shape[1] :]
        out = model(input_ids=piece, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1]


def _named(name: str, policy: str, budget: int | float | None, doc: str) -> type[KVCache]:
    class Named(KVCache):
        __doc__ = f"""{doc}

        Args:
            model: the model, or its config.
            budget: as in ``make_cache``.
            attention_mask, settings: as in ``make_cache``.
        """

        def __init__(self, model, budget=budget, *, attention_mask=None, **settings):
            super().__init__(model, as_config(policy, budget, **settings), attention_mask)

    Named.__name__ = Named.__qualname__ = name
    return Named


_USUAL = {"streaming": 1028, **dict.fromkeys(("heavy_hitter", "snapkv", "pyramidkv", "adakv", "tova"), 2048)}

StreamingLLMCache = _named("StreamingLLMCache", "streaming", 1028, "First and last tokens (StreamingLLM, arXiv:2309.17453).")
H2OCache = _named("H2OCache", "heavy_hitter", 2048, "Heavy hitters and recent tokens (H2O, arXiv:2306.14048).")
SnapKVCache = _named("SnapKVCache", "snapkv", 2048, "What the last tokens of the prompt attend to (SnapKV, arXiv:2404.14469).")
PyramidKVCache = _named("PyramidKVCache", "pyramidkv", 2048, "SnapKV, more tokens in lower layers (PyramidKV, arXiv:2406.02069).")
AdaKVCache = _named("AdaKVCache", "adakv", 2048, "SnapKV, more tokens in heads that spread (Ada-KV, arXiv:2407.11550).")
TOVACache = _named("TOVACache", "tova", 2048, "What the newest token attends to (TOVA, arXiv:2401.06104).")
QuestCache = _named("QuestCache", "quest", 2048, "Everything; a step reads the pages that could matter (Quest, arXiv:2406.10774).")


def installer(model: PreTrainedModel, spec) -> Callable[[Cache | None], Cache]:
    """What ``patch(model, kv_cache=spec)`` does to the cache of each forward: a fresh one of transformers' gets our layers.

    Args:
        spec: a CacheConfig, a dict with ``name``, ``budget`` and settings, or a function of no arguments that makes a cache.
    """
    if isinstance(spec, dict):
        require("name" in spec, f"kv_cache has no 'name' in {spec}; there are {', '.join(METHODS)}")
        given = {key: value for key, value in spec.items() if key not in ("name", "budget")}
        spec = as_config(spec["name"], spec.get("budget"), **given)
    elif isinstance(spec, str):
        spec = as_config(spec, _USUAL.get(spec))
    require(isinstance(spec, CacheConfig), f"kv_cache is a CacheConfig, a dict with name and budget, or a name; got {type(spec).__name__}")
    KVCache(model, spec)  # says now what would be wrong later

    def install(cache: Cache | None) -> Cache:
        if cache is None:
            return KVCache(model, spec)
        if type(cache) is DynamicCache and cache.get_seq_length() == 0:
            # generate() holds on to its own object, so ours move in
            mine = KVCache(model, spec)
            cache.layers, cache.layer_class_to_replicate, cache.kv_cache = mine.layers, None, mine
        elif not isinstance(cache, KVCache) and not hasattr(cache, "kv_cache"):
            warn_once(f"kv_cache does not serve a {type(cache).__name__}; this call keeps everything")
        return cache

    return install
