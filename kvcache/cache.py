"""One layer of a cache: append, admit, observe. The only place where policy, budget, reader and storage meet.

A chunk of a prompt, a new turn, a drafted continuation and a single generated token all take the same way: their rows are
appended, attention reads what was kept and them, the policy looks at what attention saw, and whatever exceeds the budget goes.
Without a policy everything stays. With a reader a few queries read only the pages that it chooses. With more than one tier old pages
leave the store for an archive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require
from sparse_attn.kept import FEW_QUERIES, Queries, Region

from .archive import Archive
from .config import CacheConfig
from .store import Meter, Part, Store
from .types import Seen

# moves keys rotated for some positions to others: (x [1, heads, N, D], at int64 [N], to int64 [N]) -> [1, heads, N, D]
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]

# what ``packed`` says of a layer besides its tensors, and which tensors its last queries are
_FACTS = ("opening", "drafted", "waiting", "floor", "solid", "appended")
_TAIL = ("q", "lse", "first", "sinks")
# tokens of a run that may leave for the archive wait for so many
_FLUSH = 64


class CacheLayer:
    """The tokens of one attention layer, no more of them than the budget says.

    Args:
        config: what stays.
        layer, n_layers: which of the model's attention layers this is.
        meter: counts the bytes of all layers of the cache.
        turn: how the layer's keys are rotated, for ``config.roll`` and for policies that need "turn"; None where they are not.
        archive: takes old pages, where the cache has tiers for them; this layer uses it if its reader leaves anything out.

    Attributes:
        n_columns: tokens appended so far, padding included: the length that the model believes in.
        n_seen: int64 ``[B]``, real ones.
        recording: while set, eviction waits for ``crop``, so that a rejected draft can be taken back; a forward that nobody crops
            before the next one was no draft, and ends it.
        reading: while set, a forward over a single token is a chunk of a prompt too, and no chunk is read by pages.
        digest: what the reader knows of the pages; None for a layer that reads everything.
        archive: None for a layer that reads everything, or whose tokens all stay on the device.
        read: int32, rows of each page that the last few queries read; None before.
    """

    def __init__(self, config: CacheConfig, layer: int, n_layers: int, meter: Meter, turn: Turn | None = None,
                 archive: Archive | None = None):
        self.config, self.layer, self.n_layers, self._meter, self._turn = config, layer, n_layers, meter, turn
        self._window = getattr(config.policy, "window", 0)
        self.archive = archive if config.decode is not None and not config.decode.reads_all(layer) else None
        self.reset()

    def reset(self) -> None:
        """Forget the request: tokens, scores, counts and memory."""
        if hasattr(self, "store"):
            self.store.clear()
            if self.digest is not None:
                self.digest.forget()
            if self.archive is not None:
                self.archive.clear()
        self.store = Store(self._meter)
        reader = self.config.decode
        self.digest = reader.digest(self._meter, self.layer) if reader is not None and not reader.reads_all(self.layer) else None
        require(self.archive is None or self.digest is None or self.digest.outlives_rows,
                f"{type(reader).__name__} scores every key exactly, so keys cannot leave the device; use tiers=('device',)")
        self.read: Tensor | None = None
        self.n_columns, self.n_seen, self.recording, self.reading = 0, None, False, False
        self._n_new: Tensor | None = None  # real tokens of the last append; None where it was not admitted yet
        self._opening = False  # recording: the next forward brings a prompt, its first draft behind it
        self._held = self._drafted = False  # recording: the policy has not looked at the last tokens, which are a draft
        self._pending: Queries | None = None  # what it will look at
        self._tail: Queries | None = None  # the last queries of the prompt so far, for policies that look at a window
        self._waiting = False  # evict="prompt" and the prompt may go on
        self._floor = 0  # columns that the last eviction had seen; what it took cannot come back
        self._solid = 0  # column from which on no sequence has padding
        self._appended = 0
        self._unread = 0  # tokens that were admitted, and whose attention has not ended, or failed
        self._before: tuple[int, Tensor | None] = (0, None)

    # -- what attention reads (sparse_attn.kept.KeptKV) -----------------------------------------------------------------------

    @property
    def k(self) -> Tensor:
        return self.store.k

    @property
    def v(self) -> Tensor:
        return self.store.v

    def table(self) -> tuple[Tensor, Tensor]:
        """int64 ``[B, Hkv]`` starts and lengths of the runs, where the rows are."""
        return self.store.table()

    @property
    def lengths(self) -> Tensor:
        """int64 ``[B, Hkv]`` on the host: kept tokens of every run, wherever they are."""
        return self.store.lengths + self._gone

    @property
    def kv_heads(self) -> int:
        return self.store.lengths.shape[1]

    @property
    def n_tokens(self) -> int:
        """Of the longest run; 0 before the first append."""
        return 0 if self.store.k is None else int(self.lengths.max())

    @property
    def _gone(self) -> Tensor:
        """int64 ``[B, Hkv]``: tokens of every run that have left the store."""
        found = None if self.archive is None else self.archive.tokens
        return torch.zeros_like(self.store.lengths) if found is None else found

    def parts(self) -> list[Part]:
        """All runs, as few views."""
        return list(self.store.parts())

    def older(self) -> Iterator[Part]:
        """What has left the store, a piece at a time."""
        if self.archive is not None and self.archive.pages is not None:
            yield from self.archive.parts()

    def regions(self, q: Tensor, first: Tensor | None = None, last: Tensor | None = None) -> Iterator[Region]:
        """The pages that a few queries read; the first region holds their own tokens."""
        store, gone = self.store, self._gone
        starts, lengths = store.table()
        chosen = self._chosen(q, first, last)
        archived = self.archive is not None and bool(gone.any())
        if chosen is None:
            self.read = lengths[..., None].int()
            yield Region(store.k, store.v, starts[..., None], self.read)
            if archived:
                self.read = self.lengths[..., None].int()
                yield from self.archive.regions()
            return
        page = self.config.decode.page
        offsets = chosen.long() * page - gone.to(q.device, non_blocking=True)[..., None]
        own = (chosen >= 0) & (offsets >= 0)
        counts = (lengths[..., None] - offsets).clamp(max=page).masked_fill(~own, 0).int()
        coming = self.archive.fetch(chosen.masked_fill(own, -1)) if archived else None
        self.read = counts if coming is None else counts + coming.region.counts
        yield Region(store.k, store.v, starts[..., None] + offsets, counts)
        if coming is not None:
            yield coming.wait()

    def _chosen(self, q: Tensor, first: Tensor | None, last: Tensor | None) -> Tensor | None:
        """What the reader says; None for everything."""
        if self.digest is None or self.reading:
            return None
        if self.archive is not None and self.archive.pages is not None:
            self.archive.prepare(lambda pages: self.config.decode.exact(self.digest, pages))
        self.digest.ready(self._all_rows)
        return self.config.decode.choose(q, self.lengths.to(q.device, non_blocking=True), self.digest, first, last)

    def _all_rows(self) -> Iterator[tuple[Tensor, int, int, int]]:
        """Keys of all tokens: see ``digests.pages.Rows``."""
        for b, (starts, lengths) in enumerate(zip(self.store.starts.tolist(), self.store.lengths.tolist())):
            gone = [0] * len(starts)
            for h, keys in self.archive.keys(b) if self.archive is not None and self.archive.pages is not None else ():
                yield keys, b, h, gone[h]
                gone[h] += len(keys)
            yield from ((self.store.k[start : start + n], b, h, gone[h]) for h, (start, n) in enumerate(zip(starts, lengths)))

    def _follow(self, moved: bool = False) -> None:
        """Let the digest see what the store holds now; ``moved``: not only the last rows are others."""
        if self.digest is None:
            return
        if moved:
            self.digest.clear()
        if self.store.k is not None:
            self.digest.update(self.store.k, self.store.starts - self._gone, self.lengths)

    def _archive(self) -> None:
        """Let old pages leave for slower memory; with a policy only once it has chosen what stays."""
        if self.archive is None or self.config.policy is not None and not self._generated():
            return
        if self.archive.pages is None and self.n_tokens <= self.config.decode.budget:
            return  # as much would have to come back for every token
        recent = self.config.decode.recent
        if self._appended > FEW_QUERIES or int(self.store.lengths.max()) >= recent + _FLUSH:
            # a draft that is taken back leaves the recent ones
            self.archive.take(self.store, recent + max(FEW_QUERIES, self._appended if self._drafted else 0))
            if len(self.store.positions) > 2 * int((self.store.lengths + _FLUSH).sum()):
                self.store.shrink()

    def _recall(self) -> None:
        """Bring everything back to the store."""
        if self.archive is None or self.archive.pages is None:
            return
        rows = self._whole()
        self.archive.clear()
        self.store.fill(rows, self.n_seen)
        self._follow()

    def _whole(self) -> dict[str, Tensor]:
        """``Store.packed`` of all tokens."""
        rows = self.store.packed()
        if self.archive is None or self.archive.pages is None:
            return rows
        sizes, made = rows["lengths"].flatten().tolist(), {name: [] for name in ("k", "v", "positions", "state")}
        pieces = {name: iter(rows[name].split(sizes)) for name in made}
        for b in range(len(rows["lengths"])):
            for k, v, positions in self.archive.rows(b):
                of = {"k": k, "v": v, "positions": positions.to(k.device), "state": torch.zeros(len(k), device=k.device)}
                for name, found in made.items():
                    found += [of[name], next(pieces[name])]
        with torch.inference_mode(False):  # the store writes to these whatever mode is on then
            return {"lengths": self.lengths} | {name: torch.cat(found) for name, found in made.items()}

    # -- the way of a chunk ---------------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor) -> None:
        """Take new keys ``[B, Hkv, N, D]`` and values; ``admit`` must follow."""
        batch, n = k.shape[0], k.shape[2]
        require(self.n_seen is None or len(self.n_seen) == batch,
                f"the cache holds {0 if self.n_seen is None else len(self.n_seen)} sequences but {batch} came; reset() it between batches")
        require(self._n_new is not None or not self._appended,
                "attention never looked at the last tokens of this cache (the forward failed, or another attention implementation ran "
                "it); reset() the cache and see that the model runs with sparse_attn's attention")
        self.settle(n)
        if self.n_seen is None:
            self.n_seen = torch.zeros(batch, dtype=torch.int64)
        if n > FEW_QUERIES and self.config.policy is not None:
            self._recall()
        if n == 1 and self._appended > 1:
            self.store.shrink()
        self.store.append(k, v, self._headroom(n))
        self._before = self._appended, self._n_new
        self._appended, self._n_new = n, None

    def withdraw(self) -> None:
        """Forget the tokens that were appended and never admitted, as if they had not come."""
        self._appended, self._n_new = self._before
        if not self.n_columns:
            self.reset()

    @property
    def n_done(self) -> int:
        """Columns whose attention over this layer has ended."""
        return self.n_columns - self._unread

    def go_back(self, columns: int) -> None:
        """Forget what a forward that failed brought, so that ``columns`` are left; ``require_croppable`` says whether that can be."""
        if self._n_new is None and self._appended:
            self.withdraw()
        if columns == 0:
            self.reset()
        elif self.n_columns > columns:
            self.crop(self.n_columns - columns)

    def settle(self, n: int) -> None:
        """Do what waits for the next forward, over ``n`` tokens; a single one is taken for the first generated token."""
        if self._held:
            self.recording = False
            self._flush()
            self._evict_in_time()
        if n == 1 and self._waiting and not self.reading and self.config.prompt_length is None:
            self._evict(self._seen(None))

    def _headroom(self, n: int) -> int:
        """Rows per run to have ready besides the ``n`` that come: those of the budget, as far as more chunks like this would fill."""
        if n == 1 or self.config.policy is None or self.config.evict != "chunk":
            return 0
        budget = int(self.config.budget.layer_tokens(self.layer, self.n_layers, self.n_seen + n).max())
        return budget if n <= budget <= 8 * n else min(n, budget)

    def admit(self, first: Tensor | None = None, last: Tensor | None = None) -> None:
        """Say which of the appended tokens are real: int32 ``[B]`` bounds, None for all."""
        self._n_new = self.store.admit(self._appended, first, last, self.n_seen)
        if first is not None or last is not None:
            self._solid = self.n_columns + (self._appended if last is not None else int(first.max()))
        self.n_seen = self.n_seen + self._n_new
        self.n_columns += self._appended
        self._unread = self._appended
        self._follow()

    def observe(self, queries: Queries | None, in_place: bool = True) -> None:
        """Attention has read the layer: let the policy look, then evict what exceeds the budget.

        Args:
            queries: None where the policy does not need them.
            in_place: False while somebody else still reads the rows that ``rectangle`` showed.
        """
        self._unread = 0
        self._drafted, self._opening = self.recording and not self._opening, False
        if self.digest is not None and queries is not None:
            self.digest.observe(queries, self.store.k, self.store.starts - self._gone, self.lengths)
        self._show_policy(queries, in_place)
        self._archive()

    def _show_policy(self, queries: Queries | None, in_place: bool) -> None:
        if self.config.policy is None:
            return
        if self._generated() and not self.config.policy.decoding:
            self._tail = None
            return
        if self.recording:
            self._held, self._pending = True, queries
            return
        self._look(queries)
        self._evict_in_time(in_place)

    def _generated(self) -> bool:
        """Was the last forward over one generated token?"""
        return self._appended == 1 and not self.reading and self.n_columns > (self.config.prompt_length or 0)

    def _evict_in_time(self, in_place: bool = True) -> None:
        """Evict now, or once the prompt is complete."""
        known = self.config.prompt_length
        if self.config.evict == "chunk" or self._generated() or known is not None and self.n_columns >= known:
            self._evict(self._seen(None), in_place)
        else:
            self._waiting = True

    def _look(self, queries: Queries | None) -> None:
        self._recall()
        queries = self._joined(queries)
        self.store.state.copy_(self.config.policy.observe(self._seen(queries)))
        if self._window and queries is not None:
            rows = slice(max(0, queries.q.shape[2] - self._window), None)
            first = None if queries.first is None else (queries.first - rows.start).clamp(min=0)
            whole = queries.last is None  # a row that ends in padding has its last queries somewhere else
            self._tail = replace(queries, q=queries.q[:, :, rows].clone(), lse=queries.lse[:, :, rows].clone(), first=first) if whole else None

    def _joined(self, queries: Queries | None) -> Queries | None:
        """The chunk's queries, with as many of those before them as a policy's window still needs."""
        short = queries is not None and self._window and queries.q.shape[2] < self._window
        if not short or self._tail is None or queries.last is not None:
            return queries
        before = self._tail
        have = before.q.shape[2]
        keep = min(have, self._window - queries.q.shape[2])
        first = before.first if before.first is not None else torch.zeros(len(queries.q), dtype=torch.int32, device=queries.q.device)
        first = (first - (have - keep)).clamp(min=0)
        if queries.first is not None:  # a row whose prompt only begins in this chunk
            first = torch.where(queries.first > 0, queries.first + keep, first)
        return replace(queries, q=torch.cat([before.q[:, :, have - keep :], queries.q], 2), first=first,
                       lse=torch.cat([before.lse[:, :, have - keep :], queries.lse], 2))

    def _seen(self, queries: Queries | None) -> Seen:
        starts, lengths = self.store.table()
        q = queries if queries is not None and self.config.policy.needs else None
        return Seen(
            k=self.store.k, v=self.store.v, starts=starts, lengths=lengths, positions=self.store.positions, state=self.store.state,
            n_seen=self.n_seen, n_new=self._n_new if self._n_new is not None else torch.zeros_like(self.n_seen),
            q=q.q if q else None, lse=q.lse if q else None, q_first=q.first if q else None, q_last=q.last if q else None,
            scale=q.scale if q else 0.0, softcap=q.softcap if q else 0.0, sinks=q.sinks if q else None, layer=self.layer,
            n_layers=self.n_layers, turn=self._turn if "turn" in self.config.policy.needs else None,
        )  # fmt: skip

    # -- eviction -------------------------------------------------------------------------------------------------------------

    def _evict(self, seen: Seen, in_place: bool = True) -> None:
        self._waiting = False
        lengths = self.lengths
        tokens = self.config.budget.layer_tokens(self.layer, self.n_layers, self.n_seen)
        tokens = tokens.clamp(min=self.config.protected)  # a share of few tokens is less
        if bool((lengths.sum(1) <= tokens * lengths.shape[1]).all()):
            return
        rank = self._protected(self.config.policy.rank(seen, self.store.state), seen)
        counts = self.config.budget.per_head(rank, seen.starts, seen.lengths, tokens, self.layer)
        kept = torch.minimum(counts.cpu().long(), lengths)
        gone = lengths - kept
        if not bool(gone.any()):
            return
        one = in_place and self._appended == 1 and int(gone.max()) == 1
        slots = int(kept.max()) + one
        ids = ops.keep_top(rank, seen.starts, seen.lengths, kept.to(rank.device, torch.int32), slots)
        if one:
            at = torch.arange(slots, device=ids.device)
            self.store.replace((ids == at).int().argmin(-1), gone == 1)  # the first offset that is missing
        else:
            self.store.keep(ids, kept, in_place)
            if self._appended > int(kept.max()):
                self.store.shrink()  # room for another chunk like this would be most of what the layer holds
        self._floor = self.n_columns
        if self.config.roll and self._turn is not None:
            self._roll()
        self._follow(moved=True)

    def _protected(self, rank: Tensor, seen: Seen) -> Tensor:
        recent = max(self.config.recent, self.config.grace if self._appended == 1 else 0)
        newest = seen.by_sequence(self.n_seen - recent)
        return rank.masked_fill((seen.positions < self.config.sinks) | (seen.positions >= newest), float("inf"))

    def _roll(self) -> None:
        """Rotate keys so that the kept tokens stand side by side, the last one where it is."""
        store = self.store
        store.remember_true_keys()
        for b in range(len(self.n_seen)):
            for h in range(store.lengths.shape[1]):
                start, n = int(store.starts[b, h]), int(store.lengths[b, h])
                if not n:
                    continue
                at = store.positions[start : start + n].long().cpu()
                order = at.argsort()
                to = torch.empty_like(at)
                to[order] = at.max() - torch.arange(n - 1, -1, -1)
                moved = (at != to).nonzero()[:, 0] + start
                if len(moved):
                    rows = moved.to(store.k.device)
                    store.k[rows] = self._turn(store.k_true[rows][None, None], at[moved - start], to[moved - start])[0, 0]

    # -- taking back ----------------------------------------------------------------------------------------------------------

    def record(self) -> None:
        """A prompt comes, or the rest of one, and then drafts, each of which is cropped."""
        self.recording = self._opening = True

    def _flush(self) -> None:
        self._held, queries, self._pending = False, self._pending, None
        self._look(queries)

    def require_croppable(self, n: int) -> None:
        """Raise ContractError where ``crop(n)`` would."""
        if self.store.k is None:
            return
        floor, solid = self.n_columns - self._floor, self.n_columns - self._solid
        remedy = "fork() the cache before the tokens that may be taken back"
        require(0 <= n <= self.n_columns, f"crop takes back {n} tokens but the cache has seen {self.n_columns}")
        require(n <= floor, f"crop takes back {n} tokens, but layer {self.layer} last evicted {floor} tokens ago and what it "
                f"dropped cannot come back; {remedy}")
        require(n <= solid, f"crop takes back {n} tokens, but only the last {solid} are real ones in every sequence, the one "
                f"before is padding in some; {remedy}")

    def crop(self, n: int) -> None:
        """Take back the last ``n`` tokens of every sequence; while recording, also accept what is left and evict.

        What their queries added to the scores of older tokens stays.

        Raises:
            ContractError: if an eviction has seen some of them: what it took cannot come back; or if some are padding.
        """
        self.require_croppable(n)
        if self.store.k is None:
            return
        if n and self.archive is not None and int(self.store.lengths.min()) - n < self.config.decode.recent:
            self._recall()  # digests look at recent rows again
        if n:
            self.store.drop(torch.full_like(self.n_seen, n))
            self.n_seen, self.n_columns = self.n_seen - n, self.n_columns - n
            self._unread = max(0, self._unread - n)
            self._follow()
            self._forget_queries(n - self._appended if self._held else n)
        if self._held:
            self._accept(n)

    def _forget_queries(self, n: int) -> None:
        """The last ``n`` of those that the policy's window may still need."""
        if self._tail is None or n <= 0:
            return
        tail, left = self._tail, self._tail.q.shape[2] - n
        first = None if tail.first is None else tail.first.clamp(max=left)
        self._tail = replace(tail, q=tail.q[:, :, :left], lse=tail.lse[:, :, :left], first=first) if left > 0 else None

    def _accept(self, n: int) -> None:
        """Show the policy what is left of the last forward when its last ``n`` queries were taken back, then evict."""
        left = self._appended - n
        if left <= 0 or self._drafted and not self.config.policy.decoding:
            self._held, self._pending, self._tail = False, None, None
            return
        if self._pending is not None:
            self._pending = replace(self._pending, q=self._pending.q[:, :, :left], lse=self._pending.lse[:, :, :left])
        self._n_new = self._n_new - n
        self._flush()
        self._evict(self._seen(None))

    # -- the batch ------------------------------------------------------------------------------------------------------------

    def select(self, sequences: Tensor) -> None:
        """Make the sequences numbered ``sequences`` the batch, in that order, repeats allowed."""
        if self.store.k is None:
            return
        self.store.select(sequences)
        if self.archive is not None:
            self.archive.select(sequences.cpu())
        if self.digest is not None:
            self.digest.select(sequences.cpu())
            self._follow()
        on_host = sequences.cpu()
        self.n_seen = self.n_seen[on_host]
        self._n_new = None if self._n_new is None else self._n_new[on_host]
        self._pending, self._tail = (None if x is None else _selected(x, sequences) for x in (self._pending, self._tail))

    def fork(self, meter: Meter) -> CacheLayer:
        """The same layer in memory of its own."""
        twin = CacheLayer(self.config, self.layer, self.n_layers, meter, self._turn)
        store = self.store.copy(meter)
        twin.__dict__.update({name: value for name, value in self.__dict__.items() if name not in ("_meter", "store", "digest", "archive")})
        twin.store = store
        if self.archive is not None:
            twin.archive = self.archive.copy(meter)
        if self.digest is not None:
            twin.digest.copy_from(self.digest)
            twin._follow()
        return twin

    # -- the folder -----------------------------------------------------------------------------------------------------------

    def packed(self) -> tuple[dict, dict[str, Tensor]]:
        """The request as JSON facts and tensors, packed tight: what ``unpack`` takes. Nothing before the first append.

        Raises:
            ContractError: in the middle of a forward, or of a draft that may be taken back; or of keys that are factors by now.
        """
        require(self._n_new is not None or not self._appended,
                "attention never looked at the last tokens of this cache, because the forward failed; reset() it")
        require(self.archive is None or self.archive.exact,
                f"layer {self.layer} keeps its older keys as factors since it generated a token, and a folder would hold worse ones; save the "
                "cache between prefill and the first token, and go on from that")
        require(not self._held, f"layer {self.layer} holds tokens that may still be taken back; crop(0) accepts them")
        if self.store.k is None:
            return {}, {}
        facts = {"columns": self.n_columns} | {name: getattr(self, f"_{name}") for name in _FACTS} | {"recording": self.recording}
        tensors = self._whole() | {"n_seen": self.n_seen, "n_new": self._n_new}
        if self.archive is not None and self.archive.pages is not None:
            tensors["gone"] = self.archive.tokens
        if self.digest is not None:
            tensors |= {f"digest_{name}": t for name in self.digest.learned if (t := getattr(self.digest, name)) is not None}
        if self._tail is not None:
            facts |= {"scale": self._tail.scale, "softcap": self._tail.softcap}
            tensors |= {f"tail_{name}": t for name in _TAIL if (t := getattr(self._tail, name)) is not None}
        return facts, tensors

    def unpack(self, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Go on from what ``packed`` returned, in these very tensors.

        Raises:
            ContractError: if they are not what a layer holds.
        """
        self.reset()
        if not tensors:
            return
        tail = {name: tensors.pop(f"tail_{name}", None) for name in _TAIL}
        self.n_seen, self._n_new = (tensors.pop(name).cpu() for name in ("n_seen", "n_new"))
        if self.digest is not None:
            self.digest.recall({name: t for name in self.digest.learned if (t := tensors.pop(f"digest_{name}", None)) is not None})
        gone = tensors.pop("gone", None)
        self.store.fill(tensors, self.n_seen)
        self._follow()
        if self.archive is not None and gone is not None:
            require(gone.shape == self.store.lengths.shape, f"tokens that had left the store are {tuple(gone.shape)}, for runs "
                    f"{tuple(self.store.lengths.shape)}")
            self.archive.take(self.store, self.store.lengths - gone.cpu())
            self.store.shrink()
        self.n_columns, self.recording = facts["columns"], facts["recording"]
        for name in _FACTS:
            setattr(self, f"_{name}", facts[name])
        if tail["q"] is not None:
            self._tail = Queries(**tail, last=None, scale=facts["scale"], softcap=facts["softcap"])


def _selected(queries: Queries, sequences: Tensor) -> Queries:
    of = sequences.to(queries.q.device)
    bounds = {name: None if (x := getattr(queries, name)) is None else x[of] for name in ("first", "last")}
    return replace(queries, q=queries.q[of], lse=queries.lse[of], **bounds)
