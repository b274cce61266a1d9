"""Which requests count as in time."""

from __future__ import annotations

import pytest

from cascade_llm.bench.online import RequestTiming
from cascade_llm.bench.slo import ServiceLevel
from cascade_llm.errors import ConfigError

SLO = ServiceLevel(ttft_s=1.0, tpot_s=0.1)


@pytest.mark.parametrize(
    ("arrival_s", "token_times_s", "is_met"),
    [
        (0.0, [[1.0]], True),
        (0.0, [[1.01]], False),
        (5.0, [[6.0, 6.0, 6.15]], True),  # tokens that come together count: 0.075 s in the mean
        (5.0, [[5.5, 5.55, 5.9]], False),
        (5.0, [[5.5, 5.55], [5.7, 5.85]], True),
        (0.0, [], False),
    ],
)
def test_both_bounds_hold(arrival_s: float, token_times_s: list[list[float]], is_met: bool) -> None:
    assert SLO.is_met(RequestTiming(arrival_s, token_times_s)) == is_met


def test_one_bound_alone() -> None:
    late = RequestTiming(0.0, [[9.0, 9.05]])
    assert ServiceLevel(float("inf"), 0.1).is_met(late)
    assert not ServiceLevel(1.0, float("inf")).is_met(late)
    with pytest.raises(ConfigError, match="ttft_s is 0"):
        ServiceLevel(0, 1)
