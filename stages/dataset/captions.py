"""Captions: where each picture's captions come from, how bytes become text, and what the trigger does to it.

Text is strict UTF-8; a leading byte-order mark is dropped, CRLF becomes LF, the ends are stripped, and nothing else
is changed: no Unicode normalisation, no placeholders but `[trigger]`. A picture has one source of captions; a list in
JSON holds several, and so does a text of several lines where asked for.
"""

from __future__ import annotations

import codecs
import hashlib
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from schemas.base import CONTROL
from schemas.errors import Fault, RejectedInput
from stages.dataset.discover import MASK_ENDING, TABLES, Discovery, stem_of
from stages.dataset.metadata import MAX_LINE_BYTES, decode_line, read_rows

MAX_CAPTION_BYTES = 64 << 10
MOST_CAPTIONS = 256
TRIGGER = "[trigger]"
CONTROLS = re.compile(f"[{CONTROL}]")


@dataclass
class Captions:
    """`texts` maps a picture to its captions as written, before the trigger; one with a fault is not in it."""

    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    where: str
    texts: tuple[str, ...] | Fault


def read_captions(folder: Path, found: Discovery, *, allow_empty: bool, lines: bool = False) -> Captions:
    """Return the captions of every picture in `found`, and the fault of every picture without exactly one source.

    With `lines` each line that is not blank is a caption of its own.
    """
    captions = Captions()
    sources: dict[str, list[_Source]] = defaultdict(list)
    shared = _read_sidecars(folder, found, sources, captions)
    _read_tables(folder, found, sources, captions)
    for picture in found.pictures:
        if picture in shared and not sources[picture]:
            continue
        outcome = _settle(picture, sources[picture], allow_empty=allow_empty, lines=lines)
        if isinstance(outcome, Fault):
            captions.faults.append(outcome)
        else:
            captions.texts[picture] = outcome
    if found.orphans:
        shown = ", ".join(found.orphans[:3])
        captions.warnings.append(f"{len(found.orphans)} caption files belong to no picture: {shown}")
    return captions


def caption_id(text: str) -> str:
    """Return the caption's id: the first 32 hex digits of the sha256 of its UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def with_trigger(text: str, trigger: str) -> str:
    """Return a caption that holds the trigger: `[trigger]` replaced, else kept as a word, else put in front."""
    if not trigger:
        return text
    if holds_trigger(text, trigger):
        return text.replace(TRIGGER, trigger)
    return f"{trigger} {text}".strip()


def holds_trigger(text: str, trigger: str) -> bool:
    """Return whether a caption as written holds `[trigger]`, or the trigger as a word."""
    return TRIGGER in text or bool(trigger and re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text))


def prompt_with_trigger(text: str, trigger: str) -> str:
    """Return a prompt with `[trigger]` replaced and nothing put in front: a prompt may be about something else."""
    return text.replace(TRIGGER, trigger) if trigger else text


def with_class_word(text: str, trigger: str, class_word: str) -> str:
    """Return a caption of the class alone: the class word wherever the trigger stands, inside words too."""
    return text.replace(trigger, class_word)


def decode_text(data: bytes, where: str) -> str:
    """Return a caption file's text. Raises RejectedInput: too long, UTF-16, not UTF-8, or with control characters."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _rejected("caption.not_utf8", "the caption is UTF-16, not UTF-8", where, "a UTF-16 mark at byte 0")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is {data[error.start]:#04x}"
        raise _rejected("caption.not_utf8", "the caption is not UTF-8", where, why) from error
    return tidy(text, where)


def tidy(text: str, where: str) -> str:
    """Return caption text with LF line ends and stripped ends. Raises RejectedInput: too long, or not text."""
    size_bytes = len(text.encode())
    if size_bytes > MAX_CAPTION_BYTES:
        raise _too_long(where, f"expected at most {MAX_CAPTION_BYTES} bytes, found {size_bytes}")
    if "\0" in text:
        why = f"at character {text.index(chr(0))}"
        raise _rejected("caption.nul", "the caption holds a NUL character", where, why)
    if (found := CONTROLS.search(text)) is not None:
        why = f"{found[0]!r} at character {found.start()}"
        raise _rejected("caption.control", "the caption holds a control character", where, why)
    return text.replace("\r\n", "\n").strip()


def _read_sidecars(
    folder: Path, found: Discovery, sources: dict[str, list[_Source]], captions: Captions
) -> frozenset[str]:
    """Fill `sources` from sidecars; return the pictures whose sidecar could belong to another as well."""
    by_stem: dict[str, list[str]] = defaultdict(list)
    for picture in found.pictures:
        by_stem[stem_of(picture)].append(picture)
    shared: set[str] = set()
    for sidecar in found.captions:
        if _is_table(sidecar):
            continue
        pictures = by_stem.get(stem_of(sidecar), [])
        if len(pictures) > 1:
            shared.update(pictures)
            captions.faults.append(_shared_fault(sidecar, pictures))
        elif pictures:
            source = _sidecar_source(folder, sidecar)
            if source is not None:
                sources[pictures[0]].append(source)
    return frozenset(shared)


def _sidecar_source(folder: Path, sidecar: str) -> _Source | None:
    """Return the sidecar's text, or None for JSON that holds no caption (other tools leave such files)."""
    try:
        # What other tools write beside a picture is larger than a caption.
        is_json = sidecar.lower().endswith(".json")
        most_bytes = MAX_LINE_BYTES if is_json else MAX_CAPTION_BYTES
        with (folder / sidecar).open("rb") as file:
            data = file.read(most_bytes + len(codecs.BOM_UTF8) + 1)
        if len(data) > most_bytes + len(codecs.BOM_UTF8):
            raise _too_long(sidecar, f"expected at most {most_bytes} bytes")
        if not is_json:
            return _Source(sidecar, (decode_text(data, sidecar),))
        fields = decode_line(data.removeprefix(codecs.BOM_UTF8), sidecar).captions()
        if len(fields) > 1:
            what, why = "expected one of text, caption, prompt", f"found {', '.join(fields)}"
            raise RejectedInput("caption.ambiguous", what, where=sidecar, why=why, fix="keep one of them")
        return _source(sidecar, next(iter(fields.values()))) if fields else None
    except RejectedInput as error:
        return _Source(sidecar, error.faults[0])
    except OSError as error:
        fix = "make the file readable"
        why = str(error.strerror)
        return _Source(
            sidecar, Fault(code="caption.unreadable", what="cannot read the caption", where=sidecar, why=why, fix=fix)
        )


def _read_tables(folder: Path, found: Discovery, sources: dict[str, list[_Source]], captions: Captions) -> None:
    by_name = {unicodedata.normalize("NFC", picture): picture for picture in found.pictures}
    refused = {unicodedata.normalize("NFC", picture) for picture in found.refused}
    for table in filter(_is_table, found.captions):
        base = posixpath.dirname(table)
        for row in read_rows(folder / table, table):
            if isinstance(row, Fault):
                captions.faults.append(row)
                continue
            name = unicodedata.normalize("NFC", posixpath.normpath(posixpath.join(base, row.file_name)))
            if name in by_name:
                sources[by_name[name]].append(_source(row.where, row.texts))
            elif name not in refused:
                captions.faults.append(_unknown_fault(row.where, row.file_name))


def _source(where: str, texts: Sequence[str]) -> _Source:
    try:
        return _Source(where, tuple(tidy(text, where) for text in texts))
    except RejectedInput as error:
        return _Source(where, error.faults[0])


def _settle(picture: str, sources: list[_Source], *, allow_empty: bool, lines: bool) -> tuple[str, ...] | Fault:
    if len(sources) > 1:
        return Fault(
            code="caption.ambiguous",
            what="the picture has several captions",
            where=picture,
            why=f"in {' and '.join(source.where for source in sources)}",
            fix="keep one of them",
        )
    texts = sources[0].texts if sources else ()
    if isinstance(texts, Fault):
        return texts
    parts = [part for text in texts for part in (text.split("\n") if lines else [text])]
    captions = tuple(dict.fromkeys(stripped for part in parts if (stripped := part.strip())))
    if len(captions) > MOST_CAPTIONS:
        return _many_fault(sources[0].where, len(captions))
    if captions:
        return captions
    if allow_empty:
        return ("",)
    beside = f"{picture.rpartition('.')[0]}.txt"
    fix = f"write a caption into {beside}, or set validate.allow_empty_captions = true"
    if picture.lower().endswith(MASK_ENDING):
        fix = 'if it is a mask, set validate.masks = "files"'
    if sources:
        return Fault(code="caption.empty", what="the caption is empty", where=sources[0].where, fix=fix)
    return Fault(code="caption.missing", what="the picture has no caption", where=picture, fix=fix)


def _is_table(name: str) -> bool:
    return posixpath.basename(name).lower() in TABLES


def _shared_fault(sidecar: str, pictures: list[str]) -> Fault:
    return Fault(
        code="picture.ambiguous",
        what="one caption file belongs to several pictures",
        where=sidecar,
        why=" and ".join(pictures),
        fix="rename the pictures and give each its own caption",
    )


def _many_fault(where: str, count: int) -> Fault:
    return Fault(
        code="caption.too_many",
        what="the picture has too many captions",
        where=where,
        why=f"expected at most {MOST_CAPTIONS}, found {count}",
        fix="leave out some of them",
    )


def _unknown_fault(where: str, file_name: str) -> Fault:
    return Fault(
        code="caption.no_picture",
        what="the row names a picture that does not exist",
        where=where,
        why=f"file_name is {file_name!r}",
        fix="correct file_name (relative to the table's folder), or remove the row",
    )


def _too_long(where: str, why: str) -> RejectedInput:
    fix = "shorten it, or move it out of the dataset"
    return RejectedInput("caption.too_long", "the caption is too long", where=where, why=why, fix=fix)


def _rejected(code: str, what: str, where: str, why: str) -> RejectedInput:
    return RejectedInput(code, what, where=where, why=why, fix="save the caption as plain UTF-8 text of one picture")
