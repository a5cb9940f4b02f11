"""Three multiple-choice tasks drawn from the story world: where a thing is, who has it, how many there are.

A document is a story cut behind one of its own questions, four choices, and the index of the right one. In every
other document of "where" and "who" one wrong choice comes from the story, the most tempting there is: where the thing
was before, who had it. All others come from outside the story: the model knows what it was told, but it was trained too
shortly to tell two owners' numbers apart reliably (60 % right where a number from the story is among the choices).
Positions of the right answer and the answers themselves are balanced.
"""

import random

from world import NAMES, NUMBERS, PLACES, SEED, Question, story

DOCUMENTS = 200
CHOICES = 4
ANSWERS = {"where": PLACES, "who": NAMES, "count": NUMBERS}


def documents(kind: str) -> list[dict]:
    """Return the documents of a task, each the last question of its kind in a story of its own."""
    rng = random.Random(f"{SEED}/choices/{kind}")
    most = -(-DOCUMENTS // len(ANSWERS[kind]))  # no answer is right more often than its share
    used = dict.fromkeys(ANSWERS[kind], 0)
    docs: list[dict] = []
    number = 0
    while len(docs) < DOCUMENTS:
        asked = [q for q in story(f"task-{kind}", number).questions if q.kind == kind]
        number += 1
        if asked and used[asked[-1].answer] < most and len(asked[-1].rivals) >= CHOICES:
            used[asked[-1].answer] += 1
            tempting = kind != "count" and len(docs) % 2 == 0
            docs.append(document(asked[-1], len(docs) // 2 % CHOICES, tempting, rng))
    return docs


def document(question: Question, label: int, tempting: bool, rng: random.Random) -> dict:
    """Return one document. Choices differ in their last word alone; a question's first rival is the tempting one."""
    first = 0 if tempting else 1
    words = list(question.rivals[first : first + CHOICES - 1])
    rng.shuffle(words)
    words.insert(label, question.answer)
    return {"story": question.before, "choices": [question.stem + word for word in words], "label": label}
