"""What a training reads of the stages before it: the items to train on, and those kept from training.

Imported to plan: whatever is heavy is imported inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.contract.digests import digest_of
from stages.contract.job import Job
from stages.contract.runner import upstream

if TYPE_CHECKING:
    from stages.training.data import TrainingData
    from stages.training.validation import Validator


def held_out_inputs(job: Job) -> dict[str, str]:
    """Return the digest of which items validation keeps from training, as an input of the stage; none when off."""
    if job.config.train.validation is None:
        return {}
    from stages.dataset.holdout import held_out

    return {"held_out": digest_of("held-out", sorted(held_out(_items(job), job.config.train.validation)))}


def validator(job: Job) -> Validator | None:
    """Return what measures the loss on the pictures kept from training; None when none are."""
    spec = job.config.train.validation
    if spec is None:
        return None
    from stages.training.validation import Validator

    return Validator(training_data(job, held_out=True), spec)


def training_data(job: Job, *, held_out: bool = False) -> TrainingData:
    """Return the latents and embeddings to train on, or those of the pictures kept from training."""
    from schemas.tables import EMBEDDING_INDEX, LATENT_INDEX, MASK_INDEX
    from stages.dataset import holdout
    from stages.dataset.draws import read_draws
    from stages.stores.tables import read_table
    from stages.training.data import Tables, TrainingData

    manifest, folder = upstream(job, "validate")
    rows = _items(job)
    draws = read_draws(manifest, folder, rows)
    held = holdout.held_out(rows, job.config.train.validation)
    items = [row for row in rows if (row["item_id"] in held) == held_out]
    encoded = upstream(job, "encode-latents")[1]
    latents = read_table(encoded / "index.parquet", LATENT_INDEX)
    masks = read_table(encoded / MASK_INDEX.name, MASK_INDEX) if job.config.train.mask is not None else None
    embeddings = read_table(upstream(job, "encode-text")[1] / "index.parquet", EMBEDDING_INDEX)
    return TrainingData(job.stores, Tables(items, draws, latents, embeddings, masks))


def _items(job: Job) -> list[dict[str, Any]]:
    from schemas.tables import DATASET
    from stages.stores.tables import read_table

    return read_table(upstream(job, "validate")[1] / "dataset.parquet", DATASET)
