"""verify: every file of the run's chain, from the LoRA back to the pictures; reads only, and lists every fault.

It judges what the run's receipts name. `--quick` looks at presence, sizes and manifests; without it every byte is
hashed again and the LoRA's numbers are looked at.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from schemas import results
from schemas.errors import BadConfig, Damaged, Fault, NoResources, StageError, Stale
from schemas.manifest import Manifest, Result, ResultError
from stages.console.messages import faults
from stages.contract.artifacts import find, read_manifest, read_receipt
from stages.contract.digests import canonical_json, sha256_file
from stages.contract.job import Job
from stages.contract.publish import write_file
from stages.contract.runner import STAGES

# Which role of which stage each input of a stage must be: the links of the chain.
LINKS = {
    "encode-latents": {"pictures": ("validate", "pictures"), "masks": ("validate", "masks")},
    "encode-text": {"captions": ("validate", "captions")},
    "train": {
        "items": ("validate", "items"),
        "latents": ("encode-latents", "latents"),
        "caption": ("encode-text", "caption"),
        "empty": ("encode-text", "empty"),
        "class": ("encode-text", "class"),
        "masks": ("encode-latents", "masks"),
    },
    "preview": {"prompt": ("encode-text", "prompt"), "empty": ("encode-text", "empty")},
}
Chain = dict[str, tuple[Manifest, Path]]


@dataclass
class Inspection:
    """What has been found so far. An error of kind `Stale` is lineage, any other is damage."""

    job: Job
    quick: bool
    checked: int = 0
    errors: list[tuple[type[StageError], Fault]] = field(default_factory=list[tuple[type[StageError], Fault]])
    hints: list[Fault] = field(default_factory=list[Fault])
    not_checked: list[str] = field(default_factory=list[str])

    def error(self, kind: type[StageError], code: str, what: str, where: Path | str, fix: str) -> None:
        """Note something wrong."""
        self.errors.append((kind, Fault(code=code, what=what, where=str(where), fix=fix)))

    def failed(self, error: StageError) -> None:
        """Note what looking at something raised."""
        self.errors += [(type(error), fault) for fault in error.faults]

    def hint(self, code: str, what: str, fix: str) -> None:
        """Note something worth knowing."""
        self.hints.append(Fault(code=code, what=what, fix=fix))

    def file(self, path: Path, size: int, sha256: str, fix: str) -> None:
        """Check one file's presence, size and, unless quick, bytes."""
        self.checked += 1
        if not path.is_file() or path.is_symlink():
            self.error(Damaged, "file.missing", "a file is missing", path, fix)
        elif path.stat().st_size != size:
            what = f"a file has another size: expected {size} bytes, found {path.stat().st_size}"
            self.error(Damaged, "file.size", what, path, fix)
        elif not self.quick and (found := _sha256(path)) != sha256:
            what = f"a file's bytes changed: expected sha256 {sha256}, found {found}"
            self.error(Damaged, "file.changed", what, path, fix)


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        return f"none: {error.strerror}"


def run(job: Job) -> tuple[Result, int]:
    """Inspect the run, write its report, and return the outcome with all findings, and the exit code."""
    started = time.monotonic()
    inspection = Inspection(job, job.flags.quick)
    chain = dict(_artifacts(inspection))
    for stage, (manifest, folder) in chain.items():
        _files(inspection, stage, manifest, folder)
        _links(inspection, stage, chain)
    if "train" in chain:
        _loras(inspection, chain["train"][0])
        _checkpoints(inspection, chain)
    if "preview" in chain and _shows_this_lora(inspection, chain):
        _previews(inspection, *chain["preview"])
    if "validate" in chain:
        _pictures(inspection, chain["validate"][1])
    _model(inspection, chain)
    return _report(inspection, started)


def _artifacts(inspection: Inspection) -> Iterator[tuple[str, tuple[Manifest, Path]]]:
    """Yield the artifact of every stage that the run has a receipt for."""
    job = inspection.job
    for stage in STAGES:
        if stage == "verify":
            continue
        receipt = read_receipt(job.run_folder, stage)
        if receipt is None:
            inspection.error(
                Stale, "stage.not_run", f"{stage} has no receipt in this run", job.run, job.remedy(stage)
            )
            continue
        folder = find(stage, receipt.key, job.stores)
        if folder is None:
            what = f"the artifact that {stage}'s receipt names is gone"
            inspection.error(Stale, "artifact.missing", what, receipt.key, job.remedy(stage))
            continue
        inspection.checked += 1
        try:
            manifest = read_manifest(folder)
        except Damaged as error:
            inspection.failed(error)
            continue
        if manifest.digest != receipt.digest:
            what = "the artifact is not the one the receipt was written for"
            inspection.error(Damaged, "receipt.digest", what, folder, job.remedy(stage))
        yield stage, (manifest, folder)


def _files(inspection: Inspection, stage: str, manifest: Manifest, folder: Path) -> None:
    job = inspection.job
    fix = f"{job.remedy(stage)} --force"
    for name, entry in manifest.files.items():
        inspection.file(folder / name, entry.size, entry.sha256, fix)
    for name, entry in manifest.fragments.items():
        holder = next((store for store in job.stores if (store / name).exists()), job.store)
        inspection.file(holder / name, entry.size, entry.sha256, fix)
    listed = {*manifest.files, "manifest.json"}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in listed:
            inspection.error(Damaged, "file.unlisted", "a file no manifest lists", path, "delete it")


def _links(inspection: Inspection, stage: str, chain: Chain) -> None:
    """Compare what a stage was made from with what the stages before it made."""
    made_from = chain[stage][0].inputs
    for role, (source, name) in LINKS.get(stage, {}).items():
        # Training reads class captions only where it preserves them, and masks only where it is asked to.
        if source in chain and role in made_from and made_from[role] != chain[source][0].roles.get(name):
            what = f"{stage} was made from other {role} than {source} has now"
            inspection.error(Stale, "chain.broken", what, inspection.job.run, inspection.job.remedy(stage))


def _loras(inspection: Inspection, train: Manifest) -> None:
    """Check the finished LoRA and, where one was kept, its moving average."""
    job = inspection.job
    for role, name in (("lora", results.lora(job.run)), ("ema", results.ema(job.run))):
        if role in train.roles:
            _lora(inspection, train, role, job.run_folder / name)


def _lora(inspection: Inspection, train: Manifest, role: str, path: Path) -> None:
    """Check a LoRA in the run folder: the artifact's bytes, a strict header, finite numbers, some B not zero."""
    job = inspection.job
    entry = train.files[f"{role}.safetensors"]
    inspection.file(path, entry.size, entry.sha256, job.remedy("train"))
    if inspection.quick:
        inspection.not_checked.append("the LoRA's numbers and names (left out by --quick)")
        return
    if not path.is_file():
        return
    from stages.flux2.identity import model_without_making
    from stages.lora.formats.read import read
    from stages.lora.layer import learnt
    from stages.stores.tensors import load, tensor_digest, to_mlx

    try:
        file = load(path)
    except (Damaged, NoResources) as error:
        inspection.failed(error)
        return
    if tensor_digest(file.tensors) != train.roles[role]:
        inspection.error(
            Damaged, "lora.digest", "the tensors are not those that training made", path, job.remedy("train")
        )
    try:
        config = model_without_making(job).variant.transformer
        tensors = {name: to_mlx(each) for name, each in file.tensors.items()}
        factors = read(tensors, file.metadata, config, str(path))
    except (BadConfig, NoResources) as error:
        inspection.not_checked.append(f"whether the LoRA fits the model ({error.faults[0].what})")
        return
    except Damaged as error:
        inspection.failed(error)
        return
    if not learnt(factors):
        inspection.error(
            Damaged,
            "lora.zero",
            "every up-matrix is zero: this LoRA does nothing",
            path,
            "train again with a higher train.learning_rate",
        )


def _checkpoints(inspection: Inspection, chain: Chain) -> None:
    """Check the checkpoints that the run shows, and that none is missing of those whose pictures it has."""
    from stages.training.checkpoints import list_checkpoints, public_checkpoints, trajectory_of

    job, train = inspection.job, chain["train"][0]
    fix = f"{job.remedy('train')} --force"
    if (begun := _begun(job)) not in ("", trajectory := trajectory_of(train.params, train.inputs)):
        what = "another training was begun after the one that is finished"
        inspection.error(Stale, "train.unfinished", what, f"trajectory {begun}", job.remedy("train"))
        return
    for checkpoint in public_checkpoints(job.stores, train, job.config.train.checkpoint_every):
        for name, entry in checkpoint.manifest.files.items():
            inspection.file(checkpoint.folder / name, entry.size, entry.sha256, fix)
        entry = checkpoint.manifest.files["lora.safetensors"]
        copy = job.run_folder / results.checkpoint(checkpoint.step)
        inspection.file(copy, entry.size, entry.sha256, job.remedy("train"))
    if "preview" in chain and _shows(preview := chain["preview"][0], train):
        found = list_checkpoints(job.stores, trajectory)
        there = {each.step: {each.manifest.lora, each.manifest.ema} for each in found} | {0: {"none"}}
        for step, lora in _drawn(preview).items():
            if step != train.params["steps"] and lora not in there.get(step, ()):
                what = f"the checkpoint of step {step} is missing or unreadable"
                inspection.error(Damaged, "checkpoint.missing", what, trajectory, fix)


def _begun(job: Job) -> str:
    """Return the trajectory that training in this run folder began last; "" when that is not known."""
    try:
        return msgspec.json.decode((job.run_folder / results.TRAJECTORY).read_bytes(), type=_Note).trajectory
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return ""


class _Note(msgspec.Struct):
    trajectory: str


def _drawn(preview: Manifest) -> dict[int, str]:
    """Return the LoRA of each step whose pictures there are."""
    named = {name.removeprefix("lora "): lora for name, lora in preview.inputs.items() if name.startswith("lora ")}
    return {int(step): lora for step, lora in named.items()}


def _shows(preview: Manifest, train: Manifest) -> bool:
    """Whether the pictures are of what training made."""
    role = "ema" if preview.params.get("ema") else "lora"
    return _drawn(preview).get(train.params["steps"]) == train.roles.get(role)


def _shows_this_lora(inspection: Inspection, chain: Chain) -> bool:
    """Compare the LoRA that the pictures show with the one training made; others are not to be judged by them."""
    if "train" not in chain or _shows(chain["preview"][0], chain["train"][0]):
        return True
    what = "preview shows another LoRA than train has now"
    inspection.error(Stale, "chain.broken", what, inspection.job.run, inspection.job.remedy("preview"))
    return False


class _Shown(msgspec.Struct):
    file: str
    fragment: str


def _previews(inspection: Inspection, preview: Manifest, folder: Path) -> None:
    job = inspection.job
    for name, entry in preview.files.items():
        if name.endswith(".png"):
            inspection.file(job.run_folder / name, entry.size, entry.sha256, job.remedy("preview"))
    try:
        shown = msgspec.json.decode((folder / "index.json").read_bytes(), type=list[_Shown])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        # Among the artifact's files this one is missing or changed already.
        return
    for each in shown:
        if entry := preview.fragments.get(each.fragment):
            inspection.file(job.run_folder / each.file, entry.size, entry.sha256, job.remedy("preview"))


def _model(inspection: Inspection, chain: Chain) -> None:
    """Hash the model's tensors again: each stage was made with those of its part."""
    if inspection.quick:
        inspection.not_checked.append("the model's files (left out by --quick)")
        return
    from stages.flux2 import load
    from stages.flux2.identity import model_without_making

    parts = {
        "encode-latents": ("autoencoder", load.autoencoder_encoder_digest),
        "encode-text": ("text_encoder", load.text_encoder_digest),
        "train": ("transformer", load.transformer_digest),
        "preview": ("decoder", load.autoencoder_decoder_digest),
    }
    try:
        model = model_without_making(inspection.job)
        for stage, (role, digest) in parts.items():
            if stage in chain and chain[stage][0].inputs[role] != digest(model):
                what = f"{stage} was made with another {role} than the model has now"
                inspection.error(Stale, "model.changed", what, model.source, inspection.job.remedy(stage))
    except (BadConfig, NoResources) as error:
        inspection.not_checked.append(f"the model's files ({error.faults[0].what})")
    except Damaged as error:
        inspection.failed(error)


def _pictures(inspection: Inspection, folder: Path) -> None:
    """Hash the pictures of the dataset again."""
    if inspection.quick:
        inspection.not_checked.append("the pictures of the dataset (left out by --quick)")
        return
    from schemas.tables import DATASET
    from stages.stores.tables import read_table

    job = inspection.job
    try:
        rows = read_table(folder / "dataset.parquet", DATASET)
        dataset = job.dataset
    except (Damaged, BadConfig) as error:
        inspection.not_checked.append(f"the pictures of the dataset ({error.faults[0].what})")
        return
    for path, sha256 in sorted({(row["path"], row["image_sha256"]) for row in rows}):
        inspection.checked += 1
        if not (dataset / path).is_file() or _sha256(dataset / path) != sha256:
            what = "a picture is missing or was changed since validate"
            inspection.error(Stale, "dataset.changed", what, dataset / path, "run all stages again")


def _report(inspection: Inspection, started: float) -> tuple[Result, int]:
    """Write `verify.json` and return the outcome: damage comes before lineage."""
    job = inspection.job
    errors = sorted(inspection.errors, key=lambda each: each[0] is Stale)
    findings = [*(fault for _, fault in errors), *inspection.hints]
    counts = {"checked": inspection.checked, "errors": len(errors), "hints": len(inspection.hints)}
    path = job.run_folder / results.VERIFY
    report = {
        "depth": "quick" if inspection.quick else "default",
        **counts,
        "findings": findings,
        "not_checked": inspection.not_checked,
    }
    write_file(path, msgspec.json.format(canonical_json(report)) + b"\n")
    first = errors[0][1] if errors else None
    faults([fault for _, fault in errors])
    if first is None:
        _say_where(job)
    for fault in inspection.hints:
        job.warn(fault.line())
    result = Result(
        stage="verify",
        status="failed" if errors else "built",
        key=None,
        path=str(path.absolute()),
        digest=None,
        counts=counts,
        seconds=round(time.monotonic() - started, 3),
        error=ResultError(code=first.code, what=first.what, where=first.where, fix=first.fix) if first else None,
        findings=findings,
    )
    return result, errors[0][0].exit_code if errors else 0


def _say_where(job: Job) -> None:
    """Tell the person where the results lie."""
    pictures = sorted(job.run_folder.glob("preview_*.png"))
    job.say(f"the LoRA:  {job.run_folder / results.lora(job.run)}")
    if pictures:
        job.say(f"pictures:  {job.run_folder / results.LATEST_PREVIEW} and {len(pictures) - 1} more")
    job.say(f"curves:    {job.run_folder / results.CURVES}")
