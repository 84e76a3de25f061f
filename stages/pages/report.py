"""The page about one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from schemas.base import UNREADABLE
from schemas.errors import Damaged, Fault
from stages.pages.chain import chain_of, checkpoints_of, timings_of
from stages.pages.contact import Contact, contact_of
from stages.pages.curves import panels
from stages.pages.figures import figures_of
from stages.pages.previews import preview_files, shown_steps, strips
from stages.pages.record import Record
from stages.pages.settings import settings_of
from stages.pages.template import render


@dataclass(frozen=True)
class Page:
    """A page: its bytes, how many things it shows, and what is to be said of what it does not."""

    data: bytes
    counts: Mapping[str, int]
    remarks: Sequence[str]


def report_page(record: Record) -> Page:
    """Return the page about a run, with the previews, pictures and curves there are."""
    files = preview_files(record)
    every = {step for by_step in files.values() for step in by_step}
    steps = shown_steps(every)
    films, unreadable = strips(files, steps)
    contact, findings, damage = _dataset(record)
    remarks = [*record.remarks, *unreadable, *damage]
    if not films:
        remarks.append("There are no previews.")
    if contact and record.config is None:
        remarks.append("The pictures are not shown: name the pipeline's file with --config, it knows where they are.")
    drawn = panels(record.metrics)
    data = render(
        "report.html",
        record=replace(record, remarks=remarks),
        figures=figures_of(record),
        strips=films,
        steps=steps,
        steps_left_out=len(every) - len(steps),
        panels=drawn,
        contact=contact,
        findings=findings,
        settings=settings_of(record),
        chain=chain_of(record),
        checkpoints=checkpoints_of(record),
        timings=timings_of(record),
    )
    previews = sum(len(film.shots) for film in films)
    pictures = sum(bool(card.src) for card in contact.cards) if contact else 0
    return Page(data, {"previews": previews, "pictures": pictures, "curves": len(drawn)}, remarks)


class _Report(msgspec.Struct):
    findings: list[Fault]


def _dataset(record: Record) -> tuple[Contact | None, list[Fault], list[str]]:
    """Return the contact sheet, what validate found, and a remark when their files are damaged."""
    try:
        contact = contact_of(record)
        if contact is None:
            return None, [], []
        report = (record.artifacts["validate"] / "report.json").read_bytes()
        return contact, msgspec.json.decode(report, type=_Report).findings, []
    except Damaged as error:
        return None, [], [f"The dataset cannot be shown: {error.faults[0].what} ({error.faults[0].where})."]
    except (OSError, *UNREADABLE):
        return None, [], ["The dataset cannot be shown: validate's report.json cannot be read."]
