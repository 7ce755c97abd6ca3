"""A layer with an archive beside plain lists: whatever happens to it, every token is where the model of it says, once."""

import copy
import gc
import random
from dataclasses import replace

import pytest
import torch
from delayed import Delayed
from test_quest import AllPages
from test_transformers import tiny, tokens

import kvcache
import sparse_attn
from kvcache.archive import Archive
from kvcache.cache import CacheLayer
from kvcache.config import CacheConfig
from kvcache.store import Meter
from kvcache.tiers import Pools, TierError

TIERS = ("device", "host")


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


class Life:
    """One layer, and for each sequence the list of its tokens' numbers: key and value of KV head h are (number, h, ...)."""

    def __init__(self, rng: random.Random, heads: int, page: int, **streams):
        self.rng, self.heads, self.page, self.meter = rng, heads, page, Meter()
        self.config = CacheConfig(None, None, decode=AllPages(8 * page, page), tiers=TIERS)
        self.pools = Pools(TIERS, **streams)
        self.core, self.tokens = self.layer(self.meter), []
        self.next = 0

    def layer(self, meter: Meter) -> CacheLayer:
        return CacheLayer(self.config, 0, 1, meter, None, Archive(meter, self.page, 8, self.pools))

    def forward(self, n: int) -> None:
        batch = len(self.tokens) or self.rng.randint(1, 3)
        self.tokens = self.tokens or [[] for _ in range(batch)]
        number = torch.arange(self.next, self.next + batch * n).view(batch, 1, n, 1).expand(batch, self.heads, n, 1)
        head = torch.arange(self.heads).view(1, -1, 1, 1).expand(batch, self.heads, n, 1)
        self.next += batch * n
        first = last = None
        if n > 1 and self.rng.random() < 0.4:
            first = torch.tensor([self.rng.randint(0, n) for _ in range(batch)], dtype=torch.int32)
        elif n > 1 and self.rng.random() < 0.3:
            last = torch.tensor([self.rng.randint(0, n) for _ in range(batch)], dtype=torch.int32)
        self.core.append(torch.cat([number, head], -1).float(), torch.cat([number, head, head], -1).float())
        self.core.admit(first, last)
        for b, run in enumerate(self.tokens):
            low, high = 0 if first is None else int(first[b]), n if last is None else int(last[b])
            run += number[b, 0, low:high, 0].tolist()
        if n > 1 or self.rng.random() < 0.05:
            self.check()
        self.core.observe(None)

    def crop(self) -> None:
        most = min(self.core.n_columns - self.core._solid, min(map(len, self.tokens)))
        n = self.rng.choice([0, min(most, 3), min(most, 20), most])
        self.core.crop(n)
        self.tokens = [run[: len(run) - n] for run in self.tokens]

    def select(self) -> None:
        which = [self.rng.randrange(len(self.tokens)) for _ in range(self.rng.randint(1, 4))]
        self.core.select(torch.tensor(which))
        self.tokens = [list(self.tokens[b]) for b in which]

    def fork(self) -> None:
        """Go on with one of both, while the other goes, or lives on a little."""
        before, meter, tokens = self.core, self.meter, copy.deepcopy(self.tokens)
        self.meter = Meter()
        self.core = before.fork(self.meter)
        if self.rng.random() < 0.5:
            before.reset()
            assert meter.now == 0
        elif self.rng.random() < 0.5:
            self.forward(30)
            self.core.reset()
            self.core, self.meter, self.tokens = before, meter, tokens
        del before
        gc.collect()

    def save(self) -> None:
        facts, tensors = self.core.packed()
        again = self.layer(Meter())
        again.unpack(facts, tensors)
        self.core, self.meter = again, again._meter

    def reset(self) -> None:
        self.core.reset()
        self.tokens = []
        assert self.meter.now == 0 and self.pools.counts()["host"]["bytes"] == 0

    def check(self) -> None:
        core = self.core
        assert core.n_seen.tolist() == [len(run) for run in self.tokens]
        held = core.store.n_bytes + core.digest.n_bytes + core.archive.n_bytes
        assert self.meter.now == held
        gone = 0 if core.archive.pages is None else int(core.archive.tokens.sum())
        assert self.pools.counts()["host"]["bytes"] <= gone * 5 * 4
        # whole, in order
        found = [[[] for _ in range(self.heads)] for _ in self.tokens]
        for part in [*self.copied(core.older()), *self.copied(core.parts())]:
            for b, h in ((b, h) for b in range(len(self.tokens))[part.rows] for h in range(self.heads)[part.heads]):
                k, v = part.k[b - part.rows.start, h - part.heads.start], part.v[b - part.rows.start, h - part.heads.start]
                self.require_alike(k, v, h)
                found[b][h] += k[:, 0].long().tolist()
        assert found == [[run] * self.heads for run in self.tokens]
        # by pages, chosen or all of them
        q = torch.zeros(len(self.tokens), self.heads, 1, 2)
        for core.reading in (True, False):
            found = [[[] for _ in range(self.heads)] for _ in self.tokens]
            for region in core.regions(q):
                for b, h in ((b, h) for b in range(len(self.tokens)) for h in range(self.heads)):
                    for start, count in zip(region.starts[b, h].tolist(), region.counts[b, h].tolist()):
                        k, v = (t[start : start + count] for t in (region.k, region.v)) if count else (region.k[:0], region.v[:0])
                        self.require_alike(k, v, h)
                        found[b][h] += k[:, 0].long().tolist()
            assert [[sorted(run) for run in heads] for heads in found] == [[run] * self.heads for run in self.tokens]
            assert int(core.read.sum()) == self.heads * sum(map(len, self.tokens))
        assert self.meter.now == core.store.n_bytes + core.digest.n_bytes + core.archive.n_bytes

    @staticmethod
    def copied(parts) -> list:
        return [replace(part, k=part.k.clone(), v=part.v.clone()) for part in parts]

    @staticmethod
    def require_alike(k, v, h: int) -> None:
        assert torch.equal(k, v[:, :2]) and bool((k[:, 1] == h).all())


@pytest.mark.parametrize("streams", [{}, dict(streams=Delayed())], ids=["staged", "direct"])
@pytest.mark.parametrize("seed", range(6))
def test_every_token_is_where_it_should_be(seed, streams):
    rng = random.Random(seed)
    life = Life(rng, heads=rng.choice([1, 2]), page=rng.choice([1, 4, 16]), **streams)
    for _ in range(16):
        steps = ["chunk"] * 4 + ["tokens"] * 3 + (["draft", "crop", "select", "fork", "fork", "save"] + ["reset"] * (rng.random() < 0.3)) * bool(life.tokens)
        step = rng.choice(steps)
        with torch.inference_mode(rng.random() < 0.3):
            if step == "chunk":
                life.forward(rng.choice([2, 15, 17, 60, 90]))
            elif step == "tokens":
                for _ in range(rng.choice([1, 5, 70])):
                    life.forward(1)
            elif step == "draft":
                life.core.recording = True
                for _ in range(4):
                    life.forward(rng.choice([2, 6, 20]))
                    life.crop()
                life.core.recording = False
            else:
                getattr(life, step)()
            if life.tokens:
                life.check()
    if life.tokens:
        life.reset()


def test_the_rows_of_a_prompt_go_with_it():
    life = Life(random.Random(0), heads=2, page=4)
    life.forward(2000)
    life.forward(1)
    assert life.core.store.n_bytes < 2000 * 10
    like = life.core.archive._like
    assert all(t.untyped_storage().nbytes() == 0 for t in like)


def test_rows_that_came_back_leave_again():
    life = Life(random.Random(0), heads=2, page=4)
    life.tokens = [[]]
    for n in (60, *[1] * 400):
        life.forward(n)
    small = life.core.store.n_bytes
    life.core.crop(200)
    life.tokens = [life.tokens[0][:-200]]
    for _ in range(100):
        life.forward(1)
    assert life.core.store.n_bytes <= 2 * small


def test_a_page_that_was_not_read_is_not_taken_for_read(monkeypatch):
    life = Life(random.Random(0), heads=1, page=4)
    life.forward(100)
    archive = life.core.archive
    archive._drop_slots()

    class Lost:
        def wait(self):
            raise TierError("a page is lost")

    with monkeypatch.context() as patch:
        patch.setattr(archive._values, "read", lambda *_: Lost(), raising=False)
        with pytest.raises(TierError):
            list(life.core.regions(torch.zeros(len(life.tokens), 1, 1, 2)))
    life.check()


@pytest.mark.parametrize("turn", [6, 40])
def test_a_short_turn_is_judged_with_all_that_is_kept(turn):
    model, ids, more = tiny("Llama"), tokens(1, 90), tokens(2, 40)[1:, :turn]
    with sparse_attn.patch(model, prefill="dense"):
        found = []
        for tiers in (("device",), TIERS):
            cache = kvcache.make_cache(model, "snapkv", 40, window=4, kernel=3, decode=AllPages(512, 4), tiers=tiers)
            kvcache.prefill(model, ids, cache, 90)
            for token in range(100):
                model(torch.tensor([[token % 100]]), past_key_values=cache)
            kvcache.prefill(model, more, cache, 40)
            stores = (layer.core for layer in cache.layers)
            found.append([sorted(core._whole()["positions"].tolist()) for core in stores])
    assert found[0] == found[1]


def test_blocks_are_described_alike_whatever_was_taken_back():
    model, ids = tiny("Llama"), tokens(1, 100)
    settings = dict(decode="infllm", budget=64, page=8, sinks=8, recent=16, representatives=2, dense_layers=())
    with sparse_attn.patch(model, prefill="dense"):
        found = []
        for tiers in (("device",), TIERS):
            cache = kvcache.make_cache(model, tiers=tiers, **settings)
            kvcache.prefill(model, ids, cache, 50)
            cache.crop(-10)  # not all that the device has, but less than the digest looks back
            kvcache.prefill(model, ids, cache, 50)
            digests = [(d, d.starts.flatten().tolist(), int(d.pages[0, 0])) for d in (layer.core.digest for layer in cache.layers)]
            found.append(torch.cat([d.vector[start : start + n] for d, starts, n in digests for start in starts]))
    assert (found[0] - found[1]).abs().max() < 2e-4
