"""Many questions on one text: its K/V are computed once, and read once per decode step for all questions."""

from __future__ import annotations

from cascade_llm import LLM, SamplingParams

TEXT = """You answer questions on the timetable of the ferry to the island of Lund, in one short sentence.

The ferry leaves the harbour of Sand every day at seven in the morning, at noon and at six in the evening. On Sundays
the first crossing is at nine instead of seven. A crossing takes fifty minutes. In a storm from the west no ferry goes,
and passengers sleep in the school, where the teacher has blankets for thirty people. A ticket costs four crowns, a
bicycle two crowns, and a dog goes for nothing if it sits under the bench. The captain is called Marta Quist, and she
has not been late since 2011, when a whale lay across the mouth of the harbour for most of a morning. Coffee is sold
on the upper deck. Whoever misses the last ferry may ask at the lighthouse for a bed.

Tickets are sold by the machine on the quay, which takes coins only. The machine on the island is broken.
"""
QUESTIONS = [
    "How long does a crossing take?",
    "What does a ticket cost?",
    "Who is the captain?",
    "When does the ferry leave on Sundays?",
    "Where is coffee sold?",
    "Where are tickets sold?",
]


def main() -> None:
    conversations = [
        [{"role": "system", "content": TEXT}, {"role": "user", "content": question}] for question in QUESTIONS
    ]
    with LLM("smollm2", max_model_len=512, max_num_seqs=8) as llm:
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=24))
        stats = llm.stats()
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"{question}\n  {output['text']}")  # a small model: what is shared is exact, its answers are not
    print(f"prompt tokens: {stats['prompt_tokens']}, computed: {stats['prefilled_tokens']}")
    read, saved = stats["kv_bytes_read"], stats["kv_bytes_saved"]
    print(f"K/V read: {read / 1e6:.0f} MB; without shared levels it would be {(read + saved) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
