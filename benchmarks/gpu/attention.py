"""Part ``attention``: block_sparse_attention by every backend of the GPU beside dense SDPA and FlexAttention, one layer, causal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from sparse_attn.ops import OPS, use_backend
from sparse_attn.types import BlockIndex

from .. import kernels, measure
from ..cases import Shape, random_lists, visible_pairs
from .bars import judged, mark
from .ceilings import dense_calls, fastest
from .units import Bench, Unit, forced, sentence

DENSITIES = (1.0, 0.1, 0.05)
_OP = OPS["block_sparse_attention"]


def arguments(shape: Shape, index: BlockIndex) -> tuple:
    """Of the op, for these lists."""
    return (*shape.tensors, index.counts, index.indices, *index.block, shape.scale)


def gated(bench: Bench, shape: Shape, index: BlockIndex, said: list[str]) -> dict[str, dict]:
    """Error fields of every backend that takes these lists and is right; the others say why into ``said``."""
    found = {}
    for backend in bench.check_backend(_OP, *arguments(shape, index)):
        try:
            with use_backend(backend):
                found[backend] = kernels.attention_errors(shape, index)
        except kernels.GateError as error:
            said.append(f"{backend} is not timed: {sentence(error)}")
    return found


def timed(bench: Bench, n: int) -> str | None:
    """All densities of one length, in the same rounds as dense SDPA."""
    shape, wrong = bench.shape(n), []
    calls: dict[str, Callable] = dense_calls(shape)
    cases = {}
    for density in DENSITIES:
        index = random_lists(shape, density)
        call = functools.partial(_OP, *arguments(shape, index))
        flop = 4.0 * shape.head_dim * visible_pairs(index)
        for backend, errors in gated(bench, shape, index, wrong).items():
            name = f"{backend} at {density}"
            calls[name] = forced(backend, call)
            cases[name] = backend, {**shape.fields(), "density": round(index.density(), 4), "wanted_density": density, "flop": flop,
                                    **errors}
    us, broken = bench.rounds(calls)
    best = fastest(us, "sdpa")
    for name in [name for name in us if name.startswith("sdpa")]:
        flop = 2.0 * shape.heads * shape.head_dim * n * (n + 1)
        bench.record(us[name], op="sdpa", backend=name.split()[1], **shape.fields(), flop=flop)
    for name, (backend, fields) in cases.items():
        if name not in us:
            continue
        whole = f"{backend} at {DENSITIES[0]}"
        bar = {}
        if fields["wanted_density"] == DENSITIES[0]:
            bar = mark(f"dense {backend}", measure.pairwise(us[best], us[name])) if best and backend in ("triton", "cuda") else {}
        elif whole in us:
            bar = mark("proportional", 1 / (fields["density"] * measure.pairwise(us[whole], us[name])))
        row = bench.record(us[name], best or None, us.get(best), op="block_sparse_attention", backend=backend, **fields, **bar)
        if bar:
            bench.say(judged(row))
    if wrong:
        raise kernels.GateError("; ".join(wrong))
    return "; ".join(broken) or None


def flex(bench: Bench, density: float) -> str | None:
    """Compiled FlexAttention over the same lists as ours."""
    shape = bench.shape(bench.sizes.flex)
    index = random_lists(shape, density)
    given = arguments(shape, index)
    names = bench.check_backend(_OP, *given)
    calls = {"flex": kernels.flex(shape, index), **{name: forced(name, functools.partial(_OP, *given)) for name in names}}
    us, broken = bench.rounds(calls)
    for name in [name for name in names if name in us]:
        bench.record(us[name], "flex" if "flex" in us else None, us.get("flex"), op="block_sparse_attention", backend=name,
                     **shape.fields(), density=round(index.density(), 4), wanted_density=density,
                     flop=4.0 * shape.head_dim * visible_pairs(index))
    return "; ".join(broken) or None


def units(bench: Bench) -> Iterator[Unit]:
    for n in bench.sizes.lengths:
        yield Unit(f"{n} tokens", lambda n=n: timed(bench, n))
    if bench.sizes.flex:
        for density in DENSITIES[:2]:
            yield Unit(f"flex at {density}, {bench.sizes.flex} tokens", lambda density=density: flex(bench, density))
