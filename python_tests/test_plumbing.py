"""What a forward tells its layers: documents, a dict of their own, how many they are; and key blocks that a model chose itself."""

import copy
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
from oracle import assert_as_good_as_torch, attention, plan_mask
from rows import randn

transformers = pytest.importorskip("transformers")

from test_transformers import SPARSE, TOKENS, assert_same, padded, tiny, tokens, traces, with_indexer  # noqa: E402

import sparse_attn  # noqa: E402
from sparse_attn import ContractError, Dense, XAttention  # noqa: E402
from sparse_attn import hf as sparse_hf  # noqa: E402
from sparse_attn.own_blocks import attend_own_blocks  # noqa: E402
from sparse_attn.patterns import AShape, BlockRank, TriangleMix  # noqa: E402
from sparse_attn.types import LayerContext, ReadPlan, ResidentKV  # noqa: E402

ALWAYS = dict(dense_below=0, min_queries=2)


@pytest.fixture(scope="module")
def llama():
    return tiny("Llama", num_hidden_layers=3)


@pytest.fixture(autouse=True)
def every_warning_again():
    sparse_hf.warn_once.cache_clear()


@dataclass(frozen=True)
class Watch:
    """Reads everything and notes the contexts that it was given."""

    seen: tuple = ()

    def __hash__(self):
        return id(self)

    def select(self, q, kv, ctx):
        self.seen[0].append(ctx)
        if ctx.carry is not None:
            ctx.carry.setdefault("layers", []).append(ctx.layer)
        if len(self.seen) > 1 and ctx.layer == 1:
            self.seen[1](ctx)
        return ReadPlan()


def contexts(model, run, *fail) -> list:
    """Every context that layers saw while ``run(handle)`` used the patched model."""
    found = []
    with sparse_attn.patch(model, prefill=Watch((found, *fail)), **ALWAYS) as handle:
        run(handle)
    return found


# -- n_layers and carry ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_know_how_many_they_are(llama):
    assert {c.n_layers for c in contexts(llama, lambda handle: llama(tokens(1)))} == {3}
    with sparse_attn.patch(llama, prefill=TriangleMix(4, 8, 4, block=8), **ALWAYS) as handle:
        llama(tokens(1))
        assert [row.density < 1 for row in handle.report().layers] == [False, True, True]


@torch.no_grad()
@pytest.mark.parametrize("inner", [False, True], ids=["head", "base"])
def test_a_forward_carries_one_dict_through_its_layers(llama, inner):
    model = llama.model if inner else llama

    def run(handle):
        for _ in range(2):
            model(tokens(1))
            assert handle._forward.carry is None, "nothing outlives a forward"

    found = contexts(llama, run)
    assert [c.carry["layers"] for c in found] == [[0, 1, 2]] * 6
    assert found[0].carry is found[2].carry and found[2].carry is not found[3].carry


@torch.no_grad()
def test_a_failed_forward_leaves_nothing_for_the_next(llama):
    def fail(ctx):
        if len(ctx.carry["layers"]) == 2 and not failed:
            failed.append(True)
            raise RuntimeError("stop here")

    failed = []

    def run(handle):
        with pytest.raises(RuntimeError, match="stop here"):
            llama(tokens(1))
        assert handle._forward.carry is None
        llama(tokens(1))

    assert contexts(llama, run, fail)[-1].carry["layers"] == [0, 1, 2]


@torch.no_grad()
def test_threads_do_not_share_what_they_carry(llama):
    """Both stand in layer 1 at once, so each has left something that the other could find."""
    meet = threading.Barrier(2, timeout=60)

    def run(handle):
        threads = [threading.Thread(target=torch.no_grad()(lambda: llama(tokens(1)))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    found = contexts(llama, run, lambda ctx: meet.wait())
    assert len(found) == 6 and all(c.carry["layers"] == [0, 1, 2] for c in found)


@torch.no_grad()
def test_undo_takes_the_hooks_off_and_copies_stay_usable(llama):
    before, want = traces(llama), llama(tokens(1)).logits
    handle = sparse_attn.patch(llama, prefill=AShape(4, 8), **ALWAYS)
    sparse = llama(tokens(1)).logits
    twin = copy.deepcopy(llama)
    handle.undo()
    handle.undo()
    assert traces(llama) == before and torch.equal(llama(tokens(1)).logits, want)
    assert torch.equal(twin(tokens(1)).logits, sparse) and not torch.equal(sparse, want)


@torch.no_grad()
def test_why_a_method_could_not_serve_is_in_the_report(llama):
    with sparse_attn.patch(llama, prefill="block_rank", **ALWAYS) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama(tokens(1))
        row = handle.report().layers[0]
    assert row.reasons == {"BlockRank needs to know the documents; pass segment_ids or use handle.segments": 1}
    assert (row.sparse_calls, row.dense_calls, row.density) == (0, 1, 1.0)


# -- documents ------------------------------------------------------------------------------------------------------------

DOCUMENTS = torch.tensor([0] * 16 + [1] * 16 + [2] * 32 + [3] * 16)  # TOKENS of them
RANK = dict(prefill=BlockRank(block=16), **ALWAYS)


def rows(side: str) -> torch.Tensor:
    """Documents of the rows of ``padded(side)``: each row has its own first tokens of DOCUMENTS."""
    ids = torch.full((3, TOKENS), -1)
    for row, pad in enumerate((0, 19, 33)):
        real = slice(pad, TOKENS) if side == "left" else slice(0, TOKENS - pad)
        ids[row, real] = DOCUMENTS[: TOKENS - pad]
    return ids


@torch.no_grad()
def test_segment_ids_reach_the_method_by_either_way(llama):
    ids = tokens(2)[:, :TOKENS]
    documents = DOCUMENTS.expand(2, -1)
    with sparse_attn.patch(llama, **RANK) as handle:
        by_call = llama(ids, segment_ids=documents).logits
        assert handle.report().density < 0.9
        with handle.segments(documents):
            assert torch.equal(llama(ids).logits, by_call)
            other = threading.Thread(target=lambda: found.append(handle._forward.segments))
            found = []
            other.start()
            other.join()
            assert found == [None], "another thread's request is not told"
        assert handle._forward.segments is None
    assert not torch.allclose(llama(ids).logits, by_call, atol=1e-2)


@torch.no_grad()
def test_documents_that_do_not_read_each_other_do_not_change_each_other(llama):
    """Through all layers: what document 1 says changes itself and the question, never document 2."""
    ids = tokens(1)[:, :TOKENS]
    other = ids.clone()
    other[:, 20:30] = ids[:, 20:30].flip(1)
    with sparse_attn.patch(llama, **RANK):
        a, b = (llama(x, segment_ids=DOCUMENTS[None]).logits[0] for x in (ids, other))
    assert torch.equal(a[32:64], b[32:64])
    assert not torch.allclose(a[64:], b[64:], atol=1e-3) and not torch.allclose(a[20:32], b[20:32])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_documents_of_a_padded_batch_are_those_of_its_rows(llama, side):
    ids, mask = tokens()[:, :TOKENS], padded(side)[:, :TOKENS]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with sparse_attn.patch(llama, **RANK) as handle, handle.segments(rows(side)):
        together = llama(ids, attention_mask=mask, position_ids=positions).logits
    with sparse_attn.patch(llama, **RANK):
        for row in range(3):
            real = mask[row].bool()
            alone = llama(ids[row, real][None], segment_ids=rows(side)[row, real][None]).logits[0]
            assert_same(together[row, real], alone)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunked_prefill_sees_the_documents_of_the_whole_prompt(family, cache):
    """Mistral's sliding cache lets go of the first keys: the rest keep their documents."""
    model = tiny(family, num_hidden_layers=1)
    ids = tokens(1)[:, :TOKENS]
    make = {"dynamic": lambda: transformers.DynamicCache(config=model.config),
            "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=TOKENS + 16)}[cache]
    found = []
    with sparse_attn.patch(model, prefill=Watch((found,)), **ALWAYS) as handle, handle.segments(DOCUMENTS[None]):
        past = make()
        for start in range(0, TOKENS, 32):
            model(ids[:, start : start + 32], past_key_values=past)
    for c, start in zip(found, range(0, TOKENS, 32), strict=True):
        end = min(start + 32, TOKENS)
        queries = c.segments[0, c.q_start : c.q_start + end - start]
        assert torch.equal(queries, DOCUMENTS[start:end].int())
        assert int(c.segments.max()) == 3, "the question is known before it comes"
    with sparse_attn.patch(model, **RANK) as handle, handle.segments(DOCUMENTS[None]):
        past = make()
        chunks = [model(ids[:, start : start + 32], past_key_values=past).logits for start in range(0, TOKENS, 32)]
        if family == "Llama":  # a sliding cache cuts its blocks elsewhere
            assert_same(torch.cat(chunks, 1), model(ids).logits)


@torch.no_grad()
def test_segment_ids_that_do_not_fit_get_a_sentence(llama):
    ids = tokens(2)[:, :TOKENS]
    with sparse_attn.patch(llama, **RANK) as handle:
        with pytest.raises(ContractError, match="segment ids cover 79 of 80 tokens; give one per token"):
            llama(ids, segment_ids=DOCUMENTS[:79].expand(2, -1))
        with pytest.raises(ContractError, match=r"segment ids \[3, 80\] do not fit a prompt of 2 rows"), \
                handle.segments(DOCUMENTS.expand(3, -1)):
            llama(ids)
        with pytest.raises(ContractError, match="came twice"), handle.segments(DOCUMENTS.expand(2, -1)):
            llama(ids, segment_ids=DOCUMENTS.expand(2, -1))
        for bad, sentence in [(DOCUMENTS, r"whole numbers \[B, N\]"), (DOCUMENTS[None].float(), "got torch.float32"),
                              ([[0, 1]], "got list"), (DOCUMENTS.flip(0)[None], "must rise"), (torch.tensor([[0, -2]]), "must rise")]:
            with pytest.raises(ContractError, match=sentence), handle.segments(bad):
                pass
        assert handle._forward.segments is None


# -- key blocks that a model chose ----------------------------------------------------------------------------------------


def eager(model, ids, **inputs) -> torch.Tensor:
    model.set_attn_implementation("eager")
    try:
        return model(ids, **inputs)[0]
    finally:
        model.set_attn_implementation("sdpa")


@torch.no_grad()
@pytest.mark.parametrize("prefill", [Dense(), XAttention(threshold=0.1, block=16, stride=4)], ids=["dense", "xattention"])
def test_blocks_that_a_model_chose_are_walked_by_our_kernel(prefill):
    model, ids = with_indexer("MiniMaxM3"), tokens(2)[:, :TOKENS]
    want = eager(model, ids)
    with sparse_attn.patch(model, prefill=prefill, **ALWAYS) as handle:
        assert_same(model(ids)[0], want)
        report = handle.report()
    assert all(row.sparse_calls == 1 and not row.dense_calls and 0.2 < row.density < 0.8 for row in report.layers), report
    told = "XAttention: the model chooses its own key blocks" in str(report)
    assert told == isinstance(prefill, XAttention)


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 29])
def test_the_plan_is_the_models_own_mask_and_our_output_its_attention(monkeypatch, start):
    """Every key the model's eager path would allow and no other, and as close to float64 as plain torch under that mask."""
    model, ids, calls = with_indexer("MiniMaxM3"), tokens(2)[:, :TOKENS], []

    def spy(q, kv, ctx, indices, block):
        calls.append((q, kv, ctx, indices, attend(q, kv, ctx, indices, block)))
        return calls[-1][-1]

    attend = sparse_hf.attend_own_blocks
    monkeypatch.setattr(sparse_hf, "attend_own_blocks", spy)
    with sparse_attn.patch(model, **ALWAYS):
        cache = transformers.DynamicCache(config=model.config)
        if start:
            model(ids[:, :start], past_key_values=cache)
        model(ids[:, start:], past_key_values=cache)
    for layer, (q, kv, ctx, indices, found) in enumerate(calls[-2:]):
        positions = torch.arange(start, TOKENS)[None].expand(2, -1)
        mask = model.layers[layer].self_attn.indexer.build_block_mask(indices, None, TOKENS, q.dtype, q.device, positions) == 0
        names = ("scale", "q_start", "causal", "window", "softcap", "sinks", "first", "last")
        case = dict(q=q, k=kv.k, v=kv.v, **{name: getattr(ctx, name) for name in names})
        assert torch.equal(plan_mask(case, found.plan), mask) and ctx.q_start == start
        assert_as_good_as_torch(found.out, attention(case, mask, q.dtype)[0], attention(case, mask)[0])


@torch.no_grad()
def test_chosen_blocks_hold_in_chunks_decoding_and_right_padding():
    model, ids = with_indexer("MiniMaxM3"), tokens()[:, :TOKENS]
    mask = padded("right")[:, :TOKENS]
    want, padded_want = eager(model, ids), eager(model, ids, attention_mask=mask)[mask.bool()]
    with sparse_attn.patch(model, **ALWAYS) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(model(ids, attention_mask=mask)[0][mask.bool()], padded_want)
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(ids[:, a:b], past_key_values=cache)[0] for a, b in ((0, 32), (32, 71), (71, 79), (79, 80))]
        assert_same(torch.cat(parts, 1), want)
        row = handle.report().layers[1]
    assert (row.sparse_calls, row.dense_calls, row.decode_calls) == (4, 0, 1)


@torch.no_grad()
def test_what_our_kernel_cannot_walk_stays_masked_and_says_why():
    model, ids = with_indexer("MiniMaxM3"), tokens()[:, :TOKENS]
    mask = padded("left")[:, :TOKENS]
    want, short = eager(model, ids, attention_mask=mask)[mask.bool()], eager(model, ids[:, :20])
    with sparse_attn.patch(model, **ALWAYS) as handle:
        with pytest.warns(UserWarning, match=r"the model chooses its own keys \(left padding shifts the blocks"):
            assert_same(model(ids, attention_mask=mask)[0][mask.bool()], want)
        assert not any(row.sparse_calls for row in handle.report().layers)
    with sparse_attn.patch(model, **SPARSE | dict(dense_below=40)) as handle:
        assert_same(model(ids[:, :20])[0], short)
        assert handle.report().layers[0].reasons == {"fewer than 40 keys": 1}


@pytest.mark.parametrize("heads, kv_heads, lists", [(4, 2, 2), (4, 2, 1), (8, 2, 4), (3, 3, 3), (8, 1, 1)])
@pytest.mark.parametrize("q_start, softcap, sinks, padded_to", [(0, 0.0, False, None), (21, 5.0, True, None), (16, 0.0, True, 60)])
def test_own_blocks_for_any_heads_positions_and_padding(heads, kv_heads, lists, q_start, softcap, sinks, padded_to):
    n_k, block, last = 75, 16, None if padded_to is None else torch.tensor([75, padded_to], dtype=torch.int32)
    q, k, v = (randn(2, h, n, 24, torch.float32, "tokens_first", i)
               for i, (h, n) in enumerate(((heads, n_k - q_start), (kv_heads, n_k), (kv_heads, n_k))))
    own = (torch.arange(q_start, n_k) // block)[:, None]
    blocks = torch.arange(5)
    score = torch.rand(2, lists, n_k - q_start, 5).masked_fill(blocks > own, -1.0).masked_fill(blocks == own, 2.0)
    top = score.topk(3, -1)
    ctx = LayerContext(0, 0.2, q_start, softcap=softcap, sinks=torch.randn(heads) if sinks else None, last=last)
    found = attend_own_blocks(q, ResidentKV(k, v), ctx, top.indices.masked_fill(top.values < 0, -1), block)
    case = dict(q=q, k=k, v=v, scale=0.2, q_start=q_start, causal=True, window=0, softcap=softcap, first=None, last=last,
                sinks=ctx.sinks)
    seen = plan_mask(case, found.plan)
    truth, lse = attention(case, seen)
    by_torch, lse_by_torch = attention(case, seen, torch.float32)
    assert_as_good_as_torch(found.out, by_torch, truth)
    finite = lse.isfinite()
    assert torch.equal(found.lse.isneginf(), ~finite)
    assert_as_good_as_torch(found.lse[finite], lse_by_torch[finite], lse[finite])
