"""New inputs keep the shape of those that a problem has."""

import ast

from magistral_jax.curate.code_inputs import new_calls, new_inputs

ARRAY = ["3\n5 1 4\n", "4\n7 7 2 9\n"]
CASES = ["2\n3\n1 2 3\n2\n5 6\n"]


def test_an_array_keeps_its_length_and_its_range():
    made = new_inputs(ARRAY, 30, "seed")
    assert len(made) == 30
    assert len(set(made) | set(ARRAY)) == 32
    for text in made:
        first, second, *rest = text.split("\n")
        assert rest == [""]
        assert int(first) == len(second.split())
        assert all(0 <= int(value) <= 10 for value in second.split())


def test_the_numbers_of_cases_and_of_their_items_are_left_alone():
    for text in new_inputs(CASES, 20, "seed"):
        lines = text.split("\n")
        assert lines[0] == "2"
        assert (lines[1], lines[3]) == ("3", "2")
        assert [len(line.split()) for line in lines] == [1, 1, 3, 1, 2, 0]


def test_words_keep_their_letters_and_their_length():
    for text in new_inputs(["5\nabcab\n", "3\nxyz\n"], 10, "seed"):
        length, word, _ = text.split("\n")
        assert int(length) == len(word)
        assert set(word) <= set("abc") or set(word) <= set("xyz")


def test_they_are_a_function_of_the_seed():
    assert new_inputs(ARRAY, 5, "a") == new_inputs(ARRAY, 5, "a") != new_inputs(ARRAY, 5, "b")


def test_what_cannot_be_changed_gives_nothing():
    assert new_inputs(["\n"], 5, "seed") == []
    assert new_inputs(ARRAY, 0, "seed") == []
    assert new_calls(["f()"], 5, "seed") == []


def test_calls_keep_their_names_and_types():
    calls = ["candidate(nums=[3, 1, 2], target=6, flag=True, name='ab')"]
    made = new_calls(calls, 20, "seed")
    assert len(made) == 20
    for text in made:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        assert {name: type(value) for name, value in values.items()} == {
            "nums": list,
            "target": int,
            "flag": bool,
            "name": str,
        }
        assert all(type(value) is int for value in values["nums"])
        assert len(values["name"]) == 2
