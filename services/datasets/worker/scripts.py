"""Languages that a text's script or its commonest words tell.

Law of this room: pure, and no model: most rows of the world are told here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

UNKNOWN = "und"
UNDECIDED = ""
"""A language that neither its script nor these words tell; a model may."""

_SCRIPTS: tuple[tuple[int, int, str], ...] = (
    (0x0370, 0x03FF, "el"), (0x0530, 0x058F, "hy"), (0x0590, 0x05FF, "he"), (0x0980, 0x09FF, "bn"),
    (0x0A00, 0x0A7F, "pa"), (0x0A80, 0x0AFF, "gu"), (0x0B00, 0x0B7F, "or"), (0x0B80, 0x0BFF, "ta"),
    (0x0C00, 0x0C7F, "te"), (0x0C80, 0x0CFF, "kn"), (0x0D00, 0x0D7F, "ml"), (0x0D80, 0x0DFF, "si"),
    (0x0E00, 0x0E7F, "th"), (0x0E80, 0x0EFF, "lo"), (0x0F00, 0x0FFF, "bo"), (0x1000, 0x109F, "my"),
    (0x10A0, 0x10FF, "ka"), (0x1100, 0x11FF, "ko"), (0x1200, 0x137F, "am"), (0x1780, 0x17FF, "km"),
    (0x1F00, 0x1FFF, "el"), (0x3040, 0x30FF, "ja"), (0x3400, 0x4DBF, "zh"), (0x4E00, 0x9FFF, "zh"),
    (0xAC00, 0xD7AF, "ko"), (0xF900, 0xFAFF, "zh"), (0x20000, 0x3FFFF, "zh"),
)  # fmt: skip
"""Scripts that one language of today has nearly for itself. Latin, Cyrillic, Arabic and Devanagari have many."""
_COMMON: Mapping[str, str] = {
    "en": "the of and to is in that it for was with are this be on as you what which have from not by an can will how",
    "de": "der die und das ist nicht ein eine zu den von mit sich auf dem für im auch wie ich sie wird sind oder wenn",
    "fr": "le la les et est des que une dans pour pas qui sur vous avec au du ce sont être plus nous cette comment ou",
    "es": "el la los las que y en un una es por con para se del como más su al son está qué cuál pero este también",
    "it": "il di che la è un una per non sono del della con gli le si come più anche dei nel questo alla ho cosa",
    "pt": "o os as que de do da em um uma é para com não se por mais como dos das ao você são está qual isso na no",
    "nl": "de het een en van is dat niet op te zijn voor met die in aan er ook als maar wat hoe naar wordt deze je",
    "sv": "och att det som en är på för av med den inte till har jag om ett var vad hur kan eller från de sig",
    "pl": "i w nie na się jest że do to jak z co o są czy tak ale dla po przez który może jego być od",
    "tr": "ve bir bu için ile de da ne çok olarak daha gibi en olan var mı nasıl ama kadar sonra değil o her",
    "id": "yang dan di untuk dengan ini itu dari dalam adalah tidak pada ke apa atau bisa akan juga saya oleh anda",
    "vi": "là và của có không được cho một các trong người này đã với những tôi để khi như đến bạn về làm",
}
_LEAST_WORDS = 3
_LEAST_SHARE = 0.12
_LEAST_LEAD = 1.5
_LEAST_LETTERS = 0.75
"""Of what is no blank. Code and tables have fewer."""
_OWN_SHARE = 0.5
_KANA_SHARE = 0.08


def languages_of_words() -> dict[str, tuple[str, ...]]:
    """For each common word the languages that have it."""
    of: dict[str, list[str]] = {}
    for language, words in _COMMON.items():
        for word in words.split():
            of.setdefault(word, []).append(language)
    return {word: tuple(languages) for word, languages in of.items()}


def tell(text: str, words_of: Mapping[str, tuple[str, ...]]) -> str:
    """The language of a text; "und" for what is no language, UNDECIDED where a model should be asked."""
    written = [c for c in text if not c.isspace()]
    letters = sum(c.isalpha() or ord(c) >= 0x300 for c in written)
    if not letters:
        return UNKNOWN
    if not text.isascii():
        own = Counter(_script(ord(c)) for c in written if c > "\u02ff")
        own.pop("", None)
        if "ja" in own and own["ja"] >= _KANA_SHARE * (own["ja"] + own["zh"]):
            own["ja"] += own.pop("zh", 0)
        if own:
            language, count = own.most_common(1)[0]
            if count >= _OWN_SHARE * letters:
                return language
    if letters < _LEAST_LETTERS * len(written):
        return UNKNOWN
    return _by_words(text.lower().split(), words_of)


def _script(code: int) -> str:
    for first, last, language in _SCRIPTS:
        if first <= code <= last:
            return language
    return ""


def _by_words(words: list[str], words_of: Mapping[str, tuple[str, ...]]) -> str:
    met: Counter[str] = Counter()
    for word in words:
        met.update(words_of.get(word.strip(".,;:!?\"'()¿¡«»"), ()))
    (best, count), (_, second) = [*met.most_common(2), (UNDECIDED, 0), (UNDECIDED, 0)][:2]
    if count >= _LEAST_WORDS and count >= _LEAST_SHARE * len(words) and count >= _LEAST_LEAD * second:
        return best
    return UNDECIDED
