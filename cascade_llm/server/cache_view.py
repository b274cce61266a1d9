"""What the prefix cache holds, as a tree of lengths: read off the radix tree when somebody asks."""

from __future__ import annotations

from heapq import heappop, heappush, nlargest
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade_llm.scheduler.prefix_cache import RadixNode

__all__ = ["MOST_SHOWN_TOKENS", "cached_runs"]

MOST_RUNS = 40
"""That are told of: a cache may have a hundred thousand."""
MOST_SHOWN_TOKENS = 48
"""Of a run, where its text may be told."""


def cached_runs(root: RadixNode, owner: str | None, *, with_tokens: bool) -> dict[str, Any]:
    """The runs that the most sequences and sessions hold, and behind which the text branches most; at most `MOST_RUNS`.

    Args:
        root: of the prefix cache; looked at only
        owner: the tenant whose runs are told; None is all
        with_tokens: say how each run begins, as token ids

    Returns:
        {"runs": [...], "num_more": runs at this place that are left out}, each run with such a pair for those behind it
    """
    told: dict[str, Any] = {"runs": [], "num_more": 0}
    waiting: list[tuple[tuple[int, ...], int, RadixNode, dict[str, Any]]] = []
    numbers = count()  # nodes of one weight are not compared

    def look_behind(node: RadixNode, place: dict[str, Any]) -> None:
        behind = [child for child in node.children.values() if owner is None or child.owner == owner]
        place["num_more"] = len(behind)
        for child in nlargest(MOST_RUNS, behind, key=_weight):
            heappush(waiting, (tuple(-part for part in _weight(child)), next(numbers), child, place))

    look_behind(root, told)
    for _ in range(MOST_RUNS):
        if not waiting:
            break
        *_, node, place = heappop(waiting)
        run: dict[str, Any] = {
            "num_tokens": len(node.token_ids),
            "num_holders": node.num_holds,
            "has_pages": bool(node.pages),
            "runs": [],
        }
        if with_tokens:
            run["token_ids"] = node.token_ids[:MOST_SHOWN_TOKENS].tolist()
        place["runs"].append(run)
        place["num_more"] -= 1
        look_behind(node, run)
    return told


def _weight(node: RadixNode) -> tuple[int, ...]:
    return node.num_holds, len(node.children), len(node.token_ids)
