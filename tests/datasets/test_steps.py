"""Steps by themselves: what each changes, what none may change, and how parameters are checked."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2
from services.common import parameters
from services.common.errors import Fault
from services.datasets.worker.plain import Plain
from services.datasets.worker.steps import Pipeline, api
from services.datasets.worker.steps.citations import Citations
from services.datasets.worker.steps.genes import GENES
from services.datasets.worker.steps.kinds import steps as known_steps
from services.datasets.worker.steps.kinds import told as told_of
from services.datasets.worker.steps.notation import Notation
from services.datasets.worker.steps.shaping import AsText
from services.datasets.worker.steps.writing import StripTags, Unicode, Whitespace

NAMES = """TP53 BRCA1 BRCA2 BRCA1/2 EGFR KRAS NRAS HRAS BRAF MYC c-Myc c-Jun c-Fos N-Myc p53 p21 p27 p16INK4a p38
p-Akt IL-6 IL\u20116 IL6 IL-1β IL-2Rα TNF-α TNFα IFN-γ TGF-β1 NF-κB α-synuclein β-catenin β2-microglobulin γH2AX H2AX
H3K27me3 H3K4me1 H4K16ac HLA-DRB1*15:01 HLA-A*02:01 HLA-B27 CYP2D6 CYP2D6*4 UGT1A1*28 c.76A>T c.1521_1523delCTT
c.88+2T>C c.*32G>A p.Val600Glu p.V600E p.(Arg175His) p.Gln39* g.123456A>G NM_000546.6:c.215C>G NM_000546.6 rs1042522
BCR-ABL1 EML4-ALK PD-1 PD-L1 CTLA-4 CD4 CD8A CD4+ CD8\u2212 CXCL12 CCR5 5-HT2A 5-HT ΔF508 Kv1.3 Nav1.5 TRPV1 Sox2 Oct4
Trp53 C9orf72 ENSG00000141510 IκBα Gαq 14-3-3ζ 14-3-3 Na+/K+-ATPase mTOR mTORC1 eIF4E 4E-BP1 53BP1 Bcl-2 Bcl-xL
BCL2L1 caspase-3 HIF-1α PPARγ ERα Aβ42 Aβ1\u201342 PGC-1α GSK-3β GSK3B PI3Kα PIK3CA miR-21-5p miR-155 let-7a
hsa-miR-34a CRISPR-Cas9 dCas9 Cas12a YAL001C cdc2 Cdc42 rad51Δ RAD51 MLH1 MSH2 SMAD2/3 ERK1/2 MAPK1 JAK2 STAT3 VEGF-A
VEGFR2 FGFR3 PDGFRβ Wnt3a Wnt/β-catenin APOE APOE-ε4 ε4 SARS-CoV-2 ACE2 GLP-1 GLP1R NLRP3 TLR4 MyD88 LC3-II ATG5 SOD1
TDP-43 FUS HTT PARK7 LRRK2 G2019S GBA1 CFTR SMN1 DMD FMR1 MECP2 SHANK3 α-tubulin κ-opioid μ-opioid""".split()
CITED = (
    " [1]", " [2, 4-6]", " [12\u201314]", " [1], [2] and [3]", " (Lee et al., 2020)",
    " (Smith & Jones, 2019a; Lee, 2020)", " (see van der Berg et al., 2001, p. 5)", " \\citep{lee2020,smith2019}",
    " [@lee2020; @smith2019]",
)  # fmt: skip
KEPT = (
    "x[1] = 2", "the array [1, 2, 3] has", "the interval [0, 1] of", "order [3, 1, 2] them", "an area of 5 cm² and m³",
    "metre² and sinh² of x", "held (May, 2020) in", "`rows [1]` and", "```\nx [1]\n```", "for x in [1, 2]:",
    "nums = [1, 2]", "print(a [1])", "[1] J. Lee. A title.", "equation [3] says", "¹⁴C and Ca²⁺ and 10⁻⁵",
    "https://a.org/x [a]", "(TP53, 2020)", "\\(a [1]\\)", "f(x) [1](b)",
    "as [1](https://a.org) tells",
)  # fmt: skip
TEXT_STEPS = (
    Citations(), Citations(attached=True), Notation(), Notation(scientific="caret"), Notation(scientific="raised"),
    Unicode(), Unicode(form="NFKC", drop_invisible=True), Whitespace(), Whitespace(empty_lines=0), StripTags(),
)  # fmt: skip
SNIPPETS = (
    *NAMES[::7], *CITED, *KEPT, "α", "β", "Ω", "µ", "ϕ", "ά", "ά", "é", "ﬁ", "½", "x²", "1.5 × 10^-5", "2.50E-05",
    "3×10⁻⁵", "5mg", "10µM", "37℃", "“q”", "–", "—", "−", "  ", "\t", "\n", "\n\n\n", "\r\n", " ", "\u00a0", "```\n",
    "`", "<b>", "</p>", "<br/>", "&amp;lt;", "&lt;b&gt;", "&", "[", "]", "(", ")", "word", "protein¹²", "word.³",
    "<sup>1,2</sup>", "$", "~", "\\",
    "[1", "1]", "and", "10", "e5", "-", ".", ":", "é́",
)  # fmt: skip
mixed = st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join)


def talk(*turns: str, **fields: Any) -> Plain:
    roles = ("ROLE_USER", "ROLE_ASSISTANT")
    messages = [{"role": roles[i % 2], "parts": [{"text": t}]} for i, t in enumerate(turns)]
    return {"chat": {"messages": messages, **fields}}


def said(example: Plain) -> list[str]:
    return [text for _, text in api.texts(example)]


def pipeline(*steps: tuple[str, dict[str, Any]]) -> Pipeline:
    asked = []
    for name, values in steps:
        asked.append(datasets_pb2.Step(name=name))
        asked[-1].parameters.update(values)
    return Pipeline.load(asked)


def run(example: Plain, *steps: tuple[str, dict[str, Any]]) -> Plain | None:
    return pipeline(*steps).apply(example)


def refused(*steps: tuple[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    with pytest.raises(Fault) as caught:
        pipeline(*steps)
    return {v.field: (v.given, v.accepted) for v in caught.value.violations}


def test_names_of_genes_are_told_whole() -> None:
    assert len(NAMES) >= 150
    for name in NAMES:
        found = [m.group() for m in GENES.finditer(f"the protein {name}, which binds")]
        assert name in found, (name, found)


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), st.sampled_from(CITED), st.sampled_from(",.; "))
def test_science_takes_citations_and_leaves_names(names: list[str], cited: str, behind: str) -> None:
    bare = "We measured " + " and ".join(f"{n} binding" for n in names)
    science = (("citations", {}), ("notation", {}), ("unicode", {"form": "NFKC"}), ("whitespace", {}))
    told = run(talk("Why?", bare + cited + behind + "Then it grew."), *science)
    assert told is not None
    assert said(told)[1] == bare + (behind + "Then it grew." if behind.strip() else " Then it grew.")


@pytest.mark.parametrize("text", KEPT)
def test_what_only_looks_like_a_citation_stays(text: str) -> None:
    assert Citations().cleaned(f"Here {text}" if text[0].islower() and "=" not in text and ":" not in text else text)
    for whole in (text, f"A line before\n{text}\nand one behind"):
        assert Citations().cleaned(whole) == whole


def test_citations_in_every_style() -> None:
    clean = Citations().cleaned
    assert (
        clean("shown [1,2-5], (Hanahan and Weinberg, 2011) and raised¹,² as claimed.³")
        == "shown, and raised as claimed."
    )
    assert clean("folds<sup>1,2</sup> so") == "folds so"
    assert clean("said[12] so") == "said[12] so" and Citations(attached=True).cleaned("said[12] so") == "said so"
    assert Citations(styles=("authors",)).cleaned("a word [1] (Lee, 2020)") == "a word [1]"
    assert Citations(protect=()).cleaned("Use `rows [1]` here") == "Use `rows` here"


@pytest.mark.parametrize(
    ("text", "plain", "raised"),
    [
        ("1.5 × 10^-5 M", "1.5e-5 M", "1.5 × 10⁻⁵ M"),
        ("3 x 10⁻⁵", "3e-5", "3 × 10⁻⁵"),
        ("3×10−5", "3e-5", "3 × 10⁻⁵"),
        ("2.50E-05", "2.50e-5", "2.50 × 10⁻⁵"),
        ("3 x 10-5", "3 x 10-5", "3 x 10-5"),
        ("antibody 5E3", "antibody 5E3", "antibody 5E3"),
        ("10µM, 5mg, 2L", "10 µM, 5 mg, 2L", "10 µM, 5 mg, 2L"),
        ("“5–10” 5′ — end", '"5-10" 5′ — end', '"5-10" 5′ — end'),
        ("`“5–10”`", "`“5–10”`", "`“5–10”`"),
        ("37℃", "37 °C", "37 °C"),
    ],
)
def test_notation_keeps_values(text: str, plain: str, raised: str) -> None:
    assert Notation().written(text) == plain
    assert Notation(scientific="raised").written(text) == raised
    assert Notation(scientific="keep", dashes=False, quotes=False, units=False).written(text) == text


@settings(max_examples=150)
@given(mixed)
def test_writing_again_changes_nothing_and_greek_stays(text: str) -> None:
    for step in TEXT_STEPS:
        once = step.apply(talk("ask", text))
        assert step.apply(once) is once, (step, text)
        if not isinstance(step, Citations):
            assert _greek("".join(said(once)[1:])) == _greek(text), (step, text)


def _greek(text: str) -> str:
    return "".join(c for c in text if "\u0370" <= c <= "\u03ff" or "\u1f00" <= c <= "\u1fff" or c in "µ\u2126")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_passes_every_step(text: str) -> None:
    for step in TEXT_STEPS:
        once = step.apply(talk("ask", text or "x"))
        assert step.apply(once) is once
    assert unicodedata.is_normalized("NFC", "".join(said(Unicode(protect=()).apply(talk(text or "x")))))


def test_whitespace_knows_prose_from_code() -> None:
    code = "Look:\n\n```python\nif  x:\n\n\n\n    y   =  1   \n```"
    assert said(run(talk(" a  b \n\n\n\n c ", code), ("whitespace", {})) or {}) == ["a b\n\n c", code]
    border = {"completion": {"prompt": "so:  ", "completion": " 1"}}
    assert run(border, ("whitespace", {})) == {"completion": {"prompt": "so: ", "completion": " 1"}}
    gap = {"infill": {"prefix": "a  ", "middle": "b", "suffix": "  c"}}
    assert run(gap, ("whitespace", {}), ("citations", {}), ("notation", {})) is gap


def test_tags_go_and_code_stays() -> None:
    clean = run(talk("a", "<p>Hi <b>you</b>&nbsp;&amp; me<br>x &lt; y, List&lt;int&gt;</p> `<b>`"), ("strip_tags", {}))
    assert said(clean or {})[1] == "\nHi you & me\nx < y, List<int> `<b>`"


def test_rows_are_chosen_by_themselves() -> None:
    row = talk("one two three", "four five")
    assert run(row, ("min_words", {"min_words": 2}), ("max_words", {"max_words": 2})) is row
    assert run(row, ("min_words", {"min_words": 3})) is None
    assert run(row, ("max_words", {"max_words": 1})) is None
    assert run(row, ("max_characters", {"max_characters": 22})) is row
    assert run(row, ("max_characters", {"max_characters": 21})) is None
    english = talk("What is this long question about?", "It is about the weather in the mountains and the sea.")
    assert run(english, ("keep_languages", {"languages": ["en"]})) is english
    assert run(english, ("keep_languages", {"languages": ["ta"], "keep_unknown": False})) is None


def test_a_sample_is_the_same_in_every_order_and_grows() -> None:
    rows = [talk("q", f"answer {i}") for i in range(2000)]

    def drawn(fraction: float, seed: int, order: list[Plain]) -> set[str]:
        some = pipeline(("sample", {"fraction": fraction, "seed": seed}))
        left = {said(r)[1] for r in order if some.apply(r)}
        assert some.dropped["0:sample"] == 2000 - len(left)
        return left

    few = drawn(0.1, 3, rows)
    assert 130 < len(few) < 270 and few == drawn(0.1, 3, rows[::-1])
    assert few < drawn(0.2, 3, rows) and few != drawn(0.1, 4, rows)
    assert run(rows[0], ("sample", {"fraction": 1})) is rows[0] and run(rows[0], ("sample", {"fraction": 0})) is None


def test_shapes_change_and_come_back() -> None:
    row = {**talk("ask", "tell"), "metadata": {"id": 1}}
    text = run(row, ("as_text", {"prompt": "Q: {prompt}\n", "completion": "A: {answer}"}))
    assert text == {"completion": {"prompt": "Q: ask\n", "completion": "A: tell"}, "metadata": {"id": 1}}
    plain = run(row, ("as_text", {"prompt": "{prompt}\n---\n", "plain": True}))
    assert plain == {"completion": {"completion": "ask\n---\ntell"}, "metadata": {"id": 1}}
    assert run(plain, ("as_instruction", {"border": "---"})) == row
    assert run(plain, ("as_instruction", {})) is plain
    for stays in (talk("a", "b", "c", "d"), talk("a", "b", tools=[{"name": "t"}])):
        assert run(stays, ("as_text", {})) is stays
    assert (
        AsText().apply(run(row, ("system_prompt", {"text": "Be."})) or {})["completion"]["prompt"] == "Be.\n\nask\n\n"
    )


def test_system_prompts_and_metadata() -> None:
    row = {**talk("a", "b"), "metadata": {"id": 1, "src": "x"}}
    led = run(row, ("system_prompt", {"text": "Be kind."}))
    assert said(led or {}) == ["Be kind.", "a", "b"]
    assert run(led or {}, ("system_prompt", {"text": "Other."})) is led
    assert said(run(led or {}, ("system_prompt", {"mode": "replace", "text": "Other."})) or {})[0] == "Other."
    assert run(led or {}, ("system_prompt", {"mode": "remove"})) == row
    assert (run(row, ("metadata", {"rename": {"id": "key"}, "drop": ["s*"]})) or {})["metadata"] == {"key": 1}
    assert (run(row, ("metadata", {"rename": {"id": "src"}})) or {})["metadata"] == {"id": 1, "src": "x"}
    assert run(row, ("metadata", {"keep": ["nothing"]})) == talk("a", "b")


def test_secrets_are_hidden_and_said_texts_only_where_asked() -> None:
    row = talk("mail jane.doe@corp-mail.com", "I wrote to jane.doe@corp-mail.com")
    assert said(run(row, ("redact", {"where": "answers"})) or {}) == [
        "mail jane.doe@corp-mail.com", "I wrote to [e-mail]"
    ]  # fmt: skip
    pair = {"preference": {"prompt": talk("a\r\nb")["chat"], "chosen": talk("", "c\rd")["chat"]["messages"][1:],
                           "rejected": talk("", "e")["chat"]["messages"][1:]}}  # fmt: skip
    after = run(pair, ("line_ends", {}))
    assert said(after or {}) == ["a\nb", "c\nd", "e"] and after is not pair
    assert said(run(pair, ("line_ends", {"where": "prompts"})) or {}) == ["a\nb", "c\rd", "e"]


def test_a_pipeline_counts_what_it_did_and_tells_what_it_is() -> None:
    steps = pipeline(("line_ends", {}), ("min_words", {"min_words": 2}), ("line_ends", {"where": "answers"}))
    for row in (talk("a", "b\rc"), talk("a", "b"), talk("a", "b c")):
        steps.apply(row)
    assert dict(steps.changed) == {"0:line_ends": 1} and dict(steps.dropped) == {"1:min_words": 1} and len(steps) == 3
    assert [(a.step.name, dict(a.step.parameters)) for a in steps.applied] == [
        ("line_ends", {"where": "all"}), ("min_words", {"min_words": 2}), ("line_ends", {"where": "answers"})
    ]  # fmt: skip
    assert all(a.package.startswith("qlorad-services ") for a in steps.applied)


def test_every_violation_is_told_at_once() -> None:
    wrong = refused(
        ("citaitons", {}),
        ("min_words", {"min_words": 0, "max_words": 4}),
        ("min_words", {}),
        ("citations", {"styles": ["numbers", "poems"], "attached": "yes"}),
        ("whitespace", {"empty_lines": 1.5}),
        ("keep_languages", {"languages": []}),
        ("sample", {"fraction": float("nan")}),
        ("system_prompt", {"mode": "set"}),
        ("as_text", {"prompt": "{question}"}),
        ("as_text", {"prompt": "{"}),
        ("metadata", {"rename": {"a": 1}}),
    )
    assert wrong["steps[0].name"][0] == "'citaitons'" and wrong["steps[0].name"][1].startswith("nearest citations")
    assert wrong["steps[1].parameters.min_words"] == ("0", "a whole number, 1 to 1000000")
    assert wrong["steps[1].parameters.max_words"][1] == "nearest min_words; one of min_words"
    assert wrong["steps[2].parameters.min_words"][0] == "nothing"
    assert wrong["steps[3].parameters.styles"][1] == "a list of numbers, authors, raised, latex"
    assert wrong["steps[3].parameters.attached"] == ("'yes'", "true or false")
    assert wrong["steps[4].parameters.empty_lines"][1] == "a whole number, 0 to 100"
    assert wrong["steps[5].parameters.languages"][1] == "a list of texts of 1 to 200 entries"
    assert wrong["steps[6].parameters.fraction"][1] == "a number, 0.0 to 1.0"
    assert wrong["steps[7].parameters"][1] == "a text with set and replace, none with remove"
    assert "not {question}" in wrong["steps[8].parameters"][1] and "steps[9].parameters" in wrong
    assert wrong["steps[10].parameters.rename"][1] == "an object of texts of at most 1000 entries"
    assert len(wrong) == 13


def test_schemas_tell_what_is_checked() -> None:
    kinds = known_steps()
    assert len(kinds.names()) >= 16
    for name in kinds.names():
        kind = kinds.load(name)
        assert kind is not None
        told = told_of(kind)
        parsed = json.loads(told.parameters_schema_json)
        assert parsed == kind.schema and told.description.endswith(".") and told.package
        for rules in parsed["properties"].values():
            assert rules["description"]
            if "default" in rules and rules["default"] not in ("", {}):
                assert parameters._fits(rules, rules["default"]), (name, rules)


@dataclass(frozen=True)
class Loose:
    """No parameter()."""

    depth: int = 1

    def apply(self, example: Plain) -> Plain:
        return example


@dataclass
class Thawed:
    """Not frozen."""

    def apply(self, example: Plain) -> Plain:
        return example


@dataclass(frozen=True)
class Idle:
    """No apply."""


@pytest.mark.parametrize("cls", [Loose, Thawed, Idle, int])
def test_a_class_that_is_no_step_is_told_why(cls: type) -> None:
    with pytest.raises(TypeError):
        parameters.schema_of(cls, "apply(example)")


@pytest.mark.parametrize(
    "text",
    [
        "A" + "1" * 20000 + "b" * 9, "a-" * 20000, "IL" + "-1" * 20000 + "xyz", "w" + " " * 20000 + "x", "`" * 20000,
        "<!--" * 20000, "(" + "Lee, " * 5000, "[1" + ",2" * 20000, "\\cite[" * 9000, "\\(" * 20000, "$a" * 20000,
        "x," * 20000, "def " + "(" * 20000, "word [1]" + " " * 20000 + "x", "α-" * 20000, "a1b2c3" * 9000 + "é",
    ],
    ids=lambda text: text[:6],
)  # fmt: skip
def test_hostile_texts_end(text: str) -> None:
    for step in TEXT_STEPS:
        assert step.apply({"completion": {"completion": text}})["completion"]["completion"]
