"""The Module form of a loss: its options as attributes, its forward one call of the function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__: list[str] = []


class LossModule(nn.Module):
    """A Module whose options are plain attributes, to be read and set at any time."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._option_names = tuple(options)
        for name, value in options.items():
            if name == "class_map" and value is not None:
                # A buffer, so that it moves with the Module; not persistent, so that checkpoints stay as they are.
                index = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
                self.register_buffer(name, index, persistent=False)
            else:
                setattr(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in self._option_names}

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
