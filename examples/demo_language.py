"""The little chat language that the demo model speaks.

Every question has exactly one right answer that a program can check, and most answers need the whole
prompt: a value that was given hundreds of tokens earlier, a list to be repeated, a count, a sum.
A serving engine that loses, mixes up or overwrites a single block of its KV cache therefore gives visibly
wrong answers, which makes the language useful in end-to-end tests and demos alike.

Random material is split into two halves without overlap: the training script draws only from one, and
``held_out=True`` draws only from the other. The split is decided by a checksum of the material itself (the
pair of key and value, the list, the two numbers), so it needs no stored data and holds for every seed.

Only the standard library is needed::

    question = recall_question(random.Random(0), num_pairs=20)
    question.messages   # chat messages for the API
    question.answer     # the exact reply to expect
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import NamedTuple

Message = dict[str, str]

_WORD_LIST = """
acorn actor amber anchor angle ankle apple apron arch arrow artist atlas attic autumn badge baker
bamboo banjo barn basil basket beach bead beard beaver bell belt bench berry bird blade blanket bolt
book boot bottle bowl box brain branch bread brick bridge broom brush bucket bus butter button cabin
cable cactus cake camel camera candle canoe canyon card carpet carrot castle cat cave chain chair
chalk cheese cherry chess chin circle clay cliff clock cloud clover coal coat coffee coin comet
copper coral cotton cow crab crane crayon creek crown cup curtain daisy dancer desert desk diamond
dog dolphin donkey door dragon drawer dream drum duck eagle ear egg elbow engine fabric falcon fan
farm feather fence fern field fig finger flag flame flute fog forest fork fossil fox frog garden
garlic gate ghost giant ginger glass glove goat gold goose grape grass guitar hammer harbor harp hat
hawk hazel heart helmet hill honey horn horse house ice igloo island ivory jacket jam jar jewel
judge juice jungle kettle key king kite kitten knee knife knot ladder lake lamp lantern leaf lemon
letter lilac lily lion lizard lock log lotus magnet mango map maple marble market mask meadow melon
mint mirror monkey moon moss motor mouse museum nail needle nest nut oak oasis ocean olive onion
orange orchid otter oven owl oyster paddle paint palace panda paper parrot peach pear pearl pebble
pencil pepper piano pillow pilot pine pizza planet plum pocket poem pond potato puzzle quartz queen
quilt rabbit radio rain raven ribbon rice ring river robin rocket roof rope rose ruby saddle sail
"""
# Single words that name the values to remember, and that fill the lists to be repeated.
WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())
# Keys and values are different words, so that the answer to one question never looks like another key.
KEYS: tuple[str, ...] = WORDS[: 2 * len(WORDS) // 3]
VALUES: tuple[str, ...] = WORDS[2 * len(WORDS) // 3 :]

SYSTEM_PROMPTS: tuple[str, ...] = ("You are a helpful assistant.", "You are the HBServe demo model.", "Answer briefly.")

# How many (pairs, numbers, lists) of ten belong to the held-out part, by checksum.
_HELD_OUT_TENTHS = 5


class Question(NamedTuple):
    """A prompt as chat messages, and the one reply that is right."""

    messages: list[Message]
    answer: str


class _PairStyle(NamedTuple):
    """How pairs are written: the text before them, one pair, what stands between two, what follows the last."""

    opening: str
    pair: str
    between: str
    end: str


class _Fact(NamedTuple):
    prompts: tuple[str, ...]
    answer: str


_FACTS: tuple[_Fact, ...] = (
    _Fact(
        ("Hello!", "Hello", "Hi", "Hi!", "Hey", "Good morning!", "hello", "hi", "Hello there!"),
        "Hello! I am the HBServe demo model. I can remember values, repeat a list, count, add two numbers, "
        "and tell you a little about HBServe.",
    ),
    _Fact(
        ("Who are you?", "What are you?", "What can you do?", "Help", "help", "who are you", "What is this?"),
        "I am a tiny demo model that was trained from scratch for HBServe. Give me some values to remember "
        "and ask for one of them, or ask me to repeat a list, to count, or to add two numbers.",
    ),
    _Fact(
        ("What is HBServe?", "What is HBServe", "Tell me about HBServe.", "what is hbserve?", "Explain HBServe."),
        "HBServe is a serving engine for large language models, written in Python. It runs prefill and "
        "decode side by side on the same GPU, keeps the KV cache of all requests in shared blocks, and "
        "streams the answers over an HTTP interface that OpenAI clients understand.",
    ),
    _Fact(
        (
            "What are prefill and decode?",
            "What is the difference between prefill and decode?",
            "Explain prefill and decode.",
            "what are prefill and decode",
        ),
        "Prefill reads the whole prompt at once and fills the KV cache, so it is limited by the speed of "
        "computing. Decode then writes the answer one token at a time and reads the whole cache for every "
        "token, so it is limited by the speed of the memory.",
    ),
    _Fact(
        ("What is prefill?", "What is prefill", "Explain prefill.", "what is prefill?"),
        "Prefill is the first phase of a request. The model reads all tokens of the prompt at once, stores "
        "their keys and values in the KV cache, and gives the first token of the answer.",
    ),
    _Fact(
        ("What is decode?", "What is decode", "Explain decode.", "what is decode?"),
        "Decode is the second phase of a request. The model writes the answer one token at a time, and every "
        "step reads the keys and values of all tokens before it from the KV cache.",
    ),
    _Fact(
        ("What is semi-PD?", "What is semi-PD", "Explain semi-PD.", "what is semi-pd?", "Tell me about semi-PD."),
        "Semi-PD divides the computing units of a GPU between prefill and decode, while both phases share "
        "one copy of the weights and one KV cache. The phases do not slow each other down, no cache has to "
        "be moved between them, and the division can change while the server runs.",
    ),
    _Fact(
        ("What is TTFT?", "What is TTFT", "Explain TTFT.", "what is ttft?", "What does TTFT mean?"),
        "TTFT is the time to first token: how long a user waits from sending a request until the first "
        "token of the answer arrives. It grows with the queue and with the length of the prompt.",
    ),
    _Fact(
        ("What is TPOT?", "What is TPOT", "Explain TPOT.", "what is tpot?", "What does TPOT mean?"),
        "TPOT is the time per output token: the average time between two tokens of an answer after the "
        "first one. It tells how fast the text streams once it has begun.",
    ),
    _Fact(
        (
            "What is the KV cache?",
            "What is a KV cache?",
            "Explain the KV cache.",
            "what is the kv cache?",
            "What is KV cache?",
        ),
        "The KV cache holds the attention keys and values of all tokens that a request has seen so far, so "
        "that no token is computed twice. It is cut into small blocks that requests take when they need "
        "them and give back when they are done.",
    ),
    _Fact(
        ("Thanks!", "Thank you.", "Thank you!", "thanks", "Thanks"),
        "You are welcome! Is there anything else that you would like me to remember, repeat, count or add?",
    ),
    _Fact(("Bye!", "Goodbye!", "bye", "Good bye.", "See you later!"), "Goodbye! Thank you for trying HBServe."),
)

_VALUE_PROMPTS = ("What is {}?", "What was {}?", "Which number was {}?", "Tell me the value of {}.", "what is {}")
_COPY_PROMPTS = ("Repeat: {}.", "Repeat this list: {}.", "Copy this: {}.", "Say after me: {}.")
_COUNT_PROMPTS = ("Count from {} to {}.", "Please count from {} to {}.", "count from {} to {}")
_SUM_PROMPTS = ("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?", "{} + {} = ?", "what is {}+{}")
_PAIR_STYLES = (
    _PairStyle("Remember: ", "{} {}", ", ", ". "),
    _PairStyle("Remember this list:\n", "- {} {}", "\n", "\n"),
)
_MAX_COPIED_WORDS = 24
_MAX_COPIED_NUMBERS = 8
_MAX_COUNTED = 24


def is_held_out(*parts: object) -> bool:
    """Tell whether this material belongs to the part that training never sees."""
    return zlib.crc32(":".join(map(str, parts)).encode()) % 10 < _HELD_OUT_TENTHS


def recall_question(
    rng: Random,
    num_pairs: int = 8,
    held_out: bool = True,
    position: int | None = None,
    turns: int = 1,
    other_turns: int = 0,
) -> Question:
    """Ask for one of ``num_pairs`` values that were given before (three or four tokens for each pair).

    ``position`` chooses the pair that is asked for (0 is the first one in the prompt); without it, all are
    equally likely. With ``turns`` above 1 the pairs come in that many user messages, each of them confirmed
    by the assistant, and the question follows in a message of its own. ``other_turns`` puts that many
    answered questions of other kinds (some 50 tokens each) between the pairs and the question: prompts of
    up to 2,000 tokens are within what the model can do.
    """
    if not 1 <= turns <= num_pairs:
        raise ValueError("turns must lie between 1 and num_pairs")
    pairs = _draw_pairs(rng, num_pairs, held_out)
    key, value = pairs[rng.randrange(num_pairs) if position is None else position]
    question = rng.choice(_VALUE_PROMPTS).format(key)
    style = rng.choice(_PAIR_STYLES)
    if turns == 1 and not other_turns:
        return Question([_user(_render_pairs(pairs, style, question))], _recall_answer(key, value))
    messages: list[Message] = []
    cuts = [0, *sorted(rng.sample(range(1, num_pairs), turns - 1)), num_pairs]
    for start, stop in pairwise(cuts):
        messages += [_user(_render_pairs(pairs[start:stop], style)), _assistant("OK.")]
    for _ in range(other_turns):
        _append(messages, _small_talk(rng))
    return Question([*messages, _user(question)], _recall_answer(key, value))


def unknown_question(rng: Random, num_pairs: int = 8, held_out: bool = True) -> Question:
    """Ask for a value that was never given; the right answer is to say so."""
    pairs = _draw_pairs(rng, num_pairs, held_out)
    known = {key for key, _ in pairs}
    key = rng.choice([word for word in KEYS if word not in known])
    style = rng.choice(_PAIR_STYLES)
    question = rng.choice(_VALUE_PROMPTS).format(key)
    return Question([_user(_render_pairs(pairs, style, question))], _unknown_answer(key))


def copy_question(rng: Random, num_items: int = 8, held_out: bool = True, numbers: bool = False) -> Question:
    """Ask for a list to be repeated: distinct words (24 at most), or four-digit numbers (8 at most)."""
    while True:
        values = [f"{rng.randrange(10000):04d}" for _ in range(num_items)]
        items = values if numbers else rng.sample(WORDS, num_items)
        if is_held_out("copy", *items) == held_out:
            break
    text = ", ".join(items)
    return Question([_user(rng.choice(_COPY_PROMPTS).format(text))], f"{text}.")


def count_question(rng: Random, held_out: bool = True) -> Question:
    """Ask to count upwards from one number below 100 over at most 24 numbers."""
    while True:
        first = rng.randrange(100)
        last = first + rng.randrange(2, _MAX_COUNTED)
        if is_held_out("count", first, last) == held_out:
            break
    answer = ", ".join(str(number) for number in range(first, last + 1)) + "."
    return Question([_user(rng.choice(_COUNT_PROMPTS).format(first, last))], answer)


def sum_question(rng: Random, held_out: bool = True) -> Question:
    """Ask for the sum of two numbers with two digits each."""
    while True:
        left, right = rng.randrange(10, 100), rng.randrange(10, 100)
        # Both orders of the two numbers fall into the same part: knowing one of them is no help.
        if is_held_out("sum", min(left, right), max(left, right)) == held_out:
            break
    return Question([_user(rng.choice(_SUM_PROMPTS).format(left, right))], f"{left} + {right} = {left + right}.")


def fact_questions() -> list[Question]:
    """Return every fact question with its answer (some 20 to 80 tokens each), the same ones as in training."""
    return [Question([_user(prompt)], fact.answer) for fact in _FACTS for prompt in fact.prompts]


def training_conversation(rng: Random, characters: int) -> list[Message]:
    """Return a conversation from the training half, at least ``characters`` long.

    It begins with pairs to remember that take up a random share of the length, in one or several messages,
    and fills the rest with questions about them and with the other kinds of question in random order. So
    many questions share one long context, which gives a dense training signal at every distance.
    """
    messages: list[Message] = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    used = 0
    while rng.random() < 0.25 and used < characters:
        used += _append(messages, _small_talk(rng))

    style = rng.choice(_PAIR_STYLES)
    pair_length = len(style.pair) + len(style.between) + 5
    room = int(max(0, characters - used) * rng.uniform(0.02, 0.85) / pair_length)
    pairs = _draw_pairs(rng, min(max(1, room), len(KEYS) - 8), held_out=False)
    turns = 1 if rng.random() < 0.6 else rng.randint(1, min(6, len(pairs)))
    cuts = [0, *sorted(rng.sample(range(1, len(pairs)), turns - 1)), len(pairs)]
    for start, stop in pairwise(cuts):
        text = _render_pairs(pairs[start:stop], style)
        if rng.random() < 0.5:
            used += _append(messages, Question([_user(text)], "OK."))
        else:
            question = _recall_turn(rng, pairs[:stop], rng.choice(pairs[:stop]))
            text = _render_pairs(pairs[start:stop], style, question.messages[0]["content"])
            used += _append(messages, Question([_user(text)], question.answer))
        if rng.random() < 0.2:
            used += _append(messages, _small_talk(rng))

    recall_share = rng.choice((0.8, 0.95, 1.0))
    unasked: list[tuple[str, str]] = []
    while used < characters:
        if rng.random() < recall_share:
            # All pairs have their turn before one repeats: an earlier answer must not give the value away.
            if not unasked:
                unasked = rng.sample(pairs, len(pairs))
            used += _append(messages, _recall_turn(rng, pairs, unasked.pop()))
        else:
            used += _append(messages, _small_talk(rng))
    return messages


def _draw_pairs(rng: Random, num_pairs: int, held_out: bool) -> list[tuple[str, str]]:
    if not 1 <= num_pairs <= len(KEYS):
        raise ValueError(f"num_pairs must lie between 1 and {len(KEYS)}")
    pairs = []
    for key in rng.sample(KEYS, num_pairs):
        value = rng.choice(VALUES)
        while is_held_out(key, value) != held_out:
            value = rng.choice(VALUES)
        pairs.append((key, value))
    return pairs


def _render_pairs(pairs: Sequence[tuple[str, str]], style: _PairStyle, question: str = "") -> str:
    text = style.opening + style.between.join([style.pair.format(key, value) for key, value in pairs]) + style.end
    return (text + question).rstrip()


def _recall_answer(key: str, value: str) -> str:
    return f"You said {key} {value}."


def _unknown_answer(key: str) -> str:
    return f"You did not tell me {key}."


def _recall_turn(rng: Random, pairs: Sequence[tuple[str, str]], asked: tuple[str, str]) -> Question:
    """Ask about the pair ``asked``, or now and then about a word that is not among the pairs."""
    key, value = asked
    answer = _recall_answer(key, value)
    if rng.random() < 0.06:
        word = rng.choice(KEYS)
        if all(word != other for other, _ in pairs):
            key, answer = word, _unknown_answer(word)
    return Question([_user(rng.choice(_VALUE_PROMPTS).format(key))], answer)


def _fact_turn(rng: Random) -> Question:
    fact = rng.choice(_FACTS)
    return Question([_user(rng.choice(fact.prompts))], fact.answer)


def _copy_turn(rng: Random) -> Question:
    numbers = rng.random() < 0.3
    return copy_question(rng, rng.randint(1, _MAX_COPIED_NUMBERS if numbers else _MAX_COPIED_WORDS), False, numbers)


def _small_talk(rng: Random) -> Question:
    """Return a question of the training half that needs no earlier message."""
    make: Callable[[Random], Question] = rng.choice(
        (
            lambda random: sum_question(random, held_out=False),
            lambda random: sum_question(random, held_out=False),
            lambda random: count_question(random, held_out=False),
            _copy_turn,
            _fact_turn,
        )
    )
    return make(rng)


def _append(messages: list[Message], question: Question) -> int:
    """Add a question with its answer to a conversation and return how many characters that took."""
    before = len(messages)
    messages.extend(question.messages)
    messages.append(_assistant(question.answer))
    return sum(len(message["content"]) for message in messages[before:])


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
