"""Chorus against its own description in plain Python, float64, one unpadded sequence."""

import math

import pytest
import torch
from oracle import antidiagonal_shares, kept_blocks
from rows import randn

from sparse_attn.errors import ContractError, NotServed
from sparse_attn.patterns import Chorus
from sparse_attn.types import LayerContext, ResidentKV


def band_shares(q, k, block, scale, q_start, channels):
    """Softmax between the block means of some channels, one head, at the band's temperature."""
    means = [[x[i : i + block].mean(0) for i in range(0, len(x), block)] for x in (q, k)]
    power = lambda blocks, at: sum(float(m[at].square().mean()) for m in blocks) / len(blocks)  # noqa: E731
    every = range(q.shape[1])
    shrunk = power(means[0], channels) / power(means[0], every) * power(means[1], channels) / power(means[1], every)
    sharp = scale * q.shape[1] / len(channels) / math.sqrt(shrunk)
    rows = []
    for i, a in enumerate(means[0]):
        last = (q_start + min((i + 1) * block, len(q)) - 1) // block
        weights = [math.exp(sharp * float(a[channels] @ b[channels])) if j <= last else 0.0 for j, b in enumerate(means[1])]
        rows.append([w / sum(weights) for w in weights])
    return rows


def expected(q, k, c: Chorus, scale: float, q_start: int):
    """Kept blocks ``[head][query block]`` and columns ``[head]`` by the docstring's words."""
    heads, n_q, dim = q.shape
    n_k, group = k.shape[1], heads // k.shape[0]
    q_blocks, k_blocks = -(-n_q // c.block), -(-n_k // c.block)
    half = dim // 2
    fast = [*range(half // 2), *range(half, half + half // 2)]
    slow = [*range(half // 4, half), *range(half + half // 4, dim)]
    ranks, budgets, columns = [], [], []
    for h in range(heads):
        keys = k[h // group]
        p = [(q[h, t] @ keys[: q_start + t + 1].T * scale).softmax(-1) for t in range(n_q)]
        groups, half = [], c.tail // 2
        for s in range(1, c.probes):
            i = max(s * q_blocks // c.probes - 1, 0)
            rows = list(range(i * c.block, min((i + 1) * c.block, n_q)))
            groups.append(sorted({*rows[:half], *rows[half:][-(c.tail - half) :]}))
        groups += [[t for t in range(n_q - (g + 1) * c.tail, n_q - g * c.tail) if t >= 0] for g in range(-(-c.window // c.tail))]
        probed = [rows[-1] // c.block if rows else 0 for rows in groups]
        mass = torch.zeros(len(groups), n_k, dtype=torch.float64)
        for s, rows in enumerate(groups):
            for t in rows:
                mass[s, : len(p[t])] += p[t]
            mass[s] /= mass[s].sum().clamp(min=1e-300)
        mean = mass.mean(0)
        heavy = sorted((j for j in range(c.sink_tokens, n_k) if mean[j] >= c.column_mass), key=lambda j: (-float(mean[j]), j))
        own_columns = sorted([*range(c.sink_tokens), *heavy[: c.columns - c.sink_tokens]])
        columns.append(own_columns)
        exact = [[sum(float(mass[s, j]) for j in range(b * c.block, min((b + 1) * c.block, n_k)) if j not in own_columns)
                  for b in range(k_blocks)] for s in range(len(groups))]
        need = 0
        for s, i in enumerate(probed):
            own = (q_start + i * c.block) // c.block
            last = (q_start + min((i + 1) * c.block, n_q) - 1) // c.block
            counted = list(exact[s])
            counted[own] += float(mass[s].sum()) - sum(exact[s])
            need = max(need, len(kept_blocks(counted, list(range(last + 1)), list(range(own, last + 1)), c.threshold, 0)))
        budgets.append(k_blocks if c.threshold >= 1 else need + c.slack)
        owns = [(q_start + i * c.block) // c.block for i in probed]
        everybody = [sum(row[b] * (own + 1) for row, own in zip(exact, owns)) / (k_blocks * max(1, sum(own >= b for own in owns)))
                     for b in range(k_blocks)]
        far = antidiagonal_shares(q[h], keys, c.block, c.block, c.stride, scale, q_start, True, 0, True)
        bands = [band_shares(q[h], keys, c.block, scale, q_start, band) for band in (fast, slow)]
        rank = []
        for i in range(q_blocks):
            at = [s for s, j in enumerate(probed) if j == i]
            said = [max(exact[s][b] for s in at) for b in range(k_blocks)] if at else everybody
            rank.append([said[b] + float(far[i, b]) + (bands[0][i][b] + bands[1][i][b]) / 2 for b in range(k_blocks)])
        ranks.append(rank)
    kept = []
    for h in range(heads):
        together = range(h // group * group, (h // group + 1) * group)
        lists = []
        for i in range(q_blocks):
            own, last = (q_start + i * c.block) // c.block, (q_start + min((i + 1) * c.block, n_q) - 1) // c.block
            total = [sum(ranks[g][i][b] for g in together) for b in range(k_blocks)]
            lists.append(kept_blocks(total, list(range(last + 1)), list(range(own, last + 1)), None, budgets[h]))
        kept.append(lists)
    return kept, columns


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("n_q", "n_k"), [(150, 150), (64, 160), (37, 150), (20, 20)])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
def test_what_is_read_is_what_the_docstring_says(kv_heads, n_q, n_k, threshold):
    chorus = Chorus(threshold, stride=4, block=16, probes=3, tail=5, window=8, columns=7, column_mass=0.02, sink_tokens=2)
    q, k = randn(1, 4, n_q, 16, torch.float64, "plain", 3) * 2, randn(1, kv_heads, n_k, 16, torch.float64, "plain", 4)
    plan = chorus.select(q, ResidentKV(k, k), LayerContext(0, 0.25, n_k - n_q))
    kept, columns = expected(q[0], k[0], chorus, 0.25, n_k - n_q)
    for h in range(4):
        assert [j for j in plan.columns[0, h].tolist() if j >= 0] == columns[h]
        for i, want in enumerate(kept[h]):
            assert plan.blocks.indices[0, h, i, : plan.blocks.counts[0, h, i]].tolist() == want


def test_a_copied_run_is_found_between_the_probes_at_even_and_odd_distances():
    found = []
    for seed, distance in enumerate((992, 1025, 1500, 2001)):
        q, k = (randn(1, 1, 4096, 128, torch.float32, "plain", s) for s in (10 * seed, 10 * seed + 1))
        at = 3300  # no query block that probes
        q[:, :, at : at + 64] = 3 * k[:, :, at - distance : at - distance + 64]
        blocks = Chorus(threshold=0.1).select(q, ResidentKV(k, k), LayerContext(0, 128**-0.5, 0)).blocks
        row, column = (at + 40) // 64, (at - distance + 40) // 64
        found.append(bool(blocks.to_mask()[0, 0, row, column]))
        assert blocks.density() < 0.25
    assert all(found)


@pytest.mark.parametrize(("field", "sentence"), [
    (dict(threshold=1.5), "threshold=1.5 is outside"), (dict(stride=3), "multiple of stride=3"), (dict(probes=0), "probes=0"),
    (dict(columns=2), "columns=2 cannot hold sink_tokens=4"), (dict(slack=-1), "slack=-1"),
    (dict(column_mass=0), "column_mass=0"),
])  # fmt: skip
def test_bad_fields_get_a_sentence(field, sentence):
    with pytest.raises(ContractError) as error:
        Chorus(**field)
    assert sentence in str(error.value)


def test_what_it_cannot_serve_is_said():
    q = torch.zeros(1, 1, 64, 17)
    with pytest.raises(NotServed, match="even head_dim, got 17"):
        Chorus().select(q, ResidentKV(q, q), LayerContext(0, 1.0, 0))
    with pytest.raises(NotServed, match="causal"):
        Chorus().select(q, ResidentKV(q, q), LayerContext(0, 1.0, 0, causal=False))
