"""From token ids to text while they come: never half a character, never part of a stop string.

`TokenWindow` decodes token by token, `StopStrings` finds where the text ends, `IncrementalDetokenizer` joins both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cascade_llm.sampling_params import SamplingParams

__all__ = ["DetokenizedDelta", "IncrementalDetokenizer", "StopStrings", "TextDecoder", "TokenWindow"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that make no character, or none yet."""
CONTEXT_LEN = 6
"""Tokens of the prompt that the first generated token is decoded after, at least."""
WINDOW_STEP = 8
"""A window is cut back when it has grown by this many tokens."""
LONGEST_HELD = 16
"""Tokens without a whole character after which they can only be garbage: a character has at most 4 bytes."""


class TextDecoder(Protocol):
    """What is needed of a tokenizer: text of a run of ids, with no clean-up of spaces."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these ids; bytes that make no character become U+FFFD."""
        ...


class TokenWindow:
    """Decodes a sequence token by token, each in the context of a few before it.

    A token's text depends on its neighbours: a character may be spread over several tokens, and some tokenizers drop
    the space before a text's first word. So the last tokens, up to `2 * WINDOW_STEP` of them, are decoded together,
    and what goes beyond the text that was returned already is new. The cost of a token does not grow with the
    sequence.
    """

    def __init__(self, decoder: TextDecoder, context: Sequence[int], skip_special_tokens: bool) -> None:
        """context: token ids before the first pushed one; their text is not returned.

        Where they end inside a character, the whole character is returned once it is complete.
        """
        self._decoder, self._skip_special_tokens = decoder, skip_special_tokens
        self._ids = self._context_end(context)
        self._text = self._decode(self._ids)
        self._num_returned = len(self._text.rstrip(REPLACEMENT))
        self._mark = self._num_whole = len(self._ids)
        """Window ids up to which the text is whole: where it may be cut, and all of them."""

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token, perhaps none."""
        text = self._decode([*self._ids, token_id])
        if text == self._text and not self._decode([token_id, token_id]):
            return ""  # a special token that is skipped: no context either (twice, as a leading space may be dropped)
        self._ids.append(token_id)
        self._text = text
        whole = text.rstrip(REPLACEMENT)
        new = whole[self._num_returned :]
        self._num_returned += len(new)
        if len(whole) == len(text):
            self._num_whole = len(self._ids)
            self._cut_back()
        elif len(self._ids) - self._num_whole >= LONGEST_HELD:
            new += self._give_up_on_held()
        return new

    def flush(self) -> str:
        """The text held back: an unfinished character, as U+FFFD. Nothing may be pushed after it."""
        return self._text[self._num_returned :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _context_end(self, context: Sequence[int]) -> list[int]:
        """The last ids of the context, enough of them to have a text."""
        length = CONTEXT_LEN
        while length < len(context) and not self._decode(context[-length:]):
            length *= 2
        return list(context[-length:])

    def _cut_back(self) -> None:
        """Drop the tokens before the mark, a place where the text was whole, once enough came after it."""
        if len(self._ids) - self._mark < WINDOW_STEP:
            return
        text = self._decode(self._ids[self._mark :])
        if text:
            self._ids = self._ids[self._mark :]
            self._text, self._num_returned = text, len(text)
        self._mark = self._num_whole = len(self._ids)

    def _give_up_on_held(self) -> str:
        """Return held garbage, but for its last tokens, which may begin a character.

        Where two parts decode separately to the same text, the cut is inside no character: an unfinished one gives
        one U+FFFD as a whole and at least two in parts.
        """
        for cut in range(len(self._ids) - 1, len(self._ids) - 4, -1):
            before, after = self._decode(self._ids[:cut]), self._decode(self._ids[cut:])
            if before + after == self._text:
                new = before[self._num_returned :]
                self._ids, self._text, self._num_returned = self._ids[cut:], after, 0
                self._mark = self._num_whole = 0
                return new
        return ""


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


class DetokenizedDelta(NamedTuple):
    """What some tokens added to the text."""

    text: str
    """To be appended to what came before."""
    stopped_by: str | None
    """The stop string that ended the text."""
    num_tokens: int
    """How many of the pushed tokens belong to the output: up to and including the one that completed the stop string;
    all of them where none did."""


class IncrementalDetokenizer:
    """One sequence's text: grows with its tokens and ends at a stop string.

    The deltas together are the text of prompt and output less the prompt's text, so a leading space is kept that a
    tokenizer would drop before an output decoded alone.
    """

    def __init__(self, tokenizer: TextDecoder, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._window = TokenWindow(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = StopStrings(params.stop_strings, params.include_stop_str_in_output)
        self._shows_stop_token = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._ended = False

    def push(self, token_ids: Sequence[int], finished: bool = False, ended_by_token: bool = False) -> DetokenizedDelta:
        """Take the next tokens; return the text that is certain to be shown.

        Args:
            token_ids: may be empty, to end a sequence that was aborted
            finished: no tokens follow, so nothing is held back any longer
            ended_by_token: the last of them is an ending token (EOS, or a stop token id): it stays in the output's
                ids and is left out of its text, unless `include_stop_str_in_output`

        A stop string counts from the token on that reaches `min_tokens`. After one was found nothing may be pushed.
        """
        assert not self._ended, "tokens after the end of a sequence"
        pieces: list[str] = []
        num_shown = len(token_ids) - (ended_by_token and not self._shows_stop_token)
        for index, token_id in enumerate(token_ids[:num_shown]):
            stopped_by = self._push_text(self._window.push(token_id), pieces, num_new=1)
            if stopped_by is not None:
                return DetokenizedDelta("".join(pieces), stopped_by, index + 1)
        stopped_by = None
        if finished or ended_by_token:
            self._ended = True
            stopped_by = self._push_text(self._window.flush(), pieces, num_new=0)
            pieces.append(self._stops.flush())
        return DetokenizedDelta("".join(pieces), stopped_by, len(token_ids))

    def finish(self) -> str:
        """End a sequence that gets no more tokens; returns the text held back, and nothing where it has ended."""
        return "" if self._ended else self.push([], finished=True).text

    def _push_text(self, text: str, pieces: list[str], num_new: int) -> str | None:
        """Append what of `text` may be shown; return the stop string that it completes."""
        self._num_tokens += num_new
        shown, stopped_by = self._stops.push(text, armed=self._num_tokens >= self._min_tokens)
        pieces.append(shown)
        self._ended = self._ended or stopped_by is not None
        return stopped_by
