"""What a training reads of the stages before it: the items to train on, and those kept from training.

Imported to plan: whatever is heavy is imported inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from schemas.train import Train
from stages.contract.digests import digest_of
from stages.contract.job import Job
from stages.contract.runner import upstream
from stages.flux2.identity import model_of

if TYPE_CHECKING:
    import mlx.core as mx

    from stages.dataset.draws import Draw
    from stages.training.data import TrainingData
    from stages.training.step import Trainer
    from stages.training.validation import Validator

Items = Sequence[Mapping[str, Any]]


def held_out_inputs(job: Job) -> dict[str, str]:
    """Return the digest of which items validation keeps from training, as an input of the stage; none when off."""
    if job.config.train.validation is None:
        return {}
    items, draws = _items(job)
    return {"held_out": digest_of("held-out", sorted(_held_out(job, items, draws)))}


def validator(job: Job) -> Validator | None:
    """Return what measures the loss on the pictures kept from training; None when none are."""
    spec = job.config.train.validation
    if spec is None:
        return None
    from stages.training.validation import Validator

    data = training_data(job, held_out=True)
    return Validator(data, data.items, spec)


def make_trainer(job: Job, settings: Train, compute_dtype: mx.Dtype, init_lora: str | None) -> Trainer:
    """Return a trainer of the job's model with fresh adapters, or those of the LoRA file of digest `init_lora`."""
    from stages.flux2.load import load_transformer
    from stages.flux2.prequantized import prequantized
    from stages.lora.init_lora import init_lora_factors
    from stages.lora.merge import attach
    from stages.training.step import Trainer

    model = prequantized(job, model_of(job), "transformer")
    transformer = load_transformer(model, compute_dtype, job.config.model.quantize)
    start = init_lora_factors(job, init_lora, transformer.config)
    attach(transformer, settings, seed=job.config.run.seed, start=start)
    return Trainer(transformer, settings, job.config.run.seed)


def training_data(job: Job, *, held_out: bool = False) -> TrainingData:
    """Return the latents and embeddings to train on, or those of the pictures kept from training."""
    from schemas.tables import EMBEDDING_INDEX, LATENT_INDEX, MASK_INDEX
    from stages.stores.tables import read_table
    from stages.training.data import Tables, TrainingData

    rows, draws = _items(job)
    held = _held_out(job, rows, draws)
    items = [row for row in rows if (row["item_id"] in held) == held_out]
    encoded = upstream(job, "encode-latents")[1]
    latents = read_table(encoded / "index.parquet", LATENT_INDEX)
    masks = read_table(encoded / MASK_INDEX.name, MASK_INDEX) if job.config.train.mask is not None else None
    embeddings = read_table(upstream(job, "encode-text")[1] / "index.parquet", EMBEDDING_INDEX)
    return TrainingData(job.stores, Tables(items, draws, latents, embeddings, masks))


def _items(job: Job) -> tuple[Items, Mapping[str, Draw]]:
    from schemas.tables import DATASET
    from stages.dataset.draws import read_draws
    from stages.stores.tables import read_table

    manifest, folder = upstream(job, "validate")
    items = read_table(folder / "dataset.parquet", DATASET)
    return items, read_draws(manifest, folder, items)


def _held_out(job: Job, items: Items, draws: Mapping[str, Draw]) -> frozenset[str]:
    """Return the items kept from training: never pictures of the class, whose loss says nothing of the subject."""
    from stages.dataset.holdout import held_out

    return held_out([row for row in items if not draws[row["item_id"]].prior], job.config.train.validation)
