"""Do antidiagonal scores find what sits at an even token distance?

    python -m benchmarks.parity [--json FILE]

For an even stride an antidiagonal pairs queries and keys at odd distances only. Queries and keys here are Gaussian; planted
queries are exact copies of earlier keys: one token, or a run of tokens, an even or an odd distance away. Recall is the share of
planted query blocks whose list contains the block of the copied keys, when every query block may read ``--density`` of the
blocks. Every head of one call is one trial.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from sparse_attn import ops

PLANTS = {"one token": 1, "run of 32": 32, "run of 64": 64}


def plant(n: int, n_q: int, dim: int, trials: int, run: int, odd: bool, seed: int):
    """Random q (the last n_q tokens) and k with one copied run per head; also where its first query and key are."""
    random = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, trials, tokens, dim, generator=random) for tokens in (n_q, n))
    query = torch.randint(0, n_q - run + 1, (trials,), generator=random)
    distance = torch.randint(1, (n - n_q) // 2 - run, (trials,), generator=random) * 2 + odd + n_q
    key = (n - n_q + query - distance).clamp(min=0)
    key += (n - n_q + query - key) % 2 != odd  # a distance cut short at token 0 keeps its parity
    for h in range(trials):
        q[0, h, query[h] : query[h] + run] = k[0, h, key[h] : key[h] + run]
    return q, k, query, key


def recall(q, k, query, key, run: int, stride: int, alternate: bool, block: int, top_k: int) -> float:
    """Share of (head, planted query block) pairs whose list has every key block that this query block copies from."""
    n_q, n = q.shape[2], k.shape[2]
    score = ops.antidiagonal_score(q, k, block, block, stride, q.shape[3] ** -0.5, n - n_q, alternate=alternate)
    counts, indices = ops.select_blocks(score, None, torch.full((1, 1, 1), top_k, dtype=torch.int32), block, block, n_q, n, n - n_q)
    found, wanted = 0, 0
    for h, (first, source) in enumerate(zip(query.tolist(), key.tolist())):
        needs = {((first + i) // block, (source + i) // block) for i in range(run)}
        wanted += len(needs)
        found += sum(want in indices[0, h, row].tolist() for row, want in needs)
    return found / wanted


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=8192, help="key tokens")
    parser.add_argument("--queries", type=int, default=1024, help="query tokens, the last ones")
    parser.add_argument("--dim", type=int, default=128, help="head dimension")
    parser.add_argument("--trials", type=int, default=32, help="planted heads per case")
    parser.add_argument("--strides", default="4,8,16", help="comma list")
    parser.add_argument("--block", type=int, default=128, help="tokens per block")
    parser.add_argument("--density", type=float, default=0.1, help="share of all key blocks that a query block may read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append one JSON line per case to this file")
    args = parser.parse_args(argv)
    if args.n < 2 * args.queries + 256 or args.queries < max(PLANTS.values()):
        parser.error(f"--n {args.n} with --queries {args.queries} leaves no room to plant; use at least 64 queries and n > 2 queries")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    top_k = max(3, round(args.density * args.n / args.block))
    print(f"{args.n} keys, blocks of {args.block}, {top_k} of {-(-args.n // args.block)} blocks read, {args.trials} trials a case")
    print(f"{'copied':<10} {'distance':<8} {'stride':>6} {'recall':>7} {'alternate':>9}")
    rows = []
    for (name, run), odd, stride in itertools.product(PLANTS.items(), (False, True), map(int, args.strides.split(","))):
        planted = plant(args.n, args.queries, args.dim, args.trials, run, odd, args.seed)
        plain, alternate = (recall(*planted, run, stride, on, args.block, top_k) for on in (False, True))
        print(f"{name:<10} {'odd' if odd else 'even':<8} {stride:>6} {plain:>7.2f} {alternate:>9.2f}", flush=True)
        rows += [
            dict(copied=name, run=run, distance="odd" if odd else "even", stride=stride, alternate=on, recall=value, n=args.n,
                 block=args.block, top_k=top_k, dim=args.dim, trials=args.trials, seed=args.seed, torch=torch.__version__)
            for on, value in ((False, plain), (True, alternate))
        ]  # fmt: skip
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
