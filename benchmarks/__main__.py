"""What there is to measure, and a way to run several of them.

python -m benchmarks                  list them
python -m benchmarks NAME NAME...     run these, one after another, with their defaults
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Every script with the first sentence of what it says of itself."""
    found = {}
    for path in sorted(HERE.glob("[!_]*.py")):
        page = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if f"benchmarks/{path.stem}.py" in page or f"benchmarks.{path.stem}" in page:  # says how it is run
            found[path.stem] = page.splitlines()[0]
    return found


def main() -> int:
    known = benchmarks()
    names = sys.argv[1:]
    if unknown := [name for name in names if name not in known]:
        print(f"There is no benchmark {', '.join(unknown)}. Known: {', '.join(known)}.", file=sys.stderr)
        return 2
    if not names:
        for name, line in known.items():
            print(f"{name:14} {line}")
        return 0
    failed = 0
    for name in names:
        print(f"\n=== {name}: {known[name]}\n", flush=True)
        failed |= subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=HERE.parent, check=False).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
