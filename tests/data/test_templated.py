"""Templated problems: right by arithmetic, in their language, with forms that agree, a function of the seed."""

import collections
import re
from typing import Any

import pytest

from magistral_jax.data.sources import load_problems
from magistral_jax.data.templated import LANGUAGES, completion_words, inflect
from magistral_jax.records import Problem
from magistral_jax.verify.language import LanguageOutcome, classify, consistent_language


def problems_in(language: str, num: int = 500, more: str = "") -> list[Problem]:
    return load_problems(f"templated:sums?language={language}{more}", num, 0)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_classifier_knows_the_language_of_statements_thoughts_and_answers(language: str):
    problems = problems_in(language)
    texts = {"statement": [problem.statement for problem in problems]}
    for style, is_thorough in (("thorough", True), ("hasty", False)):
        completions = [completion_words(p, int(p.answer), language, is_thorough=is_thorough) for p in problems[:100]]
        texts[f"{style} thoughts"], texts["answer"] = map(list, zip(*completions, strict=True))
    texts["shortest thoughts"] = [
        completion_words(p, 1, language, is_thorough=True)[0] for p in problems_in(language, 100, "&terms=2&largest=2")
    ]
    for part, found in texts.items():
        labels = collections.Counter(map(classify, found))
        assert labels[language] >= 0.99 * len(found), (part, labels)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_numbers_of_a_statement_are_its_terms_and_the_answer_their_sum(language: str):
    for problem in problems_in(language, 100):
        terms = problem.extra["terms"]
        assert [int(number) for number in re.findall(r"\d+", problem.statement)] == [abs(term) for term in terms]
        assert int(problem.answer) == sum(terms)
        assert all(sum(terms[:place]) >= 0 for place in range(1, len(terms) + 1))
        assert 3 <= len(terms) <= 5
        assert all(1 <= abs(term) <= 9 for term in terms)
        assert not set("[]{}|") & set(problem.statement)


def test_languages_tell_the_same_stories():
    found = {language: problems_in(language, 200) for language in LANGUAGES}
    for same in zip(*found.values(), strict=True):
        assert len({(problem.extra["story"], *problem.extra["terms"]) for problem in same}) == 1
        assert len({problem.statement for problem in same}) == len(LANGUAGES)
    stories = collections.Counter(problem.extra["story"] for problem in found["en"])
    assert len(stories) == 4
    assert min(stories.values()) > 30


def test_languages_take_turns_and_a_seed_gives_the_same_again():
    source = "templated:sums?language=fr,ru&terms=2,3&largest=4"
    problems = load_problems(source, 20, 5)
    assert [problem.extra["language"] for problem in problems] == ["fr", "ru"] * 10
    assert problems == load_problems(source, 30, 5)[:20]
    assert problems != load_problems(source, 20, 6)
    assert len({problem.id for problem in problems}) == 20


@pytest.mark.parametrize(
    ("sentence", "language", "forms"),
    [
        ("{n} [книга|книги|книг]", "ru", {1: "книга", 3: "книги", 5: "книг", 11: "книг", 12: "книг", 21: "книга"}),
        ("{n} [livre|livres]", "fr", {0: "livre", 1: "livre", 2: "livres"}),
        ("{n} [book|books]", "en", {0: "books", 1: "book", 2: "books", 21: "books"}),
        ("{n} 本书", "zh", {1: "本书", 2: "本书"}),
    ],
)
def test_forms_agree_with_numbers(sentence: str, language: str, forms: dict[int, str]):
    assert {number: inflect(sentence, number, language) for number in forms} == {
        number: f"{number} {form}" for number, form in forms.items()
    }


def test_thoughts_in_another_language_are_inconsistent():
    (problem,) = problems_in("it", 1)
    outcomes = [
        consistent_language(problem.statement, *completion_words(problem, 3, language, is_thorough=True))
        for language in ("it", "en", "es")
    ]
    assert outcomes == [LanguageOutcome.CONSISTENT, LanguageOutcome.INCONSISTENT, LanguageOutcome.INCONSISTENT]


def test_thorough_thoughts_show_each_step():
    problem = Problem("p", "", "5", extra={"language": "en", "story": "bus", "terms": [4, 3, -2]})
    assert completion_words(problem, 5, "en", is_thorough=True) == (
        "Let us count step by step. Adding 3 to 4 gives 7. Taking 2 away from 7 leaves 5.",
        r"So the answer to the question is \boxed{5}.",
    )


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("templated:products", "there are no templates of that name; expected templated:sums"),
        ("templated:sums?langage=fr", "generator sums has no parameter 'langage'; perhaps you meant: language"),
        ("templated:sums?language=nl", "refuses its parameters: there is no language 'nl', only en, fr, es"),
        ("templated:sums?terms=4,3", "refuses its parameters: terms is one number, or the fewest and the most"),
        ("templated:sums?largest=0", "refuses its parameters: largest is at least 1"),
        ("templated:sums?largest=many", "refuses its parameters: largest is a whole number"),
        ("templated:sums?terms=2,x", "refuses its parameters: terms is a whole number or two"),
        ("templated:sums?language=3", "refuses its parameters: language is a code or several"),
    ],
)
def test_mistakes_are_named(source: str, sentence: str, refuses: Any):
    with refuses(f"{source}: ", sentence):
        load_problems(source, 5, 0)


def test_a_number_of_problems_is_needed(refuses: Any):
    with refuses("templated:sums: a generator needs a number of problems", "found 0"):
        load_problems("templated:sums", 0, 0)
