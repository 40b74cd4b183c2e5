"""Which problems are chosen for which language, and which answers are taken for translations."""

import collections
import dataclasses
import re

import pytest

from magistral_jax.curate.translation import LANGUAGE_NAMES, Order, choose_orders, translated
from magistral_jax.data.sources import load_problems
from magistral_jax.records import MagistralError, Problem

ENGLISH = load_problems("templated:sums?language=en", 120, 0)
LANGUAGES = tuple(LANGUAGE_NAMES)


def without_columns(problems: list[Problem]) -> list[Problem]:
    return [dataclasses.replace(problem, extra={}) for problem in problems]


def test_a_tenth_of_the_english_problems_equally_into_each_language():
    french = without_columns(load_problems("templated:sums?language=fr", 50, 1))
    orders, unfit = choose_orders([*french, *ENGLISH], share=0.1, languages=LANGUAGES, seed=0)
    assert len(orders) == 12
    assert collections.Counter(order.language for order in orders) == dict.fromkeys(LANGUAGES, 2)
    assert {removal.reason for removal in unfit} == {"not in English"}
    places = [ENGLISH.index(order.problem) for order in orders]
    assert places == sorted(places)
    assert orders == choose_orders([*french, *ENGLISH], share=0.1, languages=LANGUAGES, seed=0)[0]
    assert orders != choose_orders([*french, *ENGLISH], share=0.1, languages=LANGUAGES, seed=1)[0]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem("a", "$1 + 1 =$", "2"), "too few words"),
        (Problem("a", "What day is the day after next Monday?", "Wednesday"), "answer in words"),
        (Problem("a", "How many days are there in a week?", "7", extra={"language": "fr"}), "not in English"),
    ],
)
def test_what_is_never_chosen(problem: Problem, reason: str):
    orders, (removal,) = choose_orders([problem], share=1.0, languages=LANGUAGES, seed=0)
    assert (orders, removal.reason) == ([], reason)


@pytest.mark.parametrize("answer", [r"\frac{\pi}{2}", r"x^2 + 3\sin x", "12", r"\text{A}"])
def test_formulas_are_no_answers_in_words(answer: str):
    orders, _ = choose_orders(
        [Problem("a", "How large is the area of this figure?", answer)], share=1.0, languages=LANGUAGES, seed=0
    )
    assert len(orders) == 1


def test_an_unknown_language_is_named():
    sentence = "`translate.languages` has `nl`; expected some of fr, es, it, de, zh, ru."
    with pytest.raises(MagistralError, match=re.escape(sentence)):
        choose_orders(ENGLISH, share=0.1, languages=("fr", "nl"), seed=0)


ORDER = Order(Problem("a", "It costs 5 euros for 7 days. How much is a day?", "5/7", extra={"level": 3}), "de")


def test_the_endpoint_sees_marks_and_the_name_of_the_language():
    system, user = ORDER.messages
    assert user == {"role": "user", "content": "It costs [[1]] euros for [[2]] days. How much is a day?"}
    assert "into German" in system["content"]


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (
            "In [[2]] Tagen kostet es [[1]] Euro. Wie viel kostet ein Tag?",
            ("In 7 Tagen kostet es 5 Euro. Wie viel kostet ein Tag?", ""),
        ),
        (
            "<think>In [[1]] …</think>\nEs kostet [[1]] Euro für [[2]] Tage. Wie viel kostet ein Tag?\n",
            ("Es kostet 5 Euro für 7 Tage. Wie viel kostet ein Tag?", ""),
        ),
        ("Es kostet [[1]] Euro für die Tage. Wie viel kostet ein Tag?", ("", "placeholder lost")),
        ("It costs [[1]] euros for [[2]] days. How much is one day?", ("", "wrong language")),
        ("[[1]] [[2]]", ("", "wrong language")),
        (" \n", ("", "empty")),
    ],
)
def test_which_replies_are_taken(reply: str, outcome: tuple[str, str]):
    assert ORDER.accept(reply) == outcome


def test_each_attempt_has_a_seed_of_its_own():
    seeds = [ORDER.seed(attempt, run_seed) for run_seed in (0, 1) for attempt in range(3)]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_columns_of_a_translated_problem_and_of_one_that_stays():
    found = {"id": "a", "language": "de", "statement": "Wie viel kostet ein Tag?", "reason": ""}
    assert translated(ORDER.problem, found) == Problem(
        "a:de", "Wie viel kostet ein Tag?", "5/7", extra={"level": 3, "language": "de", "original_id": "a"}
    )
    same = dataclasses.replace(ORDER.problem, extra={"level": 3, "language": "en", "original_id": None})
    assert translated(ORDER.problem, None) == same
    assert translated(ORDER.problem, found | {"statement": "", "reason": "empty"}) == same
