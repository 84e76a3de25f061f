"""bundle: what a training needs, without the pictures, as one file or folder for another machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

import click
import msgspec

from schemas.errors import BadConfig, Damaged
from schemas.manifest import FileRecord, Manifest, Result
from stages.console import messages
from stages.console.invocation import PATH, job_of, places, shared
from stages.contract.artifacts import holder
from stages.contract.bundles import (
    BUNDLED,
    LIST,
    PIPELINE,
    PURPOSE,
    SIGNATURE,
    SOURCES,
    SUFFIX,
    Member,
    Stored,
    listed,
    members_of,
    write_tree,
    write_zip,
)
from stages.contract.config import run_name
from stages.contract.digests import canonical_json, sha256_bytes
from stages.contract.job import Job
from stages.contract.publish import beside, publish_file, publish_folder
from stages.contract.runner import reading, upstream
from stages.dataset.stand_in import STAND_IN, contents
from stages.flux2.folder import ModelFiles
from stages.flux2.identity import drawing_model_of, model_of
from stages.flux2.variants import VARIANTS

HELP = """Pack what train needs, without the pictures: latents, embeddings, tables and the pipeline.

It reads what validate, encode-latents and encode-text made, and writes a zip file (a name that ends in .zip) or a
folder. flux2-lora unbundle unpacks it on another machine; there, all three stages are up to date. Captions and file
names are in it; pictures and paths are not. With --key it is signed.

\b
Example:
  flux2-lora bundle --config pipelines/demo.toml --output demo.zip
"""


def pipeline(job: Job, run: str, sources: tuple[str, str | None]) -> bytes:
    """Return the resolved configuration as TOML, with no path of this machine in it."""
    import tomli_w

    tables: dict[str, Any] = cast("dict[str, Any]", _without_none(msgspec.to_builtins(job.config, enc_hook=str)))
    tables["run"]["name"] = run
    tables["validate"]["dataset"] = sources[0]
    if sources[1] is not None:
        tables["validate"]["class_dataset"] = sources[1]
    model, preview = tables["model"], tables["preview"]
    model["source"] = _named(job, model["source"], model_of)
    if "distilled" in preview:
        preview["distilled"] = _named(job, preview["distilled"], drawing_model_of)
    for part in {"transformer", "autoencoder", "text_encoder", "tokenizer"} & model.keys():
        model[part] = Path(model[part]).name
    if "init_lora" in tables["train"]:
        tables["train"]["init_lora"] = Path(tables["train"]["init_lora"]).name
    return tomli_w.dumps(tables).encode()


def _named(job: Job, source: str, opened: Callable[[Job], ModelFiles]) -> str:
    """Return what a model is called on every machine: one in a folder as published, else by the folder's name."""
    if not job.located(source).is_dir():
        return source
    row = VARIANTS.get(opened(job).variant.name)
    return (row.hub_id if row else None) or Path(source).name


def _without_none(value: object) -> object:
    """TOML has no null: a setting that is absent is left out."""
    if isinstance(value, Mapping):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list | tuple) else value


def source_folders(job: Job) -> tuple[str, str | None]:
    """Return where the two folders of pictures stand in the bundle: as they lie to each other, which keys hold."""
    name = job.config.validate.class_dataset
    if name is None:
        return f"{SOURCES}/dataset", None
    beside = PurePosixPath(os.path.relpath(job.located(name).resolve(), job.dataset.resolve()))
    ups = sum(part == ".." for part in beside.parts)
    below = PurePosixPath(*beside.parts[ups:])
    own = "dataset" if below.parts[0] != "dataset" else "pictures"
    return "/".join([SOURCES, *["in"] * (ups - 1), own]), f"{SOURCES}/{below}"


def stand_ins(job: Job, sources: tuple[str, str | None]) -> Iterator[Member]:
    """Yield what stands where the pictures were."""
    settings = job.config.validate
    yield (
        f"{sources[0]}/{STAND_IN}",
        canonical_json(contents(job.dataset, job.digests, masks=settings.masks == "files")),
    )
    if sources[1] is not None and settings.class_dataset is not None:
        yield (
            f"{sources[1]}/{STAND_IN}",
            canonical_json(contents(job.located(settings.class_dataset), job.digests, masks=False)),
        )


def bundle(job: Job, output: Path, key: Path | None) -> tuple[str, int]:
    """Write the bundle; return the sha256 of its list and the number of files in it. Raises as `upstream` does."""
    found = [upstream(job, stage) for stage in BUNDLED]
    sources = source_folders(job)
    # There the pipeline is called otherwise, so that its own name has to be one that a setting may have.
    run = job.config.run.name or run_name(job.config_path)
    written = dict([(PIPELINE, pipeline(job, run, sources)), *stand_ins(job, sources)])
    stored = dict(each for manifest, folder in found for each in _stored(job, manifest, folder))
    records = {name: entry for name, (_, entry) in stored.items()}
    records |= {name: FileRecord(size=len(data), sha256=sha256_bytes(data)) for name, data in written.items()}
    data = listed(run, [manifest for manifest, _ in found], records.items())
    signature = b""
    if key is not None:
        from stages.contract.signatures import sign

        signature = sign(data, key, PURPOSE)

    def members() -> Iterator[Member]:
        yield from ((LIST, data), (SIGNATURE, signature))
        for name in sorted(records):
            yield name, written[name] if name in written else _whole(job, *stored[name])

    with beside(output) as space:
        work = space / "bundle"
        if output.suffix == SUFFIX:
            write_zip(work, members())
            publish_file(work, output)
        else:
            write_tree(work, members())
            publish_folder(work, output)
    return sha256_bytes(data), len(records)


def _stored(job: Job, manifest: Manifest, folder: Path) -> Iterator[tuple[str, Stored]]:
    return members_of(lambda name: holder(name, job.stores), manifest, folder)


def _whole(job: Job, path: Path, entry: FileRecord) -> bytes:
    """Return a stored file's bytes. Raises Damaged, naming the remedy, unless they are those that were written."""
    data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    if len(data) != entry.size or sha256_bytes(data) != entry.sha256:
        raise Damaged(
            "file.changed",
            "a stored file is missing or its bytes changed",
            where=str(path),
            why=f"expected sha256 {entry.sha256}",
            fix=job.remedy("repair"),
        )
    return data


@places
@shared("json", "quiet", "debug")
@click.command("bundle", help=HELP, context_settings={"max_content_width": 118})
@click.option("--output", "-o", type=PATH, required=True, help="Where it goes: a .zip file, or a folder.")
@click.option("--key", type=PATH, help="Sign it with this SSH key.")
def COMMAND(**options: Any) -> int:
    """Be the `bundle` command."""
    started = time.monotonic()
    messages.configure(quiet=options["quiet"])
    job, output = job_of(options), options["output"]
    if not output.absolute().parent.is_dir() or (
        output.is_dir() and (output.suffix == SUFFIX or any(output.iterdir()))
    ):
        fix = "name a new .zip file or folder, in a folder that exists"
        raise BadConfig("bundle.output", "a bundle cannot be written there", where=str(output), fix=fix)
    with reading(job):
        digest, files = bundle(job, output, options["key"])
    messages.say(f"bundled {files} files{' and signed them' if options['key'] else ''}: {output}")
    if options["json"]:
        result = Result(
            stage="bundle",
            status="built",
            key=None,
            path=str(output.absolute()),
            digest=digest,
            counts={"files": files},
            seconds=round(time.monotonic() - started, 3),
            error=None,
        )
        messages.result(msgspec.json.encode(result))
    return 0
