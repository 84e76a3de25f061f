"""`train.init_lora`: the file a training goes on from, known by what it holds and never by its path.

On the fast path of the stage: nothing heavy is imported unless the file has to be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from schemas.errors import BadConfig, Stale
from stages.contract.digests import digest_of
from stages.contract.job import Job
from stages.flux2.variants import TransformerConfig

if TYPE_CHECKING:
    from stages.lora.layer import Factors
    from stages.stores.tensors import TensorFile

ROLE = "init_lora"


def init_lora_inputs(job: Job) -> dict[str, str]:
    """Return the role and digest of what the file holds; nothing when the settings name none.

    Raises BadConfig when there is no such file, Damaged when it is no whole safetensors file.
    """
    path = _path(job)
    if path is None:
        return {}

    def compute() -> str:
        from stages.stores.tensors import load

        return _digest(load(path))

    return {ROLE: job.digests.one(f"init-lora {path.absolute()}", [path], compute)}


def init_lora_factors(job: Job, digest: str | None, config: TransformerConfig) -> Factors | None:
    """Return the factors of the file; None when the settings name none.

    Raises Damaged when it is no LoRA of this model, Stale when it holds something else than what `digest` was.
    """
    path = _path(job)
    if path is None:
        return None
    from stages.lora.formats.read import read
    from stages.stores.tensors import load, to_mlx

    file = load(path)
    if _digest(file) != digest:
        what = "the LoRA to train on from changed while this stage ran"
        raise Stale("train.init_lora_changed", what, where=str(path), fix="run the same command again")
    tensors = {name: to_mlx(tensor, where=str(path)) for name, tensor in file.tensors.items()}
    return read(tensors, file.metadata, config, str(path))


def _path(job: Job) -> Path | None:
    name = job.config.train.init_lora
    if name is None:
        return None
    path = job.located(name)
    if not path.is_file():
        raise BadConfig(
            "train.init_lora_absent",
            "the LoRA to train on from does not exist",
            where=str(path),
            fix=f"correct train.init_lora in {job.config_path} (it is relative to that file)",
        )
    return path


def _digest(file: TensorFile) -> str:
    """Return the digest of the tensors, and of the scale that the metadata gives them."""
    from stages.lora.formats.scale import ADAPTER_METADATA
    from stages.stores.tensors import tensor_digest

    return digest_of("init-lora", [tensor_digest(file.tensors), file.metadata.get(ADAPTER_METADATA)])
