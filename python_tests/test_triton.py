"""Triton kernels without a GPU: right under Triton's interpreter, and compiled ahead of time without losing anything.

``PYTHONPATH=. python python_tests/test_triton.py`` writes triton_table.json anew, what the compiler made of every kernel.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import test_mass_ops
import test_ops
import test_page_score
import test_paged_attention
import test_pooled_ops
import test_read_plan
import test_row_score
import torch
from conftest import skip_unless
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import plain_args

from sparse_attn.__main__ import typical
from sparse_attn.errors import NoBackendError
from sparse_attn.ops import OPS, page_score, row_score, use_backend
from sparse_attn.ops.triton import frame

HERE = Path(__file__)
TABLE = HERE.with_name("triton_table.json")
OPS_SERVED = [name for name, op in OPS.items() if "triton" in op.names]
interpreted = pytest.mark.skipif(not frame.interpreted(), reason="test_kernels_hold_under_the_interpreter runs this in its own process")
here = pytest.mark.skipif(frame.interpreted(), reason="needs TRITON_INTERPRET unset")

# -- numbers: what the tests of an op ask of every backend, on fewer cases ------------------------------------------------


def small(case) -> bool:
    """Few heads, in a dtype that the interpreter computes: it takes milliseconds for a tile."""
    q = (case if isinstance(case, dict) else case[0])["q"]
    return q.shape[0] * q.shape[1] <= 6 and q.dtype != torch.bfloat16


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
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("op", OPS_SERVED)
def test_a_kernel_is_as_accurate_as_torch(op):
    ask, cases, examples = ASKED[op]

    @settings(max_examples=examples)
    @given(case=cases, data=st.data())
    def held(case, data):
        more = {"data": data} if "data" in inspect.signature(ask.hypothesis.inner_test).parameters else {}
        ask.hypothesis.inner_test("triton", case, **more)

    held()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS_SERVED)
def test_a_kernel_agrees_with_the_reference(op, dtype):
    args = plain_args(op, dtype)
    skip_unless(OPS[op], "triton", *args)
    with use_backend("triton"):
        found = OPS[op](*args)
    torch.testing.assert_close(found, OPS[op].reference(*args), atol=2e-3 if dtype == torch.float16 else 1e-5, rtol=1e-3)


@interpreted
def test_a_key_that_a_plan_names_twice_counts_once():
    plan = dict(columns=torch.arange(190, 250).int()[None, None], near=torch.tensor([[0, 40], [120, 1]], dtype=torch.int32),
                dense_rows=50)
    test_read_plan.test_long_plans_are_read_whole("triton", plan, 0)


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


@here
@pytest.mark.skipif(frame.missing() is not None, reason=str(frame.missing()))
def test_kernels_hold_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 3 * len(OPS_SERVED), "every op is asked"


# -- compiled ahead of time -----------------------------------------------------------------------------------------------

ARCHS = (80, 90, 100)
# what a program may have: sm_86 and sm_89 run what is pinned for 80, and have the least
MOST_SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
         torch.bool: "i1"}  # fmt: skip


def calls(op: str) -> list[tuple]:
    """Shapes whose kernels are compiled, on meta tensors."""
    usual = typical(op, torch.bfloat16, "meta")
    if op == "row_score":
        return [usual, (*usual[:5], True)]
    if op == "paged_attention":
        queries = torch.empty(1, usual[0].shape[1], 512, usual[0].shape[3], dtype=torch.bfloat16, device="meta")
        return [usual, (queries, *usual[1:])]
    return [usual]


def launches(op: str, args: list[tuple], arch: int) -> dict[str, tuple]:
    """Every kernel that these calls of an op launch on an architecture, with its arguments."""
    found = {}
    kept = frame.launch, frame.arch, frame.processors
    frame.launch = lambda kernel, grid, *args, **named: found.setdefault(
        f"{op} {kernel.__name__}" + (f" of {named['ROWS']} rows" if "ROWS" in named else ""), (kernel, args, named))
    frame.arch, frame.processors = lambda device: arch, lambda device: 132
    try:
        for call in args:
            OPS[op].backends[OPS[op].names.index("triton")].run(*OPS[op]._bind(call, {}))
    finally:
        frame.launch, frame.arch, frame.processors = kept
    return found


def compiled(kernel, args: tuple, named: dict, arch: int) -> dict:
    """Registers, spilled bytes, shared memory and the matrix instruction of a kernel, specialised as Triton would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: named[name] for name in ("num_warps", "num_stages") if name in named} | {"enable_fp_fusion": True}
    values = dict(zip(kernel.arg_names, args)) | {n: v for n, v in named.items() if n in kernel.arg_names}
    signature, constants, attrs = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        value = values[name]
        special = isinstance(value, int) and not kernel.params[at].do_not_specialize
        if kernel.params[at].is_constexpr or value is None or (special and value == 1):
            signature[name], constants[(at,)] = "constexpr", value
            continue
        signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attrs[(at,)] = [["tt.divisibility", 16]]
    built = triton.compile(ASTSource(kernel, signature, constants, attrs), target=GPUTarget("cuda", arch, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    matrix = next((word for word in ("tcgen05.mma", "wgmma", "mma.sync") if word in built.asm["ptx"]), "none")
    return {"registers": registers, "spilled": stack + local, "shared": built.metadata.shared, "matrix": matrix}


def built(op: str) -> dict[str, dict]:
    """Rows of the table: kernel and architecture."""
    return {f"{name} sm_{arch}": compiled(*launch, arch) for arch in ARCHS for name, launch in launches(op, calls(op), arch).items()}


@here
@pytest.mark.skipif(frame.missing() is not None, reason=str(frame.missing()))
@pytest.mark.parametrize("op", OPS_SERVED)
def test_every_kernel_compiles_without_spills_and_keeps_its_matrix_instruction(op):
    """Registers may differ a little between compilers; a spill or another instruction is another kernel."""
    table = json.loads(TABLE.read_text())
    found = built(op)
    assert found and set(found) == {name for name in table if name.split()[0] == op}, "write the table anew, see the top of this file"
    for name, row in found.items():
        assert row["spilled"] == 0, f"{name} spills {row['spilled']} bytes"
        assert row["matrix"] == table[name]["matrix"], f"{name} multiplies with {row['matrix']}, not {table[name]['matrix']}"
        assert row["shared"] <= MOST_SHARED[int(name[name.rindex("_") + 1 :])], f"{name} takes {row['shared']} bytes of shared memory"
        assert row["registers"] <= 1.25 * table[name]["registers"] + 8, f"{name} takes {row['registers']} registers: {table[name]}"


@here
@pytest.mark.skipif(frame.missing() is not None, reason=str(frame.missing()))
@pytest.mark.parametrize("op", OPS_SERVED)
def test_every_option_compiles(op):
    """Padding bounds, sinks, biases and softcaps are branches that the compiler sees only when they are given."""
    args = tuple(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in plain_args(op, torch.bfloat16))
    for name, launch in launches(op, [args], 90).items():
        assert compiled(*launch, 90)["spilled"] == 0, name


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
    rows = {name: row for op in OPS_SERVED for name, row in sorted(built(op).items())}
    TABLE.write_text("{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n}\n")
