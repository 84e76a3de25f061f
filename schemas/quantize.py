"""How a model's frozen weights are held: as they are, or in fewer bits."""

from __future__ import annotations

from typing import Literal

# Affine with 8 or 4 bits in groups of 64, or one of the microscaling floats.
Quantize = Literal["none", "8bit", "4bit", "mxfp8", "mxfp4", "nvfp4"]
