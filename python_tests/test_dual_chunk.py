"""Dual chunk attention against three literal rotations in float64, and a model that cannot tell how its text was cut."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch, attention
from rows import attention_cases, randn

from sparse_attn import ContractError, Dense, DualChunk, SparseAttnConfig, XAttention
from sparse_attn.dual_chunk import dual_chunk_attention
from sparse_attn.ops import block_sparse_attention, merge_attention
from sparse_attn.rotary import Rotation
from sparse_attn.types import LayerContext, ResidentKV

# -- merge_attention ------------------------------------------------------------------------------------------------------


@given(case=attention_cases(), parts=st.integers(1, 4), seed=st.integers(0, 99))
def test_random_splits_of_the_keys_merge_to_the_whole(case, parts, seed):
    """Every key goes to one part; a sink goes to part 0; rows that see nothing keep 0 and -inf."""
    case = {**case, "first": None, "last": None}
    (batch, heads, n_q, _), n_k = case["q"].shape, case["k"].shape[2]
    part_of = torch.randint(0, parts, (n_k,), generator=torch.Generator().manual_seed(seed))
    key, at = torch.arange(n_k), torch.arange(n_q)[:, None] + case["q_start"]
    seen = torch.ones(n_q, n_k, dtype=torch.bool) if not case["causal"] else key <= at
    seen &= key % 5 != 0  # the first row sees nothing at all
    seen = seen.expand(batch, heads, -1, -1)

    def attend(dtype, of):
        found = [attention({**case, "sinks": case["sinks"] if i == 0 else None}, seen & (part_of == i if of else key >= 0), dtype)
                 for i in (range(parts) if of else [0])]
        return torch.stack([out for out, _ in found]), torch.stack([lse for _, lse in found])

    (truth,), (lse_truth,) = attend(torch.float64, False)
    (plain,), (lse_plain,) = attend(case["q"].dtype, False)
    outs, lses = attend(case["q"].dtype, True)
    out, lse = merge_attention(outs, lses.float())
    assert out.dtype == case["q"].dtype and lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous(), "out must be laid out as [B, Nq, H, Dv]"
    # torch rounds the whole once; here every part was rounded before it came, and the merge rounds once more
    floor = 4e-6 + (torch.finfo(case["q"].dtype).eps * case["v"].abs().max().item() if case["q"].dtype != torch.float32 else 0)
    assert_as_good_as_torch(out, plain, truth, floor)
    assert torch.equal(lse.isneginf(), lse_truth.isneginf())
    there = ~lse_truth.isneginf()
    assert (out[~there] == 0).all()
    if there.any():
        assert_as_good_as_torch(lse[there], lse_plain[there], lse_truth[there], 1e-5)


@pytest.mark.parametrize(("outs", "lses", "sentence"), [
    (torch.zeros(2, 3, 4), torch.zeros(2, 3), r"outs must be \[P, B, H, Nq, Dv\], got 3"),
    (torch.zeros(2, 1, 1, 3, 4), torch.zeros(2, 1, 1, 4), r"lses \[2, 1, 1, 4\] must have outs' \[2, 1, 1, 3\]"),
    (torch.zeros(2, 1, 1, 3, 4), torch.zeros(2, 1, 1, 3).half(), "lses must be float32"),
    (torch.zeros(0, 1, 1, 3, 4), torch.zeros(0, 1, 1, 3), "there is no part to merge"),
])  # fmt: skip
def test_what_cannot_be_merged_gets_a_sentence(outs, lses, sentence):
    with pytest.raises(ContractError, match=sentence):
        merge_attention(outs, lses)


# -- the computation, against three rotations written out -------------------------------------------------------------------

THETA, DIM, FACTOR = 100.0, 16, 1.3  # a short ladder, so that a wrong distance changes every channel; and an attention factor


def angles(positions: torch.Tensor) -> torch.Tensor:
    return positions.double()[..., None] * THETA ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """float64 ``x`` ``[..., N, D]`` turned to ``positions``; pairs are (i, i + DIM / 2), channels past DIM stay."""
    x, angle = x.double(), angles(positions)
    a, b, rest = x[..., : DIM // 2], x[..., DIM // 2 : DIM], x[..., DIM:]
    cos, sin = FACTOR * angle.cos(), FACTOR * angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def as_models_do(q, k, cos, sin):
    def turn(x):
        return x * cos[:, None] + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin[:, None]

    return turn(q), turn(k)


def model_tables(positions):
    angle = angles(positions).repeat(1, 1, 2)
    return (FACTOR * angle.cos()).float(), (FACTOR * angle.sin()).float()


ROTATION = Rotation(model_tables, as_models_do, DIM)


def truth_of(q, k, v, dual: DualChunk, scale: float, sinks=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The literal definition in float64, from unrotated q and k whose last positions are the queries': out and lse."""
    n, period, group = k.shape[2], dual.chunk - dual.local, q.shape[1] // k.shape[1]
    at, key = torch.arange(n)[n - q.shape[2] :], torch.arange(n)
    k, v = (x.double().repeat_interleave(group, 1) for x in (rotated(k, key % period), v))
    logits = torch.full((*q.shape[:3], n), -math.inf, dtype=torch.float64)
    back = at[:, None] // period - key // period
    seen = [(back == 0) & (key <= at[:, None]), back == 1, back >= 2]
    three = (at % period, (at % period + period).clamp(max=dual.chunk), torch.full_like(at, dual.chunk))
    for where, positions in zip(seen, three):
        logits = torch.where(where, rotated(q, positions) @ k.mT * scale, logits)
    if dual.trained:
        f = (0.1 * ((at + 1) / dual.trained).double().log() + 1).clamp(min=1)
        logits = logits * (f * f)[:, None]
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[None, :, None, None].expand(len(q), -1, len(at), 1)], -1)
    return logits.softmax(-1)[..., :n] @ v, logits.logsumexp(-1)


def inputs(batch=1, n=75, kv_heads=2, group=2, dtype=torch.float32, seed=0, extra=8):
    q = randn(batch, kv_heads * group, n, DIM + extra, dtype, "plain", seed)
    k, v = (randn(batch, kv_heads, n, d, dtype, "plain", seed + 1 + i) for i, d in enumerate((DIM + extra, 12)))
    return q, k, v


def at_true_positions(x, shift=0):
    return rotated(x, torch.arange(x.shape[2]) + shift).to(x.dtype)


DUALS = [DualChunk(20, 4), DualChunk(20, 10), DualChunk(20, 1, trained=16), DualChunk(9, 3, trained=30), DualChunk(64, 8)]
SCALE = 0.3


def attended(q, k, v, selector, dual, n_q=None, ctx=None):
    """``dual_chunk_attention`` of unrotated inputs, handed over as a model would; the last ``n_q`` are the queries."""
    n_q = n_q or q.shape[2]
    ctx = ctx or LayerContext(0, SCALE, k.shape[2] - n_q)
    queries = at_true_positions(q)[:, :, q.shape[2] - n_q :]
    return dual_chunk_attention(queries, ResidentKV(at_true_positions(k), v), ctx, selector, dual, ROTATION)


@pytest.mark.parametrize("dual", DUALS, ids=str)
@pytest.mark.parametrize("n_q", [75, 40, 3, 1])
def test_three_rotations_written_out(dual, n_q):
    """Few queries turn to each key chunk, many have the keys turned; both at q_start > 0 and with a sink."""
    q, k, v = inputs()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    truth, lse_truth = truth_of(q[:, :, 75 - n_q :], k, v, dual, SCALE, sinks)
    ctx = LayerContext(0, SCALE, 75 - n_q, sinks=sinks)
    found = attended(q, k, v, Dense(), dual, n_q, ctx)
    assert found.out.transpose(1, 2).is_contiguous() and found.density is None
    assert (found.out - truth).abs().max() < 3e-6 and (found.lse - lse_truth).abs().max() < 1e-5
    plain = attended(q, k, v, Dense(), DualChunk(200, 4), n_q, ctx)
    assert (plain.out - truth).abs().max() > 1e-2, "plain attention must be far off, or this test sees nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_as_good_as_torch_on_narrow_rotations(dtype):
    """Torch itself, given q and k rotated literally and rounded once, is the measure; ours were rounded at their true rotation."""
    q, k, v = inputs(dtype=dtype)
    dual = DUALS[0]
    truth, _ = truth_of(q, k, v, dual, SCALE)
    found = attended(q, k, v, Dense(), dual)
    assert found.out.dtype == dtype
    rounded_once, _ = truth_of(at_true_positions(q).float(), at_true_positions(k).float(), v, DualChunk(10**6, 1), SCALE)
    exact = truth_of(*(x.double() for x in (q, k, v)), DualChunk(10**6, 1), SCALE)[0]
    assert_as_good_as_torch(found.out, rounded_once.to(dtype) - exact + truth, truth, floor=4 * torch.finfo(dtype).eps)


def test_up_to_a_chunk_of_keys_nothing_changes():
    q, k, v = inputs(n=64)
    q, k = at_true_positions(q), at_true_positions(k)
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    want, lse = block_sparse_attention(q, k, v, lists[..., 0] + 1, lists, 64, 64, SCALE)
    found = dual_chunk_attention(q, ResidentKV(k, v), LayerContext(0, SCALE, 0), Dense(), DualChunk(64, 20), ROTATION)
    torch.testing.assert_close(found.out, want, atol=3e-6, rtol=0)
    torch.testing.assert_close(found.lse, lse, atol=1e-5, rtol=0)
    assert not DualChunk(64, 20).changes(64) and DualChunk(64, 20).changes(65) and DualChunk(64, 20, trained=32).changes(33)


@given(first=st.lists(st.integers(0, 30), min_size=2, max_size=3), dual=st.sampled_from(DUALS), n_q=st.sampled_from([75, 20, 1]),
       tail=st.integers(0, 9), critical=st.booleans(), sparse=st.booleans())
def test_a_padded_row_equals_the_row_alone(first, dual, n_q, tail, critical, sparse):
    dual = DualChunk(dual.chunk, dual.local, dual.trained, critical)
    q, k, v = (x.clone() for x in inputs(batch=len(first)))
    selector = XAttention(threshold=0.4, block=8, stride=4) if sparse else Dense()
    q, k, q_start, rest = at_true_positions(q)[:, :, 75 - n_q :], at_true_positions(k), 75 - n_q, []
    last = [75 - (tail if i else 0) for i in range(len(first))]
    ctx = LayerContext(0, SCALE, q_start, first=torch.tensor(first).int(), last=torch.tensor(last).int())
    together = dual_chunk_attention(q, ResidentKV(k, v), ctx, selector, dual, ROTATION)
    for b, (f, e) in enumerate(zip(first, last)):
        rows = slice(max(0, f - q_start), max(0, e - q_start))
        rest.append(torch.cat([together.out[b, :, : rows.start], together.out[b, :, rows.stop :]], 1))
        if rows.start >= rows.stop:
            continue
        alone = dual_chunk_attention(q[b : b + 1, :, rows], ResidentKV(k[b : b + 1, :, f:e], v[b : b + 1, :, f:e]),
                                     LayerContext(0, SCALE, max(0, q_start - f)), selector, dual, ROTATION)
        assert torch.equal(together.out[b, :, rows], alone.out[0]) and torch.equal(together.lse[b, :, rows], alone.lse[0])
    assert all((x == 0).all() for x in rest), "padding rows must be 0"


def test_where_the_model_counts_from_does_not_matter():
    """A bare forward over a left-padded batch numbers the padding too; only differences of angles count."""
    q, k, v = inputs()
    ctx = LayerContext(0, SCALE, 0)
    want, got = (dual_chunk_attention(at_true_positions(q, shift), ResidentKV(at_true_positions(k, shift), v), ctx, Dense(),
                                      DUALS[0], ROTATION).out for shift in (0, 13))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_selector_sees_each_region_by_itself_and_the_density_counts_pairs():
    (q, k, v), seen = inputs(n=96), []

    class Spy(XAttention):
        def select(self, q, kv, ctx):
            seen.append((q, kv.k, ctx.causal, ctx.q_start))
            return super().select(q, kv, ctx)

    dual = DualChunk(28, 4)
    found, dense = (attended(q, k, v, how, dual) for how in (Spy(threshold=1.0, block=8, stride=4), Dense()))
    torch.testing.assert_close(found.out, dense.out, atol=3e-6, rtol=0)
    assert found.density.tolist() == pytest.approx([1.0] * 4)
    shapes = [(a.shape[2], b.shape[2], causal, start) for a, b, causal, start in seen]
    own, other, both = (24, 24, True, 0), (24, 24, False, 0), (24, 48, False, 0)
    assert shapes == [own, own, other, own, other, other, own, other, both]
    # critical: the chunk before is chosen at true distances, those further back from p mod L + chunk
    assert torch.equal(seen[-2][0], at_true_positions(q)[:, :, 72:])
    far = rotated(q[:, :, 72:], torch.arange(24) + 28)
    torch.testing.assert_close(seen[-1][0].double(), far, atol=1e-5, rtol=0)
    near = rotated(k[:, :, :48], torch.arange(48) % 24)
    torch.testing.assert_close(seen[-1][1].double(), near, atol=1e-5, rtol=0)
    less = attended(q, k, v, XAttention(threshold=0.0, sink=0, block=8, stride=4), dual)
    own = sum(24 * 25 // 2 * (3 / 6) for _ in range(4))  # 3 diagonal blocks of 6 in each chunk, nothing elsewhere
    assert less.density.tolist() == pytest.approx([own / (96 * 97 / 2)] * 4)


def test_critical_false_chooses_with_the_distances_that_attention_uses():
    q, k, v = (x for x in inputs(n=96))
    seen = []

    class Spy(XAttention):
        def select(self, q, kv, ctx):
            seen.append(q)
            return super().select(q, kv, ctx)

    attended(q, k, v, Spy(block=8, stride=4), DualChunk(28, 4, critical=False))
    for got, positions in ((seen[-1], torch.full((24,), 28)), (seen[-2], 48 + (torch.arange(24) + 24).clamp(max=28))):
        torch.testing.assert_close(got.double(), rotated(q[:, :, 72:], positions), atol=1e-5, rtol=0)


# -- models ---------------------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")

import sparse_attn  # noqa: E402
from test_transformers import TINY, assert_same, logits, padded, sharpened, tokens, traces  # noqa: E402

DUAL = DualChunk(24, 5, trained=20)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
TYPES = ["sliding_attention", "full_attention"]
TYPED = dict(zip(TYPES, ({"rope_type": "default", "rope_theta": 100.0}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2})))
# class prefix -> what differs from TINY, and the layers that dual chunk attention changes
SERVED = {
    "Llama": ({}, {0, 1}),
    "Qwen2": (dict(rope_parameters=YARN), {0, 1}),
    "Phi3": (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}), {0, 1}),
    "StableLm": (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}), {0, 1}),
    "Glm4": ({}, {0, 1}),
    "GptOss": (dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=12, layer_types=TYPES[::-1]), {0}),
    "SmolLM3": (dict(no_rope_layers=[1, 0], use_sliding_window=False), {0}),
    "Gemma3": (dict(sliding_window=12, layer_types=TYPES, rope_parameters=TYPED), {1}),
    "GPTNeoX": ({}, {0, 1}),
}


def tiny(family: str, **changes):
    torch.manual_seed(0)
    own = {**TINY, **SERVED.get(family, ({}, ()))[0], **changes}
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(**own)
    return sharpened(getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager"))


@pytest.fixture(scope="module", params=list(SERVED))
def served(request):
    return request.param, tiny(request.param)


@torch.no_grad()
def test_a_model_with_dual_chunks_equals_its_attention_written_out(served, monkeypatch):
    """Replaces the chunked computation by one over every pair of chunks, with the model's own function on unrotated vectors."""
    family, model = served
    module = next(m for m in model.modules() if "Attention" in type(m).__name__ and m.layer_idx == min(SERVED[family][1]))
    caught = {}
    original = sparse_attn.hf.dual_chunk_attention

    def catch(q, kv, ctx, selector, dual, rotation):
        found = original(q, kv, ctx, selector, dual, rotation)
        caught.setdefault(ctx.layer, (q, kv.k, kv.v, ctx, rotation, found))
        return found

    monkeypatch.setattr(sparse_attn.hf, "dual_chunk_attention", catch)
    with sparse_attn.patch(model, prefill="dense", dual_chunk=DUAL) as patched:
        model(tokens(1))
        rows = patched.report().layers
    assert set(caught) == SERVED[family][1], "which layers are served"
    assert all(("dual_chunk" in row.backend) == (row.layer in caught) for row in rows)
    q, k, v, ctx, rotation, found = caught[module.layer_idx]
    q, k = q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    n, period, out = q.shape[2], DUAL.period, torch.zeros_like(found.out)
    at = torch.arange(n)

    def to(x, positions):  # by undoing the model's rotation with its own tables and function, then applying it again
        cos, sin = rotation.tables(at[None])
        width = rotation.width or x.shape[-1]
        norm = (cos * cos + sin * sin).flatten()[0]
        plain = rotation.apply(x[..., :width], x[..., :width], cos / norm, -sin / norm)[0]
        there = rotation.apply(plain, plain, *rotation.tables(positions[None]))[0]
        return torch.cat([there, x[..., width:]], -1)

    keys, logit = to(k, at % period), torch.full((n, n), -math.inf).expand(*q.shape[:2], n, n).clone()
    back = at[:, None] // period - at // period
    three = (at % period, (at % period + period).clamp(max=DUAL.chunk), torch.full_like(at, DUAL.chunk))
    for positions, where in zip(three, ((back == 0) & (at <= at[:, None]), back == 1, back > 1)):
        logit = torch.where(where, to(q, positions) @ keys.mT, logit)
    f = DUAL.factor(at + 1).float()
    logit = logit * ctx.scale * (f * f)[:, None]
    if ctx.sinks is not None:
        logit = torch.cat([logit, ctx.sinks[None, :, None, None].expand(1, -1, n, 1)], -1)
    out = logit.softmax(-1)[..., :n] @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    assert (found.out - out).abs().max() < 1e-5 * max(1, out.abs().max())


@torch.no_grad()
def test_however_the_text_is_cut_or_padded_the_logits_are_the_same(served):
    family, model = served
    with sparse_attn.patch(model, prefill="dense", dual_chunk=DUAL):
        want = logits(model, "unpadded")
        assert_same(logits(model, "chunked"), want)
        assert_same(logits(model, "static"), want)
        ids, mask = tokens(), padded("left")
        alone = torch.cat([model(ids[row : row + 1, pad:]).logits[0] for row, pad in enumerate((0, 19, 33))])
        for scenario in ("left", "chunked_left", "static_left"):
            assert_same(logits(model, scenario), alone)
        steps = model.generate(ids[:, :40], attention_mask=mask[:, :40], max_new_tokens=8, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)
        longer = torch.cat([mask[:, :40], torch.ones(3, 8, dtype=torch.long)], 1)
        again = model(steps.sequences, attention_mask=longer, position_ids=(longer.cumsum(1) - 1).clamp(min=0)).logits
        assert_same(torch.stack(steps.logits, 1), again[:, 39:-1])
    assert not torch.allclose(logits(model, "unpadded"), want, atol=1e-2), "dual chunks must matter, or this test sees nothing"


@torch.no_grad()
def test_short_texts_run_as_always_and_undo_leaves_no_trace():
    model = tiny("Llama")
    before, ids = traces(model), tokens(2)
    want, short = model(ids).logits, model(ids[:, :24]).logits
    with sparse_attn.patch(model, prefill="dense", dual_chunk=dict(chunk=24, local=5)) as patched:
        assert_same(model(ids[:, :24]).logits, short)
        assert not torch.allclose(model(ids).logits, want, atol=1e-2)
        assert patched.report().layers[0].reasons == {"prefill is dense": 2}
    assert torch.equal(model(ids).logits, want) and traces(model) == before


@torch.no_grad()
def test_a_sparse_method_runs_within_dual_chunks():
    model, ids = tiny("Llama"), tokens(2)
    options = dict(dual_chunk=DualChunk(40, 8), dense_below=0, min_queries=8)
    with sparse_attn.patch(model, "dense", **options):
        want = model(ids).logits
    with sparse_attn.patch(model, XAttention(threshold=1.0, block=16, stride=4), **options) as patched:
        assert_same(model(ids).logits, want)
        assert patched.report().layers[1].sparse_calls == 1 and patched.report().density == pytest.approx(1.0)
    with sparse_attn.patch(model, XAttention(threshold=0.2, block=8, stride=4), **options) as patched:
        assert not torch.allclose(model(ids).logits, want, atol=1e-2)
        assert patched.report().density < 0.9


@torch.no_grad()
def test_a_method_that_needs_causality_reads_earlier_chunks_whole():
    model, ids = tiny("Llama"), tokens(2)
    sparse_attn.errors.warn_once.cache_clear()
    options = dict(dual_chunk=DualChunk(40, 8), dense_below=0, min_queries=8)
    with sparse_attn.patch(model, {"name": "a_shape", "sink_tokens": 0, "recent_tokens": 8, "block": 8}, **options) as patched:
        with pytest.warns(UserWarning, match="AShape needs causal attention; the call runs dense"):
            model(ids)
        pairs, own = 81 * 82 / 2, 2 * 32 * 33 / 2 + 17 * 18 / 2
        assert (pairs - own) / pairs < patched.report().density < 1


REFUSED = [
    ("DeepseekV3", dict(q_lora_rank=24, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=8, v_head_dim=24, num_key_value_heads=4,
                        n_routed_experts=4, n_group=2, topk_group=1), "latent attention"),
    ("Llama", dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic' changes its frequencies"),
    ("Mistral", dict(sliding_window=24), "no layer of it has both rotary positions and full attention"),
    ("Cohere2", dict(sliding_window=24, layer_types=TYPES), "no layer of it has both"),
    ("GPT2", dict(n_embd=64, n_layer=1, n_head=4), "it has no rotary_emb"),
    ("Qwen2VL", None, r"several axes \(M-RoPE\)"),
]


@pytest.mark.parametrize(("family", "changes", "sentence"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_model_that_cannot_be_served_is_refused_and_untouched(family, changes, sentence):
    if family == "GPT2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=8, **changes))
    elif family == "Qwen2VL":
        from transformers.models.qwen2_vl import Qwen2VLTextConfig, Qwen2VLTextModel

        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        model = Qwen2VLTextModel(Qwen2VLTextConfig(**TINY, rope_parameters=rope))
    else:
        model = tiny(family, **changes)
    before = traces(model)
    with pytest.raises(ContractError, match=f"dual_chunk cannot serve .*{sentence}"):
        sparse_attn.patch(model, dual_chunk=DUAL)
    assert traces(model) == before


@torch.no_grad()
def test_a_call_that_cannot_be_chunked_raises_instead_of_leaving_the_trained_range():
    model, ids = tiny("Llama"), tokens(2)
    holes = torch.ones_like(ids)
    holes[0, 10:14] = 0
    with sparse_attn.patch(model, dual_chunk=DUAL), pytest.raises(ContractError, match="a call over 81 keys: a row's real tokens"):
        model(ids, attention_mask=holes)
    with sparse_attn.patch(model, dual_chunk=DUAL), torch.enable_grad(), pytest.raises(ContractError, match="requires grad"):
        model(ids)


@pytest.mark.parametrize(("bad", "sentence"), [
    (dict(chunk=0, local=1), "chunk=0 must be a number of tokens, 1 or more"),
    (dict(chunk=64.0, local=1), "chunk=64.0 must be"),
    (dict(chunk=64, local=0), "local=0 must be a number of tokens, 1 or more"),
    (dict(chunk=64, local=33), "local=33 is more than half of chunk=64"),
    (dict(chunk=64, local=8, trained=-1), "trained=-1 must be"),
    (dict(chunk=64, local=8, critical=1), "critical=1 must be true or false"),
    (dict(chunk=64), "dual_chunk takes chunk, local, trained, critical, of which chunk and local must be given; got chunk"),
    (dict(chunk=64, local=8, chunks=1), "dual_chunk takes chunk"),
    (64, "dual_chunk is a DualChunk, its dict or None, got 64"),
])  # fmt: skip
def test_bad_settings_are_one_sentence(bad, sentence):
    with pytest.raises(ContractError, match=sentence):
        SparseAttnConfig(dual_chunk=bad)


def test_the_json_form_round_trips():
    config = SparseAttnConfig("xattention", dual_chunk=DualChunk(2048, 256, trained=1024, critical=False))
    assert SparseAttnConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert SparseAttnConfig.from_json({"dual_chunk": {"chunk": 2048, "local": 256}}).dual_chunk == DualChunk(2048, 256)
