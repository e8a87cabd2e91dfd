"""The proof of the checks: for every exercise, an untouched answer, the reference,
every known mistake, every rewrite.

    pytest tests/test_exercise_proof.py [-k gelu]

The selected answers are graded first, in as many processes as there are cores;
the tests then look at the outcomes.
"""
import multiprocessing
import os
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from answers import headings, names, rewrites, run, stub

from vit_course.exercises import bank, check, grade, source_of, variant

MISTAKES = [pytest.param(n, m.id, id=f"{n}-{m.id}") for n in names() for m in bank()[n].mistakes]
REWRITES = [pytest.param(n, code, id=f"{n}: {what}") for n, what, code in rewrites()]


def mistaken(exercise, mistake: str):
    "The reference with the known mistake of this name in it."
    return variant(exercise, next(m for m in exercise.mistakes if m.id == mistake))


WAYS = {
    "test_untouched_is_not_attempted": lambda e: check(run(stub(e), e)),
    "test_reference_is_right": lambda e: check(run(source_of(e.name), e)),
    "test_mistake_is_named": lambda e, mistake: grade(mistaken(e, mistake), e),
    "test_rewrite_is_right": lambda e, code: grade(run(code, e), e),
}


def grade_all(name: str, tasks: list[tuple]) -> dict:
    "The outcomes of answers to one exercise."
    os.environ["VIT_COURSE_PROGRESS"] = str(Path(tempfile.mkdtemp()) / "progress.jsonl")
    return {(way, name, *rest): WAYS[way](bank()[name], *rest) for way, *rest in tasks}


@pytest.fixture(scope="session")
def outcomes(request) -> dict:
    "The outcomes of all answers that the selected tests are about."
    tasks = defaultdict(list)
    for item in request.session.items:
        way = getattr(item, "originalname", None)
        if way in WAYS:
            values = dict(item.callspec.params)
            tasks[values.pop("name")].append((way, *values.values()))
    long_first = sorted(tasks, key=lambda name: (not bank()[name].is_module, -len(tasks[name])))
    processes = min(4, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(grade_all, name, tasks[name]) for name in long_first]
        return {key: outcome for job in jobs for key, outcome in job.result().items()}


@pytest.mark.parametrize("name", names())
def test_untouched_is_not_attempted(name, outcomes):
    outcome = outcomes["test_untouched_is_not_attempted", name]
    assert (outcome.status, outcome.points, outcome.cause) == ("not attempted", 0, None)


@pytest.mark.parametrize("name", names())
def test_reference_is_right(name, outcomes):
    outcome = outcomes["test_reference_is_right", name]
    assert (outcome.status, outcome.points) == ("right", bank()[name].points), str(outcome)


@pytest.mark.parametrize("name, mistake", MISTAKES)
def test_mistake_is_named(name, mistake, outcomes):
    outcome = outcomes["test_mistake_is_named", name, mistake]
    assert (outcome.status, outcome.cause, outcome.points) == ("wrong", mistake, 0), str(outcome)
    assert outcome.hint == next(m.say for m in bank()[name].mistakes if m.id == mistake)


@pytest.mark.parametrize("name, code", REWRITES)
def test_rewrite_is_right(name, code, outcomes):
    outcome = outcomes["test_rewrite_is_right", name, code]
    assert outcome.status == "right", str(outcome)


@pytest.mark.parametrize("name", names())
def test_entry_is_complete(name):
    entry, own = bank()[name], [r for r in rewrites() if r[0] == name]
    assert len(entry.hints) == 3 and all(h.strip() for h in entry.hints)
    assert len(entry.mistakes) >= 5 and len({m.id for m in entry.mistakes}) == len(entry.mistakes)
    assert all(len(m.say.split()) > 3 for m in entry.mistakes), "a sentence to the learner"
    assert len(own) >= 2
    assert 1 <= entry.difficulty <= 5 and entry.points >= 1 and entry.minutes >= 1
    places = [entry.section, *(m.see for m in entry.mistakes if m.see)]
    assert set(places) <= headings(entry.lesson)
    asked = bool(entry.asks)
    assert bool(entry.raises) == asked, "errors are graded only where the text asks for them"


def test_every_rewrite_has_an_exercise():
    assert {r[0] for r in rewrites()} <= set(names())
    assert len(names()) >= 30


def test_a_mistake_in_each_lesson_is_seen_by_check_too():
    for name in {e.lesson: n for n, e in bank().items()}.values():
        entry = bank()[name]
        assert check(variant(entry, entry.mistakes[0]), name).status == "wrong"
