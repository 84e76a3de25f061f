"""verify: every file of the run's chain, from the LoRA back to the pictures; reads only, and lists every fault.

It judges what the run's receipts name, as deep as asked for, and says what it did not look at. Given a LoRA file
instead of a configuration it judges that file alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from schemas import results
from schemas.errors import BadConfig, Damaged, NoResources
from schemas.manifest import Result, ResultError
from schemas.run import Config, Model
from schemas.validate import Validate
from stages.console.invocation import job_of
from stages.console.messages import faults, say, warn
from stages.contract.digests import canonical_json
from stages.contract.job import Job
from stages.contract.publish import write_file
from stages.flux2.folder import ModelFiles
from stages.flux2.identity import model_without_making
from stages.flux2.variants import VARIANTS
from stages.inspection.depth import depth_of
from stages.inspection.findings import Inspection
from stages.inspection.lora_file import judge, page
from stages.inspection.run import inspect


def run(job: Job) -> tuple[Result, int]:
    """Inspect the run, write its report, and return the outcome with all findings, and the exit code."""
    started = time.monotonic()
    inspection = inspect(job, depth_of(job.flags))
    return _report(inspection, started)


def _report(inspection: Inspection, started: float) -> tuple[Result, int]:
    """Write `verify.json` and return the outcome."""
    job = inspection.job
    errors = inspection.sorted_errors()
    findings = [*(fault for _, fault in errors), *inspection.hints]
    counts = {"checked": inspection.checked, "errors": len(errors), "hints": len(inspection.hints)}
    report = {
        "depth": inspection.depth.name,
        **counts,
        "findings": findings,
        "recomputed": inspection.recomputed,
        "not_checked": inspection.not_checked,
    }
    path = _written(job, msgspec.json.format(canonical_json(report)) + b"\n")
    first = errors[0][1] if errors else None
    faults([fault for _, fault in errors])
    for fault in inspection.hints:
        job.warn(fault.line())
    _say(inspection, failed=first is not None)
    result = Result(
        stage="verify",
        status="failed" if errors else "built",
        key=None,
        path=path,
        digest=None,
        counts=counts,
        seconds=round(time.monotonic() - started, 3),
        error=ResultError(code=first.code, what=first.what, where=first.where, fix=first.fix) if first else None,
        findings=findings,
    )
    return result, errors[0][0].exit_code if errors else 0


def judge_file(options: Mapping[str, Any]) -> tuple[Result, int]:
    """Judge the LoRA file of a command line, on the model it names; return the outcome and the exit code."""
    started = time.monotonic()
    path: Path | None = options["file"]
    if path is None:
        raise BadConfig(
            "usage", "Missing option '--config' / '-c', or a LoRA file to judge", fix="flux2-lora verify --help"
        )
    found = judge(path, _model(options))
    faults(found.faults)
    for fault in found.hints:
        warn(fault.line())
    for line in page(path, found):
        say(line)
    first = found.faults[0] if found.faults else None
    result = Result(
        stage="verify",
        status="failed" if first else "built",
        key=None,
        path=str(path.absolute()),
        digest=found.about.tensor_digest,
        counts={"checked": 1, "errors": len(found.faults), "hints": len(found.hints)},
        seconds=round(time.monotonic() - started, 3),
        error=ResultError(code=first.code, what=first.what, where=first.where, fix=first.fix) if first else None,
        findings=[*found.faults, *found.hints],
        about={**msgspec.to_builtins(found.about), "not_checked": found.not_checked},
    )
    return result, Damaged.exit_code if first else 0


def _model(options: Mapping[str, Any]) -> ModelFiles | None:
    """Return the model of --model, or of the configuration; None when neither names one. Writes nothing."""
    name: str = options["model"]
    if options["config"] is not None:
        if name:
            raise BadConfig("usage", "--model and --config both name a model", fix="leave one out")
        return model_without_making(job_of(dict(options)))
    if not name:
        return None
    variant = VARIANTS.get(name)
    source = (
        Path(name).absolute() if variant is None and Path(name).is_dir() else (variant and variant.hub_id) or name
    )
    config = Config(validate=Validate(dataset="."), model=Model(source=str(source)))
    return model_without_making(Job(config, Path("model.toml"), options["store"], options["runs"]))


def _written(job: Job, report: bytes) -> str | None:
    """Write the report and return where; a run folder that cannot be written to can be verified all the same."""
    path = job.run_folder / results.VERIFY
    try:
        write_file(path, report)
    except NoResources as error:
        if not job.run_folder.is_dir():
            raise
        job.warn(f"the report is not kept: {error.faults[0].line()}")
        return None
    return str(path.absolute())


def _say(inspection: Inspection, *, failed: bool) -> None:
    """Tell the person what was left out and, when all is well, where the results lie."""
    job = inspection.job
    if inspection.recomputed:
        made = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(inspection.recomputed.items()))
        job.say(f"made again: {made}")
    if inspection.depth.quick:
        job.say(
            "only presence, sizes and manifests were looked at; flux2-lora verify without --quick reads all bytes"
        )
    elif inspection.not_checked:
        job.say(f"not looked at: {'; '.join(inspection.not_checked)}")
    if failed:
        return
    pictures = sorted(job.run_folder.glob("preview_*.png"))
    job.say(f"the LoRA:  {job.run_folder / results.lora(job.run)}")
    if pictures:
        job.say(f"pictures:  {job.run_folder / results.LATEST_PREVIEW} and {len(pictures) - 1} more")
    job.say(f"curves:    {job.run_folder / results.CURVES}")
