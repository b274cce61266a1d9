"""The least cost of a subtree of shared runs, as a function of the page at which the tokens carried into it start.

Each choice of segments in the subtree costs a constant, and for every carried page what the segments and leaves cost
that read it: a line over the start page. The cheapest choice is the lower envelope of these lines, a piecewise linear
function. Only its pieces are kept.
"""

from __future__ import annotations

from bisect import insort
from math import ceil, floor
from operator import itemgetter

__all__ = ["CarriedCost", "Line", "line_at"]

Line = complex
"""A cost that falls with the start page: `real - imag * start`. Complex, so that lines add in one operation."""

Cut = tuple[int, Line]
"""A page, and what is added to the line for starts behind it: so a sum of functions has the cuts of both."""

PAGE = itemgetter(0)


def line_at(line: Line, start: int) -> float:
    """The cost when tokens are carried from page `start` on."""
    return line.real - line.imag * start


class CarriedCost:
    """A piecewise linear function over the start pages from 0 to a last one, which is only ever moved down."""

    __slots__ = ("_cuts", "_first", "_last")

    def __init__(self, line: Line = 0j) -> None:
        self._first = self._last = line
        self._cuts: list[Cut] = []

    def add_line(self, line: Line) -> None:
        """Add a line."""
        self._first += line
        self._last += line

    def add(self, other: CarriedCost) -> None:
        """Add another function, which must not be used any more: its cuts may be taken over."""
        cuts, fewer = self._cuts, other._cuts
        if len(cuts) < len(fewer):
            cuts, fewer = fewer, cuts
        for cut in fewer:
            insort(cuts, cut, key=PAGE)
        self._cuts = cuts
        self._first += other._first
        self._last += other._last

    def end_at(self, last_start: int) -> float:
        """Forget the starts behind page `last_start`; returns the cost there."""
        cuts = self._cuts
        while cuts and cuts[-1][0] >= last_start:
            self._last -= cuts.pop()[1]
        return line_at(self._last, last_start)

    def undercut(self, line: Line, last_start: int) -> range:
        """Put `line` where it is cheaper, among the starts from 0 to `last_start`; returns these starts.

        The function must be concave there, so that these starts are neighbours. As a rule the line is the flattest of
        all and they begin at 0; then only pieces that are replaced are looked at.
        """
        cuts, piece, start = self._cuts, self._first, 0
        begin = stop = first_piece = 0
        before = after = piece
        for index in range(len(cuts) + 1):
            last = min(cuts[index][0], last_start) if index < len(cuts) else last_start
            cheaper = _starts_below(line, piece, start, last)
            if cheaper:
                if begin == stop:
                    begin, before, first_piece = cheaper.start, piece, index
                stop, after, last_piece = cheaper.stop, piece, index
            if last == last_start or (stop <= last if begin < stop else piece.imag >= line.imag):
                break
            piece, start = piece + cuts[index][1], last + 1
        if begin == stop:
            return range(0)
        ends: list[Cut] = [(stop - 1, after - line)]
        if begin:
            ends.insert(0, (begin - 1, line - before))
        else:
            self._first = line
        cuts[first_piece:last_piece] = ends
        return range(begin, stop)


def _starts_below(line: Line, other: Line, first: int, last: int) -> range:
    """The starts from `first` to `last` at which `line` is cheaper than `other`."""
    gain = other - line
    if gain.imag > 0:
        return range(first, min(last + 1, ceil(gain.real / gain.imag)))
    if gain.imag < 0:
        return range(max(first, floor(gain.real / gain.imag) + 1), last + 1)
    return range(first, last + 1) if gain.real > 0 else range(0)
