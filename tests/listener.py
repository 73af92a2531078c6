"""A `Progress` that keeps what it is told, and what damage to a file looks like."""

from __future__ import annotations

from pathlib import Path

from amoeba_export.ir import SILENT


class Listener:
    """Notes and warnings, in order; and the warnings alone."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.note = self.notes.append
        self.track = SILENT.track

    def warn(self, message: str) -> None:
        """See `Progress`."""
        self.notes.append(message)
        self.warnings.append(message)

    def told_of_damage(self) -> list[str]:
        """The notes about damaged files; they are forgotten."""
        found = [note for note in self.notes if "damaged" in note]
        self.notes.clear()
        return found


def flip_bit(path: Path, position: int = -3) -> None:
    """Change one bit of a file, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
