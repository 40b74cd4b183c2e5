"""Which tests of a program stay: majorities of known solutions against expected outputs, worked by hand."""

import pytest

from magistral_jax.curate.code_votes import says_several_answers, unanimous, vote


def equal(first: str, second: str) -> bool:
    return first == second


def test_agreement_keeps_a_test_and_a_majority_repairs_it():
    outputs = [["1", "2", "3", "4"], ["1", "2", "3", "x"], ["1", "2", "3", "4"]]
    votes = vote(outputs, ["1", "9", "3", "4"], equal)
    assert votes.trusted == (0, 1, 2)
    assert votes.expected == ("1", "2", "3", "4")
    assert votes.num_repaired == 1
    assert not votes.is_split


def test_a_wrong_solution_has_no_vote():
    outputs = [["1", "2", "3"], ["1", "2", "3"], ["a", "b", "c"], ["d", "e", None], [None, None, None]]
    votes = vote(outputs, ["1", "2", "9"], equal)
    assert votes.trusted == (0, 1)
    assert votes.expected == ("1", "2", "3")


def test_one_solution_drops_what_it_disagrees_with_and_repairs_nothing():
    votes = vote([["1", "2", "3"]], ["1", "9", "3"], equal)
    assert votes.expected == ("1", None, "3")
    assert votes.num_repaired == 0


def test_without_a_majority_a_test_is_dropped():
    votes = vote([["1", "2", "5"], ["1", "2", "6"]], ["1", "2", "5"], equal)
    assert votes.expected == ("1", "2", None)
    failed = vote([["1", "2", None], ["1", "2", None], ["1", "2", "3"]], ["1", "2", "3"], equal)
    assert failed.expected == ("1", "2", None)  # a failure is no consent


def test_most_expected_outputs_may_be_wrong_where_the_solutions_agree():
    outputs = [["1", "2", "3", "4"]] * 3
    votes = vote(outputs, ["1", "x", "y", "z"], equal)
    assert votes.trusted == (0, 1, 2)
    assert (votes.expected, votes.num_repaired) == (("1", "2", "3", "4"), 3)


def test_nobody_is_trusted_where_nothing_agrees():
    votes = vote([["1", "2"]], ["8", "9"], equal)
    assert votes.trusted == ()
    assert votes.expected == (None, None)


def test_solutions_that_differ_on_most_tests_have_several_right_answers():
    outputs = [["a", "b", "c"], ["b", "c", "c"], ["c", "a", "c"]]
    assert vote(outputs, ["a", "c", "c"], equal).is_split
    assert not vote(outputs[:2], ["a", "c", "c"], equal).is_split  # two who differ: one may be wrong


def test_agreement_is_that_of_the_checker():
    close = lambda a, b: abs(float(a) - float(b)) < 0.1
    votes = vote([["1.00"], ["1.01"], ["1.02"]], ["1.03"], close)
    assert votes.expected == ("1.03",)  # the wording that it came with
    assert votes.num_repaired == 0


def test_a_new_output_needs_two_and_no_dissent():
    assert unanimous(["1", "1"], equal) == "1"
    assert unanimous(["1"], equal) is None
    assert unanimous(["1", "2"], equal) is None
    assert unanimous(["1", None], equal) is None
    assert unanimous([], equal) is None


@pytest.mark.parametrize(
    "statement",
    [
        "If there are several answers, print any of them.",
        "If there are multiple\nsolutions, print one.",
        "Output any valid permutation.",
        "You can return the answer in any order.",
        "Any of the optimal plans will be accepted.",
    ],
)
def test_a_statement_that_allows_several_answers(statement: str):
    assert says_several_answers(statement)


@pytest.mark.parametrize(
    "statement",
    ["Print the answer.", "There is exactly one solution.", "You may use any language.", "Print them in sorted order."],
)
def test_a_statement_that_does_not(statement: str):
    assert not says_several_answers(statement)
