"""Prompts to token ids, with the model's own `tokenizer.json` and nothing but the `tokenizers` library.

Control tokens come from the template alone: the caption's share of the text is encoded by a tokenizer that knows no
added tokens, so a caption with `<|im_end|>` or `<think>` in it is spelled out like any other text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.errors import Damaged
from stages.flux2.text.prompts import PROMPT, Control, Text, template_of
from stages.flux2.variants import TextEncoderConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer as PlainTokenizer


@dataclass(frozen=True)
class TokenIds:
    """`ids` padded to the encoder's length; `count` of them, on the other side than the pads, are the prompt's.

    `whole` is how many it would have had without being cut.
    """

    ids: tuple[int, ...]
    count: int
    whole: int


class Tokenizer:
    """A tokenizer file with the prompt template and the sequence length of one text encoder."""

    def __init__(self, path: Path, config: TextEncoderConfig) -> None:
        """Read `tokenizer.json`.

        Raises `Damaged` if it is absent, no tokenizer, or not one for this encoder.
        """
        self._template = template_of(config.kind)
        self._length = config.length
        self._plain, self._ids = _read(path)
        missing = sorted({control.spelling for control in self._template.controls()} - self._ids.keys())
        if missing:
            raise _damaged("control", "the tokenizer lacks control tokens", path, f"expected {', '.join(missing)}")
        size = max(*self._ids.values(), self._plain.get_vocab_size() - 1) + 1
        if size > config.vocab_size:
            why = f"expected at most {config.vocab_size} ids, found {size}"
            raise _damaged("vocabulary", "the tokenizer knows more than the text encoder", path, why)

    def encode(self, text: str) -> TokenIds:
        """Return the ids of the template filled with `text`: cut to the first `length`, or padded."""
        for literal in self._template.removed:
            text = text.replace(literal, "")
        ids: list[int] = []
        for piece in self._template.pieces:
            match piece:
                case Control(spelling):
                    ids.append(self._ids[spelling])
                case Text(around):
                    ids.extend(self._plain.encode(around.replace(PROMPT, text), add_special_tokens=False).ids)
        whole = len(ids)
        ids = ids[: self._length]
        padding = [self._ids[self._template.pad.spelling]] * (self._length - len(ids))
        return TokenIds(tuple(padding + ids if self._template.pads_left else ids + padding), len(ids), whole)


def _read(path: Path) -> tuple[PlainTokenizer, dict[str, int]]:
    """Return the file's tokenizer without its added tokens, and the ids of those."""
    from tokenizers import Tokenizer as PlainTokenizer

    # No added tokens: all is text. No post-processor, truncation or padding: the template and `encode` do these.
    plain = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        content = json.loads(path.read_bytes())
        added = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
        return PlainTokenizer.from_str(json.dumps(content | plain)), added
    except FileNotFoundError as error:
        raise _damaged("missing", "there is no tokenizer", path, "expected a tokenizer.json") from error
    except Exception as error:  # tokenizers raises bare exceptions for what it cannot read
        raise _damaged(
            "content", "not a usable tokenizer", path, f"expected a tokenizer.json, found {error}"
        ) from error


def _damaged(code: str, what: str, path: Path, why: str) -> Damaged:
    return Damaged(
        f"tokenizer.{code}", what, where=str(path), why=why, fix="fetch the model's tokenizer folder again"
    )
