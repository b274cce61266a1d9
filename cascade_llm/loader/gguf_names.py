"""How the parts of a split GGUF file are called."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["PART_NAME", "first_part"]

PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def first_part(path: Path) -> Path:
    """The part of a split file that holds the metadata, of any of its parts; a file of another name is whole."""
    match = PART_NAME.fullmatch(path.name)
    return path if match is None else path.with_name(f"{match['stem']}-00001-of-{match['count']}{path.suffix}")
