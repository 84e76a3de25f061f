"""A `tokenizer.json` of byte pair encoding, from the ranks of a vocabulary as tiktoken keeps them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from stages.flux2.micro_tokenizer import byte_letters

# Ranks of tokens; the id of a token is its rank and the number of what comes before.
Ranks = dict[bytes, int]


def tokenizer_json(ranks: Ranks, pattern: str, *, first_id: int = 0, **model: Any) -> dict[str, Any]:
    """Return the content of a tokenizer file as far as ids depend on it, without added tokens or a normalizer."""
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [[spell(part) for part in _last_merge(token, rank, ranks)] for token, rank in ranks.items() if token[1:]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    vocabulary = {spell(token): first_id + rank for token, rank in ranks.items()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, **model},
    }


def added_token(token_id: int, content: str, *, special: bool = True) -> dict[str, Any]:
    """Return an added token of a tokenizer file."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, "special": special, **flags}


def _last_merge(token: bytes, rank: int, ranks: Ranks) -> list[bytes]:
    """Return the two parts whose joining makes `token`: byte pair encoding of it with all lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        first = min(range(len(joined)), key=joined.__getitem__)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts
