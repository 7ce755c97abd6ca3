"""Triton kernels without a GPU: right under Triton's interpreter, and compiled ahead of time without losing anything.

``PYTHONPATH=. python python_tests/test_triton.py`` writes triton_table.json anew, what the compiler made of every kernel (minutes).
"""

import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_mass_ops
import test_ops
import test_page_score
import test_paged_attention
import test_pooled_ops
import test_probe_ops
import test_read_plan
import test_row_score
import torch
from conftest import skip_unless
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import plain_args, randn

from sparse_attn.__main__ import typical
from sparse_attn.errors import NoBackendError
from sparse_attn.ops import OPS, page_score, row_score, use_backend
from sparse_attn.ops.triton import frame

HERE = Path(__file__)
TABLE = HERE.with_name("triton_table.json")
OPS_SERVED = [name for name, op in OPS.items() if "triton" in op.names]
interpreted = pytest.mark.skipif(not frame.interpreted(), reason="runs in the process of test_kernels_hold_under_the_interpreter")
here = pytest.mark.skipif(frame.interpreted(), reason="needs TRITON_INTERPRET unset")
installed = pytest.mark.skipif(frame.missing() is not None, reason=str(frame.missing()))

# -- numbers: what the tests of an op ask of every backend, on fewer cases ------------------------------------------------


def small(case) -> bool:
    """Few heads, in a dtype that the interpreter computes: it takes milliseconds for a tile."""
    q = (case if isinstance(case, dict) else case[0])["q"]
    return q.shape[0] * q.shape[1] <= 6 and q.dtype != torch.bfloat16


def few(case: dict) -> bool:
    """Few programs, at one per block and head."""
    batch, heads, n, _ = case["x"].shape
    return batch * heads * n // case["block"] <= 200


ASKED = {
    "key_mass": (test_mass_ops.test_key_mass_is_as_accurate_as_torch, test_mass_ops.mass_cases(), 8),
    "antidiagonal_score": (test_ops.test_antidiagonal_shares_equal_the_loop_over_token_pairs,
                           test_ops.score_cases().filter(small), 4),
    "block_sparse_attention": (test_read_plan.test_attention_reads_the_union_that_the_plan_names,
                               test_read_plan.planned_cases().filter(small), 8),
    "pooled_score": (test_pooled_ops.test_pooled_shares_equal_softmax_over_the_blocks_of_token_pairs,
                     test_pooled_ops.pooled_cases(), 5),
    "page_score": (test_page_score.test_bounds_match_float64, test_page_score.score_cases(), 8),
    "row_score": (test_row_score.test_scores_match_float64, test_row_score.score_cases(), 8),
    "paged_attention": (test_paged_attention.test_pages_are_attended_as_accurately_as_torch_does,
                        test_paged_attention.paged_cases(), 5),
    "pool_blocks": (test_pooled_ops.test_pooling_equals_one_block_at_a_time, test_pooled_ops.pool_cases().filter(few), 8),
    "js_distance": (test_pooled_ops.test_distances_of_the_worked_examples, None, 1),
    "strided_score": (test_probe_ops.test_strided_scores_are_as_accurate_as_torch, test_probe_ops.strided_cases().filter(small), 5),
    "window_score": (test_probe_ops.test_window_sums_are_as_accurate_as_torch, test_probe_ops.window_cases().filter(small), 5),
    "window_mass": (test_mass_ops.test_window_mass_is_as_accurate_as_torch, test_mass_ops.mass_cases(), 5),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("op", OPS_SERVED)
def test_a_kernel_is_as_accurate_as_torch(op):
    ask, cases, examples = ASKED[op]
    if cases is None:
        ask("triton")
        return

    @settings(max_examples=examples)
    @given(case=cases, data=st.data())
    def held(case, data):
        more = {"data": data} if "data" in inspect.signature(ask.hypothesis.inner_test).parameters else {}
        ask.hypothesis.inner_test("triton", case, **more)

    held()


@interpreted
@pytest.mark.parametrize("op", OPS_SERVED)
def test_a_kernel_agrees_with_the_reference(op):
    args = plain_args(op, torch.float32)
    skip_unless(OPS[op], "triton", *args)
    with use_backend("triton"):
        found = OPS[op](*args)
    torch.testing.assert_close(found, OPS[op].reference(*args), atol=1e-5, rtol=1e-3)


@interpreted
def test_a_key_that_a_plan_names_twice_counts_once():
    plan = dict(columns=torch.arange(190, 250).int()[None, None], near=torch.tensor([[0, 40], [120, 1]], dtype=torch.int32),
                dense_rows=50)
    test_read_plan.test_long_plans_are_read_whole("triton", plan, 0)


@interpreted
@pytest.mark.parametrize(("n_q", "lists", "more"), [
    (3, 2, dict(columns=torch.arange(70, 95).int()[None, None], near=torch.tensor([[0, 9], [40, 1], [3, 30], [0, 0]] * 2).int())),
    (20, 1, dict(sinks=torch.arange(8.0), dense_rows=2)), (70, 8, {}),
])  # fmt: skip
def test_few_queries_are_packed_and_whole_tiles_described(monkeypatch, n_q, lists, more):
    """As on sm_90, where k may be described and v, whose rows are not 16 bytes apart, once may not."""
    monkeypatch.setattr(frame, "arch", lambda device: 90)
    launched, kept = [], frame.launch
    monkeypatch.setattr(frame, "launch", lambda *args, **named: launched.append((args[2:], named)) or kept(*args, **named))
    op = OPS["block_sparse_attention"]
    for dim, described in ((40, True), (33, False)):
        q = randn(1, 8, n_q, 40, torch.float32, "tokens_first", 0)
        k, v = (randn(1, 2, 250, d, torch.float32, "plain", d) for d in (40, dim))
        blocks = torch.tensor([0, 2, 3]).int().expand(1, lists, -(-n_q // 64), 3)
        args = op._bind((q, k, v, blocks[..., 0] * 0 + 3, blocks, 64, 64, 0.2), {"q_start": 250 - n_q} | more)
        with use_backend("triton"):
            found = op(*args)
        torch.testing.assert_close(found, op.reference(*args), atol=2e-6, rtol=1e-5)
        passed, named = launched.pop()
        assert (passed[3] is not None, named["PACK"]) == (described, 4 if n_q < 70 else 1)


@interpreted
def test_long_lists_are_cut_into_parts_and_joined():
    for lengths, pages, n_q in (([700, 3], 60, 1), ([260, 0], 1, 3)):
        case = test_paged_attention.flat_case(lengths, n_q, 2, 32, pages=pages, softcap=5.0, sinks=torch.randn(4))
        found = test_paged_attention.run("triton", case)
        for got, want in zip(found, test_paged_attention.truth(case), strict=True):
            torch.testing.assert_close(got.double(), want.double(), atol=1e-5, rtol=1e-5)


@interpreted
def test_soft_scores_of_a_long_run_are_joined_from_parts():
    q, rows, run = torch.randn(1, 2, 1, 32), torch.randn(400, 32), (torch.tensor([[7]]), torch.tensor([[380]]))
    with use_backend("triton"):
        found = row_score(q, rows, *run, 0.3, True)
    torch.testing.assert_close(found, row_score.reference(q, rows, *run, 0.3, True), atol=1e-7, rtol=1e-4)


def needs_older_numpy() -> bool:
    """Bounds of a loop are arrays of one element there, which a newer numpy takes for no number."""
    if frame.missing() is not None:
        return False
    return importlib.metadata.version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


SOME = "block_sparse_attention or window_mass or strided_score or names_twice or described"  # about half of the time


@here
@installed
@pytest.mark.skipif(needs_older_numpy(), reason=f"the interpreter of triton 3.6 needs a numpy older than 2.4, got {np.__version__}")
@pytest.mark.parametrize(("those", "least"), [(SOME, 10), (f"not ({SOME})", 2 * len(OPS_SERVED) - 6)], ids=["some", "others"])
def test_kernels_hold_under_the_interpreter(those, least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE), "-k", those]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least, "every op is asked"


# -- compiled ahead of time -----------------------------------------------------------------------------------------------

ARCHS = (80, 90, 100)
ALWAYS = 90  # what is compiled by every run of the tests, whatever the table knows
# what a program may have: sm_86 and sm_89 run what is pinned for 80, and have the least
MOST_SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
         torch.bool: "i1"}  # fmt: skip


def meta(*args) -> tuple:
    return tuple(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args)


def calls(op: str) -> dict[str, tuple]:
    """Shapes whose kernels are compiled, on meta tensors, and what is said of those that are not the usual ones."""
    usual = typical(op, torch.bfloat16, "meta")
    found = {"": usual}
    if op == "row_score":
        found["soft"] = (*usual[:5], True)
    if op == "window_mass":
        found["pooled"] = (*usual[:6], 0.0, None, 5)
    if op == "paged_attention":
        found["chunk"] = (usual[0].new_empty(1, usual[0].shape[1], 512, usual[0].shape[3]), *usual[1:])
    if op == "block_sparse_attention":
        found |= attention_calls(*usual)
    # padding bounds, sinks, biases and softcaps are branches that the compiler sees only when they are given
    return found | {"options": meta(*plain_args(op, torch.bfloat16))}


def attention_calls(q, k, v, counts, indices, block_q, block_k, scale) -> dict[str, tuple]:
    """Widths, element types and every way to name keys, at the usual sizes."""
    heads, kv_heads, n = q.shape[1], k.shape[1], q.shape[2]

    def call(dim=128, value_dim=None, dtype=q.dtype, n_q=n, lists=heads, **named):
        shapes = (heads, n_q, dim), (kv_heads, n, dim), (kv_heads, n, value_dim or dim)
        plan = (t[:, :lists, : -(-n_q // block_q)] for t in (counts, indices))
        given = (*(q.new_empty(1, *shape, dtype=dtype) for shape in shapes), *plan, block_q, block_k, scale)
        return OPS["block_sparse_attention"]._bind(given, {"q_start": n - n_q} | named)

    near, columns = q.new_empty(heads, 2, dtype=torch.int32), q.new_empty(1, heads, 1000, dtype=torch.int32)
    return {
        **{f"D={dim}": call(dim) for dim in (64, 80, 96, 256)}, "D=192 Dv=128": call(192, 128), "few": call(n_q=4, lists=kv_heads),
        "float32": call(dtype=torch.float32), "float32 D=256": call(256, dtype=torch.float32),
        "order": call(order=q.new_empty(1, kv_heads, n, dtype=torch.int32)),
        "window softcap sinks": call(window=4096, softcap=30.0, sinks=q.new_empty(heads)),
        "columns near dense": call(columns=columns, near=near, dense_rows=64),
    }  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was launched with."""

    kernel: Any
    args: tuple
    named: dict

    @functools.cached_property
    def request(self) -> tuple[dict, dict, dict, dict]:
        """Types, constants, alignments and options, specialised as Triton would."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        kernel, named = self.kernel, self.named
        options = {name: named[name] for name in ("num_warps", "num_stages") if name in named} | frame.OPTIONS
        values = dict(zip(kernel.arg_names, self.args)) | {n: v for n, v in named.items() if n in kernel.arg_names}
        signature, constants, attrs = {}, {}, {}
        for at, name in enumerate(kernel.arg_names):
            value = values[name]
            special = isinstance(value, int) and not kernel.params[at].do_not_specialize
            if kernel.params[at].is_constexpr or value is None or (special and value == 1):
                signature[name], constants[(at,)] = "constexpr", value
                continue
            if isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[name] = f"*{TYPES[value.dtype]}" if tensor else "fp32" if isinstance(value, float) else "i32"
            if tensor or (special and value % 16 == 0):
                attrs[(at,)] = [["tt.divisibility", 16]]
        return signature, constants, attrs, options

    def fingerprint(self, arch: int) -> str:
        """Equal where compiler and input are equal, and so what is compiled."""
        import triton

        texts, left = {}, [self.kernel]
        while left:
            kernel = left.pop()
            if kernel.src not in texts:
                texts[kernel.src] = None
                around = inspect.getclosurevars(kernel.fn).globals.values()
                left += [value for value in around if isinstance(value, triton.JITFunction)]
                texts |= {str(value): None for value in around if isinstance(value, triton.language.constexpr)}
        return hashlib.sha256(repr((triton.__version__, arch, sorted(texts), self.request)).encode()).hexdigest()[:12]

    def compiled(self, arch: int) -> dict:
        """Registers, spilled bytes, shared memory and the matrix instruction."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        *request, options = self.request
        built = triton.compile(ASTSource(self.kernel, *request), target=GPUTarget("cuda", arch, 32), options=options)
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(built.asm["cubin"])
            usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
        matrix = next((word for word in ("tcgen05.mma", "wgmma", "mma.sync") if word in built.asm["ptx"]), "none")
        return {"registers": registers, "spilled": stack + local, "shared": built.metadata.shared, "matrix": matrix,
                "of": self.fingerprint(arch)}  # fmt: skip


def launches(op: str) -> dict[str, tuple[Launch, int]]:
    """Rows of the table: every kernel that the calls of an op launch, and the architecture."""
    found = {}
    kept = frame.launch, frame.arch, frame.processors
    frame.processors = lambda device: 132
    try:
        for arch, (said, args) in itertools.product(ARCHS, calls(op).items()):
            frame.arch = lambda device: arch

            def remember(kernel, grid, *args, **named):
                rows = f"of {named['ROWS']} rows" if "ROWS" in named else ""
                found[" ".join(filter(None, [op, kernel.__name__, rows, said, f"sm_{arch}"]))] = Launch(kernel, args, named), arch

            frame.launch = remember
            OPS[op].backends[OPS[op].names.index("triton")].run(*OPS[op]._bind(args, {}))
    finally:
        frame.launch, frame.arch, frame.processors = kept
    # one kernel may serve several calls
    return {name: pair for name, pair in found.items() if name == next(n for n, p in found.items() if same(p, pair))}


def same(one: tuple[Launch, int], other: tuple[Launch, int]) -> bool:
    return one[1] == other[1] and one[0].kernel is other[0].kernel and one[0].request == other[0].request


def built(wanted: dict[str, tuple[Launch, int]]) -> dict[str, dict]:
    """Rows of the table."""
    return {name: launch.compiled(arch) for name, (launch, arch) in wanted.items()}


@here
@installed
@pytest.mark.parametrize("op", OPS_SERVED)
def test_every_kernel_compiles_without_spills_and_keeps_its_matrix_instruction(op):
    """A spill, another instruction or many more registers is another kernel.

    What the table's own compiler made of the very same kernel is not asked again, but on one architecture. Other versions of Triton
    spread registers in ways of their own (3.6 puts 8 bytes of two kernels on the stack): they have to keep the instruction, spill
    no more than that, and fit.
    """
    import triton

    table, wanted = json.loads(TABLE.read_text()), launches(op)
    assert wanted and set(wanted) == {name for name in table if name.split()[0] == op}, "write the table anew: see the docstring"
    new = {name: pair for name, pair in wanted.items() if pair[1] == ALWAYS or pair[0].fingerprint(pair[1]) != table[name]["of"]}
    same_compiler = triton.__version__ == table["triton"]
    for name, row in ({name: table[name] for name in wanted} | built(new)).items():
        assert row["spilled"] <= (0 if same_compiler else 8), f"{name} spills {row['spilled']} bytes"
        assert row["matrix"] == table[name]["matrix"], f"{name} multiplies with {row['matrix']}, not {table[name]['matrix']}"
        assert row["shared"] <= MOST_SHARED[wanted[name][1]], f"{name} takes {row['shared']} bytes of shared memory"
        most = 1.25 * table[name]["registers"] + 8 if same_compiler else 255
        assert row["registers"] <= most, f"{name} takes {row['registers']} registers: {table[name]}"


# -- refusals -------------------------------------------------------------------------------------------------------------


@here
def test_cpu_tensors_are_refused_and_triton_is_not_imported():
    code = ("import sys, rows; from sparse_attn.ops import page_score; "
            "print(page_score.explain(*rows.plain_args('page_score'))['triton'], 'triton' in sys.modules)")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said == "needs CUDA tensors, got cpu False\n"
    with pytest.raises(NoBackendError, match="page_score cannot run: triton: needs CUDA tensors, got cpu"), use_backend("triton"):
        page_score(*plain_args("page_score"))


@interpreted
def test_what_the_interpreter_gets_wrong_is_refused():
    for op in OPS_SERVED:
        args = plain_args(op, torch.bfloat16)
        assert args[0].dtype == torch.float32 or "which the interpreter gets wrong" in OPS[op].explain(*args)["triton"]


def test_wide_rows_and_mixed_devices_are_refused():
    wide = torch.zeros(1, 2, 1, 300), torch.zeros(8, 300), torch.zeros(8, 300)
    assert frame.needs_width(*wide) == "needs at most 256 channels, got 300"
    assert frame.needs_width(torch.zeros(1, 2, 1, 256), wide[1][:, :256]) is None
    assert "got meta" in frame.why_not(torch.empty(2, device="meta"))


if __name__ == "__main__":
    rows = {name: row for op in OPS_SERVED for name, row in sorted(built(launches(op)).items())}
    rows = {"triton": importlib.metadata.version("triton")} | rows
    TABLE.write_text("{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n}\n")
