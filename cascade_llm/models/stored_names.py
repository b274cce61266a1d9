"""What the files of a checkpoint call a decoder's parameters, for messages."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

__all__ = ["StoredNames"]

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class StoredNames:
    """Follows a parameter's name back: over what the architecture renames, stacks, and the container's own names.

    What an architecture renames is learned from the tensors that are there: those of another layer or expert are called
    alike.
    """

    def __init__(self, stacks: Mapping[str, Iterable[str]], stored_name: Callable[[str], str]) -> None:
        """Nothing is learned yet.

        Args:
            stacks: the parameters that one tensor gives values to together, by the name of that tensor
            stored_name: see `Checkpoint.stored_name`
        """
        self._stack_of = {name: stack for stack, names in stacks.items() for name in names}
        self._stored_name = stored_name
        self._learned: dict[str, str] = {}
        self._seen: set[str] = set()

    def learn(self, own: str, name: str) -> None:
        """A tensor that the checkpoint calls `name`, under Hugging Face's names, is the parameter `own`."""
        self._seen.add(pattern := NUMBER.sub("#", own))
        if NUMBER.findall(own) == NUMBER.findall(name) and own != name:
            self._learned[pattern] = NUMBER.sub("#", name)

    def of(self, own: str) -> str:
        """In the files."""
        stack = self._stack_of.get(own)
        if stack is not None and NUMBER.sub("#", stack) in self._seen:
            own = stack
        learned = self._learned.get(NUMBER.sub("#", own))
        numbers = iter(NUMBER.findall(own))
        return self._stored_name(own if learned is None else re.sub("#", lambda _: next(numbers), learned))

    def by_tensor(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Parameters by the tensor that holds them."""
        found = defaultdict(list)
        for name in names:
            found[self.of(name)].append(name)
        return dict(found)
