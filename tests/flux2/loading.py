"""What loading a transformer takes, in a process of its own and by the operating system's own count.

Run as a program it measures one size: `python -m tests.flux2.loading FOLDER --heads 24 --double 5 --single 20
--quantize 4bit` writes a file of klein 4B's real shapes (7.8 GB) into FOLDER, unless it is there, and loads it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from schemas.quantize import Quantize
from stages.flux2 import names, weights
from stages.flux2.packing import chosen
from stages.flux2.quantize import fill
from stages.flux2.shapes import Shapes, transformer_shapes
from stages.flux2.transformer import Transformer
from stages.flux2.variants import KLEIN_4B, TransformerConfig

ROOT = Path(__file__).parents[2]
# Random numbers that are written again and again: what they are changes no size.
BLOCK_NUMBERS = 1 << 22


def config_of(heads: int, double: int, single: int) -> TransformerConfig:
    return replace(KLEIN_4B, num_attention_heads=heads, num_layers=double, num_single_layers=single)


def write(path: Path, shapes: Shapes) -> None:
    """Write a bfloat16 file of these shapes, never holding more than one block."""
    header, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    drawn = np.random.default_rng(0).standard_normal(BLOCK_NUMBERS).astype(np.float32) / 32
    block = (drawn.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(start, 0, -len(block)):
            file.write(block[:left])


def resident_bytes() -> int:
    """Return the largest part of this process that was ever in memory: pages of a mapped file would count."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def load(path: Path, config: TransformerConfig, quantize: Quantize) -> dict[str, float]:
    """Load as `load_transformer` does and return bytes: before, of the weights held, of the largest tensor, peak."""
    mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
    before, began = resident_bytes(), time.monotonic()
    layout = weights.resolve([path], transformer_shapes(config), names.TRANSFORMER)
    wanted = chosen(layout.shapes, layout.packed, quantize, "model.quantize")
    module = fill(Transformer(config), weights.load(layout), mx.bfloat16, found=layout.packed, wanted=wanted)
    held = sum(array.nbytes for _, array in tree_flatten(module.parameters()))
    return {
        "file": path.stat().st_size,
        "before": before,
        "held": held,
        "largest": max(assembly.size for assembly in layout.tensors.values()),
        "peak": resident_bytes(),
        "seconds": round(time.monotonic() - began, 1),
    }


def measured(path: Path, size: tuple[int, int, int], quantize: Quantize) -> dict[str, float]:
    """Return what `load` says in a process of its own; the file must be there."""
    command = [sys.executable, "-m", "tests.flux2.loading", str(path.parent), "--quantize", quantize]
    command += [
        word for pair in zip(("--heads", "--double", "--single"), map(str, size), strict=True) for word in pair
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(found.stdout)


def file_of(folder: Path, size: tuple[int, int, int]) -> Path:
    """Return the file of a size, written unless it is there."""
    path = folder / f"{'-'.join(map(str, size))}.safetensors"
    if not path.is_file():
        write(path, transformer_shapes(config_of(*size)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for word, default in (("--heads", 24), ("--double", 5), ("--single", 20)):
        parser.add_argument(word, type=int, default=default)
    parser.add_argument("--quantize", default="4bit")
    given = parser.parse_args()
    size = (given.heads, given.double, given.single)
    sys.stdout.write(json.dumps(load(file_of(given.folder, size), config_of(*size), given.quantize)))


if __name__ == "__main__":
    main()
