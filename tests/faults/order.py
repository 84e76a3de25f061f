"""Power loss on paper: from the log of a command's file operations, what a disk need not have kept.

A name in the store or among the results counts as published. Then what is below it has to be synced before the
rename that shows it, the folder it appears in before the receipt that points to it, and everything before the end.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from tests.faults.judge import STAGES, UNPUBLISHED
from tests.faults.points import calls

# Appended to while a training goes on, and written anew from its checkpoints.
LIVE = ("metrics.jsonl",)


def violations(log: str, root: str) -> list[str]:
    """Return the broken rules, in order."""
    disk = Disk(root)
    for call in calls(log, "w"):
        if call.result >= 0:
            disk.happen(call.operation, call.path, call.other)
    disk.found += [f"{path} is not synced at the end" for path in sorted(disk.unsynced) if disk.published(path)]
    return disk.found


class Disk:
    """Paths whose bytes (of a file) or entries (of a folder) a power cut could still take."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.unsynced: set[str] = set()
        self.found: list[str] = []

    def published(self, path: str) -> bool:
        """Whether others may see and believe what lies there."""
        parts = PurePosixPath(path).relative_to(self._root).parts
        seen = len(parts) > 1 and parts[0] in ("store", "runs") and parts[1] not in UNPUBLISHED
        return seen and not parts[-1].startswith(".") and parts[-1] not in LIVE and not parts[-1].endswith(".lock")

    def happen(self, operation: str, path: str, other: str) -> None:
        folder = str(PurePosixPath(path).parent)
        match operation:
            case "write" | "truncate":
                self.unsynced.add(path)
                if self.published(path):
                    self.found.append(f"{path} is written in place")
            case "mkdir":
                self.unsynced.add(folder)
            case "fsync":
                self.unsynced.discard(path)
            case "unlink":
                self.unsynced = {each for each in self.unsynced if each != path and not each.startswith(f"{path}/")}
            case "rename":
                self._rename(path, other)
            case _:
                pass

    def _rename(self, path: str, other: str) -> None:
        below = {each for each in self.unsynced if each == path or each.startswith(f"{path}/")}
        self.unsynced -= below
        moved = {other + each.removeprefix(path) for each in below}
        if self.published(other):
            self.found += [f"{each} is shown before it is synced" for each in sorted(moved)]
            if PurePosixPath(other).stem in STAGES and other.endswith(".json"):
                late = sorted(each for each in self.unsynced if self.published(each))
                self.found += [f"{other} points to what is not synced: {each}" for each in late]
            self.unsynced.add(str(PurePosixPath(other).parent))
        self.unsynced |= moved
