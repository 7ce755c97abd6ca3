"""Every way to read less by name: what its digest knows, which pages it chooses, and models that decode from them.

A new reader adds a row to ROWS.
"""

import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache
from kvcache import READERS
from kvcache.cache import CacheLayer
from kvcache.config import CacheConfig
from kvcache.digests import Labels, Question
from kvcache.store import Meter, Store
from sparse_attn import ContractError
from sparse_attn.kept import Queries, attend_kept
from sparse_attn.patterns import Dense
from sparse_attn.types import LayerContext


@dataclass(frozen=True)
class ReaderRow:
    """A reader small enough for short texts.

    Attributes:
        settings: of the reader.
        sinks, recent: tokens that it always reads besides the queries' own, at the least.
        one_list: whether all KV heads read the same.
    """

    settings: dict = field(default_factory=dict)
    sinks: int = 1
    recent: int = 0
    one_list: bool = False


_BLOCKS = dict(budget=64, page=8, representatives=2, sinks=8, recent=16)
ROWS = {
    "quest": ReaderRow(dict(budget=64)),
    "landmarks": ReaderRow(dict(budget=64, page=4, outliers=2, recent=8), recent=8),
    "double_sparsity": ReaderRow(dict(budget=40, width=8, sinks=2, recent=8), 2, 8),
    "token_select": ReaderRow(dict(budget=40, sinks=4, recent=8), 4, 8, one_list=True),
    "infllm": ReaderRow(_BLOCKS, 8, 16, one_list=True),
    "quickllama": ReaderRow(dict(**_BLOCKS, question=8), 8, 16, one_list=True),
    "lrqk": ReaderRow(dict(budget=40, rank=8, recent=8), recent=8),
}
every_reader = pytest.mark.parametrize("name", list(ROWS))


def test_every_reader_has_a_row():
    assert set(ROWS) == set(READERS)


def small(name: str, **more):
    return READERS[name](**{**ROWS[name].settings, "dense_layers": (), **more})


def layer_of(reader) -> CacheLayer:
    return CacheLayer(CacheConfig(None, None, decode=reader), 5, 6, Meter())


def forward(core: CacheLayer, q, k, v, first=None, last=None, scale: float | None = None) -> torch.Tensor:
    """Attention of a chunk over the layer and itself: the way that a model takes."""
    core.append(k, v)
    core.admit(first, last)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    found = attend_kept(q, core, LayerContext(5, scale, 0, first=first, last=last), Dense(), Dense())
    core.observe(Queries(q, found.lse, first, last, scale))
    return found.out


def told(core: CacheLayer, q, k, v, chunk: int = 64, first=None) -> None:
    """A prompt in chunks, none of which is read by pages; ``first`` int32 ``[B]`` real tokens begin."""
    core.reading = True
    for at in range(0, q.shape[2], chunk):
        part = slice(at, at + chunk)
        low = None if first is None else (first - at).clamp(0, q[:, :, part].shape[2])
        forward(core, q[:, :, part], k[:, :, part], v[:, :, part], low)
    core.reading = False


def chosen(core: CacheLayer, q, first=None) -> list[list[set[int]]]:
    """Tokens that the queries would read, by sequence and KV head."""
    core.digest.ready(core._all_rows)
    pages, lengths = core.config.decode.choose(q, core.lengths, core.digest, first), core.lengths.tolist()
    page = core.config.decode.page
    if pages is None:
        return [[set(range(n)) for n in row] for row in lengths]
    for row in pages.flatten(0, 1).tolist():
        real = [p for p in row if p >= 0]
        assert row == real + [-1] * (len(row) - len(real)) and real == sorted(set(real))
    return [[{t for p in pages[b, h].tolist() if p >= 0 for t in range(p * page, min((p + 1) * page, n))}
             for h, n in enumerate(row)] for b, row in enumerate(lengths)]


def text(n: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = 16, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, h, n, dim, generator=g) for h in (heads, kv_heads, kv_heads))


# -- what is chosen -------------------------------------------------------------------------------------------------------


@every_reader
@pytest.mark.parametrize("n_q", [1, 5])
def test_a_planted_key_is_read(name, n_q):
    n, at, group = 600, 333, 4
    g = torch.Generator().manual_seed(1)
    look = torch.randn(1, 2, 1, 32, generator=g).repeat_interleave(group, 1)  # where the heads of a group look
    q = look + 0.2 * torch.randn(1, 2 * group, n + n_q, 32, generator=g)
    k, v = 0.3 * torch.randn(1, 2, n + n_q, 32, generator=g), torch.zeros(1, 2, n + n_q, 32)
    k[:, :, at] = 2 * look[:, ::group, 0]
    v[:, :, at] = 1.0
    core = layer_of(small(name))
    told(core, q[:, :, :n], k[:, :, :n], v[:, :, :n])
    out = forward(core, q[:, :, n:], k[:, :, n:], v[:, :, n:])
    assert core.read.sum() <= 2 * core.config.decode.budget + 2 * core.config.decode.page < 2 * (n + n_q)
    assert (out > 0.5).all()


@every_reader
@settings(max_examples=15)
@given(data=st.data())
def test_first_newest_and_own_tokens_are_read_and_the_budget_is_kept(name, data):
    reader, row, n_q = small(name), ROWS[name], data.draw(st.integers(1, 16))
    lengths = [data.draw(st.integers(1, 150)) for _ in range(2)]
    n = max(lengths)
    first = torch.tensor([n - length for length in lengths], dtype=torch.int32)
    low = torch.tensor([data.draw(st.integers(0, n_q - 1)) for _ in range(2)], dtype=torch.int32)  # padding before the queries too
    core = layer_of(reader)
    told(core, *text(n, 2), first=first)
    q, k, v = text(n_q, 2, seed=1)
    core.append(k, v)
    core.admit(low)
    found = chosen(core, q, low)
    for b, heads in enumerate(found):
        kept = lengths[b] + n_q - int(low[b])
        assert not row.one_list or all(tokens == heads[0] for tokens in heads)
        for tokens in heads:
            assert tokens <= set(range(kept))
            assert set(range(min(row.sinks, kept))) <= tokens
            assert set(range(max(kept - row.recent - (n_q - int(low[b])), 0), kept)) <= tokens
            always = sum(-(-x // reader.page) + 1 for x in (row.sinks, row.recent + n_q)) * reader.page
            assert len(tokens) == kept or len(tokens) <= max(reader.budget, always)


@every_reader
def test_a_row_of_a_padded_batch_chooses_what_it_chooses_alone(name):
    n, pads = 200, (0, 61, 190)
    q, k, v = text(n, 3)
    core = layer_of(small(name))
    told(core, q, k, v, chunk=200, first=torch.tensor(pads, dtype=torch.int32))
    step = list(text(4, 3, seed=1))
    alone = []
    for b, pad in enumerate(pads):
        one = layer_of(small(name))
        told(one, *(x[b : b + 1, :, pad:] for x in (q, k, v)), chunk=200)
        alone.append(one)
    for t in range(4):
        new = [x[:, :, t : t + 1] for x in step]
        together = forward(core, *new)
        for b, one in enumerate(alone):
            torch.testing.assert_close(together[b : b + 1], forward(one, *(x[b : b + 1] for x in new)))


@every_reader
def test_tokens_of_a_draft_have_no_say_in_what_those_before_them_read(name):
    q, k, v = text(300)
    step = [torch.cat([x, x.flip(1)], 2) for x in text(5, seed=1)]
    found = []
    for change in (0.0, 40.0):
        core = layer_of(small(name))
        told(core, q, k, v)
        forward(core, *text(1, seed=2))  # what is learned when first needed is learned
        new = [x[:, :, :5].clone() for x in step]
        for x in new[1:]:
            x[:, :, 2:] += change
        found.append(forward(core, *new))
    assert torch.equal(found[0][:, :, :2], found[1][:, :, :2])
    assert not torch.equal(found[0][:, :, 2:], found[1][:, :, 2:])


@every_reader
def test_a_budget_for_everything_is_dense(name):
    q, k, v = text(90, 2)
    core = layer_of(small(name, budget=400))
    told(core, q, k, v, first=torch.tensor([0, 30], dtype=torch.int32))
    new = list(text(3, 2, seed=1))
    out = forward(core, *new)
    for b, skip in enumerate((0, 30)):
        keys, values = (torch.cat(x, 2)[b : b + 1, :, skip:].repeat_interleave(2, 1) for x in zip((k, v), new[1:]))
        mask = torch.ones(3, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - 3)
        expected = torch.nn.functional.scaled_dot_product_attention(new[0][b : b + 1], keys, values, attn_mask=mask)
        torch.testing.assert_close(out[b : b + 1], expected)


# -- digests --------------------------------------------------------------------------------------------------------------

DIGESTS = [name for name in ROWS if name not in ("quest", "lrqk", "token_select")]  # which have tests of their own


@pytest.mark.parametrize("name", DIGESTS)
@settings(max_examples=30)
@given(data=st.data())
def test_a_digest_that_follows_equals_one_made_anew(name, data):
    batch, heads, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), 12
    reader, meter, g = small(name), Meter(), torch.Generator().manual_seed(0)

    def make(meter):
        if name == "double_sparsity":
            return Labels(meter, 3, 0, torch.tensor([[0, 4, 9], [1, 2, 3], [5, 6, 11]])[:heads])
        return reader.digest(meter, 5)

    store, digest, seen = Store(Meter()), make(meter), torch.zeros(batch, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 8))):
        later = ["token"] * 3 + ["drop", "select", "shrink"] if store.k is not None else []
        step = data.draw(st.sampled_from(["chunk"] * 3 + later))
        if step in ("chunk", "token"):
            n = 1 if step == "token" else data.draw(st.integers(2, 40))
            low = torch.tensor([data.draw(st.integers(0, n)) if step == "chunk" else 0 for _ in range(batch)], dtype=torch.int32)
            keys = torch.randn(batch, heads, n, dim, generator=g)
            store.append(keys, keys)
            seen = seen + store.admit(n, low, None, seen)
        elif step == "drop":
            store.drop(torch.tensor([data.draw(st.integers(0, int(row.min()))) for row in store.lengths]))
        elif step == "select":
            which = torch.randint(0, batch, (batch,), generator=g)
            store.select(which)
            digest.select(which)
        else:
            store.shrink()
        digest.update(store.k, store.starts, store.lengths)
        anew = make(Meter())
        anew.update(store.k, store.starts, store.lengths)
        assert torch.equal(digest.pages, anew.pages)
        for entry in digest.names:
            for one, other, count in zip(digest.starts.flatten(), anew.starts.flatten(), anew.pages.flatten()):
                mine, fresh = getattr(digest, entry)[one : one + count], getattr(anew, entry)[other : other + count]
                torch.testing.assert_close(mine, fresh, rtol=1e-6, atol=1e-6)
        assert meter.now == digest.n_bytes <= meter.peak


def test_landmarks_are_means_and_outliers_the_pages_least_like_theirs():
    k = torch.randn(1, 1, 400, 16) * 0.1 + torch.randn(16)
    k[0, 0, 201] *= -1
    k[0, 0, 322] = torch.randn(16)
    core = layer_of(small("landmarks"))
    told(core, k, k, k)
    digest, pages = core.digest, k[0, 0].unflatten(0, (100, 4)).double()
    rows = slice(int(digest.starts), int(digest.starts) + 100)
    torch.testing.assert_close(digest.landmark[rows].double(), pages.mean(1), rtol=1e-5, atol=1e-6)
    cosine = (pages @ pages.mean(1)[..., None])[..., 0] / pages.norm(dim=-1) / pages.mean(1).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(digest.likeness[rows, 0].double(), cosine.amin(1), rtol=1e-5, atol=1e-6)
    assert sorted(cosine.amin(1).topk(2, largest=False).indices.tolist()) == [50, 80]
    alike = k.mean((0, 1, 2)).expand(1, 4, 1, 16)  # what looks at all pages but these
    assert {200, 201, 202, 203, 320, 321, 322, 323} <= chosen(core, alike)[0][0]


def representatives(q, k, page: int, count: int, recent: int, scale: float, pad: int = 0) -> torch.Tensor:
    """``[Hkv, blocks, D]`` in float64, from whole attention matrices."""
    q, k = q[:, pad:].double(), k[:, pad:].double()
    group, n = len(q) // len(k), k.shape[1]
    p = (q @ k.repeat_interleave(group, 0).mT * scale).masked_fill(~torch.ones(n, n).tril().bool(), -math.inf).softmax(-1)
    begin = (torch.arange(n) // page * page - recent)[:, None]
    mass = p.masked_fill(torch.arange(n) < begin, 0.0).sum(1).unflatten(0, (-1, group)).sum(1)
    found = []
    for block in range(-(-n // page)):
        rows = slice(block * page, (block + 1) * page)
        keys = k[:, rows]
        if (block + 1) * page <= n // page * page - recent:
            keys = keys.gather(1, mass[:, rows].topk(count).indices[..., None].expand(-1, -1, k.shape[2]))
        found.append(keys.mean(1))
    return torch.stack(found, 1)


@pytest.mark.parametrize("chunks", [[150], [1] * 150, [64, 64, 22], [7, 30, 1, 1, 80, 16, 15]])
def test_representatives_are_those_of_whole_matrices_however_the_prompt_is_cut(chunks):
    q, k, v = text(150, 2)
    q, first = 3 * q, torch.tensor([0, 21], dtype=torch.int32)
    core, at = layer_of(small("infllm", budget=400)), 0
    for n in chunks:
        part = slice(at, at + n)
        forward(core, q[:, :, part], k[:, :, part], v[:, :, part], (first - at).clamp(0, n))
        at += n
    digest = core.digest
    for b, pad in enumerate((0, 21)):
        expected = representatives(q[b], k[b], 8, 2, 16, 0.25, pad)
        for h in range(2):
            rows = slice(int(digest.starts[b, h]), int(digest.starts[b, h] + digest.pages[b, h]))
            torch.testing.assert_close(digest.vector[rows].double(), expected[h], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("back", [1, 5, 12])
def test_what_is_taken_back_from_infllm_leaves_no_trace_but_attention(back):
    """As if the tokens had not come, but for what their queries gave to older tokens: here nothing, they look elsewhere."""
    q, k, v = text(120)
    q[:, :, 90:] = 0.0
    k[:, :, :90, 0], q[..., 0] = 0.0, 0.0
    q[:, :, 90 - back : 90, 0], k[:, :, 90 - back :, 0] = 60.0, 60.0
    digests = []
    for detour in (False, True):
        core = layer_of(small("infllm", budget=400))
        told(core, q[:, :, : 90 - back], k[:, :, : 90 - back], v[:, :, : 90 - back])
        if detour:
            for t in range(90 - back, 90):
                forward(core, *(x[:, :, t : t + 1] for x in (q, k, v)))
            core.crop(back)
        told(core, q[:, :, 90:], k[:, :, 90:], v[:, :, 90:], chunk=1)
        digests.append(core.digest)
    torch.testing.assert_close(digests[0].vector[:14], digests[1].vector[:14], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(digests[0].mass, digests[1].mass, rtol=1e-4, atol=1e-4)


def test_blocks_that_were_taken_back_are_described_anew():
    q, k, v = text(120, 2)
    core = layer_of(small("infllm", budget=400))
    told(core, q, k, v)
    digest = core.digest
    assert digest.progress[:, 1].tolist() == [13, 13]
    before = [digest.vector[start : start + 7].clone() for start in digest.starts.flatten()]
    core.crop(60)
    new = list(text(5, 2, seed=1))
    told(core, *new)
    keys = torch.cat([k[:, :, :60], new[1]], 2).flatten(0, 1)
    for start, old, run in zip(digest.starts.flatten(), before, keys):
        torch.testing.assert_close(digest.vector[start : start + 7], old)
        torch.testing.assert_close(digest.vector[start + 7 : start + 9], torch.stack([run[56:64].mean(0), run[64:].mean(0)]))
    assert digest.progress.tolist() == [[65, 7]] * 2


# -- double_sparsity ------------------------------------------------------------------------------------------------------


def test_online_channels_are_those_that_weigh_most_and_stay():
    q, k, v = text(200, 2, dim=16)
    heavy = {0: [1, 5, 6], 1: [0, 9, 15]}
    for h, channels in heavy.items():
        k[:, h, :, channels] *= 6
    q[:, :, :, 3] *= 2  # alone that says nothing
    core = layer_of(small("double_sparsity", width=3, budget=60))
    told(core, q, k, v, first=torch.tensor([0, 150], dtype=torch.int32))
    assert (core.digest.channels == -1).all()
    new = list(text(1, 2, seed=1))
    forward(core, *new)
    assert core.digest.channels[0].tolist() == list(heavy.values())
    assert (core.digest.channels[1] == -1).all()  # fits in the budget
    for h, channels in heavy.items():
        start = int(core.digest.starts[0, h])
        assert torch.equal(core.digest.label[start : start + 200], k[0, h][:, channels])
        assert torch.equal(core.digest.label[start + 200], new[1][0, h, 0, channels])
    forward(core, *(100 * x for x in text(12, 2, seed=2)))
    assert core.digest.channels[0].tolist() == list(heavy.values()) and (core.digest.channels[1] >= 0).all()


def test_what_a_channel_weighs_is_counted_over_the_last_queries_of_every_forward():
    q, k, v = text(200, 2)
    core = layer_of(small("double_sparsity", budget=400))
    told(core, q, k, v, chunk=100, first=torch.tensor([0, 170], dtype=torch.int32))
    new = list(text(30, 2, seed=1))
    first, last = (torch.tensor(bound, dtype=torch.int32) for bound in ([0, 11], [30, 27]))
    forward(core, *new, first, last)
    product = (q.unflatten(1, (2, 2)).abs().mean(2) * k.abs()), (new[0].unflatten(1, (2, 2)).abs().mean(2) * new[1].abs())
    for b, tokens in enumerate(([*range(36, 100), *range(136, 200)], range(170, 200))):
        expected = product[0][b][:, list(tokens)].sum(1) + product[1][b][:, first[b] : last[b]].sum(1)
        torch.testing.assert_close(core.digest.weight[b], expected)


# -- token_select ---------------------------------------------------------------------------------------------------------


def test_a_choice_stands_while_queries_are_alike():
    core = layer_of(small("token_select"))
    told(core, *text(300, 2))
    q, k, v = text(8, 2, seed=1)
    forward(core, *(x[:, :, :1] for x in (q, k, v)))
    before, size = core.digest.scan_bytes(), 16 * 4
    assert before == 2 * 2 * (301 - 4 - 8 - 1) * size
    middle = [tokens - set(range(4)) - set(range(292, 301)) for tokens in (row[0] for row in chosen(core, q[:, :, :1]))]
    near = q[:, :, :1] + 0.05 * q[:, :, 1:2]
    forward(core, near, k[:, :, 1:2], v[:, :, 1:2])
    assert core.digest.scan_bytes() == 0
    for t in (2, 3, 4):
        forward(core, torch.cat([near[:1], q[1:, :, t : t + 1]]), k[:, :, t : t + 1], v[:, :, t : t + 1])
        assert core.digest.scan_bytes() == 2 * (301 + t - 4 - 8 - 1) * size  # the second sequence chose anew
    found = chosen(core, torch.cat([near[:1], q[1:, :, 5:6]]))
    assert found[0][0] == set(range(4)) | middle[0] | set(range(296, 305)) and len(found[0][0]) == 40
    core.crop(3)
    assert core.digest.asked is None


def test_a_choice_does_not_stand_by_small_steps():
    """Each query is like the one before, but at last not like the one that chose."""
    core = layer_of(small("token_select"))
    told(core, *text(300))
    a, b = (torch.nn.functional.normalize(x.flatten(1), dim=1).view_as(x) for x in (torch.randn(1, 4, 1, 16), torch.randn(1, 4, 1, 16)))
    scanned = []
    for angle in (0.0, 0.3, 0.6, 0.9):
        _, k, v = text(1)
        forward(core, a * math.cos(angle) + (b - (a * b).sum() * a) * math.sin(angle), k, v)
        scanned.append(core.digest.scan_bytes() > 0)
    assert scanned == [True, False, True, False]


def test_votes_are_the_attention_of_all_heads():
    q, k, v = text(200)
    core = layer_of(small("token_select"))
    told(core, q, k, v)
    ask = 3 * torch.randn(1, 4, 1, 16)
    forward(core, ask, k[:, :, :1], v[:, :, :1])
    among = slice(4, 201 - 8 - 1)
    keys = torch.cat([k, k[:, :, :1]], 2)[0, :, among].double().repeat_interleave(2, 0)
    votes = (ask[0].double() @ keys.mT / 4).softmax(-1).sum((0, 1))
    best = set((votes.topk(40 - 4 - 9).indices + 4).tolist())
    assert chosen(core, ask)[0][0] == set(range(4)) | best | set(range(192, 201))


# -- quickllama -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [200, 64])
def test_the_question_finds_what_the_query_would_not(chunk):
    q, k, v = (0.1 * x for x in text(200, 2))
    ask = torch.randn(2, 1, 16)
    q[:, :, 192:] += ask.repeat_interleave(2, 0)
    k[:, :, 96:104] += 3 * ask
    other = -0.1 * ask.repeat_interleave(2, 0).expand(2, -1, -1, -1)  # what looks away
    for name, found in (("infllm", False), ("quickllama", True)):
        core = layer_of(small(name))
        told(core, q, k, v, chunk)
        forward(core, other, k[:, :, :1], v[:, :, :1])
        assert (set(range(96, 104)) <= chosen(core, other)[0][0]) == found
    asked = core.digest.asked.clone()
    forward(core, *text(5, 2, seed=3))
    assert torch.equal(core.digest.asked, asked)  # a draft is no question
    told(core, *text(40, 2, seed=4), chunk=40)
    assert core.digest.asked is None


def test_a_question_is_the_mean_query_of_what_got_most_attention():
    q, k, v = text(60)
    digest = Question(Meter(), 8, 2, 16, 5)
    core = layer_of(small("quickllama", budget=200))
    core.digest = digest
    told(core, q, k, v, chunk=60)
    digest.ready(core._all_rows)
    logits = q[0].double() @ k[0].double().repeat_interleave(2, 0).mT / 4
    p = logits.masked_fill(~torch.ones(60, 60).tril().bool(), -math.inf).softmax(-1)
    for h in range(2):
        best = p[2 * h : 2 * h + 2].sum((0, 1))[55:].topk(2).indices + 55
        torch.testing.assert_close(digest.asked[0, 2 * h : 2 * h + 2, 0], q[0, 2 * h : 2 * h + 2][:, best].mean(1))


# -- settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, arguments, sentence", [
    ("landmarks", dict(budget=256), "budget=256 leaves no page to choose, since 432 tokens are read in any case; give 440 or more"),
    ("landmarks", dict(outliers=-1), "outliers=-1 must be 0 or more pages"),
    ("landmarks", dict(reduce="median"), "reduce='median' is not known"),
    ("double_sparsity", dict(width=0), "width=0 must be 1 or more channels"),
    ("double_sparsity", dict(budget=60), "budget=60 leaves no page to choose, since 69 tokens are read in any case; give 70"),
    ("token_select", dict(similar="no"), "similar='no' must be a number"),
    ("token_select", dict(sinks=2000), "budget=2048 leaves no page to choose"),
    ("infllm", dict(recent=200), "recent=200 is not one or more blocks of 128 tokens"),
    ("infllm", dict(representatives=0), "representatives=0 must be 1 or more tokens"),
    ("quickllama", dict(question=513), "question=513 must be the question's tokens, from 1 to the 512 recent ones"),
    ("quickllama", dict(question_weight=-1), "question_weight=-1 must be a number, 0 or more"),
    ("infllm", dict(dense_layers=(-1,)), "dense_layers has -1"),
])
def test_bad_settings_are_told_in_a_sentence(name, arguments, sentence):
    with pytest.raises(ContractError, match=sentence):
        READERS[name](**arguments)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.one_list])
def test_one_list_for_all_heads_needs_the_same_tokens_in_all(name):
    with pytest.raises(ContractError, match="reads the same tokens for all KV heads"):
        kvcache.config.as_config("snapkv", 4096, decode=name)


@every_reader
def test_a_config_survives_json(name):
    config = CacheConfig(None, None, decode=small(name))
    assert CacheConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
