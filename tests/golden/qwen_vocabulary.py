"""Qwen's real vocabulary as a `tokenizer.json`, from the BPE ranks that the `dashscope` package carries."""

from __future__ import annotations

import base64
import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

from stages.flux2.micro_tokenizer import WORD_PATTERN, byte_letters

# Qwen3's added tokens in the order of their ids, which follow the 151,643 ranks; those in single
# brackets are not special.
ADDED_TOKENS = """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
<tool_response> </tool_response> <think> </think>
"""


def ranks_file() -> Path | None:
    """Return the file of ranks, without importing the package; None where it is not installed."""
    found = importlib.util.find_spec("dashscope")
    return Path(found.submodule_search_locations[0]) / "resources" / "qwen.tiktoken" if found else None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token: lines of base64 and number."""
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def tokenizer_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    """Return the content of Qwen3's tokenizer file as far as ids depend on it."""
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [[spell(part) for part in _last_merge(token, rank, ranks)] for token, rank in ranks.items() if token[1:]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(ranks) + index, "content": token, "special": token.startswith("<|"), **flags}
            for index, token in enumerate(ADDED_TOKENS.split())
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {spell(token): rank for token, rank in ranks.items()}, "merges": merges},
    }


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts whose joining makes `token`: byte pair encoding of it with all lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        first = min(range(len(joined)), key=joined.__getitem__)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts
