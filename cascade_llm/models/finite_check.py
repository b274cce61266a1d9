"""Where in a forward pass a NaN or an infinity first appears."""

from __future__ import annotations

import torch

__all__ = ["FirstNonFinite"]


class FirstNonFinite:
    """An observer of `Decoder.forward` that keeps the first stage whose output is not finite.

    Reads every output back to the host: for debugging only. One object serves one forward pass.
    """

    def __init__(self) -> None:
        self.stage: str | None = None
        """"embedding", "layer 3", "final norm", ...; None while all is finite."""
        self.rows: tuple[int, ...] = ()
        """The rows of that output that are not finite."""

    def __call__(self, stage: str, output: torch.Tensor) -> None:
        """Look at one stage's output, [rows, ...]."""
        if self.stage is not None:
            return
        broken = ~torch.isfinite(output).flatten(1).all(dim=1)
        if bool(broken.any()):
            self.stage = stage
            self.rows = tuple(int(row) for row in broken.nonzero().flatten())
