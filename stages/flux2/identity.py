"""Which weights a job uses: its model's files and their digests, remembered by stat.

On the fast path of every stage: nothing heavy is imported unless a digest has to be computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from schemas import results
from schemas.base import UNREADABLE
from schemas.errors import BadConfig, Damaged, Fault, NoResources
from schemas.run import Model
from stages.contract.digests import canonical_json, unknown
from stages.contract.job import Job
from stages.contract.publish import publish_folder, workspace, write_file
from stages.flux2.folder import BUILT_IN, ModelFiles, open_model
from stages.flux2.variants import MICRO, QWEN3_4B, VARIANTS

# Raised when make_micro gives other bytes: the folder of the built-in model in the store carries it.
MICRO_VERSION = 2
# Of a model's part that a mere look reads to know its digest.
MOST_LOOKED_BYTES = 256 << 20


def model_of(job: Job) -> ModelFiles:
    """Return the model of the job's configuration. Raises what `open_model` raises.

    Which commit of a hub's model the run uses stands in its folder; a branch that moved since is told, once.
    """
    if job.look_only:
        return _looked_at(job, job.config.model)
    model = open_model(job.config.model, job.base, lambda name: _built_in(job, name))
    if model.commit is not None:
        _note_commit(job, model.commit)
    return model


def model_without_making(job: Job) -> ModelFiles:
    """Return the same model, but write nothing: a built-in one that was never made is absent."""
    return open_model(job.config.model, job.base, lambda name: _built_in_folder(job, name))


def drawing_model_of(job: Job) -> ModelFiles:
    """Return the model whose transformer draws previews: that of the configuration, or its distilled sibling.

    Raises BadConfig when that is no distilled model of the same shape.
    """
    model, source = model_of(job), job.config.preview.distilled
    if source is None:
        return model
    spec = Model(source=source)
    try:
        if job.look_only:
            sibling = _looked_at(job, spec)
        else:
            sibling = open_model(spec, job.base, lambda name: _built_in(job, name))
    except (BadConfig, Damaged, NoResources) as error:
        raise type(error).of(_of_sibling(fault) for fault in error.faults) from error
    if sibling.variant.transformer != model.variant.transformer or not sibling.variant.distilled:
        found = f"{sibling.variant.name}, {'distilled' if sibling.variant.distilled else 'not distilled'}"
        raise BadConfig(
            "preview.not_a_sibling",
            "previews cannot be drawn with this model",
            where=f"preview.distilled = {source}",
            why=f"expected a distilled model of the shape of {model.variant.name}, found {found}",
            fix="name the distilled sibling of model.source, or leave out preview.distilled",
        )
    return sibling


def _of_sibling(fault: Fault) -> Fault:
    """Return a fault of the distilled model in its own words: a remedy for [model] would have another one trained."""
    there = "name a folder in the layout of diffusers, or a hub id, as preview.distilled"
    return msgspec.structs.replace(
        fault,
        what=fault.what.replace("model.source", "preview.distilled"),
        where=fault.where.replace("model.source", "preview.distilled"),
        fix=there if "model." in fault.fix else fault.fix,
    )


def quantization(job: Job) -> dict[str, str]:
    """Return what the frozen transformer's format adds to a key: nothing where its weights are held as they are."""
    mode = job.config.model.quantize
    return {} if mode == "none" else {"quantize": mode}


def text_length(job: Job) -> int:
    """Return the number of text tokens, known without the model's files: validate needs nothing else of it."""
    micro = MICRO.name in (job.config.model.source, job.config.model.variant)
    return MICRO.text_encoder.length if micro else QWEN3_4B.length


def _looked_at(job: Job, spec: Model) -> ModelFiles:
    """Return the model, without files where it is not on this machine yet but its name says what it is."""
    known = {**{row.hub_id: row for row in VARIANTS.values() if row.hub_id}, **VARIANTS}
    named = known.get(spec.source if spec.variant == "auto" else spec.variant)
    if spec.source in BUILT_IN and named is not None and not _built_in_folder(job, spec.source).exists():
        return ModelFiles(named, (), (), (), Path(), spec.source)
    try:
        return open_model(spec, job.base, lambda name: _built_in_folder(job, name))
    except NoResources:
        if named is None:
            raise
        return ModelFiles(named, (), (), (), Path(), spec.source)


def _note_commit(job: Job, commit: str) -> None:
    path, spec = job.run_folder / results.MODEL, job.config.model
    note = {"source": spec.source, "revision": spec.revision, "commit": commit}
    try:
        before = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, *UNREADABLE):
        before = {}
    if before == note:
        return
    if before == {**note, "commit": before.get("commit")}:
        job.warn(
            f"{spec.revision} of {spec.source} was {before['commit']} when this run last used it, "
            f"it is {commit} now: what its weights change is made anew. "
            f'To stay with the old: model.revision = "{before["commit"]}"'
        )
    write_file(path, msgspec.json.format(canonical_json(note)) + b"\n")


def _built_in_folder(job: Job, name: str) -> Path:
    return job.store / "models" / f"{name}-{MICRO_VERSION}"


def _built_in(job: Job, name: str) -> Path:
    """Return the folder of a built-in model, making it in the store the first time."""
    folder = _built_in_folder(job, name)
    if not folder.exists():
        from stages.flux2.micro import make_micro

        with workspace(job.store) as space:
            make_micro(space / name)
            publish_folder(space / name, folder)
    return folder


def transformer_digest(job: Job, model: ModelFiles) -> str:
    """Return the digest of the transformer's tensors."""
    return _remembered(job, "transformer", model.transformer, model)


def encoder_digest(job: Job, model: ModelFiles) -> str:
    """Return the digest of the autoencoder's encoder half."""
    return _remembered(job, "autoencoder_encoder", model.autoencoder, model)


def decoder_digest(job: Job, model: ModelFiles) -> str:
    """Return the digest of the autoencoder's decoder half."""
    return _remembered(job, "autoencoder_decoder", model.autoencoder, model)


def text_encoder_digest(job: Job, model: ModelFiles) -> str:
    """Return the digest of the text encoder's layers in use."""
    return _remembered(job, "text_encoder", model.text_encoder, model)


def tokenizer_digest(job: Job, model: ModelFiles) -> str:
    """Return the digest of the tokenizer's file."""
    if job.look_only and not model.transformer:
        return unknown("tokenizer")
    return job.digests.files([model.tokenizer])[0]


def _remembered(job: Job, part: str, files: Sequence[Path], model: ModelFiles) -> str:
    def compute() -> str:
        from stages.flux2 import load

        digests: dict[str, Callable[[ModelFiles], str]] = {
            "transformer": load.transformer_digest,
            "autoencoder_encoder": load.autoencoder_encoder_digest,
            "autoencoder_decoder": load.autoencoder_decoder_digest,
            "text_encoder": load.text_encoder_digest,
        }
        return digests[part](model)

    # The variant, because it says how many layers of a file are in use.
    names = " ".join(str(path.absolute()) for path in files)
    what = f"{part} {names} {model.variant}"
    if job.look_only and not files:
        return unknown(part)
    if job.look_only and sum(path.stat().st_size for path in files) > MOST_LOOKED_BYTES:
        return job.digests.recalled(what, files) or unknown(part)
    return job.digests.one(what, files, compute)
