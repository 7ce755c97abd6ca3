"""Needle-in-a-haystack prompts of an exact token length: text, needles and questions, all from one seed.

The text is made of ordinary sentences from templates; no word of a needle's key occurs in it. Tasks follow the idea of
RULER (arXiv:2404.06654): one needle, needles with other keys around it, several values of one key, several keys asked at
once, and a chain of names to follow.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TASKS = ("single", "multikey", "multivalue", "multiquery", "tracking")

KEY_ADJECTIVES = tuple(
    "amber brisk copper dapper eager fabled gentle hollow ivory jolly keen lunar marble nimble opal proud quaint russet "
    "silver tidy umber velvet wily young zesty azure bold crimson dusky elder frosty golden hazel indigo jade mellow "
    "noble olive plucky rustic".split()
)
KEY_NOUNS = tuple(
    "falcon badger cobra dolphin eagle ferret gazelle heron iguana jaguar kestrel lemur magpie newt otter panther quail "
    "raven salmon tiger urchin viper walrus yak zebra bison camel donkey ermine finch gopher hamster ibis jackal koala "
    "lobster moose narwhal osprey puffin".split()
)
NAMES = tuple("ALPHA BRAVO CEDAR DELTA EMBER FLINT GROVE HAVEN INLET JUNIPER KARST LAGOON MEADOW NORTH ORCHID".split())

_WORDS = {
    "who": "the teacher|the baker|a farmer|my neighbour|the captain|a student|the gardener|an old sailor|the painter|"
    "a doctor|the librarian|the driver|her cousin|his uncle|the mayor|a traveller|the carpenter|the nurse|"
    "our guide|the clerk|a musician|the miller|the widow|a child",
    "did": "carried|found|painted|repaired|sold|borrowed|described|forgot|counted|moved|cleaned|wrapped|watched|"
    "measured|hid|bought|kept|opened|lifted|dropped|studied|polished|packed|returned",
    "what": "wooden chair|basket|letter|lamp|blanket|bicycle|kettle|ladder|picture|clock|bucket|coat|map|table|"
    "bottle|rope|window|garden gate|box of apples|bag of flour|pile of books|pair of boots|loaf of bread|radio",
    "how": "worn|small|heavy|broken|clean|bright|narrow|round|plain|dusty|warm|cheap|square|large|strange|quiet|dry|soft",
    "where": "near the river|behind the church|in the market|on the hill|at the station|beside the road|in the kitchen|"
    "under the bridge|by the harbour|across the field|at the school|in the forest|near the mill|outside the town|"
    "on the porch|at the corner|in the cellar|along the coast|beyond the orchard|by the fountain",
    "when": "in the morning|before noon|after the storm|last winter|on Monday|late at night|during the festival|"
    "early in spring|on a cold day|after lunch|before the rain|in the evening|on Friday|that summer|at dawn|"
    "at the end of the week|once the snow melted|while the bells rang",
    "why": "it was getting late|nobody had asked for it|the price was fair|the road was closed|winter was coming|"
    "there was no other way|the work had to be done|visitors were expected|the wind had changed|"
    "it belonged to a friend|the light was fading|everyone else had left|the train was late|it looked useful",
    "mood": "happy|tired|calm|worried|surprised|hungry|patient|cheerful|busy|sleepy|hopeful|certain|careful|nervous",
    "thing": "bread|water|music|the weather|the harvest|the road|fresh fruit|tea|the garden|the news|the sea|paper|wool",
}
_WORDS = {slot: tuple(words.split("|")) for slot, words in _WORDS.items()}
_TEMPLATES = (
    "{who} {did} the {how} {what} {where} because {why}.",
    "{when}, {who} {did} a {how} {what} {where}.",
    "{who} was {mood} {when}, so {who} {did} the {what} {where}.",
    "although {why}, {who} {did} a {how} {what} {when}.",
    "{where}, {who} and {who} talked about {thing} and {did} the {how} {what}.",
    "{who} said that {thing} was better {when} than {thing}, and {who} felt {mood}.",
    "{when} there was a {how} {what} {where}, and {who} {did} it.",
    "{who} often thought about {thing} when {why}.",
    "nobody knew why {who} {did} the {what} {when}, but {why}.",
    "{who} became {mood} and {did} a {how} {what} for {who}.",
)

INTRO = "Read the text and remember every special code in it, because there will be a question at the end.\n"

# part of every row's identity: raise it when prompts change, and no row of an older form is taken for one of the new
FORM = 2


class NeedleError(ValueError):
    """A request that no prompt can satisfy; the message says what was wrong, what came and what to do."""


@dataclass(frozen=True)
class Prompt:
    """One prompt and what a right answer contains.

    Attributes:
        ids: token ids, exactly the asked length, start token included.
        expected: values (or names) the answer must contain.
        needle: token span ``[start, stop)`` of every needle that holds an expected value.
        answer_tokens: how many tokens to generate, enough for a full answer.
        question_tokens: how many tokens at the end are the question; what comes before is the text.
    """

    ids: list[int]
    expected: tuple[str, ...]
    needle: tuple[tuple[int, int], ...]
    answer_tokens: int
    question_tokens: int


@dataclass(frozen=True)
class Task:
    needles: list[str]  # hold an expected value
    distractors: list[str]
    question: str
    expected: tuple[str, ...]


def sentences(rng: random.Random) -> Iterator[str]:
    """Endless ordinary sentences, each starting with a space and a capital letter."""
    while True:
        words = _TEMPLATES[rng.randrange(len(_TEMPLATES))]
        while "{" in words:
            start, stop = words.index("{"), words.index("}")
            slot = _WORDS[words[start + 1 : stop]]
            words = words[:start] + slot[rng.randrange(len(slot))] + words[stop + 1 :]
        yield " " + words[0].upper() + words[1:]


def user_sentences(text: str) -> Iterator[str]:
    """Sentences of the user's own text, over and over when it is shorter than the haystack."""
    pieces, start = [], 0
    flat = " ".join(text.split())
    for stop, mark in enumerate(flat):
        if mark in ".!?" and (stop + 1 == len(flat) or flat[stop + 1] == " "):
            pieces.append(" " + flat[start : stop + 1].strip())
            start = stop + 1
    if flat[start:].strip():
        pieces.append(" " + flat[start:].strip())
    if not pieces:
        raise NeedleError("the haystack file holds no text; give a file with at least one sentence")
    while True:
        yield from pieces


def needle_sentence(key: str, value: str) -> str:
    return f" For the {key} the special code to remember is {value}."


def _keys(rng: random.Random, count: int) -> list[str]:
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[f"{rng.choice(KEY_ADJECTIVES)} {rng.choice(KEY_NOUNS)}"] = None
    return list(keys)


def _values(rng: random.Random, count: int) -> list[str]:
    return [str(value) for value in rng.sample(range(1000, 10000), count)]


def _ask(keys: list[str], plural: bool) -> str:
    names = " and the ".join(keys)
    which = "which special codes do the sentences" if plural else "which special code does the text"
    only = "Answer with every code in the form of the text." if plural else "Answer with the digits only."
    return (
        f"\nQuestion: For the {names}, {which} above tell you to remember? {only}"
        f"\nAnswer: For the {keys[0]} the special code to remember is"
    )


def make_task(task: str, rng: random.Random) -> Task:
    if task == "single":
        (key,), (value,) = _keys(rng, 1), _values(rng, 1)
        return Task([needle_sentence(key, value)], [], _ask([key], False), (value,))
    if task == "multikey":
        keys, values = _keys(rng, 8), _values(rng, 8)
        others = [needle_sentence(k, v) for k, v in zip(keys[1:], values[1:])]
        return Task([needle_sentence(keys[0], values[0])], others, _ask(keys[:1], False), (values[0],))
    if task == "multivalue":
        (key,), values = _keys(rng, 1), _values(rng, 4)
        return Task([needle_sentence(key, v) for v in values], [], _ask([key], True), tuple(values))
    if task == "multiquery":
        keys, values = _keys(rng, 4), _values(rng, 4)
        return Task([needle_sentence(k, v) for k, v in zip(keys, values)], [], _ask(keys, True), tuple(values))
    if task == "tracking":
        names, (value,) = rng.sample(NAMES, 4), _values(rng, 1)
        chain = [f" The name {names[0]} stands for {value}."]
        chain += [f" The name {b} stands for the same as {a}." for a, b in zip(names, names[1:])]
        question = f"\nQuestion: Which names stand for {value}? Give all of them.\nAnswer: The names for {value} are"
        return Task(chain, [], question, tuple(names))
    raise NeedleError(f"task {task!r} is not known; use one of {', '.join(TASKS)}")


class Haystack:
    """Makes prompts for one tokenizer.

    Sentences are tokenized one by one and joined as ids, so a length is exact for any tokenizer and a needle always
    starts at the start of a sentence.

    Args:
        encode: text to token ids, without special tokens.
        start: ids every prompt begins with (the tokenizer's start token, or none).
        text: the user's own haystack; None uses the generator.
    """

    def __init__(self, encode: Callable[[str], list[int]], start: list[int], text: str | None = None):
        self._encode, self._start, self._text = encode, list(start), text
        if text is not None:
            next(user_sentences(text))
        self._known: dict[str, list[int]] = {}

    def _ids(self, sentence: str) -> list[int]:
        if self._text is None:
            return self._encode(sentence)
        if sentence not in self._known:
            self._known[sentence] = self._encode(sentence)
        return self._known[sentence]

    def _question(self, made: Task) -> list[int]:
        """The question, and as much of the answer as all answers share: often a space.

        So the first token to generate already tells one answer from another, and the prompt's last row, which the method under
        test reads for, has to find it. Left to decoding, which is dense, a space hides whether the method saw the needle.
        """
        others = NAMES if not made.expected[0].isdigit() else [str(digit) * 4 for digit in range(1, 10)]
        return os.path.commonprefix([self._encode(f"{made.question} {other}") for other in others])

    def prompt(self, task: str, length: int, depth: float, seed: int) -> Prompt:
        """A prompt of exactly ``length`` tokens whose (first) needle starts at ``depth`` of the text, 0 start, 1 end.

        Raises:
            NeedleError: if the task is unknown, the depth is outside [0, 1] or the length does not hold the needles.
        """
        if not 0 <= depth <= 1:
            raise NeedleError(f"depth {depth} is outside [0, 1]; give a share of the text")
        rng = random.Random(f"{task} {length} {depth:.4f} {seed}")
        made = make_task(task, rng)
        head, tail = self._start + self._encode(INTRO), self._question(made)
        needles, others = [self._encode(s) for s in made.needles], [self._encode(s) for s in made.distractors]
        room = length - len(head) - len(tail) - sum(map(len, needles + others))
        if room < 0:
            raise NeedleError(f"length {length} is below the {length - room} tokens that task {task} needs; raise it")

        body: list[list[int]] = []
        filled, source = 0, sentences(rng) if self._text is None else user_sentences(self._text)
        if self._text is not None:  # another seed, another part of the text
            for _ in range(rng.randrange(1000)):
                next(source)
        while filled < room:
            ids = self._ids(next(source))
            body.append(ids[: room - filled])
            filled += len(body[-1])

        whole = len(body) - 1 if body else 0  # the last sentence may be cut: nothing is planted after it
        starts = [0]
        for ids in body:
            starts.append(starts[-1] + len(ids))
        at = min(range(whole + 1), key=lambda i: abs(starts[i] - depth * room))
        planted = [(at, 0, True, needles[0])]
        planted += [(rng.randint(0, whole), 1 + i, True, ids) for i, ids in enumerate(needles[1:])]
        planted += [(rng.randint(0, whole), 1000 + i, False, ids) for i, ids in enumerate(others)]
        planted.sort(key=lambda plant: plant[:2])

        out, spans, done = list(head), [], 0
        for where, _, wanted, ids in planted:
            for sentence in body[done:where]:
                out += sentence
            done = where
            if wanted:
                spans.append((len(out), len(out) + len(ids)))
            out += ids
        for sentence in body[done:]:
            out += sentence
        out += tail
        answer = sum(len(self._encode(f" {value}.")) for value in made.expected) + 2
        if len(made.expected) > 1:
            answer += len(made.expected) * max(map(len, needles))
        return Prompt(out, made.expected, tuple(spans), answer, len(tail))
