"""Verifiable instruction tasks: prompts from a seed, exact rewards, nothing judged by taste.

Three splits: `train`; `test` asks in training's phrases about words (or numbers) that no message
of a training task holds; `reworded` asks about those in phrases that training lacks. The glossary
is memory, so there all splits share the terms, and differ in the phrase that asks for each.
"""

import functools
import hashlib
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tinylm.config import BadInput, digest

Split = Literal["train", "test", "reworded"]
FAMILIES = ("copy", "format", "list", "spelling", "counting", "arithmetic", "glossary", "unknown",
            "sentence", "choice", "recall")
RULES = ("plain", "upper", "closing", "persona")
UNKNOWN = "I do not know."
NOTED = "Noted."
LONGEST_SENTENCE = 12  # words
MOST = 5  # words that a task is about
MOST_TUNED = 8  # in half of training's: each id said again is a chance to learn copying


class Task(NamedTuple):
    """A conversation that waits for an answer, and what decides whether that is right."""

    family: str
    rule: str
    argument: str  # of the rule: the closing word or the persona's name
    messages: tuple[tuple[str, str], ...]  # (role, text), the user's last
    plain: str  # a right answer were there no rule; the only one unless `needs` says otherwise
    needs: tuple[str, ...] = ()  # words that any sentence must hold to be right

    @property
    def answer(self) -> str:
        """An answer whose reward is 1, for tuning."""
        match self.rule:
            case "upper":
                return self.plain.upper()
            case "closing":
                return f"{self.plain} {self.argument}"
            case "persona":
                return f"{self.argument}: {self.plain}"
        return self.plain


def draw(family: str, rule: str, split: Split, seed: int, count: int) -> list[Task]:
    """Draw `count` tasks no two of which ask the same; a function of its arguments alone.

    BadInput for an unknown name, or where fewer tasks exist.
    """
    for name, value, known in (("family", family, FAMILIES), ("rule", rule, RULES),
                               ("split", split, ("train", "test", "reworded"))):
        if value not in known:
            raise BadInput(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
    if len(found := _different(family, rule, split, seed, count)) < count:
        raise BadInput(f"{count} {split} tasks of {family!r} with rule {rule!r} are more than the "
                       f"{len(found)} different ones found; ask for fewer")
    return found


def mixed(split: Split, seed: int, count: int) -> list[Task]:
    """Draw about `count` tasks to tune on: every family and rule in turn, half of them plain.

    A family with fewer different tasks of a rule gives all that it has.
    """
    each = -(-count // (2 * len(FAMILIES)))  # plain, and of all other rules together
    drawn = [task for family in FAMILIES for rule in RULES for task in _different(
        family, rule, split, seed, each if rule == "plain" else -(-each // (len(RULES) - 1)))]
    random.Random(f"mixed/{split}/{seed}").shuffle(drawn)
    return drawn


def _different(family: str, rule: str, split: Split, seed: int, count: int) -> list[Task]:
    rng = random.Random(f"{family}/{rule}/{split}/{seed}")
    found: dict[tuple, Task] = {}
    for _ in range(50 * count):
        if len(found) == count:
            break
        task = _task(family, rule, split, rng)
        found.setdefault(task.messages, task)
    return list(found.values())


def tasks_id(tasks: Sequence[Task]) -> str:
    """Hash a set of tasks in its order: 16 hex digits."""
    return digest([[*t[:3], [list(m) for m in t.messages], t.plain, list(t.needs)]
                   for t in tasks])[:16]


def conversation(task: Task) -> tuple[tuple[str, str], ...]:
    """Give the task's messages with its answer, to tune on."""
    return (*task.messages, ("assistant", task.answer))


def obeyed(task: Task, text: str) -> str | None:
    """Give the answer inside a text that keeps the task's rule, else None."""
    text, argument = text.strip(), task.argument
    match task.rule:
        case "upper":
            return text if text == text.upper() else None
        case "closing":
            return text.removesuffix(f" {argument}") if text.endswith(f" {argument}") else None
        case "persona":
            return text.removeprefix(f"{argument}: ") if text.startswith(f"{argument}: ") else None
    return text


def reward(task: Task, text: str) -> float:
    """Give 1.0 for a right answer that keeps the rule, else 0.0; white space around is free.

    A sentence is right with every needed word, a capital, one full stop, its last character, and
    4 to 12 words.
    """
    inner = obeyed(task, text)
    if inner is None:
        return 0.0
    if not task.needs:
        return float(inner == (task.plain.upper() if task.rule == "upper" else task.plain))
    words = inner.lower().rstrip(".").replace(",", " ").split()
    one = inner.endswith(".") and sum(inner.count(mark) for mark in ".!?\n") == 1
    return float(one and inner[:1].isupper() and 4 <= len(words) <= LONGEST_SENTENCE
                 and set(task.needs) <= set(words))


# What is asked about. A word belongs to training or to the test by its hash.

WORDS = """
apron ball band barn basket beach bell bench bird blanket boat book bottle bowl box
branch bread bridge broom brush bucket bus button cabin cake camera candle candy cap car card
carpet cart castle cat chain chair cheese circle clock cloth cloud coat coin cook corn cow crown
cup curtain desk dish dog doll donkey door dragon dress drum duck fan farm feather fence field
fire fish flag floor flower forest fork fox frog garden gate ghost gift giraffe glass glove goat
grape grass guitar hammer hand hat hill honey horse house jacket jar jewel judge kettle key king
kitchen kite kitten knife ladder lake lamp leaf lemon letter lion lock market mask melon milk
mirror monkey moon mountain mouse nail nest net nurse paper park path peach pencil piano picture
pig pillow pin plane plant plate pocket pony potato prince pump puppy queen rabbit radio rain ring
river road robot rocket roof room root rope rose sail salt sand scarf school seed shark sheep
shelf ship shirt shoe shop sister snail snake snow soap sock soup spoon spring square stamp star
stick stone stool storm story street sugar sun swan table tail tea tent thumb tiger toast tooth
tower town toy train tray tree truck trumpet valley vase village violin wagon wall watch water
whale wheel whistle wind window wing wolf wood worm yard zebra"""
NAMES = """
Ada Ben Bo Cara Dan Dora Eli Emma Finn Gus Hana Hugo Ida Ivan Jane Joe Kai Kim Lea Leo
Lily Luis Max Mia Mona Ned Nina Noah Olga Omar Otto Pam Paul Rex Rita Rosa Ruth Sam Sara Sid Tess
Theo Tom Uma Vera Vic Wes Yara Zoe"""
GLOSSARY = {
    "a programming language": "Python Java Rust Ruby Perl Haskell Fortran Cobol Pascal Lisp Scala",
    "a country": "France Spain Italy Greece Norway Sweden Poland Brazil Peru Chile Kenya Egypt",
    "a city": "Paris London Rome Madrid Berlin Vienna Tokyo Lima Cairo Oslo Prague Dublin",
    "a colour": "red blue green yellow purple orange brown pink white black grey violet",
    "a metal": "gold silver iron copper tin zinc lead nickel steel bronze brass platinum",
    "a sport": "tennis football hockey golf rugby judo boxing rowing cricket baseball skiing",
    "a language": "English French German Latin Polish Arabic Hindi Danish Dutch Czech Welsh",
    "a planet": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "a month": "January February April June July August September October November December",
    "a game": "chess poker bingo dominoes draughts hangman solitaire backgammon",
    "a science": "physics chemistry biology geology astronomy botany zoology genetics ecology",
    "a gas": "oxygen helium hydrogen nitrogen neon argon methane ozone xenon krypton",
}
SYLLABLES = tuple(a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r"))
GOOD = ("happy kind brave clever lovely friendly", "won smiled laughed sang helped danced")
BAD = ("sad cruel rude lazy awful angry", "lost cried failed fell lied broke")
FACTS = ("name", "password", "team", "home")
ADJECTIVES = ("red", "blue", "green", "big", "small", "old", "new", "kind", "cold", "warm", "dark",
              "bright", "soft", "little", "long")
DRESSED = (0, 0, 0, 1, 1, 2)  # adjectives in a sentence given for tuning: three are never seen
SENTENCES = ("The {0} is near the {1}.", "I can see the {0} and the {1}.",
             "We put the {0} by the {1}.")

# Phrases: those of training and test, those that only `reworded` uses.

PHRASES = {
    "copy": (("Say: {0}", "Repeat: {0}", "Copy this: {0}"), ("Write this again: {0}",)),
    "upper": (("Write in upper case: {0}", "Put in capitals: {0}"), ("Use big letters: {0}",)),
    "commas": (("Put commas between: {0}", "Separate with commas: {0}"), ("Add commas: {0}",)),
    "reverse": (("Reverse: {0}", "Write backwards: {0}"), ("Turn the list around: {0}",)),
    "sort": (("Sort: {0}", "Put in order: {0}"), ("Arrange by the alphabet: {0}",)),
    "first": (("What is first: {0}", "Give the first of: {0}"), ("Which one comes first: {0}",)),
    "last": (("What is last: {0}", "Give the last of: {0}"), ("Which one comes last: {0}",)),
    "spell": (("Spell: {0}", "Spell out: {0}"), ("Give the letters of: {0}",)),
    "words": (("How many words: {0}", "Count the words: {0}"), ("Give the number of words: {0}",)),
    "letters": (("How many {0} are in {1}?", "Count the {0} in {1}"), ("{1} has how many {0}?",)),
    "plus": (("What is {0} plus {1}?", "Add {0} and {1}"), ("Give the sum of {0} and {1}",
              "{0} and {1} make what?")),
    "minus": (("What is {0} minus {1}?", "Take {1} from {0}"), ("How much is {0} less {1}?",
              "What is left of {0} without {1}?")),
    "what": (("What is {0}?", "Define {0}.", "Explain {0}.", "Tell me what {0} is.",
              "What does {0} mean?", "Do you know {0}?", "Describe {0}.", "So, what is {0}?",
              "Say what {0} is.", "Please explain {0}."),
             ("Can you say what {0} is?", "I want to know what {0} is.", "Give the meaning of {0}.",
              "Please tell me about {0}.", "What kind of thing is {0}?")),
    "sentence": (("Write a sentence with the words {0} and {1}.", "Use {0} and {1} in a sentence."),
                 ("Make one sentence that has {0} and {1}.",)),
    "choice": (("Is '{0}' good or bad?", "Good or bad: {0}"), ("Does '{0}' sound good or bad?",)),
    "fact": (("My {0} is {1}.",), ("You should know that my {0} is {1}.",)),
    "ask": (("What is my {0}?", "Tell me my {0}."), ("Do you remember my {0}?",)),
    "system upper": (("Answer in upper case.", "Use capital letters only."),
                     ("Write every answer in capitals.",)),
    "system closing": (("End every answer with the word {0}.", "Always end with {0}."),
                       ("Let your last word be {0}.",)),
    "system persona": (("You are {0}. Begin with your name.", "You are {0}. Say your name first."),
                       ("Your name is {0}. Put it before every answer.",)),
}


def side(word: str) -> str:
    """Say which split a word belongs to: a quarter are the test's, by hash."""
    return "train" if hashlib.sha256(word.encode()).digest()[0] % 4 else "test"


def _task(family: str, rule: str, split: Split, rng: random.Random) -> Task:
    messages: list[tuple[str, str]] = []
    argument = ""
    if rule in ("closing", "persona"):
        argument = _pick(_pool(WORDS if rule == "closing" else NAMES, split), rng)
    if rule != "plain":
        messages.append(("system", _phrase(f"system {rule}", split, rng).format(argument)))
    if family == "recall":
        told, plain = _recall(split, rng)
        return Task(family, rule, argument, (*messages, *told), plain)
    if family == "glossary":
        asked, plain = _glossary(split, rng)
        return Task(family, rule, argument, (*messages, ("user", asked)), plain)
    kind, slots, plain = _exercise(family, split, rng)
    asked = _phrase(kind, split, rng).format(*slots)
    needs = tuple(slots) if family == "sentence" else ()
    return Task(family, rule, argument, (*messages, ("user", asked)), plain, needs)


def _exercise(family: str, split: Split, rng: random.Random) -> tuple[str, tuple, str]:
    """Give the kind of phrase, what fills it, and the answer."""
    most = MOST_TUNED if split == "train" and rng.randrange(2) else MOST
    count = rng.randrange(1 if family == "copy" else 2, most + 1)
    some = _arguments(split, count, rng)
    text, word = " ".join(some), some[0]
    match family:
        case "copy":
            return "copy", (text,), text
        case "format":
            return _pick((("upper", (text,), text.upper()),
                          ("commas", (text,), ", ".join(some))), rng)
        case "list":
            return _pick((("reverse", (text,), " ".join(some[::-1])),
                          ("sort", (text,), " ".join(sorted(some))),
                          ("first", (text,), word), ("last", (text,), some[-1])), rng)
        case "spelling":
            few = some[:rng.randrange(1, 3)]
            return "spell", (" ".join(few),), ", ".join(" ".join(w) for w in few)
        case "counting":
            letter = _pick(word, rng)
            return _pick((("words", (text,), str(len(some))),
                          ("letters", (letter, word), str(word.count(letter)))), rng)
        case "arithmetic":
            a, b = sorted((_number(split, rng), _number(split, rng)))
            return _pick((("plus", (a, b), str(a + b)), ("plus", (b, a), str(a + b)),
                          ("minus", (b, a), str(b - a))), rng)
        case "unknown":
            return "what", (_invented(split, rng),), UNKNOWN
        case "sentence":
            return "sentence", tuple(some[:2]), _pick(SENTENCES, rng).format(*_dressed(some, rng))
    good = _pick((True, False), rng)
    how, did = (_pick(words.split(), rng) for words in (GOOD if good else BAD))
    return "choice", (f"the {how} {word} {did}",), "good" if good else "bad"


def _dressed(nouns: Sequence[str], rng: random.Random) -> list[str]:
    """Put adjectives before none, one or both of two nouns."""
    styles = _sample(ADJECTIVES, _pick(DRESSED, rng), rng)
    return [f"{style} {noun}" if style else noun
            for style, noun in zip([*styles, "", ""], nouns[:2], strict=False)]


def _recall(split: Split, rng: random.Random) -> tuple[list[tuple[str, str]], str]:
    first, second = _sample(FACTS, 2, rng)
    told, known = [], {}
    for fact in (first, second):
        known[fact] = (_pick(_pool(NAMES, split), rng) if fact == "name"
                       else _arguments(split, 1, rng)[0])
        told += [("user", _phrase("fact", split, rng).format(fact, known[fact])),
                 ("assistant", NOTED)]
    asked = _pick((first, second), rng)
    return [*told, ("user", _phrase("ask", split, rng).format(asked))], known[asked]


def _glossary(split: Split, rng: random.Random) -> tuple[str, str]:
    """Ask for a term; training never uses half the phrases for it, the test only those."""
    kind = _pick(sorted(GLOSSARY), rng)
    term = _pick(GLOSSARY[kind].split(), rng)
    usual, others = PHRASES["what"]
    half = (hashlib.sha256(term.encode()).digest()[0] + (split == "test")) % 2
    asked = _pick(others if split == "reworded" else usual[half::2], rng)
    return asked.format(term), f"{term[0].upper()}{term[1:]} is {kind}."


def _arguments(split: Split, count: int, rng: random.Random) -> list[str]:
    """Draw different words to ask about; half of training's are made up.

    Over its few real words alone a model learns to copy each, and not to copy: a default study's
    had .27 nats a token on them and 2% of exact copies of the test's.
    """
    some = _sample(_pool(WORDS, split), count, rng)
    if split == "train":
        some = [_made_up(rng) if rng.randrange(2) else word for word in some]
    return list(dict.fromkeys(some)) if len(set(some)) == count else _arguments(split, count, rng)


def _made_up(rng: random.Random) -> str:
    """Make a word of two or three syllables that is training's and no real one."""
    while True:
        word = "".join(_pick(SYLLABLES, rng) for _ in range(rng.randrange(2, 4)))
        if side(word) == "train" and word not in WORDS:
            return word


def _invented(split: Split, rng: random.Random) -> str:
    while True:
        word = "".join(_pick(letters, rng) for letters in (
            "BDFGKLMNPRSTVZ", "aeiou", "bdglmnrz", "aeiou", "bklnx"))
        if side(word) == _words_of(split):
            return word


def _number(split: Split, rng: random.Random) -> int:
    """Draw 0..99; one digit is always training's, two go by hash."""
    while True:
        n = rng.randrange(100)
        if ("train" if n < 10 else side(str(n))) == _words_of(split):
            return n


def _words_of(split: Split) -> str:
    return "train" if split == "train" else "test"


def _phrase(kind: str, split: Split, rng: random.Random) -> str:
    return _pick(PHRASES[kind][split == "reworded"], rng)


@functools.cache
def _pool(words: str, split: Split) -> tuple[str, ...]:
    return tuple(w for w in words.split() if side(w) == _words_of(split))


def _pick(items: Sequence, rng: random.Random):
    return items[rng.randrange(len(items))]


def _sample(items: Sequence[str], count: int, rng: random.Random) -> list[str]:
    left = list(items)
    return [left.pop(rng.randrange(len(left))) for _ in range(count)]
