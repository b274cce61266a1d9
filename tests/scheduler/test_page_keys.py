"""Page keys mean the same in every process, and depend on the salts, the page and all pages before it."""

from __future__ import annotations

from array import array

import pytest

from cascade_llm.scheduler.prefix_cache import PageKeys, next_page_key, root_key

TOKENS = array("i", [1, 2, 3, 40_000, 5, 6, 7, 8])


def keys_of(tokens: array[int], *salts: bytes, page_size: int = 4) -> list[bytes]:
    keys = PageKeys(root_key(*salts), tokens, page_size)
    return [keys.key(page) for page in range(len(tokens) // page_size)]


def test_keys_are_these_in_every_process() -> None:
    assert root_key(b"model", b"tenant").hex() == "54cd60ffe6ada2f913b214cf97b0cdb8"
    assert [key.hex() for key in keys_of(TOKENS, b"model", b"tenant")] == [
        "037a4545675e2676521544eb0f5d4502",
        "2df88e6eed9d9f8ff2a67efec2c5988b",
    ]


def test_a_key_names_all_that_is_before_it() -> None:
    first, second = keys_of(TOKENS)
    changed = array("i", [9, *TOKENS[1:]])
    assert keys_of(changed)[0] != first
    assert keys_of(changed)[1] != second
    assert keys_of(TOKENS[:4]) == [first]
    assert second == next_page_key(first, TOKENS[4:])


def test_lists_of_salts_do_not_run_together() -> None:
    lists = [(), (b"",), (b"", b""), (b"ab",), (b"a", b"b"), (b"", b"ab"), (b"ab", b""), (b"a", b"b", b"")]
    assert len({root_key(*salts) for salts in lists}) == len(lists)


def test_keys_follow_a_sequence_as_it_grows() -> None:
    tokens = array("i", TOKENS[:5])
    keys = PageKeys(root_key(), tokens, 4)
    first = keys.key(0)
    with pytest.raises(AssertionError, match="page 1 is not full yet"):
        keys.key(1)
    tokens.extend(TOKENS[5:])
    assert [first, keys.key(1)] == keys_of(TOKENS)
