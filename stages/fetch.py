"""fetch: bring a model's files from the Hugging Face hub into its cache; the only command that opens a socket."""

from __future__ import annotations

import click

from schemas.errors import NoResources
from stages.console import messages
from stages.flux2.variants import VARIANTS

# The parts that the stages read; the single-file copy of the transformer at the root would be 8 to 60 GB for nothing.
PATTERNS = (
    "model_index.json",
    "transformer/*",
    "vae/*",
    "text_encoder/*",
    "tokenizer/*",
    "scheduler/*",
)
HELP = """Bring a model's files into the Hugging Face cache; what is there already is not fetched again.

\b
Example:
  flux2-lora fetch klein-base-4b
"""


@click.command("fetch", help=HELP)
@click.argument("model")
@click.option("--revision", default="main", show_default=True, help="A branch, tag or commit.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def COMMAND(model: str, revision: str) -> int:
    """Be the `fetch` command."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    variant = VARIANTS.get(model)
    name = variant.hub_id if variant is not None and variant.hub_id else model
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS))
    except GatedRepoError as error:
        raise NoResources(
            "fetch.gated",
            "the model's licence must be accepted first",
            where=name,
            fix=f"accept it on huggingface.co/{name}, then `hf auth login`, then run this again",
        ) from error
    except RepositoryNotFoundError as error:
        raise NoResources(
            "fetch.unknown", "the hub has no such model", where=name, fix=f"one of {', '.join(VARIANTS)}, or org/name"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise NoResources(
            "fetch.failed", "cannot fetch", where=name, why=why, fix="run it again: it resumes"
        ) from error
    messages.say(f"{name}: {folder}")
    return 0
