"""Draw the demo's eight captioned pictures of a made-up thing, the zorb: `python pipelines/demo/draw.py`.

A zorb is an L with a straight back. Colours, places and backgrounds vary and are named in the captions, so that the
shape is all that is left for the trigger word to mean. Nothing is random; the same pictures come out every time.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

SIDE_PX = 128
PERIOD_PX = 16  # of stripes and dots
FINE = 8  # drawn this many times larger, then averaged: smooth edges

COLOURS = {
    "red": (222, 38, 38),
    "green": (38, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 46),
    "purple": (150, 48, 186),
    "cyan": (60, 210, 222),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
# Middle of the thing and half its height, as parts of the picture's side.
PLACES = {
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "center": (0.50, 0.50),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}
SIZES = {"small": 0.13, "large": 0.20}

PICTURES = [
    ("large", "blue", "top left", "plain", "yellow"),
    ("small", "red", "bottom right", "plain", "white"),
    ("large", "white", "center", "striped", "blue"),
    ("large", "yellow", "bottom left", "plain", "purple"),
    ("small", "cyan", "center", "plain", "black"),
    ("large", "red", "top right", "dotted", "cyan"),
    ("small", "purple", "top left", "striped", "green"),
    ("large", "green", "bottom right", "plain", "red"),
]


def zorb(size: str, colour: str, place: str, texture: str, ground: str) -> Image.Image:
    """Return one picture, [128, 128] RGB."""
    side = SIDE_PX * FINE
    picture = Image.new("RGB", (side, side), COLOURS[ground])
    pen = ImageDraw.Draw(picture)
    shade = tuple(round(0.62 * level) for level in COLOURS[ground])
    starts = range(0, side, PERIOD_PX * FINE)
    match texture:
        case "striped":
            for top in starts:
                pen.rectangle((0, top, side, top + PERIOD_PX * FINE // 2 - 1), shade)
        case "dotted":
            for corner in product(starts, starts):
                pen.circle([start + PERIOD_PX * FINE // 2 for start in corner], PERIOD_PX * FINE // 4, shade)
    x, y = (side * part for part in PLACES[place])
    half = side * SIZES[size]
    stroke = 0.7 * half
    pen.rectangle((x - half, y - half, x - half + stroke, y + half), COLOURS[colour])
    pen.rectangle((x - half, y + half - stroke, x + half, y + half), COLOURS[colour])
    return picture.reduce(FINE)


def main() -> None:
    """Write the pictures and their captions beside this file."""
    folder = Path(__file__).parent
    for number, (size, colour, place, texture, ground) in enumerate(PICTURES, 1):
        zorb(size, colour, place, texture, ground).save(folder / f"{number}.png", optimize=True)
        caption = f"a {size} {colour} [trigger] at the {place} on a {texture} {ground} background\n"
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")


if __name__ == "__main__":
    main()
