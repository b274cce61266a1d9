"""Which heads each rank has."""

from __future__ import annotations

from dataclasses import dataclass

from cascade_llm.config import LIMITS, ModelConfig
from cascade_llm.device.ranks import Ranks, Share
from cascade_llm.errors import ConfigError

__all__ = ["HeadShares"]


@dataclass(frozen=True)
class HeadShares:
    """The heads of one rank; where there are more ranks than KV heads, several ranks hold the same one."""

    qo: Share
    kv: Share

    @classmethod
    def of(cls, model: ModelConfig, ranks: Ranks) -> HeadShares:
        """The rank's own. Raises `ConfigError` as `check` does."""
        cls.check(model, ranks.count)
        num_kv = model.num_kv_heads
        return cls(
            ranks.share(model.num_qo_heads),
            Share(num_kv, ranks.index * num_kv // ranks.count, max(1, num_kv // ranks.count)),
        )

    @staticmethod
    def check(model: ModelConfig, count: int) -> None:
        """Raise `ConfigError` where the heads cannot be shared out over so many ranks; it says which numbers work."""
        num_qo, num_kv = model.num_qo_heads, model.num_kv_heads
        if not _works(num_qo, num_kv, count):
            works = [size for size in range(1, LIMITS["tensor_parallel_size"] + 1) if _works(num_qo, num_kv, size)]
            raise ConfigError(
                f"tensor_parallel_size is {count}: {num_qo} query heads and {num_kv} KV heads cannot be shared out "
                f"over {count} ranks; this model takes {', '.join(map(str, works))}"
            )


def _works(num_qo: int, num_kv: int, count: int) -> bool:
    return num_qo % count == 0 and (num_kv % count == 0 or count % num_kv == 0)
