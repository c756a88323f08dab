"""Generated text whose answers need a state: who holds what after swaps, variables of a program, open brackets.

A story reads as prose or code, and every answer in it depends on all the events before, in their order: nothing in it
can be looked up. `events` controls how far the state must be carried. A language model trained on prose and stories is
asked the questions of stories that it has not seen (`qies.probes.stories`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
THINGS = ("book", "ring", "lamp", "coin", "map", "cup", "key", "hat")
VARIABLES = ("a", "b", "c", "d")
BRACKETS = ("()", "[]", "{}")
MOST_EVENTS = 16  # in the stories of a corpus; questions go further


@dataclass(frozen=True)
class Question:
    """What a model is asked: the `text` up to the answer, the `answer`, and the `choices` it is among."""

    text: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """A text and its questions; each question's text and answer begin `text`."""

    text: str
    questions: tuple[Question, ...]


def holders(rng: np.random.Generator, events: int, people: int = 4) -> Story:
    """`people` hold one thing each, two of them swap `events` times, and then every thing is asked for: the word
    problem of the symmetric group with transpositions, told in sentences."""
    names = rng.permutation(NAMES)[:people].tolist()
    things = rng.permutation(THINGS)[:people].tolist()
    holds = dict(zip(names, things, strict=True))
    text = " ".join(f"{name} has the {thing}." for name, thing in holds.items())
    for _ in range(events):
        first, second = rng.permutation(names)[:2].tolist()
        holds[first], holds[second] = holds[second], holds[first]
        text += _one_of(
            rng,
            f" {first} and {second} swap what they hold.",
            f" Then {first} trades with {second}.",
            f" {first} exchanges things with {second}.",
        )
    choices = tuple(f" {name}" for name in sorted(names))
    text += " In the end"
    questions = []
    for thing, joint in zip(rng.permutation(things).tolist(), ["", *[" and"] * (people - 1)], strict=True):
        text += f"{joint} the {thing} is with"
        [holder] = [name for name, held in holds.items() if held == thing]
        questions.append(Question(text, f" {holder}", choices))
        text += f" {holder}"
    return Story(text + ".\n", tuple(questions))


def program(rng: np.random.Generator, events: int, variables: int = 3) -> Story:
    """A program of `events` assignments modulo 10 to `variables` variables, each printed at the end."""
    names = VARIABLES[:variables]
    values = {name: int(rng.integers(10)) for name in names}
    lines = [f"{name} = {value}" for name, value in values.items()]
    for _ in range(events):
        target, source = rng.choice(names), rng.choice(names)
        number = int(rng.integers(1, 10))
        kind = int(rng.integers(3))
        values[target] = (
            values[source],
            (values[source] + number) % 10,
            (values[target] + values[source]) % 10,
        )[kind]
        lines.append(
            (
                f"{target} = {source}",
                f"{target} = ({source} + {number}) % 10",
                f"{target} = ({target} + {source}) % 10",
            )[kind]
        )
    text = "\n".join(lines) + "\n"
    questions = []
    for name in rng.permutation(names).tolist():
        text += f"print({name})  #"
        questions.append(Question(text, f" {values[name]}", tuple(f" {digit}" for digit in range(10))))
        text += f" {values[name]}\n"
    return Story(text, tuple(questions))


def brackets(rng: np.random.Generator, events: int, depth: int = 6) -> Story:
    """Calls, lists and tables nested in each other, at most `depth` deep: which bracket closes next after `events` of
    them? All that are open are closed in order, each one a question."""
    text = "x ="
    stack: list[str] = []
    questions: list[Question] = []
    for _ in range(events):
        if stack and (len(stack) == depth or rng.random() < 0.5):
            text += stack.pop()[1] + ","
        else:
            stack.append(str(rng.choice(BRACKETS)))
            text += f" {rng.choice(VARIABLES)}{stack[-1][0]}"
    if not stack:  # something must be open
        stack.append(str(rng.choice(BRACKETS)))
        text += f" {rng.choice(VARIABLES)}{stack[-1][0]}"
    text = text.rstrip(",") + " 0"
    choices = tuple(pair[1] for pair in BRACKETS)
    while stack:
        close = stack.pop()[1]
        questions.append(Question(text, close, choices))
        text += close
    return Story(text + "\n", tuple(questions))


KINDS: dict[str, Callable[[np.random.Generator, int], Story]] = {
    "holders": holders,
    "program": program,
    "brackets": brackets,
}


@dataclass(frozen=True)
class Stories:
    """The stories of the corpus `builtin-stories`, as a source of documents."""

    name: str = "stories"
    licence: str = "generated"
    seed: int = 0
    count: int = 1000

    def version(self) -> str:
        """What determines the text; the number changes with the generators."""
        return f"stories 1, seed {self.seed}, {self.count} documents"

    def documents(self) -> Iterator[tuple[str, str]]:
        """Pairs (id, text) in a fixed order."""
        return stories(self.seed, self.count)


STORIES = Stories()


def stories(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """`count` documents (id, text) of eight stories of one kind, with 1 to `MOST_EVENTS` events each; kinds in turn."""
    kinds = list(KINDS)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        kind = kinds[i % len(kinds)]
        parts = [KINDS[kind](rng, int(rng.integers(1, MOST_EVENTS + 1))).text for _ in range(8)]
        yield f"{kind}/{i}", "\n".join(parts)


def _one_of(rng: np.random.Generator, *sentences: str) -> str:
    return sentences[int(rng.integers(len(sentences)))]
