"""What validation found: figures first, then a verdict on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Check", "Progress", "Section", "ValidationReport"]


class Progress(Protocol):
    """Told how far a section is."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` parts of `what` are finished."""
        ...


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison."""

    name: str
    passed: bool | None
    """None: it could not be made here, `note` says why."""
    found: str = ""
    """What was measured, in words and numbers."""
    allowed: str = ""
    """What it had to keep to."""
    note: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The same numbers, for programs."""

    @property
    def verdict(self) -> str:
        """passed | failed | skipped."""
        return "skipped" if self.passed is None else "passed" if self.passed else "failed"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        texts = {name: getattr(self, name) for name in ("name", "verdict", "found", "allowed", "note")}
        return {**texts, "figures": dict(self.figures)}


@dataclass(frozen=True)
class Section:
    """Checks that belong together."""

    title: str
    checks: Sequence[Check]
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)


@dataclass(frozen=True)
class ValidationReport:
    """All that was validated, and on what."""

    subject: Mapping[str, Any]
    """Model, versions, machine, options."""
    sections: Sequence[Section]

    @property
    def passed(self) -> bool:
        """Whether no check failed and at least one was made."""
        made = any(check.passed is not None for section in self.sections for check in section.checks)
        return made and all(section.passed for section in self.sections)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "passed": self.passed,
            "subject": dict(self.subject),
            "sections": [
                {
                    "title": section.title,
                    "seconds": round(section.seconds, 2),
                    "checks": [check.as_dict() for check in section.checks],
                }
                for section in self.sections
            ],
        }
