"""Which language a row speaks: right, or "und"."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.datasets.worker import language
from tests.datasets.spooled import answered, spooled, text

SPOKEN = [
    ("en", "What is the capital of France? It is Paris, which lies on the river Seine."),
    ("de", "Guten Morgen, wie geht es dir? Ich bin heute sehr müde und gehe nicht aus dem Haus."),
    ("fr", "Bonjour, comment allez-vous ? Je suis dans la ville avec des amis qui sont en vacances."),
    ("es", "¿Cuál es la capital de Francia? Es París, que está en el norte del país."),
    ("it", "Il libro che ho letto non è della biblioteca, ma di una mia amica."),
    ("pt", "Você não sabe o que é isso, mas uma pessoa da cidade sabe como fazer."),
    ("nl", "Het is niet moeilijk om een fiets te huren in de stad, maar wel duur."),
    ("pl", "Nie wiem, czy to jest dobre, ale na pewno się nie zgubimy w lesie."),
    ("tr", "Bu kitap çok güzel ama o kadar uzun ki bir günde okumak için çok zaman gerek."),
    ("ta", "வணக்கம், எப்படி இருக்கிறீர்கள்?"),
    ("zh", "你好,请问今天天气怎么样?"),
    ("ja", "東京は日本の首都です"),
    ("ko", "안녕하세요 반갑습니다"),
    ("th", "สวัสดีครับ วันนี้อากาศดี"),
    ("he", "קיבלתי את המכתב שלך"),
    ("el", "Καλημέρα, τι κάνεις σήμερα;"),
    ("ar", "مرحبا كيف حالك اليوم يا صديقي، هل تريد أن تشرب القهوة معي؟"),
    ("ru", "Привет, как дела? Сегодня очень хорошая погода, пойдём гулять."),
    ("hi", "नमस्ते आप कैसे हैं, आज मौसम बहुत अच्छा है"),
]
NONE = [
    "def f(x):\n    return x + 1", "SELECT * FROM users WHERE id = 3;", "for (int i = 0; i < n; i++) { sum += a[i]; }",
    "42", "3.14 + 2.71 = 5.85", "!!! ???", "😀😀😀", "", "{\"a\": [1, 2, 3]}",
]  # fmt: skip


@pytest.mark.parametrize(("code", "said"), SPOKEN, ids=[code for code, _ in SPOKEN])
def test_a_language_is_known(code: str, said: str) -> None:
    assert language.of(text(said)) == code
    assert language.of(answered("?", said)) == code
    # A foreign word or a name changes nothing.
    assert language.of(text(f"{said} {said} Linux.")) == code


@pytest.mark.parametrize("said", NONE)
def test_what_is_no_language_is_not_guessed(said: str) -> None:
    assert language.of(text(said)) == "und"


def test_what_is_taught_decides() -> None:
    german = "Das ist ein langer Satz, der nicht nur aus drei Wörtern besteht und für sich selbst spricht. " * 2
    assert language.of(answered("Translate this to German for me, please, and keep the tone of it.", german)) == "de"
    preference = {"preference": {"chosen": answered("", german)["chat"]["messages"][1:], "rejected": []}}
    assert language.of(preference) == "de"


def test_a_mix_sums_up_to_the_rows_and_knows_no_order() -> None:
    draw = random.Random(3)
    rows = [text(f"{said} {i}") for i in range(90) for _, said in (SPOKEN[i % 3], SPOKEN[9 + i % 2])]
    with spooled(rows) as (spool, _):
        mix = language.mix(language.sample(spool), 180)
    draw.shuffle(rows)
    with spooled(rows) as (spool, _):
        assert language.mix(language.sample(spool), 180) == mix == {"en": 30, "de": 30, "fr": 30, "ta": 45, "zh": 45}
    with spooled([]) as (spool, _):
        assert language.mix(language.sample(spool), 0) == {}


def test_a_mix_of_many_rows_is_of_a_sample_and_still_sums_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "SAMPLE", 50)
    rows = [text(f"{SPOKEN[9 + (i % 4 > 0)][1]} {i}") for i in range(400)]
    with spooled(rows) as (spool, _):
        mix = language.mix(language.sample(spool), 400)
    assert set(mix) == {"ta", "zh"} and sum(mix.values()) == 400 and 40 <= mix["ta"] <= 180


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1), st.integers(1, 1000))
@settings(max_examples=60)
def test_shares_are_scaled_to_an_exact_sum(met: dict[str, int], total: int) -> None:
    made = language.scaled(met, total)
    assert sum(made.values()) == total and set(made) <= set(met)
    for name, n in met.items():
        assert abs(made.get(name, 0) - n * total / sum(met.values())) < 1
