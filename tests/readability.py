"""A mirror, not a gate: how long, how wide and how wordy each notebook is, beside what we aim at.

    python tests/readability.py            # the whole table
    python tests/readability.py 06 ui/     # notebooks whose path contains one of these
"""

import json
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
AIMS = {"median": 15, "p90": 35, "longest": 60, "widest": 110, "words": 25, "pictures": 1}
BEFORE = (8_217, 509_559)  # lines and characters of the package at 6165408
HEADINGS = ("cells", "exported", "median", "p90", "longest", "widest", "words", "pictures")


def lines_of(cell: dict) -> list[str]:
    "Lines of a code cell, without directives and blank ends."
    lines = "".join(cell["source"]).strip().splitlines()
    return [line for line in lines if not line.startswith("#|")]


def is_exported(cell: dict) -> bool:
    "Whether a code cell goes into the package and holds more than imports."
    source = "".join(cell["source"])
    body = [line for line in lines_of(cell) if line and not line.startswith((" ", ")", "from ", "import "))]
    return source.startswith("#| export") and bool(body)


def pictures_in(cell: dict) -> int:
    "How many of a cell's outputs are images."
    datas = [output.get("data", {}) for output in cell.get("outputs", [])]
    return sum(any(kind.startswith("image/") for kind in data) or "<svg" in "".join(data.get("text/html", "")) for data in datas)


def p90(values: list[int]) -> int:
    "The value that nine in ten do not exceed."
    return sorted(values)[int(0.9 * (len(values) - 1) + 0.5)] if values else 0


def measure(cells: list[dict]) -> dict[str, float]:
    "The measures of some cells."
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    prose = [len("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown"]
    sizes = [len(lines_of(cell)) for cell in code if is_exported(cell)]
    widths = [len(line) for cell in code for line in "".join(cell["source"]).splitlines()]
    values = (len(cells), len(sizes), median(sizes or [0]), p90(sizes), max(sizes, default=0),
              max(widths, default=0), median(prose or [0]), sum(map(pictures_in, code)))
    return dict(zip(HEADINGS, values))


def show(name: str, measured: dict[str, float]) -> None:
    "One line of the table; what misses its aim carries a star."
    cells = []
    for heading, value in measured.items():
        aim = AIMS.get(heading)
        missed = aim is not None and (value < aim if heading == "pictures" else value > aim)
        cells.append(f"{value:g}{'*' if missed else ' '}".rjust(9))
    print(f"{name:32}" + "".join(cells))


def package_size() -> tuple[int, int]:
    "Lines and characters of the package, without blank lines and the index of nbdev."
    files = [path for path in (ROOT / "evoprune_nb").rglob("*.py") if path.name != "_modidx.py"]
    lines = [line for path in files for line in path.read_text().splitlines() if line.strip()]
    return len(lines), sum(map(len, lines))


if __name__ == "__main__":
    paths = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    names = {path.relative_to(ROOT / "nbs").with_suffix("").as_posix(): path for path in paths}
    chosen = {name: path for name, path in names.items() if not sys.argv[1:] or any(part in name for part in sys.argv[1:])}
    print(f"{'notebook':32}" + "".join(f"{heading:>8} " for heading in HEADINGS))
    cells = {name: json.loads(path.read_text())["cells"] for name, path in chosen.items()}
    for name in cells:
        show(name, measure(cells[name]))
    show("all", measure([cell for part in cells.values() for cell in part]))
    print(f"{'aim':32}" + " " * 18 + "".join(f"{AIMS[heading]:>8} " for heading in HEADINGS[2:]))
    n_lines, n_characters = package_size()
    print(f"\nevoprune_nb: {n_lines:,} lines, {n_characters:,} characters (before the redesign: {BEFORE[0]:,}, {BEFORE[1]:,})")
