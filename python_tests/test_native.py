"""What only compiled kernels can get wrong: tails, anchors, overflow, bad lists, threads, forks, and the build itself."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import running_on

from sparse_attn.errors import ContractError
from sparse_attn.ops import OPS, antidiagonal_score, block_sparse_attention, native, use_backend

ROOT = Path(__file__).parent.parent
NATIVE = [f"cpu_{isa}" for isa in native.ISAS + native.TEST_ISAS]
each_backend = pytest.mark.parametrize("backend", NATIVE)
FLOAT32_BACKENDS = [name for name in NATIVE if "amx" not in name]


def lists(heads: int, qb: int, kb: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    keep = torch.rand(1, heads, qb, kb) < density
    keep |= torch.eye(qb, kb, dtype=torch.bool)
    indices = torch.where(keep, torch.arange(kb), kb).sort(-1).values
    return keep.sum(-1, dtype=torch.int32), indices.masked_fill(indices == kb, -1).int()


def run(backend: str, *args, **kwargs):
    refusal = block_sparse_attention.explain(*args, **kwargs).get(backend, "the library was not built")
    if refusal is not None:
        pytest.skip(f"{backend}: {refusal}")
    with use_backend(backend):
        return block_sparse_attention(*args, **kwargs)


def oracle(q, k, v, *rest, **kwargs):
    with use_backend("reference"):
        return block_sparse_attention(q.double(), k.double(), v.double(), *rest, **kwargs)


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())


# heads, kv heads, queries, keys, D, Dv, block_q, block_k: what fills tiles exactly, and what leaves a ragged strip, channel or row
SHAPES = [
    (2, 1, 256, 256, 128, 128, 128, 128),
    (4, 1, 130, 300, 128, 128, 64, 128),
    (2, 2, 33, 65, 64, 64, 16, 16),
    (8, 1, 64, 64, 80, 80, 64, 64),
    (2, 1, 97, 97, 96, 96, 128, 128),
    (1, 1, 129, 513, 256, 256, 128, 128),
    (2, 1, 70, 200, 64, 40, 32, 64),
    (2, 1, 70, 200, 24, 128, 32, 48),
    (1, 1, 1, 400, 128, 128, 128, 128),
    (3, 1, 300, 300, 72, 17, 300, 100),
    (1, 1, 600, 600, 64, 64, 512, 64),
    (2, 1, 5, 5, 128, 128, 128, 128),
]


@each_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_shapes_are_as_good_as_torch_in_bfloat16(backend, shape):
    heads, kv_heads, n_q, n_k, d, dv, block_q, block_k = shape
    q, k, v = (torch.randn(1, h, n, c).bfloat16() for h, n, c in ((heads, n_q, d), (kv_heads, n_k, d), (kv_heads, n_k, dv)))
    rest = (*lists(heads, -(-n_q // block_q), -(-n_k // block_k), 0.6), block_q, block_k, d**-0.5, n_k - n_q)
    out, lse = run(backend, q, k, v, *rest)
    want, want_lse = oracle(q, k, v, *rest)
    # probabilities rounded to bfloat16 and a rounded output: what torch's own kernel does
    assert relative_rms(out, want) < 3e-3
    assert torch.equal(lse.isinf(), want_lse.isinf())
    assert (lse - want_lse)[lse.isfinite()].abs().max() < 2e-3


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[9]], ids=str)
def test_ragged_shapes_in_the_other_dtypes(backend, shape, dtype):
    """On AMX these are sums of bfloat16 terms; a term lost would show as an error of 2^-9 or 2^-17."""
    heads, kv_heads, n_q, n_k, d, dv, block_q, block_k = shape
    q, k, v = (torch.randn(1, h, n, c).to(dtype) for h, n, c in ((heads, n_q, d), (kv_heads, n_k, d), (kv_heads, n_k, dv)))
    rest = (*lists(heads, -(-n_q // block_q), -(-n_k // block_k), 0.6), block_q, block_k, d**-0.5, n_k - n_q)
    out, lse = run(backend, q, k, v, *rest)
    want, want_lse = oracle(q, k, v, *rest)
    assert relative_rms(out, want) < (4e-4 if dtype == torch.float16 else 1e-6)
    assert (lse - want_lse)[lse.isfinite()].abs().max() < 1e-5


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("peak", [1, 4])
def test_the_error_is_at_most_a_tenth_above_torchs(backend, dtype, peak):
    q, k, v = (torch.randn(1, h, 640, 128).to(dtype) for h in (4, 1, 1))
    q *= peak
    counts, indices = lists(4, 5, 5, 1.0)
    out, _ = run(backend, q, k, v, counts, indices, 128, 128, 128**-0.5)
    want, _ = oracle(q, k, v, counts, indices, 128, 128, 128**-0.5)
    torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert relative_rms(out, want) <= 1.1 * relative_rms(torchs, want)


@each_backend
@pytest.mark.parametrize("order", ["rising", "falling", "spiky"])
def test_logits_of_ten_thousand_do_not_overflow(backend, order):
    n, d = 600, 64
    ramp = {"rising": torch.linspace(-1, 1, n), "falling": torch.linspace(1, -1, n), "spiky": torch.randn(n).sign()}[order]
    direction = torch.full((d,), d**-0.5)
    q = (100 * direction).expand(1, 1, n, d).bfloat16()
    k = (100 * ramp[:, None] * direction)[None, None].bfloat16()
    v = torch.randn(1, 1, n, d).bfloat16()
    rest = (*lists(1, 5, 5, 1.0), 128, 128, 1.0)
    out, lse = run(backend, q, k, v, *rest)
    want, want_lse = oracle(q, k, v, *rest)
    assert lse.abs().max() > 9000
    assert relative_rms(out, want) < 4e-3
    torch.testing.assert_close(lse.double(), want_lse.double(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_exp_is_good_to_float32(backend):
    """Two keys with logits 0 and -x: the second one's probability is 1 / (1 + e^x)."""
    x = torch.cat([torch.linspace(0, 2, 500), torch.linspace(2, 80, 500)])
    q, k = x[None, None, :, None], torch.tensor([0.0, -1.0])[None, None, :, None]
    v = torch.tensor([0.0, 1.0])[None, None, :, None]
    counts, indices = torch.ones(1, 1, 8, dtype=torch.int32), torch.zeros(1, 1, 8, 1, dtype=torch.int32)
    out, lse = run(backend, q, k, v, counts, indices, 128, 2, 1.0, 0, False)
    exact = torch.special.expit(-x.double())
    # x itself is rounded when it is turned into a power of two: an error of x * 2^-24 or so in the exponent
    assert ((out[0, 0, :, 0] - exact).abs() / exact / (1 + x)).max() < 3e-7
    assert (lse[0, 0] - torch.log1p(torch.exp(-x.double()))).abs().max() < 2e-7


@each_backend
def test_a_nan_stays_a_nan(backend):
    q, k, v = (torch.randn(1, 1, 64, 64).bfloat16() for _ in range(3))
    q[0, 0, 5, 3] = math.nan
    out, lse = run(backend, q, k, v, *lists(1, 1, 1, 1.0), 64, 64, 0.125)
    assert out[0, 0, 5].isnan().all() and lse[0, 0, 5].isnan()
    assert not out[0, 0, 6:].isnan().any() and not out[0, 0, :5].isnan().any()


@each_backend
@pytest.mark.parametrize("bad, sentence", [([0, -1], "is -1 but 64 keys make 4 blocks of 16"), ([2, 1], "is 1 after 2"),
                                           ([1, 1], "is 1 after 1; block numbers must ascend")])
def test_a_bad_list_is_refused_before_anything_is_written(backend, bad, sentence):
    q = k = v = torch.randn(1, 1, 64, 64).bfloat16()
    counts, indices = torch.full((1, 1, 4), 2, dtype=torch.int32), torch.tensor([[[[0, 1]] * 3 + [bad]]], dtype=torch.int32)
    args = (q, k, v, counts, indices, 16, 16, 0.125)
    out = (torch.full_like(q, 7.0), torch.full((1, 1, 64), 7.0))
    run(backend, q, k, v, counts, indices[:, :, :1].expand(-1, -1, 4, -1), *args[5:])
    with use_backend(backend), pytest.raises(ContractError, match=sentence):
        block_sparse_attention.out(*args, out=out)
    assert (out[0] == 7).all() and (out[1] == 7).all()


@each_backend
def test_a_given_output_is_filled_whatever_its_strides(backend):
    q, k, v = (torch.randn(1, 2, 100, 64).bfloat16() for _ in range(3))
    args = (q, k, v, *lists(2, 2, 2, 1.0), 64, 64, 0.125)
    want, want_lse = run(backend, *args)
    for out in (torch.empty_like(q), torch.empty(1, 2, 64, 100, dtype=q.dtype).mT, torch.empty(1, 2, 200, 64, dtype=q.dtype)[:, :, ::2]):
        lse = torch.empty(1, 2, 100)
        with use_backend(backend):
            block_sparse_attention.out(*args, out=(out, lse))
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
    with use_backend(backend), pytest.raises(ContractError, match="lse has size 99 at dimension 2, needs 100"):
        block_sparse_attention.out(*args, out=(torch.empty_like(q), torch.empty(1, 2, 99)))


def test_the_number_of_threads_does_not_change_a_bit():
    q, k, v = (torch.randn(1, h, 300, 64) for h in (4, 2, 2))
    args = (q, k, v, *lists(4, 5, 5, 0.5), 64, 64, 0.125)
    with running_on(1):
        one = block_sparse_attention(*args)
    with running_on(3):
        three = block_sparse_attention(*args)
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])


def test_a_forked_process_can_run_kernels():
    code = """
import os, torch
from sparse_attn.ops import block_sparse_attention, native
q = torch.randn(1, 1, 64, 64)
args = (q, q, q, torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32), 64, 64, 0.125)
torch.set_num_threads(1)
want = block_sparse_attention(*args)[0]
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(block_sparse_attention(*args)[0], want) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_every_op_has_a_backend_per_instruction_set_best_first():
    for name in ("antidiagonal_score", "block_sparse_attention"):
        assert [n for n in OPS[name].names if n in NATIVE[:4]] == NATIVE[:4]


def test_a_library_that_is_missing_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.load.cache_clear()
    native.why_not.cache_clear()
    try:
        assert native.why_not("avx2") == "the generic library was not built; reinstall with a C++ compiler and SPARSE_ATTN_BUILD unset"
        assert native.available() == []
    finally:
        native.load.cache_clear()
        native.why_not.cache_clear()


# heads, kv heads, queries, keys, D, stride, window: keys read once and many times, several panels, steps that straddle rows
SCORES = [
    (2, 1, 40, 1500, 64, 4, 0),
    (6, 2, 700, 700, 24, 3, 0),
    (1, 1, 1100, 1100, 40, 4, 333),
    (5, 1, 530, 1030, 128, 8, 0),
    (2, 2, 1030, 1030, 7, 2, 100),
]


@each_backend
@pytest.mark.parametrize("shape", SCORES, ids=str)
def test_scores_of_long_inputs_are_right(backend, shape):
    heads, kv_heads, n_q, n_k, d, stride, window = shape
    q, k = (torch.randn(2, h, n, d).bfloat16() for h, n in ((heads, n_q), (kv_heads, n_k)))
    first = torch.tensor([0, n_k - n_q + 17], dtype=torch.int32)
    rest = (8 * stride, 5 * stride, stride, 2 * d**-0.5, n_k - n_q, True, window, True, first)
    refusal = antidiagonal_score.explain(q, k, *rest).get(backend, "the library was not built")
    if refusal is not None:
        pytest.skip(f"{backend}: {refusal}")
    with use_backend(backend):
        got = antidiagonal_score(q, k, *rest)
    with use_backend("reference"):
        want = antidiagonal_score(q.double(), k.double(), *rest)
    torch.testing.assert_close(got.double(), want.double(), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("op, owner", [("antidiagonal_score", "TileProduct"), ("block_sparse_attention", "AmxEngine")])
def test_the_amx_library_multiplies_tiles(op, owner):
    """Emulated tiles prove the numbers; that the real library has the instruction can only be read from it."""
    library, source = native.FOLDER / "cpu_amx.so", ROOT / "csrc" / "cpu" / f"{op}.cpp"
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump on the path")
    if not library.exists():
        pytest.skip("the amx library was not built; run python setup.py build_ext --inplace")
    if source.exists() and source.stat().st_mtime > library.stat().st_mtime:
        pytest.skip(f"the amx library is older than {op}.cpp; run python setup.py build_ext --inplace")
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], text=True, capture_output=True, check=True).stdout
    functions = [f for f in listing.split("\n\n") if owner in f.partition("\n")[0]]
    assert functions, f"no function of {owner}: is the library stripped?"
    assert any("tdpbf16ps" in f for f in functions)


# -- the build ------------------------------------------------------------------------------------------------------------------


def build(tmp_path, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, text=True, capture_output=True, timeout=300)


def test_build_none_compiles_nothing(tmp_path):
    done = build(tmp_path, SPARSE_ATTN_BUILD="none", PATH="")
    assert done.returncode == 0 and not list(tmp_path.rglob("*.so")), done.stderr


def test_an_unknown_instruction_set_is_named(tmp_path):
    done = build(tmp_path, SPARSE_ATTN_BUILD="avx9000")
    assert done.returncode == 1 and "SPARSE_ATTN_BUILD names avx9000; use none, default" in done.stderr


def test_a_missing_compiler_says_what_to_do(tmp_path):
    done = build(tmp_path, SPARSE_ATTN_BUILD="generic", CXX="", PATH=str(tmp_path))
    assert done.returncode == 1 and "no C++ compiler found" in done.stderr and "SPARSE_ATTN_BUILD=none" in done.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler named c++")
def test_a_compiler_that_lacks_an_instruction_set_skips_that_library(tmp_path):
    """A wrapper that knows no AMX: the others are planned, that one is left out with a sentence."""
    wrapper = tmp_path / "old-c++"
    wrapper.write_text('#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; *-fsyntax-only*) exit 0;; esac\n'
                       'while [ $# -gt 0 ]; do case "$1" in -o|-MF) : > "$2"; shift;; esac; shift; done\n')
    wrapper.chmod(0o755)
    done = build(tmp_path, SPARSE_ATTN_BUILD="default", CXX=str(wrapper))
    assert done.returncode == 0, done.stderr
    assert "skipping the amx library" in done.stderr
    assert sorted(p.stem for p in (tmp_path / "lib").rglob("cpu_*.so")) == ["cpu_avx2", "cpu_avx512", "cpu_generic"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler named c++")
def test_a_host_engine_that_does_not_compile_is_done_without(tmp_path):
    wrapper = tmp_path / "c++"
    wrapper.write_text('#!/bin/sh\ncase "$*" in *csrc/host*) exit 1;; *-fsyntax-only*) exit 0;; esac\n'
                       'while [ $# -gt 0 ]; do case "$1" in -o|-MF) : > "$2"; shift;; esac; shift; done\n')
    wrapper.chmod(0o755)
    done = build(tmp_path, SPARSE_ATTN_BUILD="generic", CXX=str(wrapper))
    assert done.returncode == 0 and "going on without the host engine" in done.stderr, done.stderr
    assert [p.stem for p in (tmp_path / "lib").rglob("*.so")] == ["cpu_generic"]


def stub_compiler(path: Path, fails: str) -> Path:
    """Makes empty objects; exits 1 where its arguments match the pattern of sh."""
    path.write_text(f'#!/bin/sh\ncase "$*" in {fails}) exit 1;; *--list-gpu-code*) echo "sm_80 sm_90 sm_100"; exit 0;;\n'
                    '*-fsyntax-only*) exit 0;; esac\n'
                    'while [ $# -gt 0 ]; do case "$1" in -o|-MF) : > "$2"; shift;; esac; shift; done\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("nvcc", "sentence"), [
    (None, "no nvcc that knows these GPUs was found"), ("*move_rows.cu*", "compiling csrc/cuda/move_rows.cu for cuda failed"),
    ("", "knows sm_80, sm_90a, sm_100 only; GPUs of sm_120 need a newer one"),
])  # fmt: skip
def test_the_cuda_library_is_built_where_it_can_be_and_done_without_elsewhere(tmp_path, nvcc, sentence):
    cxx = stub_compiler(tmp_path / "c++", "''")
    (tmp_path / "bin").mkdir()
    if nvcc is not None:
        stub_compiler(tmp_path / "bin" / "nvcc", nvcc or "''")
    # a PATH without the nvcc that may be here, but with sh
    done = build(tmp_path, SPARSE_ATTN_BUILD="generic,cuda", CXX=str(cxx), CUDA_HOME=str(tmp_path), PATH="/usr/bin:/bin")
    assert done.returncode == 0 and sentence in done.stderr, done.stderr
    assert ("going on without the cuda library" in done.stderr) == (nvcc != "")
    assert sorted(p.stem for p in (tmp_path / "lib").rglob("c*.so")) == ["cpu_generic", "cuda"][: 1 + (nvcc == "")]
