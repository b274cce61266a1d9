"""The error tree: what its page draws is what there is, and every error can be caught as Python's own kind."""

from __future__ import annotations

import re

import pytest

from cascade_llm import errors


def drawn_tree() -> dict[str, str]:
    """Child to parent, from the tree at the top of errors.py."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([│├└─ ]*)([A-Z][A-Za-z]+Error)\b", line)
        if found:
            depth = len(found[1]) // 4
            path = [*path[:depth], found[2]]
            if depth:
                parents[found[2]] = path[depth - 1]
    return parents


def error_classes() -> list[type[errors.CascadeError]]:
    classes = [getattr(errors, name) for name in errors.__all__]
    return [each for each in classes if isinstance(each, type) and each is not errors.CascadeError]


def test_the_drawn_tree_is_the_tree() -> None:
    assert drawn_tree() == {each.__name__: each.__mro__[1].__name__ for each in error_classes()}


@pytest.mark.parametrize("error", error_classes(), ids=lambda error: error.__name__)
def test_every_error_is_ours_and_has_a_builtin_kind_or_children(error: type[errors.CascadeError]) -> None:
    assert issubclass(error, errors.CascadeError)
    assert error.__doc__
    builtin = [base for base in error.__mro__ if base.__module__ == "builtins"]
    assert len(builtin) > len([Exception, BaseException, object]) or error.__subclasses__()


@pytest.mark.parametrize(
    ("name", "words"),
    [("temprature", "did you mean 'temperature'?"), ("xyz", "known: seed, temperature, top_k"), ("topk", "'top_k'")],
)
def test_hint_names_the_nearest_or_all(name: str, words: str) -> None:
    assert words in errors.nearest_name_hint(name, ["top_k", "temperature", "seed"])
