"""What passes as a name is safe as one path component, and nothing else passes."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import names
from services.common.errors import Fault

NASTY = st.text(alphabet="abz019.-_/\\:% \n\0~$IJ٣éß", max_size=70) | st.text(max_size=70)


@given(NASTY)
def test_no_alias_leaves_its_root(text: str) -> None:
    if names.is_alias(text):
        root = pathlib.PurePosixPath("/store/models/aliases")
        path = root / f"{text}.json"
        assert path.parent == root and path.name == f"{text}.json"
        assert text.isascii() and text == text.lower() and not text.startswith(".") and ".." not in text


@given(NASTY)
def test_no_parsed_name_leaves_its_collection(text: str) -> None:
    for name in (text, "models/" + text):
        try:
            ident = names.parse("name", name, "models")
        except Fault as fault:
            assert fault.violations[0].field == "name" and fault.violations[0].accepted
            continue
        assert "/" not in ident and "\\" not in ident and ident not in (".", "..") and "\0" not in ident


@given(NASTY)
def test_a_job_id_is_one_component(text: str) -> None:
    if names.JOB.fullmatch(text):
        assert pathlib.PurePosixPath("/a").joinpath(text).parent == pathlib.PurePosixPath("/a") and text.isascii()


@pytest.mark.parametrize("good", ["a", "a1", "my-model", "v1.2", "a_b", "x" * 63, "0"])
def test_these_are_aliases(good: str) -> None:
    assert names.check_id("id", good) == []
    assert names.parse("name", f"models/{good}", "models") == good


@pytest.mark.parametrize("bad", ["", ".", "..", "a..b", "-a", "a-", "A", "a/b", "x" * 64, "base", "a\n", "é", "a b"])
def test_these_are_not(bad: str) -> None:
    assert [v.field for v in names.check_id("id", bad)] == ["id"]
    with pytest.raises(Fault):
        names.parse("name", f"models/{bad}", "models")


def test_digests_and_their_beginnings() -> None:
    whole = "sha256:" + "ab" * 32
    assert names.is_digest(whole) and names.is_digest_prefix(whole[:15]) and not names.is_digest_prefix(whole[:14])
    assert not names.is_digest(whole + "a") and not names.is_digest(whole.upper())
    assert names.hex_of(whole) == "ab" * 32 and names.short(whole) == "sha256:abababababab"


@given(st.text(max_size=50))
def test_page_tokens_come_back(position: str) -> None:
    assert names.page_position(names.page_token(position)) == position


@pytest.mark.parametrize("token", ["%%%", "a b", "é", "_w"])
def test_a_foreign_page_token_is_refused(token: str) -> None:
    with pytest.raises(Fault) as caught:
        names.page_position(token)
    assert caught.value.violations[0].field == "page_token"


@pytest.mark.parametrize("size", [-1, 1001])
def test_a_page_size_has_bounds(size: int) -> None:
    with pytest.raises(Fault):
        names.page_size(size)
    assert (names.page_size(0), names.page_size(1000)) == (100, 1000)


@pytest.mark.parametrize("bad", ["", "x" * 129, "a b", "a/b", "é"])
def test_a_request_id_has_a_form(bad: str) -> None:
    assert names.check_request_id(bad)
    assert not names.check_request_id("9b2f-A.:_")
