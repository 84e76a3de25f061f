"""encode-text: captions, the empty caption, preview prompts and class captions through the text encoder.

Each distinct text is encoded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import BadConfig, RejectedInput
from schemas.manifest import Manifest
from schemas.objective import Output
from stages.contract.artifacts import Built, Plan, holder, keyed
from stages.contract.digests import digest_of, unknown
from stages.contract.job import Job
from stages.contract.places import require_room
from stages.contract.runner import upstream
from stages.dataset.captions import TRIGGER, caption_id, prompt_with_trigger, with_class_word
from stages.flux2.identity import model_of, model_without_making, text_encoder_digest, tokenizer_digest

if TYPE_CHECKING:
    import numpy as np

    from stages.flux2.text.tokenize import TokenIds
    from stages.stores.embeddings import EmbeddingRow

INDEX = "index.parquet"
ROLES = ("caption", "empty", "prompt", "class")
# Settings that say which texts are encoded, not how.
WHICH = ("prompts", "class_captions")


class EncodeText:
    """Reads captions and prompts; a role each, so that a new prompt leaves training's inputs as they were."""

    name = "encode-text"
    version = 1

    def plan(self, job: Job) -> Plan:
        """Key the texts, the encoder's and tokenizer's content, and how the states are taken and stored."""
        model = model_of(job)
        dataset, _ = upstream(job, "validate")
        encoder = model.variant.text_encoder
        settings = {
            **keyed(job.config.encode_text),
            "layers": list(encoder.layers),
            "length": encoder.length,
            "prompts": sorted(set(prompts(job))),
        }
        if replaced := _class_captions(job):
            settings["class_captions"] = replaced
        inputs = {
            "captions": dataset.roles["captions"],
            "text_encoder": text_encoder_digest(job, model),
            "tokenizer": tokenizer_digest(job, model),
        }
        return Plan(settings, inputs)

    def build(self, job: Job, plan: Plan, work: Path) -> Built:
        """Encode what no store has yet, and write the index."""
        from schemas.tables import EMBEDDING_INDEX
        from stages.flux2.backend import prepare
        from stages.stores.tables import write_table

        validated = upstream(job, "validate")
        captions = _captions(validated)
        wanted = _wanted(plan, captions)
        keys = {text: _embedding_key(plan, text) for _, _, text in wanted}
        known = _known(job, keys.values())
        missing = [text for text, key in keys.items() if key not in known]
        if any(TRIGGER in text for text in plan.params["prompts"]):
            job.warn(f"preview.prompts hold {TRIGGER}, and no validate.trigger is set: it is drawn to the letter")
        known |= _encode(job, missing, keys)
        rows = [_index_row(role, named, text, known[keys[text]]) for role, named, text in wanted]
        write_table(work / INDEX, EMBEDDING_INDEX, rows)
        fragments = sorted({known[key].fragment for key in keys.values()})
        return Built(
            roles=_roles(rows),
            counts=_counts(len(keys), len(missing)),
            fragments={name: holder(name, job.stores) for name in fragments},
            device=prepare().name if missing else "",
        )

    def foresee(self, job: Job, plan: Plan, work: Path) -> Built:
        """Count what no store has yet, and write the index with what is unknown of it."""
        from schemas.tables import EMBEDDING_INDEX
        from stages.stores.embeddings import EmbeddingRow
        from stages.stores.tables import write_table

        wanted = _wanted(plan, _captions(upstream(job, "validate")))
        keys = dict.fromkeys(_embedding_key(plan, text) for _, _, text in wanted)
        known = _known(job, keys)
        encoder, dtype = model_of(job).variant.text_encoder, plan.params["dtype"]
        coming = {
            key: EmbeddingRow(key, "", 0, 0, encoder.length, encoder.width, dtype, unknown(key))
            for key in keys
            if key not in known
        }
        rows = [
            _index_row(role, named, text, (known | coming)[_embedding_key(plan, text)])
            for role, named, text in wanted
        ]
        write_table(work / INDEX, EMBEDDING_INDEX, rows)
        return Built(roles=_roles(rows), counts=_counts(len(keys), len(coming)))

    def reused(self, manifest: Manifest) -> Mapping[str, int]:
        """Everything was there."""
        return _counts(manifest.counts["total"], 0)

    def restore(self, job: Job, folder: Path, manifest: Manifest) -> None:
        """Leave nothing in the run folder: embeddings are not looked at."""

    def roles_of(self, manifest: Manifest, folder: Path) -> Mapping[str, str]:
        """Return the digests of what training and previews read, from the index in `folder`. Raises Damaged."""
        from schemas.tables import EMBEDDING_INDEX
        from stages.stores.tables import read_table

        return _roles(read_table(folder / INDEX, EMBEDDING_INDEX))

    def expected(self, manifest: Manifest, validated: tuple[Manifest, Path]) -> dict[tuple[object, ...], str]:
        """Return the key of every embedding by (role, caption_id, text). Raises Damaged."""
        plan = Plan(manifest.params, manifest.inputs)
        return {
            (role, caption_id(named), text): _embedding_key(plan, text)
            for role, named, text in _wanted(plan, _captions(validated))
        }

    def encode_again(
        self, job: Job, manifest: Manifest, validated: tuple[Manifest, Path], keys: Collection[str]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (key, embedding as stored) of `keys`."""
        from stages.flux2.backend import prepare
        from stages.flux2.load import load_text_encoder
        from stages.flux2.text.tokenize import Tokenizer

        model = model_without_making(job)
        tokenizer = Tokenizer(model.tokenizer, model.variant.text_encoder)
        plan = Plan(manifest.params, manifest.inputs)
        encoder = load_text_encoder(model, prepare().compute_dtype, plan.params["quantize"])
        texts = {_embedding_key(plan, text): text for _, _, text in _wanted(plan, _captions(validated))}
        for key in (each for each in keys if each in texts):
            yield key, _embedding(job, encoder, texts[key], tokenizer.encode(texts[key]))


def _counts(total: int, encoded: int) -> dict[str, int]:
    return {"total": total, "encoded": encoded, "reused": total - encoded}


def prompts(job: Job) -> list[str]:
    """Return the preview prompts in order, `[trigger]` replaced."""
    return [prompt_with_trigger(text, job.config.validate.trigger) for text in job.config.preview.prompts]


def _captions(validated: tuple[Manifest, Path]) -> list[str]:
    from schemas.tables import CAPTIONS
    from stages.stores.tables import read_table

    return [row["text"] for row in read_table(validated[1] / CAPTIONS.name, CAPTIONS)]


def _wanted(plan: Plan, captions: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (role, the text that names it, the text that is encoded) of every row of the index."""
    wanted = [("caption", text, text) for text in captions] + [("empty", "", "")]
    wanted += [("prompt", text, text) for text in plan.params["prompts"]]
    if replaced := plan.params.get("class_captions"):
        trigger, words = replaced["trigger"], replaced["class_word"]
        turns = itertools.cycle([words] if isinstance(words, str) else words)
        pairs = zip(captions, turns, strict=False)
        wanted += [("class", text, with_class_word(text, trigger, word)) for text, word in pairs]
    return wanted


def _class_captions(job: Job) -> dict[str, Any]:
    """Return what preservation replaces by what in captions; nothing when it is off. Raises BadConfig."""
    preservation, trigger = job.config.train.preservation, job.config.validate.trigger
    if not isinstance(preservation, Output):
        return {}
    if not trigger:
        raise BadConfig(
            "preservation.no_trigger",
            "train.preservation puts class_word where the trigger stands, and there is no trigger",
            where=str(job.config_path),
            fix='set validate.trigger = "your_word", or remove [train.preservation]',
        )
    word = preservation.class_word
    return {"trigger": trigger, "class_word": word if isinstance(word, str) else list(word)}


def _embedding_key(plan: Plan, text: str) -> str:
    settings = {name: value for name, value in plan.params.items() if name not in WHICH}
    inputs = {name: plan.inputs[name] for name in ("text_encoder", "tokenizer")}
    return digest_of("embedding", {"text": text, "version": EncodeText.version, **settings, **inputs})


def _known(job: Job, keys: Collection[str]) -> dict[str, EmbeddingRow]:
    """Return those of `keys` that a store has whole; none where all is to be done again."""
    from stages.stores.embeddings import scan_embeddings, whole_embeddings

    known: dict[str, EmbeddingRow] = {}
    for store in () if job.flags.force else reversed(job.stores):
        known |= scan_embeddings(store)
    return whole_embeddings(job.stores, [known[key] for key in keys if key in known], job.digests)


def _encode(job: Job, missing: Sequence[str], keys: Mapping[str, str]) -> dict[str, EmbeddingRow]:
    """Encode and store `missing`, one text at a time: a key promises bytes.

    In batches of 2 to 8 a text's numbers depend on its neighbours (measured: by 6e-7 relative, float32 on a CPU), and
    512 positions of one text fill the machine as well.
    """
    if not missing:
        return {}
    from stages.console.progress import progress
    from stages.flux2.backend import prepare
    from stages.flux2.load import load_text_encoder, text_encoder_formats
    from stages.flux2.prequantized import prequantized
    from stages.flux2.text.tokenize import Tokenizer
    from stages.stores.embeddings import write_embeddings
    from stages.stores.fragments import MOST_RECORDS, stored_bytes
    from stages.training.memory import require_text

    config = model_of(job).variant.text_encoder
    record_bytes = stored_bytes(config.length * config.width, job.config.encode_text.dtype)
    require_room(job.store, len(missing) * record_bytes, why=f"for {len(missing)} embeddings")
    backend = prepare()
    job.say(backend.line())
    model = prequantized(job, model_of(job), "text_encoder")
    quantize = job.config.encode_text.quantize
    require_text(config, text_encoder_formats(model, quantize), backend, job.warn)
    tokenizer = Tokenizer(model.tokenizer, config)
    encoder = load_text_encoder(model, backend.compute_dtype, quantize)
    written: dict[str, EmbeddingRow] = {}
    with progress("encode-text", total=len(missing), quiet=job.flags.quiet) as bar:
        for start in range(0, len(missing), MOST_RECORDS):
            records: list[tuple[str, int, np.ndarray]] = []
            for text in missing[start : start + MOST_RECORDS]:
                tokens = tokenizer.encode(text)
                if tokens.whole > tokens.count:
                    job.warn(f"cut to {tokens.count} of {tokens.whole} tokens: {text[:60]}...")
                records.append((keys[text], tokens.count, _embedding(job, encoder, text, tokens)))
                bar.advance(1)
            rows = write_embeddings(job.store, records, job.config.encode_text.dtype)
            written |= {row.embedding_key: row for row in rows}
    return written


def _embedding(job: Job, encoder: Any, text: str, tokens: TokenIds) -> np.ndarray:
    """Return the embedding [L, J] of one text as it is stored. Raises RejectedInput when it is not finite."""
    import mlx.core as mx

    from stages.stores.tensors import from_mlx

    states = encoder(mx.array([tokens.ids]), mx.array([tokens.count]))[0]
    if not mx.isfinite(states).all().item():
        raise RejectedInput(
            "embeddings.not_finite",
            "the embedding is not finite",
            where=f"text {text[:60]!r}",
            fix="check the text encoder's file, or change that text",
        )
    return from_mlx(states.astype(mx.bfloat16 if job.config.encode_text.dtype == "bfloat16" else mx.float32)).data


def _index_row(role: str, named: str, text: str, row: EmbeddingRow) -> dict[str, Any]:
    return {
        "caption_id": caption_id(named),
        "role": role,
        "text": text,
        "embedding_key": row.embedding_key,
        "fragment": row.fragment,
        "row": row.row,
        "tokens": row.tokens,
        "length": row.length,
        "width": row.width,
        "dtype": row.dtype,
        "sha256": row.sha256,
    }


def _roles(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {
        role: digest_of("embeddings", sorted(_content(row) for row in rows if row["role"] == role)) for role in ROLES
    }


def _content(row: Mapping[str, Any]) -> list[Any]:
    """What a reader takes of an index row: not where it lies."""
    return [row[name] for name in ("caption_id", "length", "width", "dtype", "sha256")]


STAGE = EncodeText()
