"""The exact text around a prompt: what each text encoder was asked during the model's own training.

Source: `pipeline_flux2_klein.py` of diffusers and `text_encoder.py` of black-forest-labs/flux2. A template keeps
control tokens apart from text, so that nothing in a caption can pass for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

from schemas.errors import BadConfig

PROMPT = "{PROMPT}"


@dataclass(frozen=True)
class Control:
    """One control token, by the spelling the tokenizer file gives it."""

    spelling: str


@dataclass(frozen=True)
class Text:
    """Plain text between two control tokens; `PROMPT` in it stands for the prompt.

    What lies between two control tokens is one piece: a tokenizer may join a prompt's first characters to the text
    before them.
    """

    text: str


@dataclass(frozen=True)
class Template:
    """The pieces in order, and the token that fills the rest of the sequence on the right."""

    pieces: tuple[Control | Text, ...]
    pad: Control

    def controls(self) -> set[Control]:
        """Return every control token the template needs."""
        return {self.pad, *(piece for piece in self.pieces if isinstance(piece, Control))}


# One user message, no system message, the assistant's turn opened with thinking switched off.
QWEN3 = Template(
    pieces=(
        Control("<|im_start|>"),
        Text(f"user\n{PROMPT}"),
        Control("<|im_end|>"),
        Text("\n"),
        Control("<|im_start|>"),
        Text("assistant\n"),
        Control("<think>"),
        Text("\n\n"),
        Control("</think>"),
        Text("\n\n"),
    ),
    pad=Control("<|endoftext|>"),
)


def template_of(kind: Literal["qwen3", "mistral3"]) -> Template:
    """Return the template of a kind of text encoder. Raises `BadConfig` for one that cannot run here yet."""
    match kind:
        case "qwen3":
            return QWEN3
        case "mistral3":
            raise BadConfig(
                "model.text_encoder_unsupported",
                "text encoders of kind mistral3 cannot run yet",
                why="expected qwen3",
                fix="use a klein model",
            )
    assert_never(kind)
