"""What a cache keeps and when it decides, as one frozen value that equals its JSON form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from sparse_attn.errors import ContractError, require

from .budget import BUDGETS, Budget
from .codecs import CODECS, Plain
from .policies import POLICIES
from .readers import READERS
from .tiers import TIERS, as_tiers
from .tiers.specs import Tier
from .types import CachePolicy, Codec, PageReader

# a policy with a budget of its own: name -> (policy, budget)
_EVICTING = {name: (name, "uniform") for name in POLICIES} | {
    "pyramidkv": ("snapkv", "pyramid"),
    "adakv": ("snapkv", "per_head"),
    "duo": ("streaming", "duo_heads"),
}
# a reader with a form and a place for what it reads from: name -> settings
RETRIEVING = {
    "shadowkv": {"decode": "landmarks", "codec": "lowrank", "tiers": ("device", "host")},
}
# every name that ``make_cache`` takes
METHODS = (*_EVICTING, *READERS, *RETRIEVING)


@dataclass(frozen=True)
class CacheConfig:
    """What a cache keeps, and when it decides.

    Attributes:
        policy: ranks tokens; None keeps everything.
        budget: how many stay; None without a policy.
        sinks: first tokens of a sequence that always stay, whatever a share of its tokens comes to; None for what the policy is
            used to.
        recent: last tokens that always stay, likewise; None for what the policy is used to.
        grace: like ``recent``, while tokens are generated one at a time: a new token cannot go before so many others came.
        evict: "chunk" after every forward over more than one token, so that a prompt is held as budget + chunk at the most; "prompt"
            only once the prompt is complete, which costs its whole length and scores every token with the whole prompt known.
        prompt_length: tokens of the prompt, padding included, where "prompt" should not wait for the first generated token, or
            could mistake a chunk of one token for it.
        roll: keys are attended as if the kept tokens stood side by side (StreamingLLM), else at the positions they had.
        decode: which pages of what is kept a few queries read, generated tokens and drafts; None for all.
        tiers: where tokens live, fastest first. With more than "device", pages that are older than what the reader needs at hand leave
            the device: "host" is memory of the process, "disk" a file. Names, or values of ``kvcache.tiers``
            that say how many bytes a tier may take.
        codec: what keys become when they leave the device.
    """

    policy: CachePolicy | None
    budget: Budget | None
    sinks: int | None = None
    recent: int | None = None
    grace: int = 0
    evict: str = "chunk"
    prompt_length: int | None = None
    roll: bool = False
    decode: PageReader | None = None
    tiers: tuple[Tier, ...] = ("device",)
    codec: Codec = Plain()

    def __post_init__(self):
        require(self.decode is None or hasattr(self.decode, "choose"), f"decode={self.decode!r} is no reader; names go to make_cache")
        self._place()
        if self.policy is None:
            return self._keep_everything()
        made = hasattr(self.policy, "rank") and isinstance(self.budget, Budget)
        require(made, f"CacheConfig takes a policy and a budget, got {self.policy!r} and {self.budget!r}; names and numbers go to "
                "make_cache")
        for name, usual in zip(("sinks", "recent"), getattr(self.budget, "protect", self.policy.protect)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        for name in ("sinks", "recent", "grace"):
            tokens = getattr(self, name)
            require(isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0,
                    f"{name}={tokens!r} must be a number of tokens, 0 or more")
        require(self.evict in ("chunk", "prompt"), f"evict={self.evict!r} is not known; use 'chunk' or 'prompt'")
        length = self.prompt_length
        whole = isinstance(length, int) and not isinstance(length, bool)
        require(length is None or (whole and length > 0), f"prompt_length={length!r} must be 1 or more tokens, or None")
        require(length is None or self.evict == "prompt", "prompt_length has a use only with evict='prompt'; leave it out")
        window = getattr(self.policy, "window", 0)
        require(self.recent >= window, f"recent={self.recent} is less than the policy's window={window}, whose tokens must stay; give {window}")
        require(isinstance(self.roll, bool), f"roll={self.roll!r} must be True or False")
        if hasattr(self.policy, "require_budget"):
            self.policy.require_budget(self.budget)
        self.budget.require_room(self.protected)
        require(not getattr(self.decode, "one_list", False),
                f"{type(self.decode).__name__} reads the same tokens for all KV heads, and with a policy each head keeps its own; leave the policy out")
        require(self.decode is None or not self.policy.decoding,
                f"{type(self.policy).__name__} evicts while tokens are generated, and what is known of a page would be wrong by the next "
                "token; with decode= use a policy that evicts the prompt only, such as snapkv")

    def _place(self) -> None:
        object.__setattr__(self, "tiers", as_tiers(self.tiers))
        require(hasattr(self.codec, "layer"), f"codec={self.codec!r} is no codec; names go to make_cache")
        lower = len(self.tiers) > 1
        require(not lower or self.decode is not None,
                f"tiers={[_named(t, TIERS)['name'] for t in self.tiers]} without decode= would bring every page back for every token; name a way to read less, one of "
                f"{_listed(READERS)}")
        require(lower or isinstance(self.codec, Plain),
                f"{type(self.codec).__name__} says what keys become when they leave the device, and tiers=('device',) keeps them there; add 'host'")
        require(not lower or not self.roll, "roll=True turns keys that have left the device; use one of roll and tiers")

    def _keep_everything(self) -> None:
        require(self.decode is not None, "CacheConfig takes a policy and a budget, or decode= to keep everything; got none of them")
        require(self.budget is None, "a budget needs a policy, which says what has to go; name one, or leave the budget out")
        for field in fields(self):
            useless = field.name not in ("policy", "budget", "decode", "tiers", "codec") and getattr(self, field.name) not in (field.default, 0)
            require(not useless, f"{field.name} says how to evict, but without a policy everything stays; leave it out")
        for name in ("sinks", "recent"):
            object.__setattr__(self, name, 0)

    @property
    def protected(self) -> int:
        """Tokens of a sequence that stay whatever the policy says."""
        return self.sinks + max(self.recent, self.grace)

    def to_json(self) -> dict:
        """The JSON form, as the value that ``json.dumps`` takes and ``from_json`` reads."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {"policy": _named(self.policy, POLICIES), "budget": _named(self.budget, BUDGETS), "decode": _named(self.decode, READERS),
                        "tiers": [_named(tier, TIERS) for tier in self.tiers], "codec": _named(self.codec, CODECS)}

    @classmethod
    def from_json(cls, value: dict) -> CacheConfig:
        """The config that ``to_json`` wrote."""
        require(isinstance(value, dict), f"a cache config is a dict, got {type(value).__name__}")
        _require_known(value, [f.name for f in fields(cls)], "the cache config")
        require("policy" in value and "budget" in value, f"a cache config needs policy and budget, got {_listed(value) or 'nothing'}")
        made = {name: _made(value[name], table, what) for name, table, what in (
            ("policy", POLICIES, "policy"), ("budget", BUDGETS, "budget"), ("decode", READERS, "way to read less"),
            ("codec", CODECS, "codec")) if name in value}
        return cls(**value | made)


def as_config(policy: CachePolicy | str | dict | None, budget: Budget | int | float | dict | None, **settings) -> CacheConfig:
    """The config that a method's name, a size and loose arguments describe.

    Args:
        policy: a policy; the name of a method (``METHODS``); or its JSON form, a dict with ``name`` and arguments. None, with decode=,
            keeps everything, and so does the name of a reader.
        budget: tokens per KV head; a share of the prompt below 1; a budget; or its JSON form. None where the method says it all.
            Where everything is kept, the tokens that a step reads.
        settings: fields of CacheConfig, of the policy and of the method's budget; or of the reader, where everything is kept.
            ``decode`` is a reader, its name, or its JSON form.

    duo takes ``full``, the heads that keep everything, or ``profile``, the file that ``python -m sparse_attn.calibrate`` wrote.

    Example:
        >>> config = as_config("pyramidkv", 2048, window=32, beta=10)
        >>> config.policy.window, config.budget.beta, config.recent
        (32, 10, 32)
        >>> CacheConfig.from_json(config.to_json()) == config
        True
        >>> as_config("snapkv", 2048, windw=32)
        Traceback (most recent call last):
        ...
        sparse_attn.errors.ContractError: snapkv has no argument 'windw'; it has decode, evict, grace, prompt_length, recent, roll, \
sinks, decay, kernel, pool, reduce, window
        >>> as_config("quest", 512) == as_config(None, 512, decode="quest")
        True
        >>> as_config("snapkv", 4096, decode={"name": "quest", "budget": 512}).decode.budget
        512
    """
    own = {f.name for f in fields(CacheConfig)} - {"policy", "budget", "tiers", "codec"}
    if isinstance(policy, dict):
        require("name" in policy, f"the policy has no 'name' in {policy}; there are {_listed(METHODS)}")
        settings = {key: v for key, v in policy.items() if key != "name"} | settings
        policy = policy["name"]
    decode = settings.pop("decode", None)
    if isinstance(policy, str) and policy in (*READERS, *RETRIEVING):
        require(decode is None, f"{policy} says how to read, and so does decode=; leave one of them out")
        policy, decode = None, policy
    placed = {key: settings.pop(key) for key in ("tiers", "codec") if key in settings}
    if isinstance(decode, str) and decode in RETRIEVING:
        placed = {**RETRIEVING[decode], **placed}
        decode = placed.pop("decode")
    placed["codec"] = _as_codec(placed.get("codec", "plain"), decode, settings)
    if policy is None:
        require(decode is not None, f"name a policy, one of {_listed(_EVICTING)}; or with decode= how to read, one of "
                f"{_listed((*READERS, *RETRIEVING))}")
        given = settings | ({"budget": budget} if budget is not None else {})
        return CacheConfig(None, None, decode=_as_reader(decode, given), **placed)
    name, kind = (policy, "uniform") if isinstance(policy, str) else (type(policy).__name__, "uniform")
    takes_policy: set[str] = set()
    if isinstance(policy, str):
        require(policy in METHODS, f"{policy!r}: no such cache policy; there are {_listed(METHODS)}")
        made_by, kind = POLICIES[_EVICTING[policy][0]], _EVICTING[policy][1]
        takes_policy = {f.name for f in fields(made_by)}
    sized = not isinstance(budget, Budget | dict)
    takes_budget = _takes(kind) - {"tokens", "ratio"} if sized else set()
    own -= takes_budget
    unknown = [key for key in settings if key not in own | takes_policy | takes_budget]
    has = ", ".join([*sorted(own), *sorted(takes_policy | takes_budget)])
    require(not unknown, f"{name} has no argument {unknown[0] if unknown else ''!r}; it has {has}")
    of_budget = {key: settings.pop(key) for key in list(settings) if key in takes_budget}
    if isinstance(policy, str):
        policy = _build(made_by, name, {key: settings.pop(key) for key in list(settings) if key in takes_policy})
    if sized:
        if kind == "pyramid":
            of_budget.setdefault("base", policy.window)  # the paper counts the window on top of what it shares out
        budget = _sized(kind, budget, of_budget)
    elif isinstance(budget, dict):
        budget = _made(budget, BUDGETS, "budget")
    return CacheConfig(policy, budget, decode=_as_reader(decode, {}), **placed, **settings)


def _as_reader(decode: PageReader | str | dict | None, arguments: dict) -> PageReader | None:
    if isinstance(decode, str):
        decode = {"name": decode}
    if isinstance(decode, dict):
        return _made({**decode, **arguments}, READERS, "way to read less")
    require(not arguments, f"{type(decode).__name__} says itself how to read; leave {_listed(arguments)} out")
    return decode


def _as_codec(codec: Codec | str | dict, decode: PageReader | str | dict | None, settings: dict) -> Codec:
    """Takes from ``settings`` what is the codec's and not the reader's."""
    if isinstance(codec, str):
        codec = {"name": codec}
    if not isinstance(codec, dict) or codec.get("name") not in CODECS:
        return _made(codec, CODECS, "codec")
    reader = READERS.get(decode if isinstance(decode, str) else "")
    readers = {f.name for f in fields(reader)} if reader else set()
    own = [f.name for f in fields(CODECS[codec["name"]]) if f.name in settings and f.name not in readers]
    return _made({**codec, **{name: settings.pop(name) for name in own}}, CODECS, "codec")


def _sized(kind: str, size: int | float | None, arguments: dict) -> Budget:
    takes, made = _takes(kind), BUDGETS[kind]
    if size is None:
        require("tokens" not in takes, "how many tokens may stay? give budget= tokens per KV head, or a share of the prompt below 1")
        if "profile" in arguments:
            require("full" not in arguments, "a profile says itself which heads keep everything; leave full out")
            made = made.measured
        return _build(made, kind, arguments)
    number = isinstance(size, int | float) and not isinstance(size, bool)
    require(number, f"budget={size!r} must be tokens per KV head, a share of the prompt below 1, or a budget")
    require("tokens" in takes, f"the budget of this method is not a number of tokens; it takes {_listed(takes)}")
    share = isinstance(size, float) and size <= 1
    return _build(made, kind, {"ratio" if share else "tokens": size, **arguments})


def _takes(kind: str) -> set[str]:
    """Arguments that make a budget."""
    made = BUDGETS[kind]
    return {f.name for f in fields(made)} | ({"profile"} if hasattr(made, "measured") else set())


def _made(value, table: dict[str, type], what: str):
    if not isinstance(value, dict):
        return value
    require(value.get("name") in table, f"{value.get('name')!r}: no such {what}; there are {_listed(table)}")
    arguments = {key: v for key, v in value.items() if key != "name"}
    _require_known(arguments, [f.name for f in fields(table[value["name"]])], value["name"])
    return _build(table[value["name"]], value["name"], arguments)


def _build(make: Callable, name: str, arguments: dict):
    try:
        return make(**arguments)
    except ContractError:
        raise
    except (TypeError, ValueError) as error:
        raise ContractError(f"{name} cannot take {arguments}: {error}") from error


def _named(value, table: dict[str, type]) -> dict | None:
    if value is None:
        return None
    name = next((n for n, cls in table.items() if type(value) is cls), None)
    require(name is not None, f"{type(value).__name__} has no JSON form; there are {_listed(table)}")
    return {"name": name} | asdict(value)


def _require_known(given: dict, known: list[str], what: str) -> None:
    unknown = [key for key in given if key not in known]
    require(not unknown, f"{what} has no entry {unknown[0] if unknown else ''!r}; it has {_listed(known)}")


def _listed(names) -> str:
    return ", ".join(sorted(names))
