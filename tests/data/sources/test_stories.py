"""Stories against readers of their own: every answer is recomputed from the text alone."""

import re

import numpy as np
import pytest

from qies.config import RunConfig, load
from qies.data.builder import corpus
from qies.data.sources.stories import KINDS, MOST_EVENTS, stories


def made(kind, events, n=40):
    return [KINDS[kind](np.random.default_rng([5, i]), events) for i in range(n)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("events", [1, 7, 40])
def test_questions_lead_up_to_their_answers_in_the_text(kind, events):
    for story in made(kind, events):
        for question in story.questions:
            assert story.text.startswith(question.text + question.answer)
            assert question.answer in question.choices and len(set(question.choices)) == len(question.choices)


def test_holders_by_following_each_thing():
    for story in made("holders", 12):
        where = {thing: name for name, thing in re.findall(r"(\w+) has the (\w+)\.", story.text)}
        swaps = re.findall(
            r"(\w+) (?:and|trades with|exchanges things with) (\w+)(?: swap|\.)", story.text.split(" In the end")[0]
        )
        assert len(swaps) == 12
        for first, second in swaps:
            other = {first: second, second: first}
            where = {thing: other.get(name, name) for thing, name in where.items()}
        for question in story.questions:
            thing = re.search(r"the (\w+) is with$", question.text)[1]
            assert question.answer == f" {where[thing]}"


def test_programs_by_running_them():
    for story in made("program", 20):
        space = {}
        exec("\n".join(line for line in story.text.splitlines() if "print" not in line), {}, space)
        for question in story.questions:
            name = re.search(r"print\((\w)\)  #$", question.text)[1]
            assert question.answer == f" {space[name]}"


def test_brackets_by_a_stack():
    pairs = dict(zip(")]}", "([{", strict=True))
    deepest = 0
    for story in made("brackets", 30):
        stack, asked = [], {len(q.text): q.answer for q in story.questions}
        for i, letter in enumerate(story.text):
            if i in asked:
                assert pairs[asked[i]] == stack[-1]
            if letter in pairs.values():
                stack.append(letter)
            elif letter in pairs:
                assert stack.pop() == pairs[letter]
            deepest = max(deepest, len(stack))
        assert stack == []
    assert deepest == 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_events_do_not_tell_the_answer(kind):
    """The most frequent answer is not much more frequent than chance."""
    answers = [story.questions[0].answer for story in made(kind, 16, 600)]
    share = max(answers.count(a) for a in set(answers)) / len(answers)
    assert share < {"holders": 0.2, "program": 0.2, "brackets": 0.42}[kind]


def test_a_corpus_is_fixed_by_its_seed_and_has_all_kinds():
    first, again, other = list(stories(1, 9)), list(stories(1, 9)), list(stories(2, 9))
    assert first == again and first != other
    assert [name.split("/")[0] for name, _ in first] == list(KINDS) * 3
    assert len({text for _, text in first}) == 9
    events = [text.count("with") for name, text in stories(1, 60) if name.startswith("holders")]
    assert max(events) <= 8 * (MOST_EVENTS + 4)


def test_the_corpus_is_the_built_in_prose_and_the_stories(monkeypatch):
    monkeypatch.setattr(corpus, "GENRES", ())  # the prose has its own tests
    loaded = corpus.load_corpus("builtin-stories")
    [source] = loaded.sources
    assert (source.name, source.documents) == ("stories", 1000)
    assert [own.text for own in loaded.documents] == [text.strip() for _, text in stories(0, 1000)]
    assert corpus.fingerprint("builtin-stories") == "stories 1, seed 0, 1000 documents"


def test_the_name_is_no_path(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {source: builtin-stories}\n")
    assert load(RunConfig, tmp_path / "run.yaml").data.source == "builtin-stories"
