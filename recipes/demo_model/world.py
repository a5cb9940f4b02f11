"""The demo's story world: short connected stories in which attention has work to do.

Three people hand things on and put them away, and count apples and shells. Whenever something changes the story says
so and then how things stand now, and between that it asks itself questions: who has the ball, where the kite is, how
many apples Mia has. The answers can only be told by looking back, past earlier states and other things, to the last
sentence that told. In between stand sentences of mood, with pronouns and agreement.

A story is a function of its split and its number alone: `story("calibration", 7)` is the same text on every
machine. Splits never share a random stream.
"""

import random
import re
from dataclasses import dataclass, field

SEED = 2502
SHE = ["Mia", "Anna", "Ruth", "Nora", "Lily", "Ella", "Jane", "Rosa"]
HE = ["Tom", "Ben", "Max", "Leo", "Sam", "Paul", "Hugo", "Otto"]
NAMES = SHE + HE
NOUNS = ["ball", "kite", "book", "doll", "drum", "cup", "hat", "key", "lamp", "boat", "coat", "bell"]
PLACES = ["basket", "box", "drawer", "bag", "bucket", "chest", "tent", "shed", "barn", "kitchen", "garden", "cellar"]
KINDS = ["apple", "plum", "nut", "egg", "shell", "coin"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SCENES = ["village", "valley", "yard", "park"]
MOODS = ["happy", "tired", "proud", "hungry"]
DEEDS = ["sing", "dance", "rest", "laugh"]
AGAIN = 0.15  # how readily what has changed once changes again


@dataclass(frozen=True)
class Size:
    """How long a story is, in words and punctuation marks before its closing sentence, and what it tells of."""

    length: tuple[int, int]
    closing: bool = True
    things: int = 2
    events: bool = True


FULL = Size((84, 100))
# What the training begins with: short stories; then drills, in which nothing happens but much is asked.
SHORT = Size((40, 50), closing=False)
DRILL = Size((125, 135), closing=False, things=5, events=False)


def amount(number: int, kind: str) -> str:
    return f"{NUMBERS[number - 1]} {kind}" + ("" if number == 1 else "s")


def words_in(text: str) -> int:
    """Return the number of words and punctuation marks, each of which the tokenizer makes one token."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@dataclass(frozen=True)
class Question:
    """A question the story asks itself, with what a multiple-choice task needs to ask it again."""

    kind: str  # where, who or count
    before: str  # the story up to and with the question
    stem: str  # how the answer starts, up to the word that is asked for
    answer: str
    rivals: tuple[str, ...]  # wrong answers: one from the story, then some from outside


@dataclass
class Thing:
    name: str
    holder: str = ""  # a person, or
    place: str = ""  # a place: exactly one of the two
    past: list[str] = field(default_factory=list)  # earlier holders and places

    @property
    def state(self) -> str:
        return f"the {self.name} is " + (f"with {self.holder}." if self.holder else f"in a {self.place}.")

    def to(self, holder: str = "", place: str = "") -> None:
        self.past.append(self.holder or self.place)
        self.holder, self.place = holder, place


@dataclass
class Store:
    owner: str
    kind: str
    number: int
    past: list[int] = field(default_factory=list)

    @property
    def state(self) -> str:
        return f"{self.owner} has {amount(self.number, self.kind)}."


class Story:
    """One story being told: the state of its world, the sentences so far, and the questions among them."""

    def __init__(self, rng: random.Random, size: Size):
        self.rng, self.size = rng, size
        self.people, self.places = rng.sample(NAMES, 3), rng.sample(PLACES, 4)
        self.things = [Thing(name) for name in rng.sample(NOUNS, size.things)]
        kind = rng.choice(KINDS)
        self.stores = [
            Store(owner, kind, rng.randint(1, 6)) for owner in rng.sample(self.people, 2 if size.events else 3)
        ]
        self.sentences: list[str] = []
        self.questions: list[Question] = []

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence[0].upper() + sentence[1:])

    def open(self) -> None:
        first, second, third = self.people
        self.say(f"One day {first}, {second} and {third} meet in the {self.rng.choice(SCENES)}.")
        for thing in self.things:
            if self.rng.random() < 0.5:
                thing.holder = self.rng.choice(self.people)
            else:
                thing.place = self.rng.choice(self.places)
        starts = [*self.things, *self.stores]
        self.rng.shuffle(starts)
        for start in starts:
            self.say(start.state)

    def close(self) -> None:
        first, second, third = self.people
        self.say(f"In the evening {first}, {second} and {third} go home.")

    def handle(self, thing: Thing) -> None:
        """Tell that a thing is handed on, put away, found or moved, and then where it is now."""
        other = self.rng.choice([p for p in self.people if p != thing.holder])
        place = self.rng.choice([p for p in self.places if p != thing.place])
        if thing.holder and self.rng.random() < 0.5:
            self.say(f"{thing.holder} gives the {thing.name} to {other}.")
            thing.to(holder=other)
        elif thing.holder:
            pronoun = "She" if thing.holder in SHE else "He"
            self.say(f"{thing.holder} is tired of the {thing.name}. {pronoun} puts it away.")
            thing.to(place=place)
        elif self.rng.random() < 0.6:
            self.say(f"{other} finds the {thing.name}.")
            thing.to(holder=other)
        else:
            self.say(f"{other} moves the {thing.name}.")
            thing.to(place=place)
        self.say(f"now {thing.state}")

    def count(self, store: Store) -> None:
        """Tell that a store grows or shrinks, between one and nine, and then how many there are now."""
        step = self.rng.randint(1, 3)
        store.past.append(store.number)
        if store.number > step and (self.rng.random() < 0.5 or store.number + step > 9):
            self.say(f"{store.owner} loses {amount(step, store.kind)}.")
            store.number -= step
        else:
            step = min(step, 9 - store.number)
            self.say(f"{store.owner} finds {amount(step, store.kind)}.")
            store.number += step
        self.say(f"now {store.state}")

    def mood(self) -> None:
        first, second = self.rng.sample(self.people, 2)
        deed, mood = self.rng.choice(DEEDS), self.rng.choice(MOODS)
        if self.rng.random() < 0.5:
            self.say(f"{first} {deed}s. {'She' if first in SHE else 'He'} is {mood}.")
        else:
            self.say(f"{first} and {second} {deed}. They are {mood}.")

    def ask_thing(self, thing: Thing) -> None:
        if thing.holder:
            told = [p for p in thing.past if p in NAMES] + [t.holder for t in self.things if t.holder] + self.people
            self._ask("who", f"Who has the {thing.name}?", f"The {thing.name} is with ", thing.holder, told, NAMES)
        else:
            told = [p for p in thing.past if p in PLACES] + [t.place for t in self.things if t.place] + self.places
            self._ask("where", f"Where is the {thing.name}?", f"The {thing.name} is in a ", thing.place, told, PLACES)
        self.sentences[-1] += "."

    def ask_count(self, store: Store) -> None:
        numbers = [*store.past[-1:], *(n for s in self.stores for n in (s.number, *s.past)), store.number % 9 + 1]
        told = [NUMBERS[n - 1] for n in numbers]
        question, stem = f"How many {store.kind}s does {store.owner} have?", f"{store.owner} has "
        self._ask("count", question, stem, NUMBERS[store.number - 1], told, NUMBERS)
        self.sentences[-1] += amount(store.number, store.kind).removeprefix(NUMBERS[store.number - 1]) + "."

    def _ask(self, kind: str, question: str, stem: str, answer: str, told: list[str], every: list[str]) -> None:
        """Ask a question; `told` are wrong answers from the story, the most tempting first; others are from outside."""
        rival = next(word for word in told if word != answer)
        inside = {answer, rival, *told, *self.people, *self.places}
        outside = [word for word in every if word not in inside] or [w for w in every if w not in (answer, rival)]
        self.rng.shuffle(outside)
        self.questions.append(Question(kind, f"{self.text} {question}", stem, answer, (rival, *outside)))
        self.sentences.append(f"{question} {stem}{answer}")

    def tell_all(self) -> "Story":
        self.open()
        length = self.rng.randint(*self.size.length)
        while words_in(self.text) < length:
            thing, store, chance = self.rng.choice(self.things), self.rng.choice(self.stores), self.rng.random()
            if chance < 0.46 and not self.size.events:
                continue
            if chance < 0.25:
                if not thing.past or self.rng.random() < AGAIN:
                    self.handle(thing)
            elif chance < 0.36:
                if not store.past or self.rng.random() < AGAIN:
                    self.count(store)
            elif chance < 0.46:
                self.mood()
            elif chance < 0.80:
                self.ask_thing(thing)
            else:
                self.ask_count(store)
        if self.size.closing:
            self.close()
        return self


def story(split: str, number: int, size: Size = FULL) -> Story:
    """Return the story of that number in a split, a pure function of the arguments."""
    return Story(random.Random(f"{SEED}/{split}/{number}"), size).tell_all()
