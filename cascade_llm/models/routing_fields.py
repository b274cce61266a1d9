"""How experts are chosen, from the fields of a config.json."""

from __future__ import annotations

from cascade_llm.errors import CheckpointError
from cascade_llm.layers.routing import Routing
from cascade_llm.models.config_fields import ConfigFields

__all__ = ["read_routing"]

COUNTS = ("num_experts", "num_local_experts")
"""Two names for one number."""
MAX_EXPERTS = 1 << 16


def read_routing(fields: ConfigFields, *, divides_by_sum: bool) -> Routing:
    """From `num_experts` or `num_local_experts`, and `num_experts_per_tok`.

    Raises `CheckpointError` where they are missing, or contradict each other.
    """
    counts = {name: fields.count(name, most=MAX_EXPERTS) for name in COUNTS if name in fields}
    if not counts:
        raise fields.wrong(COUNTS[0], "an integer, 1 or larger")
    if len(set(counts.values())) > 1:
        told = " and ".join(f"{name} {count}" for name, count in counts.items())
        raise CheckpointError(f"{fields.where}: {told} contradict each other: one of them must go")
    (name, num_experts), *_ = counts.items()
    num_chosen = fields.count("num_experts_per_tok")
    if num_chosen > num_experts:
        raise fields.wrong("num_experts_per_tok", f"at most {name}, {num_experts}")
    return Routing(num_experts=num_experts, num_chosen=num_chosen, divides_by_sum=divides_by_sum)
