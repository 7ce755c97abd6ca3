"""window_score and strided_score: against float64 brute force, and what must hold whatever the numbers are."""

import functools
import math

import pytest
import torch
from conftest import op_backends, running_on, skip_unless
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch
from rows import attention_cases, randn

from sparse_attn.errors import ContractError
from sparse_attn.ops import strided_score, use_backend, window_score
from sparse_attn.ops.spans import spans

SPAN = ("q_start", "causal", "window", "first", "last")


@st.composite
def window_cases(draw) -> dict:
    """Arguments of window_score; probes are a tail, tails of segments, one row, all rows, or none, among entries that are no row."""
    case = draw(attention_cases(max_tokens=200))
    batch, n_q = case["q"].shape[0], case["q"].shape[2]
    kind = draw(st.sampled_from(["tail", "tails", "one", "all", "none", "outside"]))
    real = {
        "tail": range(max(0, n_q - 64), n_q), "tails": [r for r in range(n_q) if r % 50 >= 43], "one": [draw(st.integers(0, n_q - 1))],
        "all": range(n_q), "none": [], "outside": [draw(st.integers(0, n_q - 1)), n_q, n_q + 7],
    }[kind]  # fmt: skip
    rows = torch.tensor([-1, -1, *real], dtype=torch.int32).repeat(batch, 1)
    block = draw(st.sampled_from([1, 1, 1, 16, 20, 64, 128, 300, 512]))
    return {name: case[name] for name in ("q", "k", "scale", *SPAN, "softcap")} | {"rows": rows, "block": block}


def window_args(case: dict) -> tuple:
    return tuple(case[name] for name in ("q", "k", "rows", "scale", "q_start", "causal", "window", "softcap", "first", "last",
                                         "block"))


@st.composite
def strided_cases(draw) -> dict:
    """Arguments of strided_score; strides that divide blocks and nothing else, blocks shorter and longer than the tokens."""
    case = draw(attention_cases(max_tokens=200))
    stride = draw(st.sampled_from([1, 3, 4, 8]))
    blocks = {f"block_{side}": stride * draw(st.sampled_from([1, 2, 5, 16, 150])) for side in "qk"}
    return {name: case[name] for name in ("q", "k", "scale", *SPAN)} | blocks | {"stride": stride, "rotate": draw(st.booleans())}


def strided_args(case: dict) -> tuple:
    return tuple(case[name] for name in ("q", "k", "block_q", "block_k", "stride", "scale", "q_start", "causal", "window", "rotate",
                                         "first", "last"))


def seen(case: dict, b: int, row: int) -> tuple[int, int, list[int]]:
    """A query row of the tensor: its position, the first real key, and the keys it may see, token by token."""
    n_k = case["k"].shape[2]
    low = int(case["first"][b]) if case["first"] is not None else 0
    high = int(case["last"][b]) if case["last"] is not None else n_k
    at = case["q_start"] + row
    keys = [p for p in range(low, high) if not case["causal"] or p <= at and (not case["window"] or p > at - case["window"])]
    return at, low, keys


def logits_of(case: dict, softcap: float = 0.0) -> torch.Tensor:
    """float64 ``[B, H, Nq, Nk]``."""
    group = case["q"].shape[1] // case["k"].shape[1]
    s = case["q"].double() @ case["k"].double().repeat_interleave(group, 1).mT * case["scale"]
    return softcap * torch.tanh(s / softcap) if softcap else s


def real_rows(case: dict, b: int) -> range:
    (_, _, n_q, _), n_k, start = case["q"].shape, case["k"].shape[2], case["q_start"]
    if not case["causal"]:
        return range(n_q)
    low = int(case["first"][b]) if case["first"] is not None else 0
    high = int(case["last"][b]) if case["last"] is not None else n_k
    return range(min(max(low - start, 0), n_q), max(min(high - start, n_q), min(max(low - start, 0), n_q)))


def window_truth(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sums, one probe and one key at a time."""
    batch, heads = case["q"].shape[:2]
    n_k, s = case["k"].shape[2], logits_of(case, case["softcap"])
    columns, diagonals = (torch.zeros(batch, heads, n_k, dtype=torch.float64) for _ in range(2))
    for b in range(batch):
        real = real_rows(case, b)
        for entry in case["rows"][b].tolist():
            if not 0 <= entry < len(real):
                continue
            at, low, keys = seen(case, b, real[entry])
            if not keys:
                continue
            p = s[b, :, real[entry], keys].softmax(-1)
            index = torch.tensor(keys)
            columns[b, :, index - low] += p
            # without causality neither side has a common position: a query is its row number, a key its place among the real ones
            back = at - index if case["causal"] else entry - (index - low)
            kept = (back >= 0) & (back < n_k)
            diagonals[b, :, back[kept]] += p[:, kept]
    return tuple(torch.stack([x.sum(-1) for x in sums.split(case["block"], -1)], -1) for sums in (columns, diagonals))


def strided_truth(case: dict) -> torch.Tensor:
    """One query block at a time, over lists of sampled tokens."""
    batch, heads, n_q, _ = case["q"].shape
    n_k, stride, bq, bk = case["k"].shape[2], case["stride"], case["block_q"], case["block_k"]
    s, score = logits_of(case), torch.zeros(batch, heads, -(-n_q // bq), -(-n_k // bk), dtype=torch.float64)
    for b in range(batch):
        real = real_rows(case, b)
        low = int(case["first"][b]) if case["first"] is not None else 0
        span_k = (int(case["last"][b]) if case["last"] is not None else n_k) - low
        for t, row in enumerate(real):
            i = t // bq
            residue = i % stride if case["rotate"] else 0
            in_block = min(len(real) - i * bq, bq)
            if t % bq % stride != min(residue, in_block - 1) % stride or t % bq < min(residue, in_block - 1):
                continue
            sampled = set(range(low + min(residue, span_k - 1), low + span_k, stride)) if span_k else set()
            keys = [p for p in seen(case, b, row)[2] if p in sampled]
            if keys:
                block = ((torch.tensor(keys) - low) // bk).expand(heads, -1)
                score[b, :, i] = score[b, :, i].scatter_reduce(1, block, s[b, :, row, keys].softmax(-1), "amax")
    return score


def as_good(got: torch.Tensor, torchs: torch.Tensor, truth: torch.Tensor, times: float = 1.0) -> None:
    assert_as_good_as_torch(got, torchs, truth, floor=4e-6 * times)


# -- against float64 ----------------------------------------------------------------------------------------------------


@op_backends("window_score")
@settings(max_examples=12)
@given(case=window_cases())
def test_window_sums_are_as_accurate_as_torch(backend, case):
    args = window_args(case)
    skip_unless(window_score, backend, *args)
    truth, torchs = window_truth(case), window_score.reference(*args)
    with use_backend(backend):
        got = window_score(*args)
    for ours, theirs, exact in zip(got, torchs, truth, strict=True):
        assert ours.dtype == torch.float32
        # a sum of up to as many probabilities as there are probes
        as_good(ours, theirs, exact, max(1.0, exact.max().item()))
        assert (ours[exact == 0] == 0).all(), "what no probe sees must be exactly 0"


@op_backends("strided_score")
@settings(max_examples=12)
@given(case=strided_cases())
def test_strided_scores_are_as_accurate_as_torch(backend, case):
    args = strided_args(case)
    skip_unless(strided_score, backend, *args)
    truth, torchs = strided_truth(case), strided_score.reference(*args)
    with use_backend(backend):
        got = strided_score(*args)
    assert got.dtype == torch.float32
    as_good(got, torchs, truth)
    assert (got[truth == 0] == 0).all(), "what nothing sampled sees must be exactly 0"


@functools.cache
def long_windows() -> list[tuple]:
    """Longer than a tile of keys, more probes than a task takes at a time, a ragged end, and probes that see none of a tile."""
    found = []
    for heads, kv_heads, d, window, causal, block in (
        (6, 1, 24, 0, True, 1), (3, 3, 40, 300, True, 1), (4, 2, 64, 0, False, 1),
        (6, 1, 24, 0, True, 128), (3, 3, 40, 300, True, 16), (1, 1, 32, 0, True, 512), (3, 1, 32, 0, True, 100),
        (4, 2, 64, 0, False, 64),
    ):  # fmt: skip
        q, k = randn(1, heads, 900, d, torch.bfloat16, "tokens_first", 0), randn(1, kv_heads, 1003, d, torch.bfloat16, "plain", 1)
        rows = torch.tensor([[*range(5, 110), *range(560, 600), 899]], dtype=torch.int32)
        case = dict(q=q, k=k, rows=rows, scale=d**-0.5, q_start=103 if causal else 0, causal=causal, window=window, softcap=0.0,
                    first=None, last=None, block=block)
        found.append((window_args(case), window_truth(case)))
    return found


@op_backends("window_score")
def test_window_sums_over_many_tiles_are_right(backend):
    for args, truth in long_windows():
        skip_unless(window_score, backend, *args)
        with use_backend(backend):
            got = window_score(*args)
        for ours, exact in zip(got, truth, strict=True):
            torch.testing.assert_close(ours.double(), exact, atol=4e-6, rtol=1e-5)


@functools.cache
def long_strides() -> list[tuple]:
    """Longer than a tile of sampled keys, blocks of more lanes than a task takes at a time, and of fewer than one register."""
    found = []
    for heads, kv_heads, d, stride, block_q, window, rotate in ((2, 1, 24, 2, 300, 0, False), (1, 1, 40, 4, 8, 333, True)):
        q, k = randn(1, heads, 700, d, torch.bfloat16, "tokens_first", 0), randn(1, kv_heads, 803, d, torch.bfloat16, "plain", 1)
        case = dict(q=q, k=k, block_q=block_q, block_k=10 * stride, stride=stride, scale=2 * d**-0.5, q_start=103, causal=True,
                    window=window, rotate=rotate, first=None, last=None)
        found.append((strided_args(case), strided_truth(case)))
    return found


@op_backends("strided_score")
def test_strided_scores_over_many_tiles_are_right(backend):
    for args, truth in long_strides():
        skip_unless(strided_score, backend, *args)
        with use_backend(backend):
            got = strided_score(*args)
        torch.testing.assert_close(got.double(), truth, atol=4e-6, rtol=1e-5)


# -- what must hold whatever the numbers are ------------------------------------------------------------------------------


@op_backends("window_score")
@settings(max_examples=6)
@given(case=window_cases())
def test_the_mass_is_the_number_of_probes(backend, case):
    args = window_args(case)
    skip_unless(window_score, backend, *args)
    with use_backend(backend):
        columns, diagonals = window_score(*args)
    for b in range(case["q"].shape[0]):
        real = real_rows(case, b)
        probed = [real[r] for r in case["rows"][b].tolist() if 0 <= r < len(real)]
        probes = sum(bool(seen(case, b, row)[2]) for row in probed)
        torch.testing.assert_close(columns[b].sum(-1), torch.full_like(columns[b, :, 0], probes), rtol=1e-5, atol=0)
        if case["causal"]:
            torch.testing.assert_close(diagonals[b].sum(-1), columns[b].sum(-1), rtol=1e-5, atol=0)


@op_backends("window_score")
@settings(max_examples=6)
@given(case=window_cases(), data=st.data())
def test_a_future_key_leaves_the_sums_of_earlier_probes_alone(backend, case, data):
    n_k, n_q = case["k"].shape[2], case["q"].shape[2]
    case |= {"causal": True, "q_start": n_k - n_q, "first": None, "last": None}
    p = data.draw(st.integers(0, n_k - 1))
    case["rows"] = torch.arange(min(n_q, max(0, p - case["q_start"])), dtype=torch.int32).repeat(case["q"].shape[0], 1)
    skip_unless(window_score, backend, *window_args(case))
    changed = {**case, "k": case["k"].clone()}
    changed["k"][:, :, p] = math.nan
    with use_backend(backend):
        for before, after in zip(window_score(*window_args(case)), window_score(*window_args(changed)), strict=True):
            assert torch.equal(before, after)


@op_backends("strided_score")
@settings(max_examples=6)
@given(case=strided_cases(), data=st.data())
def test_a_future_key_leaves_earlier_query_blocks_alone(backend, case, data):
    n_k, n_q = case["k"].shape[2], case["q"].shape[2]
    case |= {"causal": True, "q_start": n_k - n_q, "first": None, "last": None}
    skip_unless(strided_score, backend, *strided_args(case))
    p = data.draw(st.integers(0, n_k - 1))
    changed = {**case, "k": case["k"].clone()}
    changed["k"][:, :, p] = 7.0
    untouched = max(0, p - case["q_start"]) // case["block_q"]
    with use_backend(backend):
        before, after = strided_score(*strided_args(case)), strided_score(*strided_args(changed))
    assert torch.equal(before[:, :, :untouched], after[:, :, :untouched])


@op_backends("window_score", "strided_score")
@settings(max_examples=6)
@given(windowed=window_cases(), strided=strided_cases())
def test_a_padded_row_equals_the_row_alone(backend, windowed, strided):
    for op, case, arguments in ((window_score, windowed, window_args), (strided_score, strided, strided_args)):
        skip_unless(op, backend, *arguments(case))
        (batch, _, n_q, _), n_k = case["q"].shape, case["k"].shape[2]
        with use_backend(backend):
            together = op(*arguments(case))
            for b, span in enumerate(spans(batch, n_q, n_k, case["q_start"], case["causal"], case["first"], case["last"])):
                if not span.n_q or not span.n_k:
                    continue
                alone = {**case, "first": None, "last": None, "q_start": span.q_start, "q": case["q"][b : b + 1, :, span.rows],
                         "k": case["k"][b : b + 1, :, span.keys]}
                if op is window_score:
                    alone["rows"] = case["rows"][b : b + 1]
                    pairs = list(zip(together, op(*arguments(alone)), strict=True))
                    pairs = pairs if case["causal"] else pairs[:1]  # distances past the last real key exist only beside padding
                else:
                    pairs = [(together, op(*arguments(alone)))]
                for whole, single in pairs:
                    part = whole[b : b + 1, :, : single.shape[2]]
                    part = part[..., : single.shape[3]] if op is strided_score else part
                    if backend == "reference":  # torch's matrix product rounds by shape
                        torch.testing.assert_close(part, single, atol=1e-5, rtol=1e-4)
                    else:
                        assert torch.equal(part, single)
                    assert whole[b].count_nonzero() == part.count_nonzero(), "padding is exactly 0"


@op_backends("window_score", "strided_score")
def test_neither_threads_nor_neighbouring_heads_change_a_bit(backend):
    q, k = randn(2, 6, 300, 64, torch.bfloat16, "tokens_first", 0), randn(2, 2, 300, 64, torch.bfloat16, "plain", 1)
    rows = torch.arange(10, 250, dtype=torch.int32).repeat(2, 1)
    by_block = (rows, 0.125, 0, True, 0, 0.0, None, None, 32)
    calls = (window_score, (rows, 0.125)), (window_score, by_block), (strided_score, (64, 32, 4, 0.125, 0, True, 0, True))
    for op, rest in calls:
        skip_unless(op, backend, q, k, *rest)
        if backend == "reference":
            pytest.skip("reference: torch's matrix product rounds by shape and threads")
        found = []
        with use_backend(backend):
            for threads in (1, 2):
                with running_on(threads):
                    found.append(op(q, k, *rest))
            group = op(q[:, 3:], k[:, 1:], *rest)
        for one, two, part in zip(*(x if isinstance(x, tuple) else (x,) for x in (*found, group)), strict=True):
            assert torch.equal(one, two) and torch.equal(one[:, 3:], part)


@op_backends("window_score", "strided_score")
def test_a_query_does_not_depend_on_which_others_are_scored_with_it(backend):
    """A probe among others, and a chunk of a prompt, under a sliding window: bit for bit what they are alone."""
    q, k = randn(1, 2, 1200, 64, torch.float32, "plain", 0), randn(1, 1, 1200, 64, torch.float32, "plain", 1)
    one, two = (torch.tensor([rows], dtype=torch.int32) for rows in ([1000], [31, 1000]))
    rest = 0.125, 0, True, 500
    skip_unless(window_score, backend, q, k, one, *rest)
    blocks = *rest, 0.0, None, None, 32
    with use_backend(backend):
        alone, among = (window_score(q, k, rows, *rest)[0][..., 501:] for rows in (one, two))
        block_alone, block_among = (window_score(q, k, rows, *blocks)[0][..., 16:] for rows in (one, two))
        whole = strided_score(q, k, 16, 32, 4, 0.125, 0, True, 500)
        chunk = strided_score(q[:, :, 848:], k, 16, 32, 4, 0.125, 848, True, 500)
    same = torch.testing.assert_close if backend == "reference" else lambda a, b: torch.testing.assert_close(a, b, atol=0, rtol=0)
    same(alone, among)
    same(block_alone, block_among)
    same(chunk, whole[:, :, 848 // 16 :])


@op_backends("window_score", "strided_score")
def test_a_row_of_nan_or_infinite_logits_adds_nothing(backend):
    q, k = randn(1, 2, 70, 64, torch.float32, "plain", 0), randn(1, 1, 70, 64, torch.float32, "plain", 1)
    q[0, 0, 40], q[0, 0, 48] = math.nan, math.inf
    rows = torch.tensor([[40, 48, 60]], dtype=torch.int32)
    skip_unless(window_score, backend, q, k, rows, 0.125)
    with use_backend(backend):
        columns, diagonals = window_score(q, k, rows, 0.125)
        score = strided_score(q, k, 8, 8, 4, 0.125)
    for sums in (columns, diagonals):
        assert sums.sum(-1)[0].tolist() == pytest.approx([1, 3], rel=1e-5)
    assert score.isfinite().all() and (score[0, 0].diagonal() > 0).all(), "the other query of the block still counts"


@op_backends("strided_score")
def test_rotation_finds_a_key_that_a_fixed_residue_never_looks_at(backend):
    """A needle at key 33 that every query wants: residue 1 of 4 alone samples it."""
    q, k = torch.ones(1, 1, 256, 64), torch.zeros(1, 1, 256, 64)
    k[0, 0, 33] = 8.0
    skip_unless(strided_score, backend, q, k, 32, 32, 4, 0.125)
    with use_backend(backend):
        fixed, turned = (strided_score(q, k, 32, 32, 4, 0.125, rotate=rotate)[0, 0] for rotate in (False, True))
    assert (fixed[2:, 1] < 0.1).all()
    assert turned[:, 1].gt(0.9).tolist() == [i % 4 == 1 for i in range(8)]


Q, K = torch.zeros(2, 4, 64, 32), torch.zeros(2, 2, 64, 32)


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: window_score(Q, K, torch.zeros(2, 3), 1.0), "rows must be int32 [2, R]"),
    (lambda: window_score(Q, K, torch.zeros(1, 3, dtype=torch.int32), 1.0), "rows must be int32 [2, R]"),
    (lambda: window_score(Q, K, torch.zeros(2, 3, dtype=torch.int32), 1.0, softcap=-1.0), "softcap=-1.0 is negative"),
    (lambda: window_score(Q, K, torch.zeros(2, 3, dtype=torch.int32), 1.0, block=0), "block=0 must be 1 or more"),
    (lambda: strided_score(Q, K, 16, 16, 3, 1.0), "block_q=16 is not a multiple of stride=3"),
    (lambda: strided_score(Q, K, 12, 16, 3, 1.0), "block_k=16 is not a multiple of stride=3"),
    (lambda: strided_score(Q, K, 16, 16, 0, 1.0), "stride=0 must be positive"),
    (lambda: strided_score(Q, K[:, :, :60], 16, 16, 4, 1.0), "lie past the 60 keys"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ContractError) as error:
        call()
    assert sentence in str(error.value)
