"""Every latent, mask and embedding decoded: as it was written, finite, of a likely size; a sample made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from schemas.errors import BadConfig, Damaged, NoResources, StageError, Stopped
from stages.contract.job import Job
from stages.contract.runner import Encoder, load_stage
from stages.flux2.identity import model_without_making
from stages.inspection.findings import Chain, Inspection
from stages.inspection.lineage import made_of
from stages.inspection.tables import index_rows, key_of

if TYPE_CHECKING:
    import numpy as np

# A whitened latent has a standard deviation of about 1; a hundredth or a hundredfold is no picture.
LIKELY_STD = (0.01, 100.0)
# Of the relative L2 distance between a record and the same one made by another backend. An H200 against a CPU, the
# built-in model: latents 0.0005, embeddings (bfloat16 against float32) 0.019; with the text encoders of klein 4B and
# 9B, random weights, bfloat16 against float32: 0.011. Another picture's latent is about 1 away, a text of which one
# token of forty is another one 0.066 (2026-11-21).
MOST_DISTANCE = {"latents": 0.02, "embeddings": 0.04}
KINDS = {"encode-latents": "latents", "encode-text": "embeddings"}


def check_records(inspection: Inspection, chain: Chain) -> None:
    """Decode the records of both encoders, and make some of them again, where the depth asks for it."""
    depth = inspection.depth
    if not depth.deep:
        inspection.leave_out("the records one by one (verify --deep)")
    if not depth.recompute:
        inspection.leave_out("whether records and steps are what the model makes of them (verify --recompute 5%)")
    for stage in KINDS if depth.deep or depth.recompute else ():
        if stage in chain:
            _check(inspection, stage, chain)


def _check(inspection: Inspection, stage: str, chain: Chain) -> None:
    try:
        rows = {key_of(row): row for row in index_rows(stage, *chain[stage]).values()}
    except Damaged:
        inspection.leave_out(f"the {KINDS[stage]}: their index is damaged")
        return
    read = _reader(inspection.job, stage)
    for row in rows.values() if inspection.depth.deep else ():
        inspection.checked += 1
        with inspection.noting():
            _values(inspection, stage, row, read(row))
    if inspection.depth.deep and stage == "encode-text":
        _token_counts(inspection, rows)
    stored: dict[str, np.ndarray] = {}
    for key in inspection.depth.sample(sorted(rows)):
        with inspection.noting():
            stored[key] = read(rows[key])
    if stored:
        _recompute(inspection, stage, chain, rows, stored)


def _reader(job: Job, stage: str) -> Callable[[Mapping[str, Any]], np.ndarray]:
    """Return what reads the record of an index row as float32."""
    from stages.stores.embeddings import EmbeddingReader
    from stages.stores.latents import LatentReader
    from stages.training.data import embedding_row, latent_row, widened

    latents, embeddings = LatentReader(job.stores), EmbeddingReader(job.stores)
    if stage == "encode-latents":
        return lambda row: widened(latents.read(latent_row(row)), row["dtype"])
    return lambda row: widened(embeddings.read(embedding_row(row)), row["dtype"])


def _values(inspection: Inspection, stage: str, row: Mapping[str, Any], values: np.ndarray) -> None:
    """Check the numbers of one record."""
    import numpy as np

    kind, job = KINDS[stage], inspection.job
    is_mask = stage == "encode-latents" and row["channels"] == 1
    where = f"{row['fragment']}, record {key_of(row)}"
    fix = f"{job.remedy(stage)} --force"
    if not np.isfinite(values).all():
        inspection.error(Damaged, f"{kind}.not_finite", "a record holds infinite or undefined numbers", where, fix)
    elif is_mask:
        if values.min() < 0 or values.max() > 1:
            inspection.error(Damaged, "masks.range", "a mask is not between 0 and 1", where, fix)
    elif values.min() == values.max():
        inspection.error(Damaged, f"{kind}.constant", "all numbers of a record are the same", where, fix)
    elif stage == "encode-latents" and not LIKELY_STD[0] < float(values.std()) < LIKELY_STD[1]:
        inspection.hint("latents.unlikely", f"a latent's spread is {float(values.std()):.3g}, expected about 1", fix)


def _token_counts(inspection: Inspection, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the number of tokens of every text with what the model's tokenizer makes of it."""
    from stages.flux2.text.tokenize import Tokenizer

    try:
        model = model_without_making(inspection.job)
        tokenizer = Tokenizer(model.tokenizer, model.variant.text_encoder)
    except (BadConfig, NoResources, Damaged) as error:
        inspection.leave_out(f"the number of tokens ({error.faults[0].what})")
        return
    for row in rows.values():
        if tokenizer.encode(row["text"]).count != row["tokens"]:
            what = f"expected {tokenizer.encode(row['text']).count} tokens, found {row['tokens']}"
            fix = f"{inspection.job.remedy('encode-text')} --force"
            inspection.error(Damaged, "embeddings.tokens", what, f"record {key_of(row)}", fix)


def _recompute(
    inspection: Inspection,
    stage: str,
    chain: Chain,
    rows: Mapping[str, Mapping[str, Any]],
    stored: Mapping[str, np.ndarray],
) -> None:
    """Make records again from their sources and compare: the same bytes, or those of another backend."""
    import numpy as np

    from stages.training.data import widened

    kind, maker = KINDS[stage], load_stage(stage)
    assert isinstance(maker, Encoder)
    if not made_of(stage, "validate", chain):
        inspection.leave_out(f"the {kind} made again: they were made of another dataset than there is")
        return
    manifest = chain[stage][0]
    fix = f"{inspection.job.remedy(stage)} --force"
    try:
        for key, made in maker.encode_again(inspection.job, manifest, chain["validate"], stored.keys()):
            again = widened(made, rows[key]["dtype"])
            same = np.array_equal(again, stored[key])
            distance = 0.0 if same else _distance(again, stored[key])
            inspection.count_again(kind, "equal" if same else "close" if distance <= MOST_DISTANCE[kind] else "other")
            if not distance <= MOST_DISTANCE[kind]:
                what = f"a record is not what the model makes of its source: they differ by {distance:.2g}"
                inspection.error(Damaged, f"{kind}.recomputed", what, f"record {key}", fix)
    except Stopped:
        raise
    except StageError as error:
        inspection.leave_out(f"the {kind} made again ({error.faults[0].what})")


def _distance(again: np.ndarray, stored: np.ndarray) -> float:
    """Return the relative L2 distance; infinite between different shapes."""
    import numpy as np

    if again.shape != stored.shape:
        return float("inf")
    scale = float(np.linalg.norm(again.astype(np.float64)))
    return float(np.linalg.norm(again.astype(np.float64) - stored)) / scale if scale else float("inf")
