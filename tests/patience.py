"""How long tests wait for what should come: a limit against hanging alone, since other work may take the processors."""

from __future__ import annotations

__all__ = ["PATIENCE_S"]

PATIENCE_S = 900.0
