"""CUDA kernels without a GPU: what the compiler made of them, what the library says here, and the words they are written in.

That their numbers are right is tested with every other backend's, on emulated threads: see conftest.op_backends.
``PYTHONPATH=. python python_tests/test_cuda.py`` writes cuda_table.json anew, what the compiler made of every kernel.
"""

import functools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import test_lowrank_op
import test_paged_attention
import torch
from rows import most, plain_args, share

from sparse_attn.errors import NoBackendError
from sparse_attn.ops import (OPS, cuda, gather_pages, keep_top, lowrank_keys, move_rows, native, select_blocks, select_global,
                             use_backend)

ROOT = Path(__file__).parent.parent
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
            stack = int(usage["STACK"]) + int(usage["LOCAL"])
            found[name] = {"registers": int(usage["REG"]), "stack": stack, "shared": int(usage["SHARED"])}
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


GEOMETRY = dict(block_q=1, block_k=1, n_q=4, n_k=4)
BAD = [math.nan, -1.0, math.inf, -math.inf]


@emulated
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rule", [dict(threshold=share(0.1, 2), top_k=None), dict(threshold=None, top_k=most(1))],
                         ids=["share", "count"])
def test_a_row_whose_scores_are_no_mass_keeps_all_it_reaches(bad, rule):
    score = torch.tensor([8.0, 1, 4, 2]).repeat(1, 2, 4, 1)
    score[0, 1, 3, 1], score[0, 0, 2, 3] = bad, bad  # the second one out of reach
    with use_backend("cuda_emulated"):
        counts, indices = select_blocks(score, **rule, **GEOMETRY, sink=0, recent=1)
    assert counts[0, 1].tolist() == [1, 1, 1, 4] and indices[0, 1, 3].tolist() == [0, 1, 2, 3]
    assert counts[0, 0].tolist() == [1, 1, 1, 1]


@emulated
@pytest.mark.parametrize("bad", [-0.5, 1.5, math.nan])
def test_a_head_without_a_share_keeps_all_it_reaches(bad):
    score, shares = torch.ones(1, 2, 4, 4), torch.tensor([0.0, bad], dtype=torch.float64)
    with use_backend("cuda_emulated"):
        assert select_blocks(score, shares, None, **GEOMETRY)[0].tolist() == [[[1, 2, 2, 2], [1, 2, 3, 4]]]
        assert select_global(score, shares, "head", **GEOMETRY)[0].tolist() == [[[0, 0, 0, 0], [1, 2, 3, 4]]]
        assert select_global(score, shares, "all", **GEOMETRY)[0].tolist() == [[[1, 2, 3, 4], [1, 2, 3, 4]]]


@emulated
@pytest.mark.parametrize("bad", BAD)
def test_a_budget_over_scores_that_are_no_mass_keeps_all_it_reaches(bad):
    score = torch.ones(1, 2, 4, 4)
    score[0, 1, 3, 1], score[0, 0, 2, 3] = bad, bad  # the second one out of reach
    with use_backend("cuda_emulated"):
        assert select_global(score, share(0.3, 2), "head", **GEOMETRY)[0].tolist() == [[[1, 2, 0, 0], [1, 2, 3, 4]]]


@emulated
def test_runs_counts_and_slots_that_do_not_fit_are_cut_to_what_does():
    score, starts = torch.arange(10.0), torch.tensor([[8, -1, 0, 0, 2, 4, 11]])
    lengths, counts = torch.tensor([[3, 3, -1, 4, 3, 4, 0]]), torch.tensor([[1, 1, 1, -2, 9, 3, 1]], dtype=torch.int32)
    with use_backend("cuda_emulated"):
        kept = keep_top(score, starts, lengths, counts, 2)
    assert kept.tolist() == [[[-1, -1]] * 4 + [[1, 2], [2, 3], [-1, -1]]]


@emulated
@pytest.mark.parametrize("k_blocks", [4000, 9000])
def test_long_rows_are_selected_as_the_reference_does(k_blocks):
    """Fewer rows share a block then, and the keys of one outgrow what needs no asking for."""
    score = torch.rand(1, 1, 5, k_blocks).mT.contiguous().mT ** 30
    for rule in ((share(0.9, 1), None), (None, most(300))):
        args = (score, *rule, 64, 64, 5 * 64, k_blocks * 64, (k_blocks - 5) * 64)
        with use_backend("cuda_emulated"):
            found = select_blocks(*args)
        for got, want in zip(found, select_blocks.reference(*args), strict=True):
            assert torch.equal(got, want)
    refusal = select_blocks.explain(torch.rand(1, 1, 1, 30000), share(0.5, 1), None, 1, 1, 1, 30000, 29999)["cuda_emulated"]
    assert refusal == "needs at most 24576 key blocks, got 30000"


# -- the words that kernels are written in ---------------------------------------------------------------------------------------

WORDS = r"""
#include <cstdio>
#include <cstdlib>
#include "cuda/simt.h"
using namespace words;
// each thread reads what its neighbour wrote
SA_GLOBAL(64) void neighbours(int* out, int ahead, bool waits) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[thread()] = thread();
  if (waits) barrier();
  out[block_x() * threads() + thread()] = shared[(thread() + ahead + 64) % 64];
}
SA_GLOBAL(64) void half_waits() { if (thread() < 32) barrier(); else warp_sum(thread() < 40 ? 1 : (barrier(), 1)); }
SA_GLOBAL(32) void lost_lane() { if (thread()) ballot(true); }
SA_GLOBAL(32) void overruns() { shared_memory()[128 + thread()] = 1; }
SA_GLOBAL(32) void poisoned(float* out) { *out = reinterpret_cast<float*>(shared_memory())[thread()]; }
SA_GLOBAL(64) void leaves_early(int* out) {
  if (thread() >= 32) return;
  barrier();
  const int sum = warp_sum(0);
  if (thread() == 0) *out = sum + 7;
}
SA_GLOBAL(64) void warp_words(int* out) {
  const int i = lane();
  bool good = warp_sum(i) == 496 && warp_max(i) == 31 && warp_min(i) == 0 && shuffle(i, 5) == 5 && shuffle_xor(i, 3) == (i ^ 3);
  good &= i == 0 || shuffle_up(i, 1) == i - 1;
  if (i == 0) shuffle_up(i, 1);
  good &= ballot(i % 2) == 0xaaaaaaaau && any(i == 31) && !all(i < 31) && votes_before(0xffffffffu) == i;
  atomic_add(out, int(good));
}
template <class F>
const char* fault(const F& f) {
  static char sentence[300];
  try {
    f();
    return "none";
  } catch (const std::exception& e) {
    std::snprintf(sentence, sizeof sentence, "%s", e.what());
    return sentence;
  }
}
int main() {
  const Stream stream{};
  int all[192], *const out = all;
  for (int ahead : {1, -1})
    for (bool waits : {true, false}) {
      launch<neighbours>(Grid{3}, 64, 256, stream, out, ahead, waits);
      int wrong = 0;
      for (int i = 0; i < 192; ++i) wrong += out[i] != (i + ahead + 64) % 64;
      std::printf("%d ", wrong > 0);
    }
  float nan = 0;
  launch<poisoned>(Grid{}, 32, 128, stream, &nan);
  int left = 0, words = 0;
  launch<leaves_early>(Grid{}, 64, 0, stream, &left);
  launch<warp_words>(Grid{2, 2}, 64, 0, stream, &words);
  launch<warp_words>(Grid{0}, 64, 0, stream, &words);
  std::printf("%d %d %d\n", nan != nan, left, words);
  std::printf("%s\n", fault([&] { launch<half_waits>(Grid{}, 64, 0, stream); }));
  std::printf("%s\n", fault([&] { launch<lost_lane>(Grid{}, 32, 0, stream); }));
  std::printf("%s\n", fault([&] { launch<overruns>(Grid{}, 32, 128, stream); }));
  std::printf("%s\n", fault([&] { launch<lost_lane>(Grid{1, 65536}, 32, 0, stream); }));
  std::printf("%s\n", fault([&] { launch<warp_words>(Grid{}, 64, 0, stream, &words); }));
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler named c++")
def test_emulated_threads_find_what_is_wrong_with_a_kernel(tmp_path):
    (tmp_path / "words.cpp").write_text(WORDS)
    program = tmp_path / "words"
    subprocess.run(["c++", "-std=c++20", "-DSA_CUDA", "-DSA_CUDA_EMULATED", "-DSA_NAMESPACE=words", "-I", ROOT / "csrc",
                    tmp_path / "words.cpp", "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert said[0] == "0 1 0 1 1 7 256", "with a barrier right, without it wrong both ways; NaN; left early; words of 256 threads"
    never = "CUDA: threads of a block wait for others that never come: a barrier or a warp word was not reached by all"
    assert said[1:3] == [never, never] and said[3] == "CUDA: a kernel wrote behind its shared memory"
    assert said[4] == "CUDA: a grid of 1 x 65536 x 1 blocks is too large; use smaller inputs" and said[5] == "none"


if __name__ == "__main__":
    lines = [f" {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(kernels().items())]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
