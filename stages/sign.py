"""sign: give one's word for what a store holds, so that others may take it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas.errors import BadConfig
from schemas.manifest import Result
from stages.console import messages
from stages.console.invocation import PATH, shared
from stages.contract.publish import no_resources
from stages.contract.trust import SIGNATURES, open_to_others, sign_store

HELP = """Sign every artifact of a store with an SSH key; sign again after adding to it.

Others who name the store with --also, and the file with your public key with --trust, then take what you signed:
it is copied into their own store, and every byte is checked on the way. A store of your own needs no signature.
A store that anyone may write to is not signed: nobody can answer for what is in it.

\b
Example:
  flux2-lora sign store --key ~/.ssh/id_ed25519
"""


@shared("json", "quiet", "debug")
@click.command("sign", help=HELP, context_settings={"max_content_width": 118})
@click.argument("store", type=PATH)
@click.option("--key", type=PATH, required=True, help="The SSH key; its public part is for the others.")
def COMMAND(**options: Any) -> int:
    """Be the `sign` command."""
    started = time.monotonic()
    messages.configure(quiet=options["quiet"])
    store: Path = options["store"]
    if not store.is_dir():
        raise BadConfig("sign.store", "no such store", where=str(store), fix="name the folder of artifacts")
    with no_resources(store):
        if shared := open_to_others(store):
            messages.warn(f"a group may write to {shared[0]}: your signature is for what its members put there, too")
        count = sign_store(store, options["key"].expanduser())
    messages.say(f"signed {count} artifacts: {store / SIGNATURES}")
    if options["json"]:
        result = Result(
            stage="sign",
            status="built",
            key=None,
            path=str((store / SIGNATURES).absolute()),
            digest=None,
            counts={"artifacts": count},
            seconds=round(time.monotonic() - started, 3),
            error=None,
        )
        messages.result(msgspec.json.encode(result))
    return 0
