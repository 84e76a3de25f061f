"""The bars: how well the built-in model follows words, and how well a LoRA learns a new one.

Judged by `stages.world.judge` from pixels alone. `make learn` prints what each came to.
"""

from __future__ import annotations

# Shares of pictures.
ALL, PART = 0.90, 0.95
NEW, KEPT_ALL, KEPT_COLOUR = 0.90, 0.85, 0.95

BARS = {
    "L1": f"captions followed: all-correct >= {ALL} of held-out prompts; colour, position, background >= {PART}",
    "L2": f"the demo's LoRA: new thing >= {NEW} of seeds; base all-correct >= {KEPT_ALL}, colour >= {KEPT_COLOUR}",
    "L3": "mean training loss and final validation loss lie in their bands, whatever the seed",
    "L4": "L2 holds with EMA, DoRA, 8 and 4 bits, caption dropout, guidance 2 and 5, two resolutions, for a style",
    "L5": "each break of what draws misses L1",
    "L6": "each break of what trains misses L2 or L3",
    "L7": "what pictures cannot show: each break fails a comparison with recorded activations or noise levels",
}
