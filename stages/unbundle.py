"""unbundle: check a bundle, every byte of it and who made it, and lay it out as a project that trains."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas.errors import BadConfig, Untrusted
from schemas.manifest import Result
from stages.console import messages
from stages.console.invocation import PATH, shared
from stages.contract.artifacts import write_receipt
from stages.contract.bundles import (
    PIPELINE,
    PURPOSE,
    Bundle,
    check_artifacts,
    check_pipeline,
    opened,
    parse,
    write_tree,
)
from stages.contract.digests import sha256_bytes
from stages.contract.publish import beside, no_resources, publish_folder, sweep_beside

HELP = """Unpack what flux2-lora bundle packed, once every byte of it is proved.

It writes a folder with pipeline.toml, store/ and runs/. A digest only shows that nothing was changed: that these
latents are of those pictures is somebody's word. So a bundle is taken when somebody listed in the --trust file
signed it (lines of a name and a public key, as ssh-keygen's allowed signers), or with --unsigned.

\b
Example:
  flux2-lora unbundle demo.zip --output demo --trust friends
  cd demo && flux2-lora train --config pipeline.toml
"""


def require_word(data: bytes, signature: bytes, path: Path, allowed: Path | None) -> str:
    """Return who signed the list. Raises Untrusted when nobody in `allowed` did."""
    if allowed is None or not signature:
        raise Untrusted(
            "trust.bundle",
            "nobody you trust signed this bundle",
            where=str(path),
            why="it is not signed" if not signature else "no --trust file was given",
            fix="--trust FILE names whose signatures count, --unsigned takes it as it is",
        )
    from stages.contract.signatures import signer

    return signer(data, signature, allowed, PURPOSE)


def unbundle(path: Path, target: Path, allowed: Path | None, *, unsigned: bool) -> tuple[Bundle, str, str]:
    """Unpack a bundle into the new folder `target`; return its list, the list's sha256, and who signed it.

    Raises Untrusted, or Damaged when anything in it is not as listed; nothing is left in `target` then.
    """
    with opened(path) as (data, signature, members):
        by = "" if unsigned else require_word(data, signature, path, allowed)
        bundle = parse(data, path)
        with beside(target) as space:
            work = space / "project"
            write_tree(work, members(bundle))
            check_pipeline(work, bundle, path)
            for manifest in check_artifacts(work, bundle, path):
                write_receipt(work / "runs" / bundle.run, manifest)
            publish_folder(work, target)
    return bundle, sha256_bytes(data), by


@shared("json", "quiet", "debug")
@click.command("unbundle", help=HELP, context_settings={"max_content_width": 118})
@click.argument("bundle", type=PATH)
@click.option("--output", "-o", type=PATH, help="The new folder (the bundle's name, in this folder).")
@click.option("--trust", type=PATH, metavar="FILE", help="Whose signatures count.")
@click.option("--unsigned", is_flag=True, help="Take it from whoever it is.")
def COMMAND(**options: Any) -> int:
    """Be the `unbundle` command."""
    started = time.monotonic()
    messages.configure(quiet=options["quiet"])
    path: Path = options["bundle"]
    target: Path = options["output"] or Path(path.stem)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        sweep_beside(target)
        raise BadConfig("unbundle.output", "something is there already", where=str(target), fix="name a new folder")
    with no_resources(target):
        bundle, digest, by = unbundle(path, target, options["trust"], unsigned=options["unsigned"])
    signed = f"signed by {by}" if by else "signed by nobody you trust: that is your word now"
    messages.say(f"unpacked {len(bundle.files)} files, {signed}")
    messages.say(f"go on with: cd {shlex.quote(str(target))} && flux2-lora train --config {PIPELINE}")
    if options["json"]:
        result = Result(
            stage="unbundle",
            status="built",
            key=None,
            path=str(target.absolute()),
            digest=digest,
            counts={"files": len(bundle.files)},
            seconds=round(time.monotonic() - started, 3),
            error=None,
        )
        messages.result(msgspec.json.encode(result))
    return 0
