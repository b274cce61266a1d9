"""Quick validation of the demo's model, in both dtypes."""

from __future__ import annotations

import pytest

from cascade_llm.validation.validate import QUICK, validate


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quick_validation_passes(dtype: str) -> None:
    report = validate("smollm2", {"dtype": dtype}, effort=QUICK)
    failed = [check for section in report.sections for check in section.checks if check.passed is False]
    assert not failed
    assert report.passed
