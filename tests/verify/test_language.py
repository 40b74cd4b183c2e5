import pytest

from magistral_jax.verify.language import LanguageOutcome, classify, consistent_language, strip_notation

ENGLISH = "Find the sum of the two numbers that are written on the blackboard."
FRENCH = "Trouvez la somme des deux nombres qui sont écrits sur le tableau noir."
TEXTS = {
    "en": ENGLISH,
    "fr": FRENCH,
    "es": "Encuentra la suma de los dos números que están escritos en la pizarra.",
    "it": "Trova la somma dei due numeri che sono scritti sulla lavagna della classe.",
    "de": "Bestimme die Summe der beiden Zahlen, die auf der Tafel geschrieben stehen.",
    "zh": "求写在黑板上的两个数字的和，并说明你的理由。",  # noqa: RUF001
    "ru": "Найдите сумму двух чисел, которые написаны на доске.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_the_languages_of_the_report(language: str):
    assert classify(TEXTS[language]) == language


def test_newlines_and_lone_surrogates_are_no_trouble():
    assert classify(ENGLISH.replace(" ", "\n")) == "en"
    assert classify(ENGLISH + "\ud800") == "en"


def test_notation_says_nothing_about_the_language():
    notation = (
        r"$\text{les nombres sont}$ \[ \sum_{k} k \] ```python"
        + "\nprint('bonjour')\n```"
        + r" `x = 1` \frac{a}{b} 123"
    )
    assert strip_notation(notation) == ""
    assert classify(ENGLISH + notation) == "en"
    assert classify(FRENCH + " $the sum of the two numbers is the answer$" * 20) == "fr"


@pytest.mark.parametrize("text", ["", "12", r"\boxed{12}", "Oui.", "$x^2 + y^2 = z^2$", "好的"])
def test_too_little_text_has_no_language(text: str):
    assert classify(text) is None


def test_chinese_dialects_count_as_chinese(monkeypatch: pytest.MonkeyPatch):
    class Dialect:
        def predict(self, _: str) -> tuple[tuple[str], tuple[float]]:
            return ("__label__yue",), (0.9,)

    monkeypatch.setattr("magistral_jax.verify.language._model", Dialect)
    assert classify(TEXTS["zh"]) == "zh"


def test_all_three_have_to_agree():
    assert consistent_language(ENGLISH, ENGLISH, ENGLISH) is LanguageOutcome.CONSISTENT
    assert consistent_language(FRENCH, ENGLISH, ENGLISH) is LanguageOutcome.INCONSISTENT
    assert consistent_language(ENGLISH, FRENCH, ENGLISH) is LanguageOutcome.INCONSISTENT
    assert consistent_language(ENGLISH, ENGLISH, FRENCH) is LanguageOutcome.INCONSISTENT


def test_a_bare_answer_gives_no_verdict_but_hides_no_disagreement():
    assert consistent_language(ENGLISH, ENGLISH, r"\boxed{12}") is LanguageOutcome.TOO_SHORT
    assert consistent_language(ENGLISH, FRENCH, r"\boxed{12}") is LanguageOutcome.INCONSISTENT


def test_a_switch_of_script_is_seen_inside_a_text():
    mixed = f"{ENGLISH} {ENGLISH} {TEXTS['zh']} {ENGLISH}"
    assert consistent_language(ENGLISH, mixed, ENGLISH) is LanguageOutcome.INCONSISTENT
    assert classify(f"{ENGLISH} We call the angle α and the sum Σ.") == "en"


SENTENCES = {
    "en": "First we add both sides, and then we look at what is left over at the end of it.",
    "zh": "我们先把两边相加，然后再看最后剩下什么，这样就得到答案了。",  # noqa: RUF001
    "ru": "Сначала сложим обе части, а потом посмотрим, что останется в конце.",  # noqa: RUF001
    "fr": "D'abord nous ajoutons les deux côtés, et ensuite nous regardons ce qui reste à la fin de tout cela. Il nous "
    "faut encore vérifier que la solution est bien la bonne, en la mettant dans les équations du début, et conclure.",
}


@pytest.mark.parametrize(
    ("base", "other"),
    [("en", "zh"), ("zh", "en"), ("en", "ru"), ("ru", "en"), ("zh", "ru"), ("fr", "zh"), ("en", "fr")],
)
def test_a_passage_in_another_language_is_seen_in_a_long_text(base: str, other: str):
    text = "\n".join([TEXTS[base]] * 40)
    mixed = f"{text}\n{SENTENCES[other]}\n{text}"
    assert classify(text) == base
    assert classify(mixed) == "mixed"
    assert consistent_language(TEXTS[base], mixed, TEXTS[base]) is LanguageOutcome.INCONSISTENT


@pytest.mark.parametrize(
    ("base", "names"),
    [
        ("zh", "设三角形 ABC 中 AB = CD，由 Pythagorean theorem 可知 sin x 与 cos x 的值。"),  # noqa: RUF001
        ("ru", "По теореме Pythagorean theorem имеем AB = CD, где f и g заданы на отрезке MN PQ RS."),
        ("en", "The mathematician 李明 and his friend Иван looked at the angles α, β, γ."),
    ],
)
def test_names_and_symbols_do_not_mix_a_text(base: str, names: str):
    assert classify("\n".join([TEXTS[base]] * 4 + [names] + [TEXTS[base]] * 4)) == base


def test_figures_in_asymptote_are_code():
    figure = (
        '[asy] import geometry; draw circle with label and some more english words in it; label("A", origin); [/asy]'
    )
    assert strip_notation(figure) == ""
    assert classify(TEXTS["zh"] + figure + TEXTS["zh"]) == "zh"


def test_chinese_without_kana_is_not_japanese():
    assert classify("求三角形面积。") == "zh"
    assert classify("三角形の面積を求めなさい。") == "ja"
