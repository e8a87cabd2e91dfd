"""The proof of the checks: for every exercise, an untouched answer, the reference, every known mistake, every rewrite.

    pytest tests/test_exercise_proof.py
"""
import pytest
from answers import headings, names, rewrites, run, stub

from vit_course.exercises import bank, check, grade, source_of, variant

MISTAKES = [pytest.param(n, m, id=f"{n}-{m.id}") for n in names() for m in bank()[n].mistakes]
REWRITES = [pytest.param(n, code, id=f"{n}: {what}") for n, what, code in rewrites()]


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_COURSE_PROGRESS", str(tmp_path / "progress.jsonl"))


@pytest.mark.parametrize("name", names())
def test_untouched_is_not_attempted(name):
    outcome = check(run(stub(bank()[name]), bank()[name]))
    assert (outcome.status, outcome.points, outcome.cause) == ("not attempted", 0, None)


@pytest.mark.parametrize("name", names())
def test_reference_is_right(name):
    outcome = check(run(source_of(name), bank()[name]))
    assert (outcome.status, outcome.points) == ("right", bank()[name].points), str(outcome)


@pytest.mark.parametrize("name, mistake", MISTAKES)
def test_mistake_is_named(name, mistake):
    outcome = grade(variant(bank()[name], mistake), bank()[name])
    assert (outcome.status, outcome.cause, outcome.points) == ("wrong", mistake.id, 0), str(outcome)
    assert outcome.hint == mistake.say


@pytest.mark.parametrize("name, code", REWRITES)
def test_rewrite_is_right(name, code):
    outcome = grade(run(code, bank()[name]), bank()[name])
    assert outcome.status == "right", str(outcome)


@pytest.mark.parametrize("name", names())
def test_entry_is_complete(name):
    entry, own = bank()[name], [r for r in rewrites() if r[0] == name]
    assert len(entry.hints) == 3 and all(h.strip() for h in entry.hints)
    assert len(entry.mistakes) >= 5 and len({m.id for m in entry.mistakes}) == len(entry.mistakes)
    assert all(len(m.say.split()) >= 6 for m in entry.mistakes), "a sentence to the learner"
    assert len(own) >= 2
    assert 1 <= entry.difficulty <= 5 and entry.points >= 1 and entry.minutes >= 1
    places = [entry.section, *(m.see for m in entry.mistakes if m.see)]
    assert set(places) <= headings(entry.lesson)
    assert bool(entry.raises) == bool(entry.asks), "errors are graded only where the text asks for them"


def test_every_rewrite_has_an_exercise():
    assert {r[0] for r in rewrites()} <= set(names())
    assert len(names()) >= 30


def test_a_mistake_in_each_lesson_is_seen_by_check_too():
    for name in {e.lesson: n for n, e in bank().items()}.values():
        entry = bank()[name]
        assert check(variant(entry, entry.mistakes[0]), name).status == "wrong"
