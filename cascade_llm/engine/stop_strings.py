"""Stop strings in text that comes piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Finds where a text ends, and holds back what may yet turn out to be the beginning of a stop string.

    The stop string that is complete first wins; of those that end at the same character, the one that began first.
    So the answer depends on the text alone, not on how it was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._include = include_in_output
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Take the next piece; return what is certain to be shown, and the stop string that ended the text.

        armed: whether stop strings that become complete in this piece count.
        """
        if not self._stops:
            return text, None
        num_scanned, text = len(self._held), self._held + text
        found = self._first_complete(text, num_scanned) if armed else None
        if found is not None:
            end, begin, stop = found
            self._held = ""
            return text[: end if self._include else begin], stop
        self._held = self._possible_beginning(text)
        return text[: len(text) - len(self._held)], None

    def flush(self) -> str:
        """What is held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _first_complete(self, text: str, num_scanned: int) -> tuple[int, int, str] | None:
        """(end, begin, stop) of the first stop string that ends after `num_scanned` characters."""
        found = []
        for stop in self._stops:
            begin = text.find(stop, max(0, num_scanned - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin, stop))
        return min(found, default=None)

    def _possible_beginning(self, text: str) -> str:
        """The longest end of the text that a stop string begins with, short of all of it."""
        for begin in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[begin:]
            if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stops):
                return tail
        return ""
