"""The exact text around a prompt: what each text encoder was asked during the model's own training.

Source: `pipeline_flux2_klein.py`, `pipeline_flux2.py` and `system_messages.py` of diffusers, `text_encoder.py` of
black-forest-labs/flux2. A template keeps control tokens apart from text, so that nothing in a caption passes for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

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
    """The pieces in order, and the token that fills the rest of the sequence, on the right or on the left.

    `removed` are literals that a prompt loses before it is encoded.
    """

    pieces: tuple[Control | Text, ...]
    pad: Control
    pads_left: bool = False
    removed: tuple[str, ...] = ()

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


# The line break in the system message is the original's.
MISTRAL3_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
# Nothing but control tokens between the parts, no space, and no turn of the assistant.
MISTRAL3 = Template(
    pieces=(
        Control("<s>"),
        Control("[SYSTEM_PROMPT]"),
        Text(MISTRAL3_SYSTEM),
        Control("[/SYSTEM_PROMPT]"),
        Control("[INST]"),
        Text(PROMPT),
        Control("[/INST]"),
    ),
    pad=Control("<pad>"),
    pads_left=True,
    removed=("[IMG]",),  # the pipeline takes it out, lest it pass for a picture
)


def template_of(kind: Literal["qwen3", "mistral3"]) -> Template:
    """Return the template of a kind of text encoder."""
    match kind:
        case "qwen3":
            return QWEN3
        case "mistral3":
            return MISTRAL3
    assert_never(kind)
