"""What looks like the name of a gene, a protein, an allele or a variant.

Law of this room: pure; shapes, no lists of names. Too much is better than too
little: what is taken for a name is only left as it was.
"""

from __future__ import annotations

import re

_GREEK = "\u0370-\u03ff\u00b5"
_HYPHEN = "[-\u2010-\u2013\u2212]"
_INNER = f"[A-Za-z0-9{_GREEK}]"

_SHAPES = (
    # c.76A>T, p.Val600Glu, p.(Arg175His), NM_000546.6:c.215C>G, c.1521_1523delCTT, c.88+2T>C, c.*32G>A
    r"(?:(?:[NX][CGMRPT]_\d+|ENS[A-Z]*\d+|LRG_\d+[a-z\d]*)(?:\.\d+)?(?:\([A-Z][A-Za-z\d-]*\))?:)"
    r"?[cgmnpr]\.(?:\((?=[^)\s]*\d)[^)\s]+\)|\*?[-A-Za-z\d][A-Za-z\d_+>=?-]*(?:\*(?:\d+)?)?)",
    r"(?:[NX][CGMRPT]_\d+|ENS[A-Z]*\d+|LRG_\d+)(?:\.\d+)?",
    # HLA-DRB1*15:01, CYP2D6*4, UGT1A1*28
    r"HLA-[A-Z]{1,4}\d{0,2}(?:\*\d{2,3}(?::\d{2,3}){0,3}[A-Z]?)?",
    r"[A-Z][A-Z\d]+\*\d+[A-Z]?(?::\d+)*",
    # Na+/K+-ATPase
    r"(?:[A-Z][a-z]?\d?\+/)?[A-Z][a-z]?\d?\+-ATPase",
    # α-synuclein, TNF-α, TGF-β1, NF-κB, γH2AX, 14-3-3ζ, Aβ1–42, ΔF508
    rf"(?!\d+[\u00b5\u03bc][A-Za-z]{{1,3}}(?![A-Za-z\d]))(?:{_INNER}{{1,20}}(?:{_HYPHEN}|/)){{0,4}}"
    rf"{_INNER}{{0,20}}[{_GREEK}]{_INNER}{{0,20}}(?:{_HYPHEN}{_INNER}{{1,20}}){{0,4}}",
    # 53BP1, 4E-BP1, 5-HT2A
    r"\d{1,2}(?:[A-Z]{2,}\d*|E-BP\d|-HT\d?)[A-Z\d]*",
    r"14-3-3",
    # CD4+, CD25hi
    rf"CD\d{{1,3}}[A-Za-z]{{0,2}}(?:[+\u207a]|{_HYPHEN}(?![A-Za-z\d]))?",
    # hsa-miR-21-5p, let-7a
    rf"(?:[a-z]{{3}}{_HYPHEN})?(?:miR|mir|let){_HYPHEN}\d+[a-z]?(?:{_HYPHEN}\d)?(?:{_HYPHEN}[35]p)?",
    # C9orf72
    r"[A-Z]\d+orf\d+",
    # TP53, IL-6, H3K27me3, CYP2D6, Kv1.3, Sox2, p53, eIF4E, rs1042522, BRCA1/2, BCR-ABL1, PD-L1, TDP-43
    rf"(?:[A-Za-z]{{1,7}}(?:{_HYPHEN}?\d++(?:\.\d++)?[A-Za-z]{{0,5}})+|[A-Z]{{2,}}[a-z]?)"
    rf"(?:(?:{_HYPHEN}|/)(?:[A-Z]{{1,6}}[A-Za-z]{{0,3}}\d*[A-Za-z]?|\d++[a-z]?))*",
    # mTOR, dNTP
    r"[a-z]{1,2}[A-Z]{2,}\d*[A-Z]?",
    # c-Myc, N-Myc, p-Akt, Bcl-xL, VEGF-A
    rf"[A-Za-z]{_HYPHEN}[A-Z][a-z]{{1,4}}\d*|[A-Z][a-z]{{1,3}}{_HYPHEN}[a-z]?[A-Z\d][A-Za-z\d]*",
    # caspase-3, interleukin-6
    rf"[a-z]{{4,}}{_HYPHEN}\d{{1,2}}[A-Za-z]?",
)
GENES = re.compile(
    rf"(?<![A-Za-z\d.{_GREEK}])(?:{'|'.join(_SHAPES)})(?![A-Za-z\d{_GREEK}])",
)
