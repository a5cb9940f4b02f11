"""Calibration text: from its name to token sequences to measure on, and others kept for verifying.

Held-out text must not repeat text that was measured on. So every sequence counts once: one that is the same as an
earlier one, of any of the texts, or that comes from a document that was read before, or that a recovered model was
fitted on, is left out before anything is measured, and `Text.note` says how many were.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from transformers import PreTrainedTokenizerBase

from spd_calib.errors import InputError
from spd_calib.formats.common import TextRef

from .documents import TEXT, Document, read_documents

REPEATED_SHARE = 0.5  # of a packed sequence's tokens: headings and other short documents may well come again
Tokens = list[int]
Fitted = Mapping[str, int | None]  # documents by the hash of their content: how many of their tokens, None for all


@dataclass(frozen=True)
class TextOptions:
    """Names the sequences of one text that are used; see `load_texts`."""

    source: str
    seq_len: int
    min_len: int
    max_samples: int
    verify_samples: int
    pack: bool = False
    name: str | None = None  # what stands in files in place of `source`
    spread: int = 1  # the sequences to measure on are taken evenly from up to so many times as many
    column: str = TEXT  # that holds the documents
    fitted: Fitted = field(default_factory=dict)  # the Text.documents of a recovery: left out


@dataclass(frozen=True)
class Text:
    """Sequences of one source. `note` says, in words, where fewer than asked for were found, and what was left out.

    `documents` are those that the sequences before the verification are of.
    """

    calibration: list[Tokens]
    verification: list[Tokens]
    note: str | None
    options: TextOptions
    passed: int  # sequences of the source from the first of these up to the verification
    documents: Fitted = field(default_factory=dict)
    first: int = 0  # the place of the first of these in the source

    def calibration_ref(self) -> TextRef:
        return _ref(self.options, self.calibration, first=self.first)

    def verification_ref(self) -> TextRef:
        return _ref(self.options, self.verification, first=self.first + self.passed)


def load_text(options: TextOptions, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Return the sequences of one text, as `load_texts`."""
    return load_texts([options], tokenizer)[0]


def load_texts(options: Sequence[TextOptions], tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """Tokenize each text's documents in file order until `max_samples + verify_samples` are long enough.

    A document's first `seq_len` tokens, special tokens as the tokenizer adds them, are one sequence; documents
    shorter than `min_len` are left out. With `pack` documents are glued together and cut every `seq_len` tokens. A
    document of chat messages is written out by the tokenizer's chat template. What was there before, in the same text
    or in one before it, is left out. The first `max_samples` are for measuring, those that follow for verifying; where
    the text is too short for both, a fifth (at least one) is set aside. With `spread` those to measure on are taken
    evenly from more of the text: packed sequences that follow one another are of the same few documents. Raises
    InputError for text that cannot be used.
    """
    seen = _Seen()
    return [_split(_Reading(o, number, tokenizer), o, seen=seen) for number, o in enumerate(options)]


def further(texts: Sequence[Text], times: int, *, tokenizer: PreTrainedTokenizerBase) -> list[Text] | None:
    """Return the `times`-th (from 1) further verification sequences of each of `texts`, as many as it has of those.

    They follow everything before them in the source, and repeat nothing of any text. None where one of the sources
    holds no more. `texts` are all that `load_texts` returned.
    """
    seen = _Seen()
    readings = [_Reading(text.options, number, tokenizer) for number, text in enumerate(texts)]
    for text, reading in zip(texts, readings, strict=True):
        reading.take(text.passed + len(text.verification), seen)
    found: list[Text] = []
    for time in range(times):
        found = []
        for text, reading in zip(texts, readings, strict=True):
            sequences = [c.ids for c in reading.take(len(text.verification), seen)]
            if len(sequences) < len(text.verification):
                return None
            first = text.passed + (time + 1) * len(sequences)
            found.append(Text([], sequences, None, text.options, passed=0, first=first))
    return found


@dataclass(frozen=True)
class _Part:
    """The share of one document in a sequence."""

    document: str  # hash of its content
    occurrence: tuple[int, int]  # which text, and which document of it: the same content may come again
    tokens: int
    fitted: int  # of these tokens, those that the model was fitted on
    up_to: int | None  # how many of the document's tokens were read by the end of it; None: all that ever are


@dataclass(frozen=True)
class _Candidate:
    """A sequence before it is known whether it was there before."""

    ids: Tokens
    parts: list[_Part]

    @property
    def hash(self) -> str:
        return _hash(json.dumps(self.ids))

    @property
    def is_fitted(self) -> bool:
        """Say whether it, or enough of it, is text that the model was fitted on."""
        return sum(p.fitted for p in self.parts) >= REPEATED_SHARE * len(self.ids)


@dataclass
class _Seen:
    """The sequences that are used so far, of all texts, and the documents they come from."""

    sequences: set[str] = field(default_factory=set)
    documents: dict[str, tuple[int, int]] = field(default_factory=dict)  # by hash: where it was first

    def repeats(self, candidate: _Candidate) -> bool:
        again = sum(
            p.fitted if self.documents.get(p.document, p.occurrence) == p.occurrence else p.tokens
            for p in candidate.parts
        )
        return candidate.hash in self.sequences or again >= REPEATED_SHARE * len(candidate.ids)

    def add(self, candidate: _Candidate) -> None:
        self.sequences.add(candidate.hash)
        for part in candidate.parts:
            self.documents.setdefault(part.document, part.occurrence)


class _Reading:
    """One text, read once from its beginning: `take` goes on where it stopped."""

    def __init__(self, options: TextOptions, number: int, tokenizer: PreTrainedTokenizerBase):
        self.documents = 0  # looked at
        self.repeated = 0  # sequences left out
        self.fitted = 0  # of them, those that the model was fitted on
        self._candidates = self._cut(options, number, tokenizer)

    def take(self, wanted: int, seen: _Seen) -> list[_Candidate]:
        """Return the next `wanted` sequences that repeat nothing, or as many as there are, and add them to `seen`."""
        return list(islice(self._fresh(seen), wanted))

    def _fresh(self, seen: _Seen) -> Iterator[_Candidate]:
        for candidate in self._candidates:
            if seen.repeats(candidate):
                self.repeated += 1
                self.fitted += candidate.is_fitted
                continue
            seen.add(candidate)
            yield candidate

    def _cut(self, options: TextOptions, number: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Candidate]:
        n, opening = options.seq_len, _opening(tokenizer) if options.pack else []
        held, parts = Tokens(), list[_Part]()  # with pack: what fills no sequence yet
        for document in read_documents(options.source, options.column):
            self.documents += 1
            key, occurrence = _hash(json.dumps(document.content)), (number, self.documents)
            if not options.pack:
                ids = token_ids(document, tokenizer=tokenizer, at_most=n)
                if len(ids) >= options.min_len:
                    fitted = len(ids[: options.fitted.get(key, 0)])
                    yield _Candidate(ids, [_Part(key, occurrence, len(ids), fitted, up_to=None)])
                continue
            ids, done = token_ids(document, tokenizer=tokenizer), 0
            known = len(ids[: options.fitted.get(key, 0)])
            while done < len(ids):
                if done and not held:  # at its beginning a document brings its own
                    held += opening[: n - 1]
                piece = ids[done : done + n - len(held)]
                held += piece
                fitted = max(0, min(known - done, len(piece)))
                done += len(piece)
                parts.append(_Part(key, occurrence, len(piece), fitted, up_to=done if done < len(ids) else None))
                if len(held) == n:
                    yield _Candidate(held, parts)
                    held, parts = [], []


def _opening(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Return the special tokens that the tokenizer puts in front of any text: most often one, BOS, or none.

    What is cut from the middle of a document is given them, too: without its BOS many a model reads nothing aright.
    """
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def token_ids(document: Document, *, tokenizer: PreTrainedTokenizerBase, at_most: int | None = None) -> Tokens:
    """Return a document's token ids, the first `at_most` of them: those of a chat by the tokenizer's chat template.

    Raises InputError for a chat where the tokenizer has no template, or one that refuses the messages.
    """
    text, special = document.content, True
    if not isinstance(text, str):
        if tokenizer.chat_template is None:
            raise InputError(
                f"{document.place}: these are chat messages, and the model's tokenizer has no chat template; name a "
                "column of text as `column`."
            )
        # a reader of tables fills in keys that only other messages have
        messages = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in text]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as e:  # the template is a program of its own
            why = (str(e) or type(e).__name__).splitlines()[0].rstrip(".")
            raise InputError(
                f"{document.place}: the tokenizer's chat template does not take these messages: {why}."
            ) from None
        special = False  # the template has written them
    cut = {} if at_most is None else {"truncation": True, "max_length": at_most}
    return tokenizer(text, add_special_tokens=special, **cut)["input_ids"]


def _split(reading: _Reading, options: TextOptions, *, seen: _Seen) -> Text:
    """Read a text, and divide it. Raises InputError for too little of it."""
    most = options.spread * options.max_samples
    found = reading.take(most + options.verify_samples, seen)
    sequences = [candidate.ids for candidate in found]
    source, notes = options.name or options.source, list[str]()
    if not reading.documents:
        raise InputError(f"{source} holds no text; name a file with documents in it.")
    if len(sequences) < 2:
        beyond = f" beyond the {reading.fitted} that were fitted on" if reading.fitted else ""
        others = reading.repeated - reading.fitted
        repeated = f" and repeat none before them ({others} do)" if others else ""
        way_out = "lower seq_len" if options.pack else "lower seq_len or min_len, or glue documents with `pack`"
        if reading.repeated:
            way_out = "give other text" if reading.fitted else "give text that repeats itself less"
        have = f"have {options.min_len} tokens or more"
        if options.pack:
            have = f"packed sequences of {options.seq_len} tokens are made"
        raise InputError(
            f"Of {reading.documents} documents in {source}, {len(sequences)} {have}{repeated}{beyond}, two are needed "
            f"(one to measure on, one to verify on); {way_out}."
        )
    if reading.fitted:
        notes.append(
            f"{source}: {reading.fitted} sequences are left out, since the model was fitted on them, or on the "
            "documents they are from."
        )
    if others := reading.repeated - reading.fitted:
        notes.append(
            f"{source}: {others} sequences are left out, since they, or the documents they are from, repeat earlier "
            "ones."
        )
    measured = min(most, len(sequences) - options.verify_samples)
    if len(sequences) < options.max_samples + options.verify_samples:
        aside = min(options.verify_samples, max(1, len(sequences) // 5))
        measured = min(options.max_samples, len(sequences) - aside)
        notes.append(
            f"{source} has {len(sequences)} usable sequences, fewer than {options.max_samples} to measure on and "
            f"{options.verify_samples} to verify on: {measured} are measured on, {len(sequences) - measured} set aside."
        )
    calibration, verification = sequences[:measured], sequences[measured:]
    if measured > options.max_samples:
        calibration = evenly(calibration, options.max_samples)
    documents = dict[str, int | None]()
    for candidate in found[:measured]:
        for part in candidate.parts:
            if documents.get(part.document, 0) is not None:
                documents[part.document] = part.up_to
    return Text(calibration, verification, " ".join(notes) or None, options, passed=measured, documents=documents)


def evenly(sequences: Sequence[Tokens], number: int) -> list[Tokens]:
    """Return so many of the sequences, from everywhere among them."""
    return [sequences[i * len(sequences) // number] for i in range(number)]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _ref(options: TextOptions, sequences: list[Tokens], *, first: int) -> TextRef:
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(json.dumps(ids).encode())
    return TextRef(
        source=options.name or options.source,
        column=options.column,
        seq_len=options.seq_len,
        min_len=options.min_len,
        pack=options.pack,
        first=first,
        sequences=len(sequences),
        tokens=sum(map(len, sequences)),
        sha256=digest.hexdigest(),
    )
