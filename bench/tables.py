"""Keeps the tables of the documents equal to the measurements: `python bench/tables.py --write` or `--check`.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; it is made from bench/results/NAME.json.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import harness

ROOT = Path(__file__).resolve().parent.parent
_OPEN = re.compile(r"<!-- bench:([^\s>]+) -->")
_CLOSE = "<!-- /bench -->"


class TableError(ValueError):
    """A document or a record that has to be changed by hand; the message says what."""


def documents(root: Path) -> list[Path]:
    """README.md and docs/*.md."""
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.is_file()]


def filled(text: str, where: str, results: Path) -> str:
    """``text`` with every table made anew. Raises TableError."""
    parts, position = [], 0
    for found in _OPEN.finditer(text):
        name, end = found[1], text.find(_CLOSE, found.end())
        if found.start() < position or end < 0 or _OPEN.search(text, found.end(), end):
            raise TableError(f"{where}: the table {name!r} is not closed: end it with a line {_CLOSE}")
        try:
            table = harness.table(harness.read(name, results))
        except FileNotFoundError:
            have = ", ".join(sorted(path.stem for path in results.glob("*.json"))) or "none"
            raise TableError(f"{where}: there is no bench/results/{name}.json (there are: {have}): run its benchmark") from None
        except (KeyError, ValueError) as problem:
            raise TableError(f"bench/results/{name}.json is no record of the harness ({problem!r}): run its benchmark") from None
        parts += [text[position : found.end()], f"\n{table}\n"]
        position = end
    if text.count(_CLOSE) != len(_OPEN.findall(text)):
        raise TableError(f"{where}: a line {_CLOSE} closes no table: remove it")
    return "".join([*parts, text[position:]])


def run(write: bool, root: Path) -> list[str]:
    """Write the tables, or name the documents whose tables differ from the records. Raises TableError."""
    stale = []
    for path in documents(root):
        text, where = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        new = filled(text, where, root / "bench" / "results")
        if new != text:
            stale.append(where)
            if write:
                path.write_text(new, encoding="utf-8")
    return stale


def main(argv: list[str], root: Path = ROOT) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="replace the tables in README.md and docs/*.md")
    mode.add_argument("--check", action="store_true", help="fail when a table is not the measured one")
    flags = parser.parse_args(argv)
    try:
        stale = run(flags.write, root)
    except TableError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    if stale and flags.check:
        print(f"error: tables differ from bench/results in {', '.join(stale)}: run python bench/tables.py --write", file=sys.stderr)
        return 1
    print(f"{'wrote' if flags.write else 'checked'} {', '.join(stale) or 'the tables: all are the measured ones'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
