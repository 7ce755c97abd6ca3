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
    "SmolLM3": dict(num_hidden_layers=4, use_sliding_window=False),
    "Llama4": dict(MOE, num_hidden_layers=4, attention_chunk_size=32, intermediate_size_mlp=96, no_rope_layers=[1, 1, 1, 0]),
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
    sparse_hf._warn_once.cache_clear()


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


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_threshold_equals_eager(models, family, scenario):
    model = models(family)
    want = logits(model, scenario)
    with sparse_attn.patch(model, **EXACT) as patched:
        got = logits(model, scenario)
        report = patched.report()
    assert any(row.sparse_calls for row in report.layers), f"nothing ran sparse:\n{report}"
    assert_same(got, want)
