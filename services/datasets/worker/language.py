"""Which language a row speaks, as far as a glance can tell.

Law of this room: the same row has the same language wherever it lies. Script and
common words come first (scripts.py); the model of py3langid, which takes half a
second and 80 MB, is loaded where they do not decide. An answer that the model is
not sure of is "und", and so are code, numbers and words without a sentence.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orjson

from services.datasets.worker import scripts
from services.datasets.worker.plain import Plain, conversations, text_of, texts
from services.datasets.worker.scripts import UNDECIDED, UNKNOWN
from services.datasets.worker.spool import Spool

SAMPLE = 1000
_CHARACTERS = 240
_LEAST_LETTERS = 8
_SURE = 0.3


def of(example: Plain) -> str:
    """The language of a row (ISO 639-1); "und" where it cannot be told."""
    return of_text(said(example))


def of_text(text: str) -> str:
    """The same of a text."""
    told = scripts.tell(text, _words())
    if told != UNDECIDED:
        return told
    model = _model() if sum(map(str.isalpha, text)) >= _LEAST_LETTERS else None
    if model is None:
        return UNKNOWN
    language, sureness = model.classify(text)
    return str(language) if sureness >= _SURE else UNKNOWN


def said(example: Plain) -> str:
    """What a row says, at most some hundred characters: what is taught of it, and the question before that."""
    asked, taught = [], []
    for path, messages in conversations(example):
        for message in messages:
            if message.get("role") == "ROLE_ASSISTANT":
                taught.append(text_of(message)[:_CHARACTERS])
            elif message.get("role") == "ROLE_USER" and path != "rejected":
                asked.append(text_of(message)[:_CHARACTERS])
    if not taught:
        taught = [text[:_CHARACTERS] for _, text in texts(example)]
    answer = " ".join(taught)[:_CHARACTERS]
    return answer if len(answer) > _CHARACTERS // 2 else f"{' '.join(asked)[:_CHARACTERS]} {answer}"


@functools.cache
def _words() -> Mapping[str, tuple[str, ...]]:
    return scripts.languages_of_words()


@functools.cache
def _model() -> Any:
    """The model, for languages with a code of two letters; None where a worker's memory has no room for it."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    try:
        whole = LanguageIdentifier.from_model_file(MODEL_FILE)
        wanted = [i for i, name in enumerate(whole.nb_classes) if len(name) == 2]
        # A model of its own: set_languages keeps the whole one beside, 28 MB.
        return LanguageIdentifier(
            whole.nb_ptc[:, wanted],
            whole.nb_pc[wanted],
            [whole.nb_classes[i] for i in wanted],
            whole.tk_nextmove,
            whole.tk_output,
            norm_probs=True,
            tk_row=whole.tk_row,
        )
    except (MemoryError, OSError):  # it is unpacked into a temporary file
        return None  # an estimate is no reason to refuse a dataset


def sample(spool: Spool) -> list[str]:
    """What some rows say, or all where there are few. Which rows are asked depends on their contents alone."""
    return [said(orjson.loads(line)) for line in _sample(spool)] if spool.rows else []


def mix(sample: Iterable[str], kept: int) -> dict[str, int]:
    """Rows by language, told of a sample; they sum up to the rows that are kept."""
    return scaled(Counter(map(of_text, sample)), kept)


def _sample(spool: Spool) -> Iterable[bytes]:
    """Lines of rows whose contents have the lowest hashes, each content once."""
    contents = np.concatenate([b.entries["content"][:, 0] for b in spool.blocks()])
    if len(contents) > SAMPLE:
        bound = np.unique(contents)[:SAMPLE][-1]
    else:
        bound = contents.max()
    met: set[int] = set()
    for block in spool.blocks():
        contents = block.entries["content"][:, 0]
        places = np.flatnonzero(contents <= bound)
        for content, line in zip(contents[places].tolist(), block.chosen(places), strict=True):
            if content not in met:
                met.add(content)
                yield line


def scaled(met: Mapping[str, int], total: int) -> dict[str, int]:
    """Counts in the same proportion with another sum, by largest remainders; names break ties."""
    of_all = sum(met.values())
    if not of_all:
        return {}
    shares = {name: divmod(n * total, of_all) for name, n in met.items()}
    left = total - sum(whole for whole, _ in shares.values())
    first = sorted(shares, key=lambda name: (-shares[name][1], name))[:left]
    counts = {name: whole + (name in first) for name, (whole, _) in shares.items()}
    return {name: n for name, n in sorted(counts.items()) if n}
