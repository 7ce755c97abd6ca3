"""A patched model is the same model when nothing is dropped; when something is, the report says so, and undo leaves no trace."""

import copy
import json
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache  # noqa: E402

import sparse_attn  # noqa: E402
from sparse_attn import ContractError, Dense, SparseAttnConfig, XAttention  # noqa: E402
from sparse_attn import hf as sparse_hf  # noqa: E402

EXACT = dict(prefill=XAttention(threshold=1.0, block=16, stride=4), dense_below=0, min_queries=8)
TOKENS, VOCAB, WINDOW = 80, 128, 24
TINY = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
HYBRID = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
MLA = dict(q_lora_rank=24, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=8, v_head_dim=24, n_routed_experts=4, n_group=2,
           topk_group=1, first_k_dense_replace=1, num_key_value_heads=4, n_shared_experts=1)

# class prefix -> what differs from TINY
FAMILIES = {
    "Llama": {},
    "Qwen3": {},
    "Phi3": {},
    "Glm4": {},
    "Gemma2": dict(HYBRID, attn_logit_softcapping=20.0, query_pre_attn_scalar=16),
    "Gemma3": HYBRID,
    "GptOss": HYBRID | MOE,
    "DeepseekV3": MLA | MOE,
    "Mistral": dict(sliding_window=WINDOW),
    "Cohere2": HYBRID,
    "SmolLM3": dict(no_rope_layers=[1, 0], use_sliding_window=False),
    "Llama4": dict(MOE, attention_chunk_size=32, intermediate_size_mlp=96, no_rope_layers=[1, 0]),
    "Olmo2": {},
    "GPTNeoX": {},
    "Starcoder2": dict(sliding_window=None),
    "Qwen3Moe": MOE,
    "Qwen2Moe": dict(MOE | HYBRID, use_sliding_window=True, max_window_layers=0, shared_expert_intermediate_size=32),
}
CAUSAL_LM = {"Gemma3": "Gemma3ForCausalLM", "Llama4": "Llama4ForCausalLM"}
CONFIG = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}


def tiny(family: str, **changes):
    """A small random causal language model of a family, in float32, whose attention is peaked enough to matter."""
    torch.manual_seed(0)
    config = getattr(transformers, CONFIG.get(family, f"{family}Config"))(**{**TINY, **FAMILIES[family], **changes})
    model = getattr(transformers, CAUSAL_LM.get(family, f"{family}ForCausalLM"))._from_config(config, attn_implementation="eager")
    return sharpened(model)


def sharpened(model):
    """Larger weights, so that a wrong key changes the logits by much more than rounding does."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 2.0 * p.shape[-1] ** -0.5)
            elif "sink" in name:
                p.normal_()
    return model.eval()


def tokens(batch: int = 3, n: int = TOKENS + 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, n), generator=torch.Generator().manual_seed(7))


def padded(side: str, n: int = TOKENS + 1) -> torch.Tensor:
    """Attention mask of rows with 0, 19 and 33 padding tokens."""
    mask = torch.ones(3, n, dtype=torch.long)
    for row, pad in enumerate((0, 19, 33)):
        if side == "left":
            mask[row, :pad] = 0
        else:
            mask[row, TOKENS - pad : TOKENS] = 0
    return mask


# name -> (padding side or None, where the prompt is cut into forwards, cache)
SCENARIOS = {
    "unpadded": (None, (0, TOKENS, TOKENS + 1), "dynamic"),
    "left": ("left", (0, TOKENS, TOKENS + 1), "dynamic"),
    "right": ("right", (0, TOKENS, TOKENS + 1), "dynamic"),
    "no_cache": ("left", (0, TOKENS), None),
    "chunked": (None, (0, 32, 64, TOKENS, TOKENS + 1), "dynamic"),
    "chunked_left": ("left", (0, 32, 64, TOKENS, TOKENS + 1), "dynamic"),
    "static": (None, (0, TOKENS, TOKENS + 1), "static"),
    "static_left": ("left", (0, 48, TOKENS, TOKENS + 1), "static"),
    "static_right": ("right", (0, 48, TOKENS, TOKENS + 1), "static"),
}


@torch.no_grad()
def logits(model, scenario: str) -> torch.Tensor:
    """Logits of every real token of a scenario."""
    side, cuts, kind = SCENARIOS[scenario]
    ids, mask = tokens(), padded(side) if side else None
    cache = None
    if kind == "dynamic":
        cache = DynamicCache(config=model.config)
    elif kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=TOKENS + 16)
    parts = []
    for start, stop in zip(cuts, cuts[1:]):
        seen = None if mask is None else mask[:, :stop]
        out = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=cache is not None)
        parts.append(out.logits)
    found = torch.cat(parts, 1)
    return found[(mask if mask is not None else torch.ones_like(ids))[:, : cuts[-1]].bool()]


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal up to the rounding of float32; a wrong mask moves these models by 0.1 and more."""
    assert got.shape == want.shape
    worst = float((got - want).abs().max())
    assert worst <= 1e-5 * max(1.0, float(want.abs().max())), f"max error {worst:.2e} on logits up to {float(want.abs().max()):.2g}"


@pytest.fixture(autouse=True)
def every_warning_again():
    sparse_hf.warn_once.cache_clear()


@pytest.fixture(scope="module")
def models():
    """Models are built once per family and shared: no test may leave a trace on one."""
    built = {}

    def model(family: str):
        if family not in built:
            built[family] = tiny(family)
        return built[family]

    return model


# -- nothing dropped ------------------------------------------------------------------------------------------------------


EVERY_FAMILY = ("unpadded", "left", "right", "chunked_left", "static_left")
ROWS = [(f, s) for f in FAMILIES for s in (SCENARIOS if f in ("Llama", "Gemma2") else EVERY_FAMILY)]


@pytest.mark.filterwarnings("ignore:Llama4TextAttention runs dense")
@pytest.mark.parametrize("family, scenario", ROWS)
def test_dense_threshold_equals_eager(models, family, scenario):
    model = models(family)
    want = logits(model, scenario)
    with sparse_attn.patch(model, **EXACT) as patched:
        got = logits(model, scenario)
        report = patched.report()
    assert any(row.sparse_calls for row in report.layers), f"nothing ran sparse:\n{report}"
    assert_same(got, want)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GptOss"])
@pytest.mark.parametrize("scenario", ["left", "chunked_left", "static_right"])
def test_dense_layers_equal_eager_without_a_mask_of_their_own(models, monkeypatch, family, scenario):
    """Where SDPA would need a large mask, or has no word for softcap and sinks, our op walks the full list."""
    model = models(family)
    monkeypatch.setattr(sparse_hf, "_MASK_ENTRIES", 0)
    want = logits(model, scenario)
    with sparse_attn.patch(model, **EXACT | dict(dense_layers=(0, 1))) as patched:
        assert_same(logits(model, scenario), want)
        rows = patched.report().layers
    assert all(row.density == 1.0 and not row.sparse_calls for row in rows)
    assert not any("sdpa" in row.backend for row in rows)


def test_the_window_reaches_families_that_do_not_pass_it_on(models):
    """Qwen2-MoE masks a window but never tells its attention function; only the mask knows."""
    model = models("Qwen2Moe")
    seen = []
    original = sparse_hf.sparse_attention
    sparse_hf.sparse_attention = lambda q, kv, ctx, selector: seen.append(ctx.window) or original(q, kv, ctx, selector)
    try:
        with sparse_attn.patch(model, **EXACT):
            logits(model, "unpadded")
    finally:
        sparse_hf.sparse_attention = original
    assert set(seen) == {0, WINDOW}


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "sampling", "chunked", "static", "lookup"])
def test_generate_gives_the_same_tokens(models, family, mode):
    model = models(family)
    ids, mask = tokens()[:, :TOKENS], padded("left")[:, :TOKENS]
    options = {
        "greedy": {}, "beams": dict(num_beams=3, num_return_sequences=2), "sampling": dict(do_sample=True, temperature=0.7),
        "chunked": dict(prefill_chunk_size=32), "static": dict(cache_implementation="static", disable_compile=True),
        "lookup": dict(prompt_lookup_num_tokens=4),
    }[mode]  # fmt: skip
    if mode == "lookup":
        ids = ids[:1, :20].repeat(1, 4)
        mask = torch.ones_like(ids)

    def run():
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, max_new_tokens=6, **{"do_sample": False, **options})

    want = run()
    with sparse_attn.patch(model, **EXACT) as patched:
        got = run()
        rows = patched.report().layers
    assert torch.equal(got, want)
    assert all(row.sparse_calls for row in rows) and all(row.sparse_calls + row.dense_calls + row.decode_calls >= 6 for row in rows
                                                         if mode not in ("lookup", "chunked"))


@torch.no_grad()
@pytest.mark.parametrize("family, changes", [("Llama", {}), ("Gemma2", dict(layer_types=["full_attention"]))])
def test_compiled_graphs_are_whole_and_exact(family, changes):
    model = tiny(family, num_hidden_layers=1, **changes)
    ids, mask = tokens()[:, :TOKENS], padded("left")[:, :TOKENS]
    want, want_padded = model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]
    with sparse_attn.patch(model, **EXACT):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_same(compiled(ids).logits, want)
        cache = StaticCache(config=model.config, max_cache_len=TOKENS + 16)
        assert_same(compiled(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()], want_padded)
    torch._dynamo.reset()


# -- something dropped ----------------------------------------------------------------------------------------------------

SPARSE = dict(prefill=XAttention(threshold=0.3, block=16, stride=4), dense_below=0, min_queries=8)


@torch.no_grad()
def test_a_padded_row_equals_the_row_alone_when_blocks_are_dropped(models):
    model = models("Llama")
    ids, mask = tokens()[:, :TOKENS], padded("left")[:, :TOKENS]
    with sparse_attn.patch(model, **SPARSE) as patched:
        together = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        for row, pad in enumerate((0, 19, 33)):
            assert_same(together[row, pad:], model(ids[row : row + 1, pad:]).logits[0])
        assert patched.report().density < 0.9


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_part_in_the_density(models, side):
    model = models("Llama")
    ids, mask = tokens()[2:, :TOKENS], padded(side)[2:, :TOKENS]
    with sparse_attn.patch(model, **SPARSE) as patched:
        found = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[mask.bool()]
        with_padding = patched.report().layers
        patched.report().reset()
        assert_same(found, model(ids[mask.bool()][None]).logits[0])
        for got, alone in zip(with_padding, patched.report().layers, strict=True):
            assert got.head_density == pytest.approx(alone.head_density)


@torch.no_grad()
def test_a_lower_threshold_reads_less_and_changes_more(models):
    model = models("Llama")
    ids, density, changed = tokens(1)[:, :TOKENS], [], []
    dense = model(ids).logits
    for threshold in (1.0, 0.6, 0.0):
        selector = XAttention(threshold=threshold, block=16, stride=4, sink=0)
        with sparse_attn.patch(model, prefill=selector, dense_below=0, min_queries=8) as patched:
            changed.append(float((model(ids).logits - dense).abs().max()))
            density.append(patched.report().density)
    assert density[0] == 1.0 and density[0] > density[1] > density[2]
    assert abs(density[2] - 5 / 15) < 1e-9, "threshold 0 without sinks reads each query block's own diagonal only"
    assert changed[0] < 1e-4 < changed[1] < changed[2]


@torch.no_grad()
def test_report_counts_calls_density_and_reasons(models):
    model = models("Llama")
    ids = tokens(2)[:, :TOKENS]
    with sparse_attn.patch(model, prefill=SPARSE["prefill"], dense_layers=(0,), dense_below=40, min_queries=8) as patched:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        model(ids[:, :39])
        first, second = patched.report().layers
        assert (first.sparse_calls, first.dense_calls, first.decode_calls) == (0, 2, 2)
        assert (second.sparse_calls, second.dense_calls, second.decode_calls) == (1, 1, 2)
        assert first.density == 1.0 and first.head_density == (1.0,) * 4
        assert first.backend == "sdpa" and second.backend not in ("", "sdpa")
        assert first.reasons == {"layer is in dense_layers": 2, "decoding": 2}
        assert second.reasons == {"fewer than 40 keys": 1, "decoding": 2}
        assert len(second.head_density) == 4 and second.density < 1.0
        long, short = TOKENS * (TOKENS + 1) / 2, 39 * 40 / 2
        patched.report().reset()
        model(ids)
        alone = patched.report().layers[1].density
        assert second.density == pytest.approx((alone * long + short) / (long + short), abs=1e-6)
        table = str(patched.report())
        assert "layer is in dense_layers (1)" in table and f"{alone:.3f}" in table
        patched.report().reset()
        assert patched.report().density == 1.0 and not any(r.sparse_calls for r in patched.report().layers)


# -- leaving no trace -----------------------------------------------------------------------------------------------------


def traces(model) -> list:
    """Everything that patching could leave behind."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [[sorted(m.__dict__) for m in model.modules()], hooks, model.config._attn_implementation, model.config.to_json_string()]


@torch.no_grad()
def test_undo_restores_the_model_bit_for_bit(models):
    model = models("Gemma2")
    before, want = traces(model), logits(model, "left")
    handle = sparse_attn.patch(model, **SPARSE)
    assert not torch.equal(logits(model, "left"), want)
    handle.undo()
    handle.undo()
    assert torch.equal(logits(model, "left"), want) and traces(model) == before
    with pytest.raises(RuntimeError, match="stop here"), sparse_attn.patch(model, **SPARSE):
        raise RuntimeError("stop here")
    assert torch.equal(logits(model, "left"), want) and traces(model) == before


@torch.no_grad()
def test_a_second_patch_is_refused_and_changes_nothing(models):
    model = models("Llama")
    with sparse_attn.patch(model, **SPARSE) as patched:
        inside = logits(model, "left")
        with pytest.raises(ContractError, match="patched already; call undo"):
            sparse_attn.patch(model)
        assert torch.equal(logits(model, "left"), inside)
        assert patched.report().density < 1.0
    assert "sparse_attn" not in model.config.to_json_string()


@torch.no_grad()
def test_names_work_without_patch(models):
    """By name the defaults hold: short prompts run dense."""
    model = models("Llama")
    want = logits(model, "left")
    model.set_attn_implementation("xattention")
    try:
        assert_same(logits(model, "left"), want)
    finally:
        model.set_attn_implementation("eager")
    assert torch.equal(logits(model, "left"), want)


def test_importing_sparse_attn_does_not_import_transformers_but_registers_with_it(tmp_path):
    script = """
        import sys, sparse_attn
        assert "transformers" not in sys.modules and "triton" not in sys.modules
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        LlamaForCausalLM(config).save_pretrained(sys.argv[1])
        model = LlamaForCausalLM.from_pretrained(sys.argv[1], attn_implementation="xattention")
        assert model.config._attn_implementation == "xattention"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True, capture_output=True, timeout=120)


# -- what cannot be expressed ---------------------------------------------------------------------------------------------


def test_inputs_that_require_grad_run_dense_with_one_warning(models):
    model = models("Llama")
    ids = tokens(1)[:, :TOKENS]
    want = model(ids).logits
    with sparse_attn.patch(model, **SPARSE) as patched, pytest.warns(UserWarning, match="requires grad; run under") as caught:
        got = model(ids).logits
        got.sum().backward()
        assert not any(row.sparse_calls for row in patched.report().layers)
    model.zero_grad(set_to_none=True)
    assert len([w for w in caught if "requires grad" in str(w.message)]) == 1
    assert_same(got.detach(), want.detach())


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GptOss"])
def test_a_mask_with_holes_and_a_4d_mask_run_dense_and_exact(models, family):
    model = models(family)
    ids = tokens(2)[:, :TOKENS]
    holes = torch.ones_like(ids)
    holes[0, 20:30] = 0
    full = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    full = torch.where(full, 0.0, torch.finfo(torch.float32).min)
    want = model(ids, attention_mask=holes).logits[holes.bool()], model(ids, attention_mask=full).logits
    with sparse_attn.patch(model, **SPARSE) as patched:
        with pytest.warns(UserWarning, match="not one run; pad on one side"):
            assert_same(model(ids, attention_mask=holes).logits[holes.bool()], want[0])
        if family == "Llama":
            with pytest.warns(UserWarning, match="not plain causal"):
                assert_same(model(ids, attention_mask=full).logits, want[1])
        assert not any(row.sparse_calls for row in patched.report().layers)


@torch.no_grad()
def test_packed_sequences_stay_apart(models):
    model = models("Llama")
    ids = tokens(1)[:, :TOKENS]
    positions = torch.cat([torch.arange(50), torch.arange(TOKENS - 50)])[None]
    want = model(ids, position_ids=positions, use_cache=False).logits
    with sparse_attn.patch(model, **SPARSE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(model(ids, position_ids=positions, use_cache=False).logits, want)


def encoder_decoder(name: str):
    tiny_sizes = dict(vocab_size=VOCAB, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, dropout=0.0,
                      decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, pad_token_id=0,
                      bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    torch.manual_seed(0)
    if name == "Bart":
        config, cls = transformers.BartConfig(**tiny_sizes), transformers.BartForConditionalGeneration
    elif name == "Whisper":
        config = transformers.WhisperConfig(**tiny_sizes, num_mel_bins=8, max_source_positions=40, max_target_positions=128)
        cls = transformers.WhisperForConditionalGeneration
    else:
        config = transformers.T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, num_heads=4, d_ff=64, num_layers=1, pad_token_id=0,
                                       num_decoder_layers=2, decoder_start_token_id=0, dropout_rate=0.0)
        cls = transformers.T5ForConditionalGeneration
    return cls._from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["Bart", "Whisper", "T5"])
def test_only_the_self_attention_of_a_decoder_runs_sparse(name):
    model = encoder_decoder(name)
    target, source = tokens(2)[:, :48], tokens(2)[:, :TOKENS]
    mask = padded("right")[1:, :TOKENS]
    inputs = dict(input_features=torch.randn(2, 8, 80)) if name == "Whisper" else dict(input_ids=source, attention_mask=mask)
    target_mask = (torch.arange(48) >= torch.tensor([[0], [10]])).long()
    want = model(**inputs, decoder_input_ids=target, decoder_attention_mask=target_mask).logits
    with sparse_attn.patch(model, **EXACT) as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model(**inputs, decoder_input_ids=target, decoder_attention_mask=target_mask).logits
        rows = patched.report().layers
    assert_same(got[target_mask.bool()], want[target_mask.bool()])
    sparse = [row.name for row in rows if row.sparse_calls]
    assert len(sparse) == (0 if name == "T5" else 2) and all("decoder" in n and "encoder_attn" not in n for n in sparse)
    assert name != "T5" or any("position bias" in reason for row in rows for reason in row.reasons)


@torch.no_grad()
def test_only_the_text_tower_of_a_vision_model_is_patched():
    vision = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                           image_size=16, patch_size=4, projection_dim=32)
    text = transformers.LlamaConfig(**TINY)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, vision_feature_layer=-1)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ids = tokens(2)[:, :TOKENS].masked_fill(tokens(2)[:, :TOKENS] == 5, 6)
    ids[:, 10:26] = 5
    mask = (torch.arange(TOKENS) >= torch.tensor([[0], [9]])).long()
    inputs = dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 16, 16))
    want = model(**inputs).logits[mask.bool()]
    with sparse_attn.patch(model, **EXACT) as patched:
        assert_same(model(**inputs).logits[mask.bool()], want)
        rows = patched.report().layers
        assert model.model.vision_tower.config._attn_implementation == "eager"
    assert len(rows) == 2 and all(row.sparse_calls == 1 and "vision" not in row.name for row in rows)
    assert model.config.text_config._attn_implementation == "eager"


def with_indexer(name: str):
    torch.manual_seed(0)
    if name == "DeepseekV32":
        config = transformers.DeepseekV32Config(**{**TINY, **MLA, **MOE}, index_n_heads=2, index_head_dim=32, index_topk=16)
        return sharpened(transformers.DeepseekV32ForCausalLM._from_config(config, attn_implementation="sdpa"))
    from transformers.models.minimax_m3_vl import MiniMaxM3VLTextConfig, MiniMaxM3VLTextModel

    config = MiniMaxM3VLTextConfig(**TINY, **MOE, index_n_heads=2, index_head_dim=16, index_block_size=8, index_topk_blocks=3,
                                   shared_intermediate_size=32, dense_intermediate_size=64, rotary_dim=16,
                                   mlp_layer_types=["dense", "dense"], layer_types=["minimax_m3_sparse"] * 2)
    return sharpened(MiniMaxM3VLTextModel._from_config(config, attn_implementation="sdpa"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["DeepseekV32"])
def test_a_model_with_its_own_key_indexer_keeps_its_choice(name):
    model = with_indexer(name)
    ids = tokens(1)[:, :TOKENS]
    want = model(ids)[0]
    with sparse_attn.patch(model, **SPARSE) as patched, pytest.warns(UserWarning, match="the model chooses its own keys"):
        assert_same(model(ids)[0], want)
        assert not any(row.sparse_calls for row in patched.report().layers)


def test_a_model_that_computes_attention_itself_is_refused():
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config)
    with pytest.raises(ContractError, match="BloomForCausalLM computes attention itself and cannot be driven"):
        sparse_attn.patch(model)
    by_name = transformers.BloomForCausalLM._from_config(copy.deepcopy(config), attn_implementation="xattention")
    with pytest.raises(ContractError, match="cannot be driven; load it without attn_implementation"):
        by_name(tokens(1))


# -- bad input and the JSON form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad, sentence", [
    (dict(prefill="xatention"), "'xatention': no such method; there are dense, "),
    (dict(prefill={"name": "xattention", "stired": 8}), "xattention has no argument 'stired'; it has threshold, stride"),
    (dict(prefill={"name": "dense", "threshold": 1}), "dense has no argument 'threshold'; it takes none"),
    (dict(prefill={"threshold": 0.9}), "the method has no 'name'"),
    (dict(prefill={"name": "xattention", "threshold": 1.5}), r"threshold=1.5 is outside \[0, 1\]"),
    (dict(prefill={"name": "xattention", "threshold": "high"}), "xattention cannot take"),
    (dict(prefill=XAttention), "a method is a name, a dict with 'name', or a selector object"),
    (dict(dense_layers=(7,)), "dense_layers names layer 7 but the model has 2"),
    (dict(dense_layers=(-1,)), "layers are counted from 0"),
    (dict(dense_layers=1), "must list layer indices"),
    (dict(dense_below=-1), "dense_below=-1 must be a number of tokens"),
    (dict(min_queries=0.5), "min_queries=0.5 must be a number of tokens"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_touches_nothing(models, bad, sentence):
    model = models("Llama")
    before = traces(model)
    with pytest.raises(ContractError, match=sentence):
        sparse_attn.patch(model, **bad)
    assert traces(model) == before


def test_something_else_than_a_model_is_refused():
    with pytest.raises(ContractError, match="patch needs a transformers model, got Linear"):
        sparse_attn.patch(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("config", [
    SparseAttnConfig(),
    SparseAttnConfig("xattention", dense_layers=[0, 1], dense_below=0),
    SparseAttnConfig(XAttention(threshold=((0.1, 0.9), (1, 0.3)), stride=16), min_queries=2),
])  # fmt: skip
def test_the_json_form_round_trips(config):
    assert SparseAttnConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_json_shorthands_and_mistakes():
    assert SparseAttnConfig.from_json("xattention").prefill == XAttention()
    assert SparseAttnConfig.from_json({"prefill": "dense"}) == SparseAttnConfig(Dense())
    assert SparseAttnConfig.from_json({"prefill": {"name": "xattention", "stride": 4}}).prefill == XAttention(stride=4)
    with pytest.raises(ContractError, match="the config has no entry 'prefil'; it has prefill, dense_layers"):
        SparseAttnConfig.from_json({"prefil": "dense"})
    with pytest.raises(ContractError, match="a config is a method name or a dict, got list"):
        SparseAttnConfig.from_json([])


# -- tensor parallel ------------------------------------------------------------------------------------------------------

SHARDED = """
    import os, sys, torch, sparse_attn
    from transformers import AutoModelForCausalLM
    ids, mask = torch.load(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
    with torch.no_grad(), sparse_attn.patch(model, prefill={"name": "xattention", "threshold": 1.0, "block": 16, "stride": 4},
                                            dense_below=0) as patched:
        found = model(ids, attention_mask=mask).logits
        rows = patched.report().layers
    assert all(row.sparse_calls == 1 and len(row.head_density) == 2 for row in rows), patched.report()
    if int(os.environ["RANK"]) == 0:
        torch.save(found, sys.argv[3])
"""


def test_two_tensor_parallel_processes_equal_one(models, tmp_path):
    pytest.importorskip("accelerate", reason="tp_plan needs accelerate; pip install accelerate")
    model = models("Llama")
    ids, mask = tokens()[:, :TOKENS], padded("left")[:, :TOKENS]
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path / "model")
    torch.save((ids, mask), tmp_path / "inputs.pt")
    (tmp_path / "sharded.py").write_text(textwrap.dedent(SHARDED))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--nnodes", "1",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", tmp_path / "sharded.py", tmp_path / "model",
               tmp_path / "inputs.pt", tmp_path / "found.pt"]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(torch.load(tmp_path / "found.pt")[mask.bool()], want[mask.bool()])
