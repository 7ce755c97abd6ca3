"""Keep everything, read little: the digest of the pages, what is chosen by it, and models that decode from it."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch
from rows import DTYPES, randn

import kvcache
import sparse_attn
from kvcache.cache import CacheLayer
from kvcache.config import CacheConfig
from kvcache.digests import MinMax
from kvcache.policies import KNorm
from kvcache.readers import Quest
from kvcache.store import Meter, Store
from sparse_attn import ContractError, ops
from sparse_attn.kept import attend_kept
from sparse_attn.patterns import Dense
from sparse_attn.types import LayerContext


@dataclass(frozen=True)
class AllPages(Quest):
    """Chooses every page, so that what differs from dense is how pages are found and read."""

    dense_layers: tuple[int, ...] = ()

    def choose(self, q, lengths, digest, first=None, last=None):
        nothing = torch.zeros(len(digest.low))
        return ops.keep_top(nothing, digest.starts, digest.pages, digest.pages.int(), int(digest.pages.max()))


# -- the digest ---------------------------------------------------------------------------------------------------------


def assert_digest(digest: MinMax, store: Store) -> None:
    """Page for page what plain Python finds in the rows."""
    for b in range(store.lengths.shape[0]):
        for h in range(store.lengths.shape[1]):
            start, n = int(store.starts[b, h]), int(store.lengths[b, h])
            keys = store.k[start : start + n].tolist()
            pages = [keys[i : i + digest.page] for i in range(0, n, digest.page)]
            assert int(digest.pages[b, h]) == len(pages)
            rows = slice(int(digest.starts[b, h]), int(digest.starts[b, h]) + len(pages))
            assert digest.low[rows].tolist() == [[min(column) for column in zip(*page)] for page in pages]
            assert digest.high[rows].tolist() == [[max(column) for column in zip(*page)] for page in pages]


@settings(max_examples=100)
@given(st.data())
def test_a_digest_that_follows_equals_one_made_anew(data):
    heads, page, dtype = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 4, 16])), data.draw(st.sampled_from(DTYPES))
    batch, meter, g = data.draw(st.integers(1, 3)), Meter(), torch.Generator().manual_seed(0)
    store, digest, seen = Store(Meter()), MinMax(meter, page), torch.zeros(batch, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 12))):
        step = data.draw(st.sampled_from(["chunk"] * 4 + ["token"] * 4 + ["drop", "keep", "select", "shrink"] if store.k is not None else ["chunk"]))
        if step in ("chunk", "token"):
            n = 1 if step == "token" else data.draw(st.integers(2, 40))
            low = torch.tensor([data.draw(st.integers(0, n)) if step == "chunk" else 0 for _ in range(batch)], dtype=torch.int32)
            keys = torch.randn(batch, heads, n, 3, generator=g).to(dtype)
            store.append(keys, keys)
            seen = seen + store.admit(n, low, None, seen)
        elif step == "drop":
            store.drop(torch.tensor([data.draw(st.integers(0, int(row.min()))) for row in store.lengths]))
        elif step == "keep":
            counts = torch.tensor([[data.draw(st.integers(0, int(n))) for n in row] for row in store.lengths])
            store.keep(torch.where(torch.arange(int(counts.max())) < counts[..., None], torch.arange(int(counts.max())), -1).int(), counts)
            digest.clear()
            assert meter.now == 0
        elif step == "select":
            store.select(torch.randint(0, batch, (batch,), generator=g))
            digest.clear()
        else:
            store.shrink()
        digest.update(store.k, store.starts, store.lengths)
        assert_digest(digest, store)
        assert meter.now == digest.n_bytes <= meter.peak


def test_a_digest_costs_an_eighth_of_the_keys():
    store, digest = Store(Meter()), MinMax(Meter(), 16)
    keys = torch.randn(2, 4, 4000, 64)
    store.append(keys, keys)
    seen = store.admit(4000, None, None, torch.zeros(2, dtype=torch.int64))
    digest.update(store.k, store.starts, store.lengths)
    assert keys.nbytes / 8 <= digest.n_bytes <= 1.05 * keys.nbytes / 8
    for token in range(64):
        store.append(keys[:, :, token, None], keys[:, :, token, None])
        seen = seen + store.admit(1, None, None, seen)
        digest.update(store.k, store.starts, store.lengths)
    assert 4064 / 16 * 8 * 2 * 64 * 4 <= digest.n_bytes <= 1.05 * 4064 / 16 * 8 * 2 * 64 * 4


# -- one layer ----------------------------------------------------------------------------------------------------------


def layer_of(reader: Quest, k: torch.Tensor, v: torch.Tensor, new: int = 1, first: torch.Tensor | None = None) -> CacheLayer:
    """A layer that was given all but the last ``new`` tokens, and then those."""
    core = CacheLayer(CacheConfig(None, None, decode=reader), 5, 6, Meter())
    core.append(k[:, :, :-new], v[:, :, :-new])
    core.admit(first)
    core.append(k[:, :, -new:], v[:, :, -new:])
    core.admit()
    return core


def pages_of(core: CacheLayer, q: torch.Tensor, first: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and counts of the only region."""
    (region,) = core.regions(q, first, None)
    return region.starts, region.counts


class OfPrompts(KNorm):
    """Small keys stay, of a prompt."""

    decoding = False


def test_whatever_happens_to_a_layer_its_digest_follows():
    core = CacheLayer(CacheConfig(OfPrompts(), kvcache.BUDGETS["uniform"](70), decode=AllPages()), 5, 6, Meter())

    def new(n: int, first: torch.Tensor | None = None) -> None:
        keys = torch.randn(len(core.store.lengths) if core.store.k is not None else 3, 2, n, 8)
        core.append(keys, keys)
        core.admit(first)
        core.observe(None)
        assert_digest(core.digest, core.store)

    new(100, torch.tensor([0, 45, 7], dtype=torch.int32))
    assert int(core.store.longest) == 70
    new(1)
    core.record()
    new(12)
    core.crop(9)
    assert_digest(core.digest, core.store)
    new(1)
    new(15)
    core.crop(14)
    new(16)  # more than was taken back, in one piece
    core.select(torch.tensor([2, 0, 0]))
    assert_digest(core.digest, core.store)
    new(1)
    twin = core.fork(Meter())
    core.reset()
    assert_digest(twin.digest, twin.store)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_q", [1, 5, 16])
def test_all_pages_are_dense_attention(n_q, dtype):
    q = randn(2, 8, n_q, 64, dtype, "plain", 0)
    k, v = (randn(2, 2, 500, 64, dtype, "plain", i) for i in (1, 2))
    core = layer_of(AllPages(), k, v, n_q, torch.tensor([0, 37], dtype=torch.int32))
    got = attend_kept(q, core, LayerContext(5, 0.125, 0), Dense(), Dense())
    assert core.read.shape == (2, 2, 32) and core.read.sum((1, 2)).tolist() == [1000, 926]
    for b, skip in enumerate((0, 37)):
        seen = torch.arange(skip, 500) <= torch.arange(500 - n_q, 500)[:, None]

        def attention(wide, b=b, skip=skip, seen=seen):
            keys, values = (x[b, :, skip:].to(wide).repeat_interleave(4, 0) for x in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q[b].to(wide), keys, values, attn_mask=seen, scale=0.125)

        assert_as_good_as_torch(got.out[b], attention(dtype), attention(torch.float64))


@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
@pytest.mark.parametrize("n_q", [1, 5])
def test_a_planted_page_is_found_at_a_small_budget(reduce, n_q):
    k, v = torch.randn(1, 2, 2000, 64) * 0.3, torch.zeros(1, 2, 2000, 64)
    q = (0.1 * torch.randn(1, 2, 1, 64)).repeat_interleave(4, 1) + 0.02 * torch.randn(1, 8, n_q, 64)
    for h, at in enumerate((777, 1404)):
        k[0, h, at] = q[0, 4 * h : 4 * h + 4].mean((0, 1)) * 50
        v[0, h, at] = 1.0
    core = layer_of(Quest(64, reduce=reduce), k, v, n_q)
    starts, counts = pages_of(core, q)
    assert counts.shape == (1, 2, 4) and counts.sum() <= 2 * 64
    for h, at in enumerate((777, 1404)):
        offsets = (starts - core.table()[0][..., None])[0, h].tolist()
        assert offsets[0] == 0 and at // 16 * 16 in offsets and offsets[-1] == 1984
    out = attend_kept(q, core, LayerContext(5, 1.0, 0), Dense(), Dense()).out
    assert (out > 0.5).all()


@given(st.data())
def test_first_and_own_pages_are_always_read_and_the_budget_is_kept(data):
    n_q, page, pages = data.draw(st.integers(1, 16)), data.draw(st.sampled_from([4, 16])), data.draw(st.integers(2, 6))
    lengths = [data.draw(st.integers(n_q + 1, 150)) for _ in range(2)]
    n = max(lengths)
    k = torch.randn(2, 2, n, 16)
    first = torch.tensor([n - length for length in lengths], dtype=torch.int32)
    low = torch.tensor([data.draw(st.integers(0, n_q)) for _ in range(2)], dtype=torch.int32)  # padding before the queries too
    core = CacheLayer(CacheConfig(None, None, decode=Quest(pages * page, page)), 5, 6, Meter())
    core.append(k[:, :, : n - n_q], k[:, :, : n - n_q])
    core.admit(first)
    core.append(k[:, :, n - n_q :], k[:, :, n - n_q :])
    core.admit(low)
    q = torch.randn(2, 4, n_q, 16)
    starts, counts = pages_of(core, q, low)
    begin, kept = core.table()
    for b in range(2):
        for h in range(2):
            rows = [row for s, c in zip(starts[b, h].tolist(), counts[b, h].tolist()) for row in range(s, s + c)]
            run = range(int(begin[b, h]), int(begin[b, h] + kept[b, h]))
            real = n_q - int(low[b])
            assert rows == sorted(set(rows)) and set(rows) <= set(run)
            assert rows[: min(page, len(run))] == list(run[:page])
            assert rows[len(rows) - real :] == list(run[len(run) - real :])
            if len(rows) < len(run):
                most = max(pages, 1 + (n_q + page - 2) // page + 1)
                assert len(rows) <= most * page


# -- models -------------------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")

from test_cache import NEW, PADS, assert_close, generate, prompt  # noqa: E402
from test_transformers import FAMILIES, tiny, tokens  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def all_pages(model, policy=None, budget=None, **settings):
    if policy is None:
        return kvcache.KVCache(model, CacheConfig(None, None, decode=AllPages()))
    return kvcache.make_cache(model, policy, budget, decode=AllPages(), **settings)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("Llama4", "DeepseekV3", "Mistral")])
def test_every_family_is_dense_when_all_pages_are_read(family):
    model, (ids, mask) = tiny(family), prompt()
    expected, logits = generate(model, None, ids, mask)
    with sparse_attn.patch(model, prefill="dense"):
        cache = all_pages(model)
        found, mine = generate(model, cache, ids, mask, prefill_chunk_size=32)
    assert torch.equal(found, expected)
    assert_close(mine, logits)
    assert cache.report().step_bytes > cache.report().dense_step_bytes > 0


class ReadsPages:
    """Attention of one sequence that masks whatever Quest would not read, chosen by brute force in float64."""

    def __init__(self, pages: int, page: int, dense: tuple[int, ...]):
        self.pages, self.page, self.dense = pages, page, dense

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        heads, n_q, (kv_heads, n_k) = query.shape[1], query.shape[2], key.shape[1:3]
        q, k, v = (x[0].double() for x in (query, key, value))
        seen = (torch.arange(n_k) <= torch.arange(n_k - n_q, n_k)[:, None]).expand(heads, -1, -1).clone()
        of_page = torch.arange(n_k) // self.page
        if n_q == 1 and module.layer_idx not in self.dense:
            for h in range(kv_heads):
                group = range(h * heads // kv_heads, (h + 1) * heads // kv_heads)
                bound = []
                for p in range(int(of_page[-1]) + 1):
                    rows = k[h, of_page == p]
                    bound.append(max(float(torch.maximum(q[a, 0] * rows.amin(0), q[a, 0] * rows.amax(0)).sum()) for a in group))
                bound[0] = bound[-1] = float("inf")
                best = sorted(range(len(bound)), key=lambda p: (-bound[p], p))[: self.pages]
                seen[list(group)] &= torch.isin(of_page, torch.tensor(best))
        k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        p = (q @ k.mT * scaling).masked_fill(~seen, float("-inf")).softmax(-1)
        return (p @ v)[None].transpose(1, 2).to(query.dtype), None


@pytest.mark.parametrize("dense", [(), (0,)])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Glm4"])
def test_decoding_equals_a_replay_that_masks_what_is_not_read(family, dense):
    model, (ids, _) = tiny(family), prompt(1)
    AttentionInterface.register("replay", ReadsPages(3, 16, dense))
    AttentionMaskInterface.register("replay", sdpa_mask)
    model.set_attn_implementation("replay")
    cut = dict(mask=torch.ones_like(ids), prefill_chunk_size=29)  # the last token of the prompt comes alone
    expected, logits = generate(model, None, ids, **cut)
    with sparse_attn.patch(model, prefill="dense"):
        found, mine = generate(model, kvcache.make_cache(model, decode="quest", budget=48, dense_layers=dense), ids, **cut)
    assert torch.equal(found, expected)
    assert_close(mine, logits)


@pytest.mark.parametrize("chunk", [10, 29])
def test_prefill_reads_everything_however_short_its_chunks(chunk):
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        found = kvcache.prefill(model, ids, kvcache.QuestCache(model, 32, dense_layers=()), chunk, mask)
        assert_close(found, kvcache.prefill(model, ids, all_pages(model), 88, mask))


def test_bytes_are_those_of_the_formula():
    layers, heads, dim, size = 3, 2, 16, 4
    model, ids = tiny("Llama", num_hidden_layers=layers, max_position_embeddings=4096), tokens(2, 1500)
    with sparse_attn.patch(model, prefill="dense"):
        cache = kvcache.QuestCache(model, 256, dense_layers=(0,))
        generate(model, cache, ids, torch.ones_like(ids), new=5, prefill_chunk_size=500)
    report, n = cache.report(), 1504
    pages = -(-n // 16)
    last = 256 - (16 - n % 16) % 16
    assert [row.step_bytes for row in report.layers] == [2 * heads * n * 2 * dim * size,
                                                         *[2 * heads * (last * 2 * dim * size + pages * 2 * dim * size)] * 2]
    assert report.dense_step_bytes == layers * 2 * heads * n * 2 * dim * size
    assert report.token_bytes == layers * heads * (2 * dim * size + 8) + 2 * heads * 2 * dim * size // 16
    assert report.formula(n, batch=2) <= report.n_bytes <= 1.05 * report.formula(n, batch=2)
    assert report.n_bytes == sum(row.n_bytes for row in report.layers) == cache.meter.now
    assert "the last step read" in str(report)
    cache.reset()
    assert cache.report().n_bytes == 0


def test_drafts_beams_forks_and_crops_read_the_right_pages():
    model, ids = tiny("Llama"), tokens(1, 12).repeat(1, 7)
    whole = torch.ones_like(ids)
    with sparse_attn.patch(model, prefill="dense"):
        written = [generate(model, all_pages(model), ids, whole, new=24, **draft)[0] for draft in ({}, dict(prompt_lookup_num_tokens=4))]
        assert torch.equal(*written)
        ids, mask = prompt()
        beams = dict(attention_mask=mask, num_beams=3, max_new_tokens=NEW, do_sample=False)
        expected = model.generate(ids, **beams)
        assert torch.equal(model.generate(ids, past_key_values=all_pages(model), **beams), expected)
        cache = kvcache.make_cache(model, "quest", 48, dense_layers=())
        kvcache.prefill(model, ids[:1], cache, 24)
        fork = cache.fork()
        want = model(ids[:1, :1], past_key_values=fork).logits
        for token in (3, 4, 5):
            model(torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-3)
        assert torch.equal(model(ids[:1, :1], past_key_values=cache).logits, want)
        both = ([replace(row, n_bytes=0) for row in each.report().layers] for each in (fork, cache))  # which grew in other steps
        assert next(both) == next(both)
        assert fork.meter.now == fork.report().n_bytes


@pytest.mark.parametrize("evict", ["chunk", "prompt"])
@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_first_evict_then_read_little(name, evict):
    model, (ids, mask), settings = tiny("Llama"), prompt(), dict(window=8, kernel=3, evict=evict)
    with sparse_attn.patch(model, prefill="dense"):
        expected = generate(model, kvcache.make_cache(model, name, 40, **settings), ids, mask, prefill_chunk_size=24)[1]
        assert_close(generate(model, all_pages(model, name, 40, **settings), ids, mask, prefill_chunk_size=24)[1], expected)
        cache = kvcache.make_cache(model, name, 40, decode={"name": "quest", "budget": 32, "dense_layers": ()}, **settings)
        together = generate(model, cache, ids, mask)[1]
        report = cache.report()
        assert report.tokens == 40 + NEW - 1 and report.step_bytes < report.dense_step_bytes
        for row, pad in enumerate(PADS):
            alone = kvcache.make_cache(model, name, 40, decode={"name": "quest", "budget": 32, "dense_layers": ()}, **settings)
            assert_close(together[row : row + 1], generate(model, alone, ids[row : row + 1, pad:], mask[row : row + 1, pad:])[1])


def test_patch_takes_it_by_name():
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        expected = generate(model, kvcache.QuestCache(model, 48, dense_layers=()), ids, mask)[1]
    with sparse_attn.patch(model, prefill="dense", kv_cache={"name": "quest", "budget": 48, "dense_layers": ()}):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert_close(torch.stack(out.logits, 1), expected)


@pytest.mark.parametrize("arguments, sentence", [
    (dict(decode="quest", budget=20), "budget=20 holds fewer than two pages of 16 tokens"),
    (dict(decode="quest", budget=0.1), "budget=0.1 must be 1 or more tokens"),
    (dict(decode="quest", page=0), "page=0 must be 1 or more tokens"),
    (dict(decode="quest", reduce="median"), "reduce='median' is not known"),
    (dict(decode="quest", dense_layers=(-1,)), "dense_layers has -1"),
    (dict(decode="quest", sinks=4), "quest has no entry 'sinks'"),
    (dict(decode="guess"), "'guess': no such way to read less; there are .*quest"),
    (dict(policy="quest", decode="quest"), "leave one of them out"),
    (dict(policy="heavy_hitter", budget=64, decode="quest"), "HeavyHitter evicts while tokens are generated"),
    (dict(decode=Quest(), budget=64), "Quest says itself how to read; leave budget out"),
])
def test_bad_settings_are_told_in_a_sentence(arguments, sentence):
    with pytest.raises(ContractError, match=sentence):
        kvcache.make_cache(tiny("Llama"), **arguments)


def test_a_config_without_a_policy_has_nothing_to_evict_by():
    for how, sentence in ((dict(sinks=4), "sinks says how to evict"), (dict(roll=True), "roll says how"), (dict(evict="prompt"), "evict says how")):
        with pytest.raises(ContractError, match=sentence):
            CacheConfig(None, None, decode=Quest(), **how)
    for decode, sentence in ((None, "takes a policy and a budget, or decode="), ("quest", "decode='quest' is no reader; names go to")):
        with pytest.raises(ContractError, match=sentence):
            CacheConfig(None, None, decode=decode)
    with pytest.raises(ContractError, match="a budget needs a policy"):
        CacheConfig(None, kvcache.BUDGETS["uniform"](tokens=64), decode=Quest())


def test_an_attention_that_cannot_read_pages_says_so():
    model, (ids, mask) = tiny("Llama"), prompt()
    with pytest.raises(ContractError, match="Quest would read everything: of this model only layers 0, 1 attend to the whole text"):
        kvcache.QuestCache(model)
    cache = kvcache.QuestCache(model, dense_layers=())
    with pytest.raises(ContractError, match="reads pages of keys, which attention 'eager' cannot; call sparse_attn.patch"):
        generate(model, cache, ids, mask)
    assert cache.get_seq_length() == 0 and cache.report().n_bytes == 0
    model = tiny("DeepseekV3")
    with sparse_attn.patch(model, prefill="dense"), pytest.raises(ContractError, match="reads pages of keys, which a cache of latents does not hold; leave decode= out"):
        generate(model, kvcache.QuestCache(model, dense_layers=()), ids, mask)
