"""Which backend runs, who may be forced, and what is said when one refuses."""

import warnings

import pytest
import torch

from sparse_attn.errors import NoBackendError
from sparse_attn.ops import select_blocks, use_backend
from sparse_attn.ops.registry import Backend, Op

ONE = torch.ones(3)


def make_op(name: str) -> Op:
    """A private op with a picky and a willing backend, outside the real table."""
    from sparse_attn.ops import registry

    def doubled(x: torch.Tensor, times: int = 2) -> torch.Tensor:
        return x * times

    doubled.__name__ = name
    made = Op(doubled)
    registry.OPS.pop(name)
    made.backends.append(Backend("picky", lambda x, times: x * 0 + 10, lambda x, times: None if times == 7 else f"needs times 7, got {times}"))
    made.backends.append(Backend("willing", lambda x, times, out=None: x * 0 + 20 + times, lambda x, times: None))
    return made


OP = make_op("doubled_for_tests")


def test_the_first_backend_that_accepts_runs():
    assert OP(ONE, 7)[0] == 10 and OP(ONE, 3)[0] == 23
    assert OP.chosen(ONE, 7) == "picky" and OP.chosen(ONE) == "willing"


def test_arguments_that_equal_their_default_reach_the_backend():
    assert OP(ONE, 2)[0] == 22 and OP(ONE)[0] == 22 and OP(ONE, times=2)[0] == 22


def test_explain_gives_every_verdict_in_order():
    assert OP.explain(ONE) == {"picky": "needs times 7, got 2", "willing": None, "reference": None}


def test_a_forced_backend_that_refuses_raises_and_does_not_fall_back(monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", "picky")
    with pytest.raises(NoBackendError, match="doubled_for_tests cannot run: picky: needs times 7, got 2"):
        OP(ONE)
    assert OP(ONE, 7)[0] == 10


def test_a_backend_that_does_not_exist_is_named_with_those_that_do(monkeypatch):
    with pytest.raises(NoBackendError, match="cutlass: no such backend; there are .*reference"), use_backend("cutlass"):
        pass
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", "cutlass")
    with pytest.raises(NoBackendError, match="cutlass: no such backend; this op has picky, willing, reference"):
        OP(ONE)


def test_use_backend_ends_with_its_block_even_on_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        assert OP(ONE, 7)[0] == 7
        1 / 0  # noqa: B018
    assert OP(ONE, 7)[0] == 10


def test_meta_tensors_need_no_backend():
    assert torch.ops.sparse_attn.select_blocks.default is not None
    score = torch.empty(1, 2, 4, 4, device="meta")
    counts, indices = select_blocks(score, None, torch.empty(1, 1, 1, dtype=torch.int32, device="meta"), 16, 16, 64, 64)
    assert counts.shape == (1, 2, 4) and indices.shape == score.shape and counts.device.type == "meta"


def test_no_warning_on_a_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OP(ONE, 3)
