"""The one text that teacher forcing uses: a model that reads it is never asked to invent anything."""

from __future__ import annotations

import random

from cascade_llm.engine.tokenizer import Tokenizer

__all__ = ["TEXT", "text_token_ids"]

TEXT = """\
A lighthouse keeper kept two notebooks. The first was the official one, a ledger with printed columns for the \
hour, the wind, the state of the sea and the oil that had been burned. Every night at midnight he filled a \
line in the same small hand, and once a month a boat took the pages away to an office on the mainland, where a \
clerk copied them into a larger book that nobody read. The second notebook had no columns. He wrote in it \
whatever the first one had no room for: that the fog had come in from the east, which it never did in March; \
that a flock of geese had circled the lamp for an hour and then flown on; that he had found a bottle with a \
letter inside, written in a language he did not know.

When he had been on the rock for eleven years, a young engineer arrived with a crate of instruments. The lamp \
was to be lit by electricity, and the wind was to be measured by a machine that drew a line on a drum of \
paper. The engineer was polite and quick, and he explained everything twice. "You will have less to do," he \
said, "and the records will be better. The drum does not sleep, and it does not round its numbers." The keeper \
agreed that this was so. He asked whether the drum would also write down the geese. The engineer laughed, then \
saw that the question was meant, and thought about it. "No," he said at last. "It would only show that the \
wind was light that night."

The machine worked well. For the first weeks the keeper compared its line with his own guesses, and he was \
pleased to find that he had seldom been wrong by more than a little. At midnight he still went up the stairs, \
one hundred and forty of them, although nothing up there needed him any longer. He looked at the sea, and he \
wrote in the second notebook. It grew thicker. In the spring the boat brought a replacement for the drum, \
three barrels of water, a sack of flour and a letter from the office. The office thanked him for his service. \
It wished to know why, on the ninth of February, between two and four in the morning, the line on the drum had \
stopped.

He knew the answer, because he had written it down. On the ninth of February, between two and four in the \
morning, ice had formed on the cups of the machine, and he had climbed out on the gallery with a lamp and a \
kettle to free them. He had counted the steps of the ladder aloud in order to stay awake: one, two, three, \
four, five, six, seven, eight, nine, ten, eleven, twelve. He copied the page, word for word, and sent it with \
the next boat. A month later the answer came. The office had read his account with interest. It asked whether \
he had, by any chance, written down anything else.

So the second notebook became official as well. A new column was printed in the ledger, the widest of them \
all, and its heading was "Remarks". Keepers on other rocks received the same ledger. Some of them left the \
column empty, and some wrote "none" in it every night for years. But others filled it to the edge and went on \
along the margin, and the clerk on the mainland, who had never seen the sea in winter, began to read. He read \
about whales and wrecks, about a green flash at sunset, about a keeper who had taught a seal to come when it \
was called. He copied all of it. When he retired, the larger book had become nine books, and there were people \
who came from the university to look at them.

They were interested in the birds, as it turned out. Nobody else had counted the birds, on the same rocks, at \
the same hour, night after night, for forty years. The line on the drum was accurate to a tenth of a knot, and \
it was thrown away when the paper turned brittle. The remarks are still there. If you ask for them, you will \
be given a pair of cotton gloves and a desk near the window, and you may read, in a small and regular hand, \
that on the third of March the geese circled the lamp for an hour, and then flew on.
"""


def text_token_ids(tokenizer: Tokenizer | None, vocab_size: int, seed: int) -> list[int]:
    """The text's token ids; for a checkpoint without a tokenizer random ones instead, about as many."""
    if tokenizer is None:
        draw = random.Random(seed)
        return [draw.randrange(vocab_size) for _ in range(1000)]
    return tokenizer.encode(TEXT, add_special_tokens=False)
