from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.engine.text import StopStrings


def reference_cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the text shown in the end, and the stop string that ended it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def show(matcher: StopStrings, pieces: list[str]) -> tuple[str, str | None]:
    shown = ""
    for piece in pieces:
        new, stop = matcher.push(piece)
        shown += new
        if stop is not None:
            return shown, stop
    return shown + matcher.flush(), None


def test_a_possible_beginning_is_held_back_until_decided() -> None:
    matcher = StopStrings(["END", "\n\n"])
    assert matcher.push("the E") == ("the ", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("\n") == ("EN", None)
    assert matcher.push("a E") == ("\na ", None)
    assert matcher.push("ND.") == ("", "END")


def test_the_stop_string_stays_only_where_asked() -> None:
    assert StopStrings(["b"]).push("abc") == ("a", "b")
    assert StopStrings(["b"], include_in_output=True).push("abc") == ("ab", "b")


def test_complete_first_wins_then_begun_first() -> None:
    assert StopStrings(["abcd", "bc"]).push("xabcd") == ("xa", "bc")
    assert StopStrings(["bc", "abc"]).push("xabcd") == ("x", "abc")


def test_nothing_is_held_without_stop_strings() -> None:
    matcher = StopStrings([])
    assert matcher.push("END") == ("END", None)
    assert matcher.flush() == ""


def test_an_unarmed_stop_string_is_text_and_is_not_found_later() -> None:
    matcher = StopStrings(["END", "xENDy"])
    assert matcher.push("aEND", armed=False) == ("aEND", None)
    assert matcher.push("xEND", armed=False) == ("", None)
    assert matcher.push("z") == ("xENDz", None)
    assert matcher.push("END") == ("", "END")


TEXT = st.text("ab\n", max_size=12)


@given(pieces=st.lists(TEXT, max_size=6), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_the_answer_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    for include in (False, True):
        expected = reference_cut("".join(pieces), stops, include)
        assert show(StopStrings(stops, include), pieces) == expected
        assert show(StopStrings(stops, include), list("".join(pieces))) == expected


@given(pieces=st.lists(TEXT, max_size=6), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_what_was_shown_is_never_part_of_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher, shown = StopStrings(stops), ""
    expected, _ = reference_cut("".join(pieces), stops, include=False)
    for piece in pieces:
        new, stop = matcher.push(piece)
        shown += new
        assert expected.startswith(shown)
        if stop is not None:
            break
