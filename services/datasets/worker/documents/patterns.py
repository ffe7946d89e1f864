"""How sections and sentences show what they are: glossaries, principles, definitions, questions.

Law of this room: pure. A pattern that does not fit is no answer; it never guesses.
"""

from __future__ import annotations

import re

from services.datasets.worker.documents.blocks import PROSE, Block

GLOSSARY = re.compile(
    r"\b(?:glossary|definitions?|terms?|terminology|vocabulary|nomenclature|key concepts|glossar|begriffe?|"
    r"definitionen|terminologie)\b",
    re.I,
)
SAYS_NOTHING = re.compile(
    r"(?:for|zum) (?:example|instance|beispiel)|(?:another |an )?examples?|beispiele?|e\.g|z\. ?b|as follows|like this",
    re.I,
)
"""What a sentence before code may be and tell nothing of it."""
PRINCIPLES = re.compile(
    r"\b(?:principles|rules|guidelines|tenets|maxims|laws|best practices|dos? and don'?ts?|grundsätze|prinzipien|"
    r"regeln|leitlinien)\b",
    re.I,
)
PRINCIPLE_HEADING = re.compile(
    r"(?:principle|rule|tenet|maxim|law|guideline|grundsatz|prinzip|regel)\s+(?:\d+|[IVX]+)\s*[.:–—-]?\s*", re.I
)
CONTENTS = re.compile(r"(?:table of )?contents|toc|inhalt(?:sverzeichnis)?|on this page", re.I)
REFERENCES = re.compile(
    r"references|bibliography|literature(?: cited)?|works cited|sources|further reading|index|"
    r"literatur(?:verzeichnis)?|quellen(?:verzeichnis)?|acknowledge?ments?",
    re.I,
)
STEP = re.compile(r"(?:step|schritt)\s+(\d{1,3})\s*[.:–—-]?\s*", re.I)

_MOST_GLOSSARY_WORDS = 8
QUESTION_MARK = re.compile(r"(?:q(?:uestion)?|frage)\s*\d{0,3}\s*[.:)]\s+", re.I)
ANSWER_MARK = re.compile(r"(?:a(?:nswer)?|antwort)\s*\d{0,3}\s*[.:)]\s+", re.I)

_NAME = r"[^\W\d_][\w/'’\-]*(?:\s+[\w/'’\-]+){0,5}?(?:\s+\([^()]{1,20}\))?"
_DEFINED = re.compile(
    rf"(?:(?:an?|the|ein|eine|der|die|das)\s+)?(?P<term>{_NAME})\s*"
    r"(?:,\s+[^,.]{1,60},\s*)?"
    r"(?:(?:is|are)\s+(?:defined\s+as|understood\s+as|the\s+name\s+(?:of|for)|short\s+for|called|what)\b"
    r"|means\b|mean\s+(?=an?\s|the\s)|refers?\s+to\b|denotes?\b|stands?\s+for\b"
    r"|(?:ist|sind)\s+definiert\s+als\b|bedeutet\b|bezeichnet\b|steht\s+für\b)",
    re.I,
)
_IS = re.compile(
    rf"(?:(?:an?|the|ein|eine|der|die|das)\s+)?(?P<term>{_NAME})\s+(?:is|are|ist|sind)\s+(?:an?|the|any|all|ein|eine|der|die|das)\s+",
    re.I,
)
_WE_MEAN = re.compile(rf"by\s+[\"“*]?(?P<term>{_NAME})[\"”*]?,?\s+(?:we|this\s+\w+)\s+means?\b", re.I)
_COLON = re.compile(rf"(?P<term>{_NAME})\s*(?::|\s[–—-])\s+(?=\S)", re.I)
_NO_TERMS = frozenset(
    "this that these those it its they them there here he she we i you one what which who whose when where why how "
    "each every any some all both such so if then and or but not no nothing everything something anyone everyone "
    "nobody another other others dies diese dieser dieses das es sie er wir ich man was wer wenn und oder aber "
    "note example warning caution tip important hinweis beispiel achtung for in as at by to on of with from after "
    "before while whoever whatever although because since also often usually sometimes only".split()
)


def is_dotted(text: str) -> bool:
    """Whether a line is one of a table of contents: a title, dots, and the number of a page."""
    line = text.rstrip("0123456789")
    dotted = line.rstrip()
    title = dotted.rstrip(" .\u00a0…")
    dots = dotted[len(title) :]
    is_numbered = 0 < len(text) - len(line) <= 4 and dotted.endswith((".", "…"))
    return is_numbered and bool(title.strip()) and dots.count(".") + 3 * dots.count("…") >= 4


def is_glossary(heading: str) -> bool:
    """Whether a heading stands above terms. The signature of a function may have such a word too, and does not."""
    return bool(GLOSSARY.search(heading)) and len(heading.split()) <= _MOST_GLOSSARY_WORDS and "(" not in heading


def term_of(text: str, lead: str, is_glossary: bool) -> str:
    """The term that a paragraph or item defines; "" if it defines none."""
    plain = text.replace("`", "")
    marked = lead.rstrip(" :.–—-")
    found = _WE_MEAN.match(plain) or _DEFINED.match(plain)
    if found:
        return _term(found["term"])
    if marked and len(marked.split()) <= 6 and len(marked) < len(plain) // 2:
        behind = plain[plain.find(marked) + len(marked) :].lstrip()
        if is_glossary or re.match(r"(?:is|are|means|ist|sind)\s+(?:an?|the|ein|eine|der|die|das)\s", behind):
            return _term(marked)
    if is_glossary:
        found = _COLON.match(plain) or _IS.match(plain)
        if found and len(plain) - found.end() > 10:
            return _term(found["term"])
    return ""


def is_headed(block: Block) -> bool:
    """Whether a paragraph begins with a heading of its own, set apart by how it looks and by a point or a colon."""
    lead = block.lead.strip()
    ends = lead.endswith((".", ":")) or block.text[len(lead) :].startswith(":")
    said = len(block.text) - len(lead)
    return (
        (block.kind, block.level) == (PROSE, 0)
        and ends
        and 1 < len(lead) <= 80
        and any(map(str.isalnum, lead))
        and block.text.startswith(lead)
        and said > 20
    )


def _term(text: str) -> str:
    found = " ".join(text.split())
    words = re.findall(r"[\w'’-]+", found.lower())
    return found if words and len(found) > 1 and not {words[0], words[-1]} & _NO_TERMS else ""


def name_of(text: str, lead: str) -> str:
    """The name that a principle has before its text, as in "Blind first. Whoever …"; "" if it has none."""
    plain = text.replace("`", "")
    marked = lead.strip().rstrip(" :.–—-")
    if marked and len(marked.split()) <= 12 and len(marked) < len(plain) - 10:
        return marked
    found = re.match(r"([A-Z][^.:!?\n]{2,70}?)(?:[.!]|:|\s[–—])\s+(?=\S)", plain)
    if found and len(found[1].split()) <= 8 and len(plain) - found.end() > 10:
        return found[1]
    return ""
