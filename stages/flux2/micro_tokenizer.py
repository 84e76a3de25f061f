"""The built-in model's tokenizer: byte-level BPE in Qwen's style, learned from a handful of caption words.

Small enough to be made on the spot, real enough that every caption has ids: what is not a known word is bytes.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

# Qwen's own split into words: contractions, words, single digits, punctuation, line ends, spaces.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As in Qwen3's file: the thinking marks are added tokens but not special ones.
ADDED_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<think>": False,
    "</think>": False,
}
# The template's own words and those that begin a caption, then words inside captions, which carry their space.
FIRST_WORDS = ["user", "assistant", "\n\n", "a", "photo"]
INNER_WORDS = """
a the of on in with and at its from by to is over under near behind front
red green blue yellow purple orange white black brown pink grey cyan
large small top left right bottom middle background plain
photo picture painting drawing portrait style person cat dog toy car house
couch table beach forest garden street snow sunset water light night
circle square triangle diamond ring cross star robot flower bird mug
wearing sitting standing looking holding striped dotted texture window mountain
river field sky cloud wooden glass metal paper close up face hand two three
"""


def tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` with exactly `vocab_size` ids: bytes, merges, added tokens."""
    alphabet = list(byte_letters().values())
    merges = _learn_merges(_word_counts(), vocab_size - len(alphabet) - len(ADDED_TOKENS))
    vocabulary = [*alphabet, *(left + right for left, right in merges)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(len(vocabulary) + index, content, special=special)
            for index, (content, special) in enumerate(ADDED_TOKENS.items())
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": False},
                _byte_level(),
            ],
        },
        "post_processor": _byte_level(),
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(vocabulary)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def byte_letters() -> dict[int, str]:
    """Return the printable letter that stands for each byte in byte-level vocabularies (GPT-2's convention)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _added_token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": index, "content": content, **flags}


def _word_counts() -> dict[tuple[str, ...], int]:
    """Return each word in letters with its weight: more the earlier it is listed."""
    letters = byte_letters()
    listed = FIRST_WORDS + [f" {word}" for word in INNER_WORDS.split()]
    return {tuple(letters[byte] for byte in word.encode()): len(listed) - i for i, word in enumerate(listed)}


def _learn_merges(words: dict[tuple[str, ...], int], count: int) -> list[tuple[str, str]]:
    """Return the `count` pairs that byte pair encoding joins, most frequent first, ties in the order of letters."""
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, weight in words.items():
            for pair in pairwise(word):
                pairs[pair] += weight
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_join(word, best): weight for word, weight in words.items()}
    return merges


def _join(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    joined: list[str] = []
    for letter in word:
        if joined and (joined[-1], letter) == pair:
            joined[-1] += letter
        else:
            joined.append(letter)
    return tuple(joined)
