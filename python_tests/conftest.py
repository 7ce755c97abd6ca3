"""Outputs start as NaN, seeds are fixed, and every op runs on every backend that this machine has."""

import contextlib

import hypothesis
import pytest
import torch
from rows import DTYPES, plain_args

from sparse_attn.ops import OPS

hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def poisoned_and_seeded():
    """torch.empty comes back full of NaN, so an element that a kernel forgot to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    with running_on(torch.get_num_threads()):  # commands set it
        yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def running_on(threads: int):
    """So many threads, then as many as before: with more than its core, a process waits for its neighbours at every op."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def op_backends(*op_names: str):
    """Parametrise a test over every backend of the named ops, the reference included."""
    names = dict.fromkeys(name for op in op_names for name in OPS[op].names)
    return pytest.mark.parametrize("backend", list(names))


def skip_unless(op, backend: str, *args, **kwargs) -> None:
    """Skip with the backend's own sentence; of generated arguments only those that it refuses, unless the machine lacks it."""
    refusal = op.explain(*args, **kwargs).get(backend, "this op has no such backend")
    if refusal is None:
        return
    machine = [op.explain(*plain_args(op.name, dtype)).get(backend, refusal) for dtype in DTYPES]
    if all(sentence is not None for sentence in machine):
        pytest.skip(f"{backend}: {machine[0]}")
    if not hypothesis.currently_in_test_context():
        pytest.skip(f"{backend}: {refusal}")
    hypothesis.reject()


def skip_unless_it_looks(backend: str) -> None:
    """Skip where a kernel is not asked to refuse what a tensor holds: on a GPU looking would cost a synchronisation."""
    if backend.startswith("cuda"):
        pytest.skip(f"{backend}: does not look at what tensors hold; test_cuda.py has what it does instead")
