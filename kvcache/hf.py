"""Caches that transformers takes for its own: ``past_key_values=`` of any call, or ``patch(model, kv_cache=...)``."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from sparse_attn.calibrate import digest
from sparse_attn.errors import ContractError, require, warn_once
from sparse_attn.hf import model_id, model_rotations, runs_ours
from sparse_attn.kept import leave
from sparse_attn.layout import layout_of
from sparse_attn.profile import ModelId
from sparse_attn.rotary import Rotation

from .archive import Archive
from .budget import Budget
from .cache import CacheLayer
from .config import METHODS, CacheConfig, as_config
from .readers import READERS
from .report import CacheReport
from .save import Saved, write
from .store import Meter
from .tiers import Pools
from .types import CachePolicy


class _Together:
    """What the layers of one cache have in common. They hold this, not the cache: its memory goes when the last name for it does.

    Attributes:
        config: of the text model; says which attention it runs.
        mask: int64 ``[B, N]``, 0 where a token is padding; None where nobody says.
        cores: the layers that evict.
    """

    def __init__(self, config: PreTrainedConfig, mask: Tensor | None):
        self.config, self.cores = config, []
        self.tell(mask)

    def tell(self, mask: Tensor | None) -> None:
        """What is padding: ``[B, N]``, 0 where it is; None where nobody says."""
        require(mask is None or mask.dim() == 2,
                f"attention_mask must be [B, N], 1 for real tokens, got {mask is not None and mask.dim()} dimensions")
        self.mask = None if mask is None else (mask != 0).long()
        self._padded = mask is not None and not bool(self.mask.all())
        self._left = not self._padded or bool((self.mask.diff(dim=1) >= 0).all())

    def alone(self) -> _Together:
        """The same for other layers, yet to be named."""
        twin = copy.copy(self)
        twin.cores = []
        return twin

    def require_served(self, core: CacheLayer, k: Tensor) -> bool:
        """Whether our attention will read this layer; raises before anything changes where somebody has to and cannot."""
        same = core is not self.cores[0] or all(other.n_done == other.n_columns == core.n_columns for other in self.cores)
        require(same, "the last forward over this cache failed half way, and its layers have seen different texts; recover() takes back "
                "what it left, or reset() the cache")
        latent = bool(getattr(self.config, "kv_lora_rank", None))
        if runs_ours(self.config) and not latent:
            return True
        budget, policy, batch = core.config.budget, type(core.config.policy).__name__, k.shape[0]
        reader = "a cache of latents" if latent else f"attention {self.config._attn_implementation!r}"
        remedy = "" if latent else "; call sparse_attn.patch(model, prefill='dense')"
        require(core.config.decode is None, f"{type(core.config.decode).__name__} reads pages of keys, which {reader} "
                + ("does not hold; leave decode= out" if latent else f"cannot{remedy}"))
        require(not core.config.policy.needs, f"{policy} ranks tokens by queries, and " + (
            "this model caches latents that have none; use streaming, knorm, keydiff or random" if latent else
            f"{reader} does not show them{remedy}, or load the model with attn_implementation='dense'"))
        require(budget.alike,
                f"{type(budget).__name__} keeps different numbers per layer or head, which {reader} cannot read{remedy}")
        require(batch == 1 or self.mask is not None, f"a batch of {batch} may be padded, and {reader} does not say where; give "
                "attention_mask= to the cache, all ones if nothing is")
        require(self._left, f"a row's padding is not all on the left, and {reader} would read wrong keys; pad on the left{remedy}")
        shares = batch > 1 and self._padded and getattr(budget, "ratio", None) is not None
        require(not shares, f"each padded row keeps a share of its own length, and {reader} would read wrong keys; give budget= in "
                f"tokens{remedy}")
        return False

    def real_of(self, start: int, n: int, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """Bounds of the real tokens among columns ``start`` to ``start + n``, by the mask that the cache was given."""
        if self.mask is None or start >= self.mask.shape[1]:
            return None, None
        require(len(self.mask) == batch, f"the cache's attention_mask has {len(self.mask)} rows but {batch} sequences came; beams and "
                "returned sequences are rows of their own, so repeat_interleave it")
        piece = self.mask[:, start : start + n]
        piece = torch.nn.functional.pad(piece, (0, n - piece.shape[1]), value=1)
        layout = layout_of(piece, n, n)
        return layout.first, layout.last


class KVPolicyLayer(DynamicLayer):
    """One attention layer of a ``KVCache``: what transformers calls, in terms of ``CacheLayer``.

    It reports the length that the model believes in (``get_seq_length``) and the one it keeps (``get_mask_sizes``), so positions
    and masks are those of the whole text.
    """

    is_compileable = False

    def __init__(self, core: CacheLayer, together: _Together):
        self.core, self._together = core, together
        together.cores.append(core)
        super().__init__()

    keys = property(lambda self: self._shown(0), lambda self, _: None)
    values = property(lambda self: self._shown(1), lambda self, _: None)

    def _shown(self, which: int) -> Tensor | None:
        return None if self.core.store.k is None else self.core.store.rectangle()[which]

    @property
    def record_past(self) -> bool:
        return self.core.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.core.recording = value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append; what is returned is everything kept, the new tokens last.

        Raises:
            ContractError: if the policy needs queries and the model's attention will not show them, or nobody said what is padding.
        """
        watched = self._together.require_served(self.core, key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        core = self.core
        if watched:
            core.append(key_states, value_states)
            # attention reads the runs themselves; the tensors only have to be there
            leave(core, key_states)
            return key_states, value_states
        bounds = self._together.real_of(core.n_columns, key_states.shape[2], key_states.shape[0])
        core.append(key_states, value_states)
        core.admit(*bounds)
        shown = core.store.rectangle()
        core.observe(None, in_place=False)
        return shown

    def get_seq_length(self) -> int:
        return self.core.n_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.core.settle(query_length)
        kept = self.core.n_tokens
        return kept + query_length, self.core.n_columns - kept

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.core.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises:
            ContractError: if an eviction has seen them, here or in a later layer, or some are padding; or on a positive number.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        require(tokens_to_remove <= 0, f"crop({tokens_to_remove}) names a length; give minus the number of tokens to take back")
        for core in self._together.cores:
            if core.layer >= self.core.layer:  # Cache.crop goes from layer to layer: the first one speaks for all
                core.require_croppable(-tokens_to_remove)
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

    def packed(self) -> tuple[dict, dict[str, Tensor]]:
        """Facts and tensors, see ``CacheLayer.packed``."""
        return self.core.packed()

    def unpack(self, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Hold what ``packed`` returned."""
        if tensors:
            self.lazy_initialization(tensors["k"], tensors["v"])
        self.core.unpack(facts, tensors)


# layers that can be saved, by name because older transformers have no DummyLayer, which reads another's keys and holds none; and
# facts of those that are transformers' own, where they have them
_SAVED = ("KVPolicyLayer", "DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
_OWN_FACTS = ("sliding_window", "cumulative_length", "record_past")


def _packed(layer: CacheLayerMixin) -> tuple[dict, dict[str, Tensor]]:
    """Facts and tensors of any layer of _SAVED."""
    if isinstance(layer, KVPolicyLayer):
        facts, tensors = layer.packed()
    else:
        facts = {name: getattr(layer, name) for name in _OWN_FACTS if hasattr(layer, name)}
        tensors = {} if layer.keys is None else {"keys": layer.keys, "values": layer.values}
    return {"kind": type(layer).__name__, **facts}, tensors


def _unpack(layer: CacheLayerMixin, facts: dict, tensors: dict[str, Tensor]) -> None:
    """Fill a fresh layer with what ``_packed`` returned of another."""
    window = getattr(layer, "sliding_window", None)
    require((facts["kind"], facts.get("sliding_window")) == (type(layer).__name__, window),
            f"it was saved as a {facts['kind']} and is a {type(layer).__name__} here, or its window differs")
    if isinstance(layer, KVPolicyLayer):
        layer.unpack(facts, tensors)
        return
    for name in _OWN_FACTS:
        if name in facts:
            setattr(layer, name, facts[name])
    if tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]


class KVCache(Cache):
    """A transformers cache whose full-attention layers keep no more than a budget, or read no more than one of all they keep; other
    layers keep transformers' own classes.

    Args:
        model: the model, or its config where no layer has to be rolled.
        config: what stays.
        attention_mask: ``[B, >= N]`` padding mask of the prompt, 0 on the left only; needed only for prompts that may be padded
            under an attention implementation that is not ours, which tells us itself. A single prompt without it is not padded.

    Raises:
        ContractError: on a model without full-attention layers, or settings that do not fit it.
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, config: CacheConfig, attention_mask: Tensor | None = None):
        whole = model.config if isinstance(model, PreTrainedModel) else model
        require(hasattr(whole, "get_text_config"),
                f"a cache is made for a transformers model or its config, got {type(model).__name__}")
        self.kept, self.meter = config, Meter()
        self._model = weakref.ref(model) if isinstance(model, PreTrainedModel) else None
        text = whole.get_text_config(decoder=True)
        self._together = _Together(text, attention_mask)
        rotates = config.roll or "turn" in getattr(config.policy, "needs", ())
        wanted_by = "roll=True" if config.roll else type(config.policy if rotates else config.codec).__name__
        turns = {}
        if rotates or config.codec.unrotates:
            require(isinstance(model, PreTrainedModel),
                    f"{wanted_by} needs the model, not its config: its rotary embedding turns the keys")
            turns = model_rotations(model, wanted_by, none=not rotates)
        if isinstance(model, PreTrainedModel) and hasattr(config.policy, "require_model"):  # trained or measured for one
            config.policy.require_model(model_id(model))
        layers = DynamicCache(config=text).layers
        # layers that read what another one stored want the whole of it
        shared = getattr(text, "kv_sharing_modes", None) or [None] * len(layers)
        own = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer and shared[i] is None]
        require(bool(own), f"{type(whole).__name__} has no full-attention layer to evict from; use transformers' own cache")
        reader = config.decode
        require(reader is None or not all(map(reader.reads_all, own)),
                f"{type(reader).__name__} would read everything: of this model only layers {', '.join(map(str, own))} attend to the whole text; "
                "leave one of them out of its dense_layers")
        if config.budget is not None:
            config.budget.require_model(len(layers), getattr(text, "num_key_value_heads", None))
        self.pools = Pools(config.tiers) if len(config.tiers) > 1 else None
        for i in own:
            turn = turns[i].move if i in turns and rotates else None
            archive = self._archive_of(i, turns.get(i))
            layers[i] = KVPolicyLayer(CacheLayer(config, i, len(layers), self.meter, turn, archive), self._together)
        super().__init__(layers=layers)

    def _archive_of(self, layer: int, rotation: Rotation | None) -> Archive | None:
        reader = self.kept.decode
        if self.pools is None or reader.reads_all(layer):
            return None
        return Archive(self.meter, reader.page, max(reader.budget // reader.page, 2), self.pools, self.kept.codec.layer(self.meter, rotation))

    def recover(self) -> int:
        """After a forward that failed half way, out of memory say: take back what it left in some layers, so that it can be repeated,
        in smaller chunks perhaps. What its queries added to the scores of older tokens stays.

        Returns:
            Tokens that every layer has seen, as before that forward; nothing changes where none failed.

        Raises:
            ContractError: if what some layer did meanwhile cannot be undone (an eviction, or padding behind real tokens, or a layer of
                transformers' own that is ahead); reset() is then the only way.
        """
        cores = self._together.cores
        columns = min(core.n_done for core in cores)
        for core in cores:
            core.require_croppable(max(0, core.n_columns - columns))
        for i, layer in enumerate(self.layers):
            ahead = not isinstance(layer, KVPolicyLayer) and layer.is_initialized and layer.get_seq_length() > columns
            require(not ahead, f"layer {i} is a {type(layer).__name__} and cannot take tokens back; reset() the cache")
        for core in cores:
            core.go_back(columns)
        return columns

    def fork(self) -> KVCache:
        """A second cache with the same contents in memory of its own: ask several questions of one prefilled text."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.meter, twin.layers, twin._together = Meter(), [], self._together.alone()
        for layer in self.layers:
            if isinstance(layer, KVPolicyLayer):
                copied = KVPolicyLayer(layer.core.fork(twin.meter), twin._together)
                copied.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in ("core", "_together")})
            else:
                copied = copy.deepcopy(layer)
            twin.layers.append(copied)
        return twin

    def save(self, folder: str | Path, *, token_ids: Tensor | None = None, overwrite: bool = False,
             model: PreTrainedModel | None = None) -> None:
        """Write the cache to a folder, whole or not at all; ``load`` makes an equal one of it, as often as it is asked.

        Safetensors files and a JSON manifest that only their owner can read; a process that is killed in the middle leaves what
        was there before.

        Args:
            token_ids: ``[B, N]``, all that the cache has seen, padding included; a hash of them is kept, so that ``load`` can tell
                another text from this one.
            overwrite: replace the cache saved in ``folder``.
            model: needed where the cache was made from a config.

        Raises:
            ContractError: if the folder is there already, cannot be written, or another process saves to it; if the cache is empty,
                in the middle of a forward or a draft, or has layers that cannot be saved; or on ids that are not all it has seen.
        """
        model = model or (self._model and self._model())
        require(model is not None, "the cache was made from a config, or its model is gone; give model=, so that load can compare")
        for i, layer in enumerate(self.layers):
            require(type(layer).__name__ in _SAVED,
                    f"layer {i} is a {type(layer).__name__}, and only full and sliding-window attention can be saved; keep this cache in "
                    "memory")
        lengths = {layer.get_seq_length() for layer in self.layers if layer.is_initialized and hasattr(layer, "get_seq_length")}
        require(max(lengths, default=0) > 0, "the cache is empty; prefill it first")
        require(len(lengths) == 1,
                f"the layers have seen {sorted(lengths)} tokens, because a forward failed half way; recover() or reset() the cache")
        if token_ids is not None:
            of = next(core.n_seen for core in self._together.cores if core.n_seen is not None)
            shape = [len(of), *lengths]
            require(list(token_ids.shape) == shape,
                    f"token_ids are {list(token_ids.shape)} but the cache has seen {shape}; give all of them")
        head = {"model": asdict(model_id(model)), "dtype": str(model.dtype), "rotation": _rotation_of(model),
                "config": self.kept.to_json(), "tokens": None if token_ids is None else digest(token_ids)}
        write(folder, head, self._pieces(), overwrite)

    def _pieces(self) -> Iterator[tuple[str, dict, dict[str, Tensor]]]:
        for i, layer in enumerate(self.layers):
            yield f"layer_{i:03}", *_packed(layer)
        if self._together.mask is not None:
            yield "mask", {}, {"mask": self._together.mask}

    def reset(self) -> None:
        """Forget the request; also the padding mask, which was that request's."""
        super().reset()
        self._together.tell(None)

    def report(self) -> CacheReport:
        """Kept tokens and bytes, measured and by formula."""
        return CacheReport.of(self._together.cores, self.meter, self.pools)


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
        settings: fields of CacheConfig (sinks, recent, grace, evict, prompt_length, roll, decode, tiers, codec), of the policy and of its
            budget; or of the reader and the codec, where everything is kept.

    Raises:
        ContractError: on unknown names or arguments, or sizes that contradict each other.

    Example (not run here)::

        cache = kvcache.make_cache(model, "snapkv", budget=2048)
        with sparse_attn.patch(model, prefill="xattention"):
            model.generate(**inputs, past_key_values=cache, prefill_chunk_size=2048)
        print(cache.report())
        cache = kvcache.make_cache(model, decode="quest", budget=2048)  # keeps everything
        cache = kvcache.make_cache(model, "snapkv", 16384, decode={"name": "quest", "budget": 1024})  # evicts, then reads little
        cache = kvcache.make_cache(model, decode="quest", tiers=("device", "host", {"name": "disk", "folder": "/scratch"}))
    """
    if isinstance(policy, CacheConfig):
        require(budget is None and not settings, "a CacheConfig says everything; leave budget and the other settings out")
        return KVCache(model, policy, attention_mask)
    if policy is None and settings.get("decode") is None:
        policy = "snapkv"
    return KVCache(model, as_config(policy, budget, **settings), attention_mask)


def load(folder: str | Path, model: PreTrainedModel, *, token_ids: Tensor | None = None) -> KVCache:
    """The cache that ``cache.save(folder)`` wrote, on the device of ``model``: generation goes on as if it had never been away.

    Every call makes a cache in memory of its own: ask several questions of one text that was read once.

    Args:
        model: the model that filled it: of the same shape, rotary embedding, dtype and (in float32 and bfloat16) weights. On one
            device.
        token_ids: ``[B, N]``, what the cache should have seen; compared with the hash that the save was given.

    Raises:
        ContractError: if there is no save, some file of it is missing, cut short or altered, or it is of another model, text or
            version.

    Example (not run here)::

        cache = kvcache.make_cache(model, "snapkv", budget=2048)
        kvcache.prefill(model, document, cache, chunk=2048)
        cache.save("document.kv", token_ids=document)
        for question in questions:  # today or tomorrow
            model.generate(torch.cat([document, question], 1), past_key_values=kvcache.load("document.kv", model))
    """
    saved = Saved.open(folder)
    head, names = saved.head, [name for name in saved.facts if name != "mask"]
    was, now = ModelId(**head["model"]), model_id(model)
    require(was.same_shape(now), f"the cache in {folder} was made by {was} but this model is {now}; prefill again")
    require(was.same_weights(now),
            f"the cache in {folder} was made by other weights of {was} ({was.weights}, these are {now.weights}); prefill again")
    for name, have in (("dtype", str(model.dtype)), ("rotation", _rotation_of(model))):
        require(head[name] == have, f"the cache in {folder} was made with {name} {head[name]} but this model has {have}; prefill again")
    if token_ids is not None:
        require(head["tokens"] is not None,
                f"the cache in {folder} was saved without token_ids, so there is nothing to compare these with; leave them out")
        require(head["tokens"] == digest(token_ids),
                f"token_ids {list(token_ids.shape)} are not those that the cache in {folder} has seen; prefill these")
    mask = saved.tensors("mask")["mask"] if "mask" in saved.facts else None
    cache = KVCache(model, CacheConfig.from_json(head["config"]), mask)
    require(len(names) == len(cache.layers),
            f"the cache in {folder} has {len(names)} layers but one of this model {len(cache.layers)}; prefill again")
    for name, layer in zip(names, cache.layers):
        tensors = saved.tensors(name, model.device)
        try:
            _unpack(layer, saved.facts[name], tensors)
        except (ContractError, KeyError) as error:
            raise ContractError(f"{name} in {folder} is no layer of this model ({error}); prefill again") from error
    return cache


def _rotation_of(model: PreTrainedModel) -> str:
    """The settings of a model's rotary embedding, as JSON."""
    config = model.config.get_text_config(decoder=True)
    return json.dumps(getattr(config, "rope_parameters", None), sort_keys=True, default=str)


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
    cores = [layer.core for layer in cache.layers if isinstance(layer, KVPolicyLayer)]
    try:
        for core in cores:
            core.reading = True
        for start in range(0, n, chunk):
            piece = input_ids[:, start : start + chunk]
            end = before + start + piece.shape[1]
            mask = None if attention_mask is None else attention_mask[:, :end]
            positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)[:, -piece.shape[1] :]
            out = model(input_ids=piece, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                        logits_to_keep=1)
    finally:
        for core in cores:
            core.reading = False
    return out.logits[:, -1]


# tokens per KV head where nobody says
_USUAL = {"streaming": 1028, "locret": 6000,
          **dict.fromkeys(("heavy_hitter", "snapkv", "pyramidkv", "adakv", "tova", "shadowkv", *READERS), 2048)}


def _named(name: str, policy: str, doc: str) -> type[KVCache]:
    class Named(KVCache):
        __doc__ = f"""{doc}

        Args:
            model: the model, or its config.
            budget: tokens per KV head, {_USUAL[policy]} unless given, or a share of the tokens seen so far if not above 1.0.
            attention_mask, settings: as in ``make_cache``.
        """

        def __init__(self, model, budget=_USUAL[policy], *, attention_mask=None, **settings):
            super().__init__(model, as_config(policy, budget, **settings), attention_mask)

    Named.__name__ = Named.__qualname__ = name
    return Named


StreamingLLMCache = _named("StreamingLLMCache", "streaming", "First and last tokens (StreamingLLM, arXiv:2309.17453).")
H2OCache = _named("H2OCache", "heavy_hitter", "Heavy hitters and recent tokens (H2O, arXiv:2306.14048).")
SnapKVCache = _named("SnapKVCache", "snapkv", "What the last tokens of the prompt attend to (SnapKV, arXiv:2404.14469).")
PyramidKVCache = _named("PyramidKVCache", "pyramidkv", "SnapKV, more tokens in lower layers (PyramidKV, arXiv:2406.02069).")
AdaKVCache = _named("AdaKVCache", "adakv", "SnapKV, more tokens in heads that spread (Ada-KV, arXiv:2407.11550).")
TOVACache = _named("TOVACache", "tova", "What the newest token attends to (TOVA, arXiv:2401.06104).")
LocretCache = _named("LocretCache", "locret", "What trained retaining heads say; needs path= (Locret, arXiv:2410.01805).")
QuestCache = _named("QuestCache", "quest", "Everything; a step reads the pages that could matter (Quest, arXiv:2406.10774).")
LandmarksCache = _named("LandmarksCache", "landmarks", "Everything; a step reads pages by their mean key (ShadowKV, arXiv:2410.21465).")
DoubleSparsityCache = _named("DoubleSparsityCache", "double_sparsity",
                             "Everything; a step reads tokens by a few channels of their keys (Double Sparsity, arXiv:2408.07092).")
TokenSelectCache = _named("TokenSelectCache", "token_select",
                          "Everything; a step reads the tokens that all heads vote for (TokenSelect, arXiv:2411.02886).")
InfLLMCache = _named("InfLLMCache", "infllm", "Everything; a step reads blocks by a few of their keys (InfLLM, arXiv:2402.04617).")
QuickLLaMACache = _named("QuickLLaMACache", "quickllama",
                         "Everything; a step reads blocks that fit it and the prompt's question (QuickLLaMA, arXiv:2406.07528).")
LRQKCache = _named("LRQKCache", "lrqk", "Everything; a step reads the tokens that a product of low rank finds (LRQK, arXiv:2510.23649).")
ShadowKVCache = _named("ShadowKVCache", "shadowkv", "Everything, keys as low-rank factors, values in host memory; a step reads the pages whose "
                       "mean key could matter (ShadowKV, arXiv:2410.21465).")


def installer(model: PreTrainedModel, spec) -> Callable[[Cache | None], Cache]:
    """What ``patch(model, kv_cache=spec)`` does to the cache of each forward: a fresh one of transformers' gets our layers.

    Args:
        spec: a CacheConfig, a dict with ``name``, ``budget`` and settings, or the name of a method that has a usual budget.
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
