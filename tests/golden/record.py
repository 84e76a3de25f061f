"""Record the golden values again: `python tests/golden/record.py [name ...]` in an environment of requirements.txt.

Every module in `recorders/` has `record(out)`, which writes its files below `out`; no name means all of them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent


def main(names: list[str]) -> None:
    """Run the named recorders, or all."""
    sys.path.insert(0, str(GOLDEN.parents[1]))
    recorders = sorted(path.stem for path in (GOLDEN / "recorders").glob("[a-z]*.py"))
    for name in names or recorders:
        importlib.import_module(f"tests.golden.recorders.{name}").record(GOLDEN)


if __name__ == "__main__":
    main(sys.argv[1:])
