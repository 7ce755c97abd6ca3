"""CUDA kernels without a GPU: what the compiler made of them, what the library says here, and the words they are written in.

That their numbers are right is tested with every other backend's, on emulated threads: see conftest.op_backends.
``PYTHONPATH=. python python_tests/test_cuda.py`` writes cuda_table.json anew, what the compiler made of every kernel.
"""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import test_lowrank_op
import test_paged_attention
import torch

from sparse_attn.errors import NoBackendError
from sparse_attn.ops import OPS, cuda, gather_pages, lowrank_keys, move_rows, native, use_backend

TABLE = Path(__file__).with_name("cuda_table.json")
LIBRARY = native.FOLDER / "cuda.so"
ARCHS = {"sm_80", "sm_90", "sm_90a", "sm_100", "sm_120"}
built = pytest.mark.skipif(not LIBRARY.exists(), reason=f"the cuda library was not built: {LIBRARY.name} needs nvcc")
emulated = pytest.mark.skipif("cuda_emulated" not in move_rows.names, reason="the cuda_emulated library was not built")


@functools.cache
def cuobjdump() -> str | None:
    """The tool that reads a library's kernels: that of the toolkit, or the one in Triton's wheel."""
    try:
        import triton

        inside = str(Path(triton.__file__).parent / "backends/nvidia/bin")
    except ImportError:
        inside = None
    return shutil.which("cuobjdump") or (inside and shutil.which("cuobjdump", path=inside))


def short(mangled: str) -> str:
    """A kernel's own name with its template arguments, whatever path it was compiled at."""
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"sparse_attn_kernels::|\(anonymous namespace\)::|^void ", "", full)
    return re.sub(r"\(\w+\)", "", plain[: plain.index("(", plain.rindex(">") if ">" in plain.split("(")[0] else 0)])


def kernels() -> dict[str, dict]:
    """Rows of the table: each kernel in the library and the architecture that it was compiled for."""
    said = subprocess.run([cuobjdump(), "-res-usage", LIBRARY], capture_output=True, text=True, check=True)
    found, arch = {}, None
    for line in (said.stdout + said.stderr).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\w+):", line):
            name = f"{short(match[1])} {arch}"
        elif "REG:" in line:
            usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line))
            found[name] = {"registers": int(usage["REG"]), "stack": int(usage["STACK"]) + int(usage["LOCAL"]), "shared": int(usage["SHARED"])}
    return found


@built
@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump, of the CUDA toolkit or of triton")
def test_every_kernel_is_compiled_for_every_architecture_and_spills_nothing():
    """Registers may differ a little between compilers; stack or shared memory that was not there is another kernel."""
    table, found = json.loads(TABLE.read_text()), kernels()
    assert set(found) == set(table), "rebuild the cuda library, or write the table anew: see the top of this file"
    assert {name.rsplit(" ", 1)[1] for name in found} <= ARCHS
    assert len(found) == 4 * len({name.rsplit(" ", 1)[0] for name in found}), "a kernel is missing for some architecture"
    for name, row in found.items():
        assert row["stack"] <= table[name]["stack"], f"{name} has {row['stack']} bytes of stack: does it spill?"
        assert row["shared"] <= table[name]["shared"], f"{name} takes {row['shared']} bytes of shared memory"
        assert row["registers"] <= 1.25 * table[name]["registers"] + 8, f"{name} takes {row['registers']} registers: {table[name]}"


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_library_loads_on_any_torch_and_says_why_it_cannot_run():
    said = cuda.why_not()
    assert said is not None and said.startswith("needs a CUDA GPU, but ")
    if torch.version.cuda is None:
        assert said == "needs a CUDA GPU, but this torch was built without CUDA"


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if "cuda" in op.names])
def test_cpu_tensors_are_refused(op):
    from rows import plain_args

    assert OPS[op].explain(*plain_args(op))["cuda"] == "needs CUDA tensors, got cpu"
    with use_backend("cuda"), pytest.raises(NoBackendError, match=f"{op} cannot run: cuda: needs CUDA tensors, got cpu"):
        OPS[op](*plain_args(op))


@emulated
def test_the_emulated_twin_is_never_chosen():
    for op in OPS.values():
        assert not any(b.by_name_only for b in op.backends if "emulated" not in b.name)
        assert all(b.by_name_only for b in op.backends if "emulated" in b.name)


# -- what a GPU does where a CPU refuses ----------------------------------------------------------------------------------------


@emulated
def test_an_entry_that_names_no_row_moves_nothing():
    rows = torch.arange(10.0)[:, None].repeat(1, 3)
    want = rows.clone()
    want[2] = rows[4]
    with use_backend("cuda_emulated"):
        move_rows(rows, torch.tensor([3, 4, 10]), torch.tensor([-1, 2, 3]))
    assert torch.equal(rows, want)


@emulated
def test_an_entry_that_names_no_page_or_no_row_gathers_nothing():
    rows = torch.zeros(3, 5)
    with use_backend("cuda_emulated"):
        gather_pages(rows, torch.ones(2, 5), torch.tensor([0, 2, 1, 0]), torch.tensor([-1, 0, 2, 3]))
    assert rows.sum(1).tolist() == [0, 0, 5]


@emulated
@pytest.mark.parametrize(("start", "count"), [(-1, 2), (28, 5), (0, -1), (2**40, 1), (0, 2**30)])
@pytest.mark.parametrize("pages", [1, 4])
def test_a_page_outside_the_store_is_attended_as_if_it_were_empty(start, count, pages):
    case = test_paged_attention.flat_case([20, 5], pages=pages)
    case["starts"][0, 1, -1], case["counts"][0, 1, -1] = start, count
    empty = case | {"counts": case["counts"].clone()}
    empty["counts"][0, 1, -1] = 0
    with_it, without = (test_paged_attention.run("cuda_emulated", one) for one in (case, empty))
    assert torch.equal(with_it[0], without[0]) and torch.equal(with_it[1], without[1])


@emulated
@pytest.mark.parametrize("changes", [
    dict(starts=torch.tensor([[[0, 3], [6, 8]]])), dict(starts=torch.tensor([[[0, 3], [6, -1]]])),
    dict(counts=torch.tensor([[[3, 3], [1, -3]]]).int()), dict(targets=torch.tensor([[[0, 3], [6, 18]]])),
])  # fmt: skip
def test_a_page_outside_factors_or_rows_is_not_rebuilt(changes):
    args, want = test_lowrank_op.plain(**changes), torch.zeros(20, 8)
    want[:7] = 4
    with use_backend("cuda_emulated"):
        lowrank_keys(*args)
    assert torch.equal(args[0].count_nonzero(1), want.count_nonzero(1))


@emulated
@pytest.mark.parametrize("positions", [torch.arange(1, 11), torch.arange(-1, 9)])
def test_a_token_whose_position_no_table_has_is_not_rebuilt(positions):
    args = test_lowrank_op.plain(positions=positions.int())
    with use_backend("cuda_emulated"):
        lowrank_keys(*args)
    source = torch.tensor([0, 1, 2, 3, 4, 5, 6, *[-1] * 10, 7, 8, 9])  # of each row
    there = (source >= 0) & (positions[source] >= 0) & (positions[source] < 10)
    assert torch.equal(args[0].any(1), there)


if __name__ == "__main__":
    lines = [f" {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(kernels().items())]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
