"""pretrain: make a small FLUX.2 from nothing on pictures of a small world, by the recipe in a file.

This is where the built-in model comes from. Nothing of a pipeline is read or written.
"""

from __future__ import annotations

from typing import Any

import click

from schemas.pretrain import Recipe
from stages.console import messages
from stages.console.invocation import PATH, shared
from stages.contract.config import load_settings

HELP = """Train a small FLUX.2 from nothing: autoencoder, then transformer, on captioned shapes drawn on the spot.

It writes the parts, report.json and sheets of pictures into the folder of --output. PART is one of the trainings
(transformer continues where autoencoder wrote), all of it, or bench, which only measures steps.

\b
Example:
  flux2-lora pretrain all --recipe pipelines/micro/recipe.toml --output micro
"""


@shared("debug")
@click.command("pretrain", help=HELP, context_settings={"max_content_width": 118})
@click.argument("part", type=click.Choice(["bench", "autoencoder", "transformer", "all"]))
@click.option("--recipe", type=PATH, required=True, help="The recipe, a TOML file.")
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Override a setting of the recipe.")
@click.option("--output", "-o", type=PATH, required=True, help="The folder the parts go to.")
def COMMAND(**options: Any) -> int:
    """Be the `pretrain` command."""
    recipe = load_settings(Recipe, options["recipe"], options["assignments"])
    from stages.flux2.backend import prepare
    from stages.pretraining import work
    from stages.pretraining.parts import save_text_parts, variant_of

    messages.say(prepare().line())
    if options["part"] == "bench":
        for line in work.bench(recipe):
            messages.say(line)
        return 0
    save_text_parts(options["output"], variant_of(recipe))
    if options["part"] in ("autoencoder", "all"):
        work.train_autoencoder(recipe, options["output"])
    if options["part"] in ("transformer", "all"):
        work.train_transformer(recipe, options["output"])
    return 0
