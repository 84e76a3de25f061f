"""A page as a strict reader sees it: every element closed in its turn, with its attributes and its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "input", "br", "hr"}
# Attributes that make a browser ask for something, or go somewhere.
REACHING = {"src", "href", "srcset", "action", "formaction", "data", "poster", "ping", "background", "xlink:href"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).split())

    @property
    def pieces(self) -> list[str]:
        """The texts of what is inside, one by one: the cells of a row."""
        return [part.strip() for part in self.parts if part.strip()]

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()


class Reading(HTMLParser):
    """Reads a page at once; raises ValueError where elements do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(page)
        self.close()
        if self._open:
            raise ValueError(f"never closed: {self._open[-1].tag}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len({name for name, _ in attrs}) < len(attrs):
            raise ValueError(f"an attribute twice: {tag} {attrs}")
        self.elements.append(Element(tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1].tag != tag:
            raise ValueError(f"{tag} closed at {self.getpos()}, open are {[each.tag for each in self._open]}")
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for each in self._open:
            each.parts.append(data)

    def all(self, tag: str, name: str = "") -> list[Element]:
        """Return the elements of a tag, those of a class where it is named, in order."""
        return [each for each in self.elements if each.tag == tag and (not name or name in each.classes)]

    def one(self, tag: str, name: str = "") -> Element:
        [found] = self.all(tag, name)
        return found

    @property
    def scripts(self) -> list[Element]:
        """What a browser would run: data blocks are not."""
        return [each for each in self.all("script") if each.attributes.get("type") != "application/json"]

    @property
    def reached(self) -> list[str]:
        """Every address in the page."""
        found = [(name, value) for each in self.elements for name, value in each.attributes.items()]
        return [value or "" for name, value in found if name in REACHING]

    @property
    def handlers(self) -> list[str]:
        """Attributes that would be run."""
        return [name for each in self.elements for name in each.attributes if name.startswith("on")]
