"""Qwen's real vocabulary as a `tokenizer.json`, from the BPE ranks that the `dashscope` package carries."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from typing import Any

from stages.flux2.micro_tokenizer import WORD_PATTERN
from tests.golden import byte_pairs
from tests.golden.byte_pairs import added_token

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
    added = [
        added_token(len(ranks) + index, token, special=token.startswith("<|"))
        for index, token in enumerate(ADDED_TOKENS.split())
    ]
    return byte_pairs.tokenizer_json(ranks, WORD_PATTERN) | {"added_tokens": added, "normalizer": {"type": "NFC"}}
