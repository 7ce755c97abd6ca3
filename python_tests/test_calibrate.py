"""Calibration: searches find what was planted, profiles say whose they are, and the command line ends in a usable file."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from oracle import plan_mask
from rows import randn

transformers = pytest.importorskip("transformers")

import sparse_attn  # noqa: E402
from benchmarks.needle import runner  # noqa: E402
from sparse_attn import ContractError, XAttention  # noqa: E402
from sparse_attn import profile as profiles  # noqa: E402
from sparse_attn.calibrate import calibrate, main, read_texts  # noqa: E402
from sparse_attn.hf import model_id  # noqa: E402
from sparse_attn.patterns.choose import empty_index  # noqa: E402
from sparse_attn.profile import ModelId, Profile  # noqa: E402
from sparse_attn.search import Exact, PatternSearch, RetrievalSearch, ThresholdSearch  # noqa: E402
from sparse_attn.types import LayerContext, ReadPlan, ResidentKV  # noqa: E402


def tiny(layers: int = 2, seed: int = 0):
    """A random Llama: 4 heads on 2 of 16."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
                                      num_key_value_heads=2, head_dim=16, max_position_embeddings=1024)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 2.0 * p.shape[-1] ** -0.5)
    return model


def texts(count: int = 2, n: int = 400) -> list[torch.Tensor]:
    return list(torch.randint(1, 128, (count, 1, n), generator=torch.Generator().manual_seed(7)))


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def found(model):
    return calibrate(model, texts(), ThresholdSearch(mass=0.8, block=64))


def call(q, k, layer: int = 0, **context):
    """A layer's call as a search sees it; values are random."""
    v = randn(*k.shape, torch.float32, "plain", 9)
    return q, ResidentKV(k, v), LayerContext(layer, q.shape[3] ** -0.5, k.shape[2] - q.shape[2], **context)


def random_call(n_q: int = 200, n_k: int = 200, heads: int = 4, kv_heads: int = 2, sharp: float = 3.0, **context):
    q, k = (randn(1, h, n, 32, torch.float32, "plain", h) for h, n in ((heads, n_q), (kv_heads, n_k)))
    return call(sharp * q, k, **context)


def oracle_mass(q, kv, ctx) -> torch.Tensor:
    """float64 ``[H, Nq, Nk]`` attention probabilities, a learned sink's share left out."""
    k = kv.k.double().repeat_interleave(q.shape[1] // kv.k.shape[1], 1)
    logits = q.double() @ k.mT * ctx.scale
    if ctx.softcap:
        logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
    back = torch.arange(q.shape[2])[:, None] + ctx.q_start - torch.arange(k.shape[2])
    hidden = (back < 0) | ((back >= ctx.window) if ctx.window else False)
    logits = logits.masked_fill(hidden, -math.inf)
    if ctx.sinks is not None:
        logits = torch.cat([logits, ctx.sinks.double()[None, :, None, None].expand(1, -1, q.shape[2], 1)], -1)
    return logits.softmax(-1)[0, :, :, : k.shape[2]]


CONTEXTS = [{}, dict(window=40), dict(softcap=4.0), dict(sinks=torch.tensor([1.0, -1.0, 3.0, 0.0]))]


# -- exact mass -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_q", [200, 77])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_retained_is_the_mass_of_what_the_plan_reads(n_q, context):
    q, kv, ctx = random_call(n_q, **context)
    index = empty_index(q, kv, ctx, 32, heads=2)
    keep = torch.rand(index.reachable().expand(-1, 2, -1, -1).shape) < 0.4
    plan = ReadPlan(index.where(keep & index.reachable()), near=torch.tensor([[3, 9]] * 4, dtype=torch.int32), dense_rows=5)
    case = dict(q=q, k=kv.k, v=kv.v, q_start=ctx.q_start, causal=True, window=ctx.window, first=None, last=None)
    p, seen = oracle_mass(q, kv, ctx), plan_mask(case, plan)[0]
    first_row = 120 - ctx.q_start if ctx.q_start < 120 else 0
    kept = p.masked_fill(~seen, 0.0).sum(-1) + (1 - p.sum(-1))  # what a sink takes counts as retained
    want = kept[:, first_row:].mean(1)
    got = Exact.of(q, kv, ctx).retained(plan, 120)
    assert torch.allclose(got, want, rtol=0, atol=1e-5) and want.max() < 0.999
    assert torch.equal(Exact.of(q, kv, ctx).retained(ReadPlan(), 0), torch.ones(4, dtype=torch.float64))


def test_padding_has_no_part_in_the_retained_mass():
    q, kv, ctx = random_call()
    plan = ReadPlan(empty_index(q, kv, ctx, 32), near=torch.tensor([[2, 20]] * 4, dtype=torch.int32))
    alone = Exact.of(q, kv, ctx).retained(plan, 0)
    longer = [torch.cat([torch.full_like(x[:, :, :50], 7.0), x], 2) for x in (q, kv.k, kv.v)]
    padded = longer[0], ResidentKV(*longer[1:]), replace(ctx, first=torch.tensor([50], dtype=torch.int32))
    plan = ReadPlan(empty_index(*padded, 32), near=plan.near)
    assert torch.allclose(Exact.of(*padded).retained(plan, 0), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_q", [200, 77])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_block_mass_is_the_sum_of_probabilities(n_q, context):
    q, kv, ctx = random_call(n_q, **context)
    p = oracle_mass(q, kv, ctx)
    got = Exact.of(q, kv, ctx).block_mass(48)
    want = torch.zeros(got.shape, dtype=torch.float64)
    for i in range(want.shape[2]):
        for j in range(want.shape[3]):
            want[0, :, i, j] = p[:, i * 48 : i * 48 + 48, j * 48 : j * 48 + 48].sum((1, 2))
    assert torch.allclose(got.double(), want, rtol=0, atol=1e-4)


# -- thresholds -----------------------------------------------------------------------------------------------------------


def profiled(score: list[list[float]], mass: list[list[float]], share: float) -> float:
    """The profiler for one head, over plain lists: sink block 0 and the diagonal are read whatever their estimate."""
    pairs = sorted(((m, -i, -j) for i, row in enumerate(mass) for j, m in enumerate(row) if j <= i), reverse=True)
    total, covered, needed = math.fsum(m for m, _, _ in pairs), 0.0, []
    for m, i, j in pairs:
        if covered >= share * total:
            break
        covered += m
        needed.append((-i, -j))
    cuts = [score[i][j] for i, j in needed if j not in (0, i)]
    if not cuts:
        return 0.0
    kept = [x for i, row in enumerate(score) for j, x in enumerate(row) if j in (0, i) or j <= i and x >= min(cuts)]
    return math.fsum(kept) / math.fsum(map(math.fsum, score))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_profiled_threshold_is_the_share_of_the_estimate_above_the_cut(share):
    q, kv, ctx = random_call(512, 512)
    index = empty_index(q, kv, ctx, 64)
    lower = torch.ones(8, 8).tril()
    mass = torch.rand(1, 4, 8, 8) * lower
    score = mass * (0.5 + torch.rand(1, 4, 8, 8))
    got = ThresholdSearch(mass=share)._profiled(score, mass, index, index.reachable(sink=1, recent=1))
    for h in range(4):
        assert float(got[h]) == pytest.approx(profiled(score[0, h].double().tolist(), mass[0, h].double().tolist(), share), abs=1e-6)
    assert 0 < got.min() and got.max() < 1


def test_a_head_that_needs_only_its_own_and_the_first_block_gets_threshold_0():
    q = torch.zeros(1, 1, 512, 32)
    k = torch.zeros(1, 1, 512, 32)
    q[..., 0], k[:, :, 0, 0] = 100.0, 1.0  # everything looks at token 0
    search = ThresholdSearch(mass=0.9, block=64)
    assert search.entries([search.see(*call(q, k), [])]) == [0.0]


def looking_back():
    """Every query finds its own key, only the last 64 an earlier one: 1 / 16 of the map's mass, all of theirs."""
    q, kv, ctx = random_call(1024, 1024)
    own = 6 * kv.k.repeat_interleave(2, 1)
    q = own + 0.5 * q
    q[:, :, -64:] = own[:, :, 301:365]
    return q, kv, ctx


def retained_at(row: list[float], start: int) -> torch.Tensor:
    q, kv, ctx = looking_back()
    return Exact.of(q, kv, ctx).retained(XAttention(threshold=(tuple(row),), stride=8, block=64).select(q, kv, ctx), start)


def test_thresholds_reach_the_mass_asked_for_by_the_queries_that_count():
    def searched(last: int) -> list[float]:
        search = ThresholdSearch(mass=0.9, last=last, block=64)
        return search.entries([search.see(*looking_back(), [])])

    whole, end = searched(0), searched(64)
    assert (retained_at(whole, 0) >= 0.9).all() and (retained_at(whole, 960) < 0.5).all()
    assert (retained_at(end, 960) >= 0.9).all() and max(end) < 1


def test_a_threshold_that_keeps_too_little_is_raised_and_no_further_than_needed(monkeypatch):
    monkeypatch.setattr(ThresholdSearch, "_profiled", lambda *_: torch.tensor([0.0, 0.1, 0.0, 1.0], dtype=torch.float64))
    search = ThresholdSearch(mass=0.9, last=64, block=64)
    raised = search.entries([search.see(*looking_back(), [])])
    assert raised[3] == 1 and max(raised[:3]) < 1 and (retained_at(raised, 960) >= 0.9).all()
    assert (retained_at([t - 2**-6 for t in raised], 960)[:3] < 0.9).all()


def test_the_lowest_threshold_reaches_the_mass_and_a_lower_one_does_not():
    search = ThresholdSearch(mass=0.9, last=64, block=64, search="lowest")
    row = search.entries([search.see(*looking_back(), [])])
    assert (retained_at(row, 960) >= 0.9).all() and (retained_at([t - 2**-13 for t in row], 960) < 0.9).all()


def test_of_several_texts_the_largest_threshold_counts():
    search = ThresholdSearch()
    assert search.entries([torch.tensor([0.2, 0.7000001], dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64)]) == [0.5, 0.700001]


# -- retrieval heads --------------------------------------------------------------------------------------------------------


def near_codes(n: int) -> torch.Tensor:
    """``[n, 12]`` codes of positions that only neighbours share."""
    wave = torch.arange(n)[:, None] / torch.tensor([3.0, 7.0, 17.0, 41.0, 97.0, 211.0])
    return torch.cat([wave.cos(), wave.sin()], 1)


def retrieval_and_local():
    """Two key heads with two query heads each: the first group's last queries look far back, the second's look at themselves."""
    q, k = torch.zeros(1, 4, 600, 16), torch.zeros(1, 2, 600, 16)
    q[..., :12], k[..., :12] = 40 * near_codes(600), near_codes(600)
    k[:, 0, 150, 12], q[:, :2, -20:, 12] = 1.0, 400.0
    return call(q, k)


def test_duo_ranks_a_retrieval_head_above_a_local_one():
    search = RetrievalSearch(sink_tokens=16, recent_tokens=64)
    q, kv, ctx = retrieval_and_local()
    scores = search.entries([search.see(q, kv, ctx, [])])
    assert scores[0] > 0.5 > 0.05 > scores[1]
    p = oracle_mass(q, kv, ctx)[:, -64:]
    back = torch.arange(600)[-64:, None] - torch.arange(600)
    reads = (back < 64) | (torch.arange(600) < 16)
    part = p.masked_fill(~reads, 0.0)
    part = part / part.sum(-1, keepdim=True)
    v = kv.v[0].double().repeat_interleave(2, 0)
    change, full = (x.square().sum((1, 2)).unflatten(0, (2, 2)).sum(1) for x in ((part - p) @ v, p @ v))
    assert scores == pytest.approx((change / full).sqrt().tolist(), abs=1e-4)


# -- patterns ---------------------------------------------------------------------------------------------------------------


def planted_heads(n: int = 512):
    """One head each that is local, has vertical stripes, and attends from block to block."""
    q, k = torch.zeros(1, 3, n, 64), torch.zeros(1, 3, n, 64)
    q[0, 0, :, :12], k[0, 0, :, :12] = 90 * near_codes(n), near_codes(n)
    stripes = torch.arange(20, n, 19)
    q[0, 1, :, 0], k[0, 1, stripes, 0] = 100.0, 1.0
    codes, of_key = torch.nn.functional.one_hot(torch.arange(16), 64).float(), torch.arange(n) // 32
    partner = torch.tensor([0, 0, 1, 0, 2, 4, 1, 3, 6, 2, 5, 7, 3, 9, 8, 11])
    k[0, 2], q[0, 2] = codes[of_key], 100 * codes[partner[of_key]]
    return call(q, k)


@pytest.fixture(scope="module")
def seen():
    return PatternSearch(density=0.3, block=16).see(*planted_heads(), [])


def test_the_search_tells_planted_patterns_apart(seen):
    row = PatternSearch(density=0.3, block=16).entries([seen])
    assert [entry["name"] for entry in row] == ["a_shape", "vertical_slash", "block_topk"]
    for h, entry in enumerate(row):
        chosen = next(c for c in seen if c.spec == entry)
        assert chosen.mass[h] > 0.95 and chosen.density[h] <= 0.3 and chosen.heads[h]


def test_what_a_candidate_retains_and_reads_is_measured_on_its_selector(seen):
    q, kv, ctx = planted_heads()
    worst = min(seen, key=lambda c: float(c.mass[1]))
    plan = worst.selector().select(q, kv, ctx)
    assert torch.allclose(Exact.of(q, kv, ctx).retained(plan, 128), worst.mass, rtol=0, atol=1e-6)
    assert torch.allclose(plan.head_density().expand(3), worst.density)


def test_several_texts_are_averaged_at_the_sizes_of_the_first(seen):
    def text(a_shape: list[float], vertical_slash: list[float], block_topk: list[float]) -> list:
        masses = dict(a_shape=a_shape, vertical_slash=vertical_slash, block_topk=block_topk)
        return [replace(c, mass=torch.tensor(masses[c.spec["name"]])) for c in seen]

    first, other = text([1.0, 0.0, 0.1], [0.5, 1.0, 0.1], [0.5, 0.1, 1.0]), text([0.3, 0.9, 0.3], [0.3, 0.0, 0.9], [0.3, 0.3, 0.3])
    for found, names in [([first], ["a_shape", "vertical_slash", "block_topk"]), ([first, other], ["a_shape", "vertical_slash", "block_topk"]),
                         ([first, other, other], ["a_shape", "a_shape", "vertical_slash"])]:
        assert [entry["name"] for entry in PatternSearch(density=0.3, block=16).entries(found)] == names
    small = tuple(x[:, :, :64] for x in (planted_heads()[0], planted_heads()[1].k, planted_heads()[1].v))
    q, kv, ctx = small[0], ResidentKV(*small[1:]), planted_heads()[2]
    again = PatternSearch(density=0.3, block=16).see(q, kv, ctx, [seen])
    assert [c.spec for c in again] == [c.spec for c in seen] and all(len(c.mass) == 3 for c in again)


def test_a_shape_over_the_budget_takes_part_only_where_none_fits(seen):
    dense = [replace(c, density=torch.full((3,), 0.5), mass=torch.ones(3)) for c in seen if c.spec["name"] == "block_topk"]
    fitting = [c for c in seen if c.spec["name"] == "a_shape"]
    assert [e["name"] for e in PatternSearch(density=0.3).entries([fitting + dense])] == ["a_shape"] * 3
    assert [e["name"] for e in PatternSearch(density=0.1).entries([fitting + dense])][1:] == ["block_topk"] * 2


# -- profiles ---------------------------------------------------------------------------------------------------------------


def test_a_profile_equals_its_json_and_its_file(found, tmp_path):
    assert Profile.from_json(json.loads(json.dumps(found.to_json()))) == found
    found.write(tmp_path / "p.json")
    assert profiles.load(tmp_path / "p.json") == found
    assert found.selector() == XAttention(threshold=found.table, stride=8, block=64)
    assert found.tokens == (400, 400) and re.fullmatch(r"\d{4}-\d\d-\d\d", found.date)


def test_the_figures_of_a_profile_are_those_of_its_selector(model, found):
    assert all(0.8 - 1e-4 <= kept <= 1 for row in found.retained for kept in row), "a threshold below the mass asked for"
    with sparse_attn.patch(model, profile=found, dense_below=0) as patched, torch.no_grad():
        for ids in texts():
            model(ids)
        for row, density in zip(patched.report().layers, found.density, strict=True):
            assert row.layer > 0 or row.head_density == pytest.approx(density, abs=1e-4)  # layer 1 sees a sparse layer 0
            assert row.sparse_calls == 2
        assert patched.report().density < 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v: v.update(version=2), "has version 2 but this package reads 1"),
        (lambda v: v.pop("version"), "has version None but this package reads 1"),
        (lambda v: v.update(method="magic"), "'magic' is no calibrated method; there are minference, xattention, duo"),
        (lambda v: v.pop("table"), "the profile lacks 'table'"),
        (lambda v: v.update(colour="red"), "the profile has no entry 'colour'"),
        (lambda v: v["model"].pop("heads"), "the profile's model lacks 'heads'"),
        (lambda v: v["model"].update(heads=8), "table has 4 heads in layer 0 but its model 8"),
        (lambda v: v["model"].update(layers=3), "table has 2 layers but its model 3"),
        (lambda v: v["density"][1].pop(), "density has 3 heads in layer 1 but its model 4"),
        (lambda v: v.update(table=[0.5, 0.5]), "table is not a list of layers"),
        (lambda v: v["table"][0].__setitem__(0, 2.0), r"threshold=2.0 is outside \[0, 1\]"),
        (lambda v: v["arguments"].update(colour="red"), "xattention has no argument 'colour'"),
        (lambda v: v.update(arguments=[]), r"arguments are \[\], not an object"),
    ],
)
def test_a_file_that_is_no_profile_says_why(found, tmp_path, change, sentence):
    value = json.loads(json.dumps(found.to_json()))
    change(value)
    (tmp_path / "p.json").write_text(json.dumps(value))
    with pytest.raises(ContractError, match=sentence) as error:
        profiles.load(tmp_path / "p.json")
    assert str(error.value).startswith(f"profile {tmp_path / 'p.json'}: ")


def test_a_file_that_is_not_json_or_not_there_says_so(tmp_path):
    (tmp_path / "p.json").write_text("threshold: 0.9")
    with pytest.raises(ContractError, match=r"p.json is not JSON \(Expecting"):
        profiles.load(tmp_path / "p.json")
    (tmp_path / "p.json").write_text("[1, 2]")
    with pytest.raises(ContractError, match="p.json: a profile is an object, got list"):
        profiles.load(tmp_path / "p.json")
    with pytest.raises(ContractError, match="cannot be read .No such file"):
        profiles.load(tmp_path / "none.json")


def test_patch_refuses_the_profile_of_another_model_and_leaves_this_one_alone(model, found):
    for other, sentence in [
        (tiny(layers=3), r"made for unnamed \(llama, 2 layers of 4 heads on 2 of 16\) but this model is unnamed \(llama, 3 layers"),
        (tiny(seed=1), r"made for other weights of unnamed .* \([0-9a-f]{12}, these are [0-9a-f]{12}\)"),
    ]:
        with pytest.raises(ContractError, match=sentence):
            sparse_attn.patch(other, profile=found)
        assert not any("_sparse_attn" in m.__dict__ for m in other.modules())
    with pytest.raises(ContractError, match="give prefill or profile, not both"):
        sparse_attn.patch(model, prefill="xattention", profile=found)
    with sparse_attn.patch(tiny(seed=1), prefill=found.selector()) as patched:
        assert patched.config.prefill == found.selector()


def test_the_weights_of_a_model_are_known_in_either_dtype():
    model = tiny()
    known = model_id(model).weights
    assert re.fullmatch("[0-9a-f]{12}", known) and model_id(tiny()).weights == known
    assert model_id(tiny().bfloat16()).weights == known
    assert model_id(tiny().half()).weights == ""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert model_id(model).weights != known


def test_every_layer_must_be_one_that_can_be_served(model):
    layer = model.model.layers[1].self_attn
    layer.is_causal = False
    try:
        with pytest.raises(ContractError, match="layer 1 cannot be calibrated: not causal"):
            calibrate(model, texts(1), ThresholdSearch())
    finally:
        layer.is_causal = True
    assert not any("_sparse_attn" in m.__dict__ for m in model.modules()), "the failed calibration left its patch behind"


def test_heads_of_a_layer_without_attention_get_what_changes_nothing(model):
    of = replace(model_id(model), layers=3)
    from sparse_attn.calibrate import _absent

    assert _absent("xattention", 1, of) == [1.0] * 4 and _absent("minference", 1, of) == [{"name": "dense"}] * 4
    with pytest.raises(ContractError, match="layer 1 has no attention of its own, and duo ranks"):
        _absent("duo", 1, of)


# -- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A needle prompt of 1024 tokens as a file."""
    from benchmarks.needle import prompt

    path = tmp_path_factory.mktemp("text") / "prompt.txt"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert prompt.main(["--length", "1024"]) == 0
    return path


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("minference", ["--density", "0.4", "--last", "64"]),
        ("xattention", ["--mass", "0.99", "--last", "64", "--length", "1000"]),
        ("duo", ["--sparsity", "0.5", "--recent-tokens", "128"]),
    ],
)
def test_the_command_writes_a_profile_with_which_the_model_still_answers(method, options, text, tmp_path, capsys):
    out = tmp_path / "profile.json"
    assert main(["--model", str(runner.BUNDLED), "--method", method, "--text", str(text), "--out", str(out), "--device", "cpu", *options]) == 0
    printed = capsys.readouterr().out
    made = profiles.load(out)
    assert made.method == method and made.model.name == "model" and str(tmp_path.anchor + "root") not in out.read_text()
    assert f"{method} for model (smollm3, 2 layers of 6 heads on 2 of 64); retains" in printed
    assert made.tokens == (1000 if method == "xattention" else 1024,)
    if method == "duo":
        assert min(made.table[1]) > max(made.table[0]), "layer 1 retrieves, layer 0 looks back a few tokens"
    loaded, tokenizer = runner.load(str(runner.BUNDLED), "cpu", torch.float32, trust=False)
    case = runner.make_haystack(tokenizer, None).prompt("multikey", 1024, 0.4, 3)
    (ids,), figures = runner.answer(loaded, [case], runner.Method.calibrated(out), runner.stop_tokens(loaded))
    assert case.expected[0] in tokenizer.decode(ids) and figures["density"] < 0.9


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "magic"], "argument --method: invalid choice: 'magic'"),
        (["--method", "duo", "--stride", "8"], "--stride is for xattention, not for duo; leave it out"),
        (["--method", "duo", "--sparsity", "2"], r"sparsity=2.0 is outside \[0, 1\]"),
        (["--stride", "7"], "block=128 is not a multiple of stride=7"),
        (["--search", "high"], "search='high' is not known; use cut or lowest"),
        (["--mass", "0"], r"mass=0.0 is outside \(0, 1\]"),
        (["--length", "-1"], "--length is -1; give a number of tokens"),
        (["--length", "100000"], "prompt.txt has 10[0-9][0-9] tokens but --length is 100000; give a longer text"),
        (["--text", "/no/such/text"], "text /no/such/text cannot be read"),
        (["--model", "/no/such/model"], "model path /no/such/model does not exist; give a folder"),
        (["--out", "/no/such/folder/p.json"], "cannot write /no/such/folder/p.json; give a file"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(options, sentence, text, tmp_path, capsys):
    given = ["--model", str(runner.BUNDLED), "--method", "xattention", "--text", str(text), "--out", str(tmp_path / "p.json"), *options]
    with pytest.raises(SystemExit) as exit_:
        main(given)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and re.search(sentence, error) and error.startswith("calibrate: ")
    assert not (tmp_path / "p.json").exists()


def test_the_shipped_profiles_belong_to_the_shipped_model():
    model, _ = runner.load(str(runner.BUNDLED), "cpu", torch.float32, trust=False)
    files = sorted(runner.BUNDLED.glob("profile_*.json"))
    assert [path.stem for path in files] == ["profile_duo", "profile_minference", "profile_xattention"]
    for path in files:
        with sparse_attn.patch(model, profile=path):
            pass
    assert ModelId.of(model, 2).name == "model"


def test_a_text_keeps_its_end_behind_the_start_token(text):
    _, tokenizer = runner.load(str(runner.BUNDLED), "cpu", torch.float32, trust=False)
    (whole,), (cut,) = (read_texts([str(text)], tokenizer, length)[0] for length in (0, 100))
    assert cut[0] == whole[0] == tokenizer.bos_token_id and len(whole) == 1024
    assert torch.equal(cut[1:], whole[-99:])
