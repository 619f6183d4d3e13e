"""What is known of every file while a data set is made: one SQLite file in the work folder, so that memory stays flat.

``files`` has a row for each file of the source: ``ident`` is its place in the listing (the same on every instance). A row
whose ``kind`` is NULL and whose ``sha256`` is set is a picture that is kept. ``plan`` says into which shard each of those goes.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from classifier import layout
from classifier.errors import DataError
from classifier.pictures import Found, Member, Task, shard_bytes
from classifier.sources import Entry

FETCH = 1000
CACHE_KIB = 8192

_TABLES = """
CREATE TABLE files (
    ident INTEGER PRIMARY KEY, name TEXT, bytes INTEGER, locator TEXT, split TEXT, folder TEXT, host INTEGER,
    kind TEXT, reason TEXT, same_as INTEGER,
    sha256 TEXT, extension TEXT, width INTEGER, height INTEGER, size INTEGER, spool TEXT, start INTEGER, dhash BLOB, phash BLOB);
CREATE TABLE folders (name TEXT);
CREATE TABLE near (one INTEGER, other INTEGER, distance INTEGER, PRIMARY KEY (one, other)) WITHOUT ROWID;
CREATE TABLE plan (position INTEGER PRIMARY KEY, ident INTEGER, shard TEXT, class_index INTEGER);
"""
_KEPT = "kind IS NULL AND sha256 IS NOT NULL"
_ORDER = "CASE split WHEN 'train' THEN 0 WHEN 'valid' THEN 1 ELSE 2 END"
"""SQL that sorts splits as ``layout.SPLITS`` does."""
_MEMBER = "printf('%05d/%s.%s', class_index, substr(sha256, 1, 40), extension)"

QUARANTINED, COPY, LEAK, NEAR_LEAK = "quarantined", "copy", "leak", "near-leak"
"""Why a file is left out: unusable; the same picture again in its split, or in another; a look-alike of a held-out picture."""


class Shard(NamedTuple):
    """One archive of the plan; ``host`` holds its pictures, ``bytes`` is the size that its file must have."""

    name: str
    split: str
    pictures: int
    bytes: int
    host: int


class Catalogue:
    """The table of files, and the decisions that are made on all of them at once."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        # The file lives no longer than the job: nothing has to survive a crash.
        self._db.executescript(f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-{CACHE_KIB}; {_TABLES}")

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> Iterator[Any]:
        """Rows, a batch at a time."""
        cursor = self._db.execute(sql, values)
        while batch := cursor.fetchmany(FETCH):
            yield from batch

    def _one(self, sql: str, values: Sequence[Any] = ()) -> Any:
        return self._db.execute(sql, values).fetchone()[0]

    def _function(self, name: str, arguments: int, function: Callable[..., Any]) -> None:
        self._db.create_function(name, arguments, function, deterministic=True)

    # --- the listing -------------------------------------------------------------------------------------------------------

    def fill(self, entries: Iterable[Entry], seed: int, hosts: int = 1) -> tuple[str, list[str]]:
        """List the source and give every file a split, a class and a host.

        Returns ``("given"|"seeded", notes)``. Files outside class folders are quarantined. Missing splits are drawn from
        train, stratified by class, with ``seed``. Raises DataError when there is nothing to train on.
        """
        survey = layout.Survey()
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO files (ident, name, bytes, locator) VALUES (?, ?, ?, ?)", self._seen(entries, survey))
        self._db.execute("COMMIT")
        self._refuse_doubles()
        scheme = survey.scheme()

        def part(name: str, index: int) -> str | None:
            found = scheme.place(name)
            return (found.split, found.folder)[index] if found else None

        self._function("place", 2, part)
        self._function("host_of", 1, lambda name: zlib.crc32(name.encode()) % hosts)
        self._db.execute("UPDATE files SET split = place(name, 0), folder = place(name, 1), host = host_of(name)")
        self._db.execute("UPDATE files SET kind = ?, reason = 'not in a class folder' WHERE split IS NULL", (QUARANTINED,))
        splits = {row[0] for row in self._rows("SELECT DISTINCT split FROM files WHERE split IS NOT NULL")}
        layout.check_classes(self.folders(), splits)
        return self._draw(layout.missing_splits(splits), seed)

    def _refuse_doubles(self) -> None:
        """Raises DataError for a name that comes twice: tools do not agree on which of the two is meant."""
        double = self._db.execute("SELECT name FROM files GROUP BY name HAVING COUNT(*) > 1 LIMIT 1").fetchone()
        if double:
            raise DataError(f"the archive holds {double[0]!r} twice: make it again from inside the folder of pictures")

    def _seen(self, entries: Iterable[Entry], survey: layout.Survey) -> Iterator[tuple[int, str, int, str]]:
        for ident, entry in enumerate(entries):
            if layout.is_hidden(entry.name.rstrip("/")):
                continue
            if entry.name.endswith("/"):
                self._db.execute("INSERT INTO folders VALUES (?)", (entry.name,))
            else:
                survey.add(entry.name)
                yield ident, entry.name, entry.size, entry.locator

    def _draw(self, missing: Sequence[str], seed: int) -> tuple[str, list[str]]:
        if not missing:
            return "given", []
        self._function("lot", 1, lambda name: layout.lot(seed, name))
        self._function("drawn", 2, lambda rank, count: layout.drawn_split(rank, count, missing))
        self._db.execute(
            """UPDATE files SET split = drawn(ranked.rank, ranked.count) FROM (
                 SELECT ident, COUNT(*) OVER (PARTITION BY folder) AS count,
                        ROW_NUMBER() OVER (PARTITION BY folder ORDER BY lot(name), name) - 1 AS rank
                 FROM files WHERE split = 'train') AS ranked
               WHERE ranked.ident = files.ident"""
        )
        note = f"no {' and no '.join(missing)} folder: drawn from train, stratified by class, seed {seed}"
        return "seeded", [note]

    def folders(self) -> list[str]:
        """All class folders, those without files too, sorted."""
        named = self._rows("SELECT DISTINCT place(name, 1) FROM folders WHERE place(name, 1) IS NOT NULL")
        used = self._rows("SELECT DISTINCT folder FROM files WHERE folder IS NOT NULL")
        return sorted({row[0] for row in named} | {row[0] for row in used})

    def places(self) -> dict[str, tuple[str, str]]:
        """``(split, class)`` by name: for small sources, since it holds them all."""
        rows = self._rows("SELECT name, split, folder FROM files WHERE split IS NOT NULL")
        return {name: (split, folder) for name, split, folder in rows}

    def tasks(self, host: int) -> Iterator[Task]:
        """This host's files, in the order of the listing."""
        where = "split IS NOT NULL AND host = ? AND ident > ?"
        sql = f"SELECT ident, name, bytes, locator FROM files WHERE {where} ORDER BY ident LIMIT ?"  # noqa: S608
        last = -1
        # Page by page: rows are written between two pages, never under an open cursor.
        while page := self._db.execute(sql, (host, last, FETCH)).fetchall():
            last = page[-1][0]
            yield from (Task(*row) for row in page)

    def count_tasks(self, host: int) -> int:
        """How many files ``tasks`` gives."""
        return int(self._one("SELECT COUNT(*) FROM files WHERE split IS NOT NULL AND host = ?", (host,)))

    def listing_hash(self) -> str:
        """Names and sizes of all files: instances that do not agree on it read different sources."""
        digest = hashlib.sha256()
        for ident, name, size in self._rows("SELECT ident, name, bytes FROM files ORDER BY ident"):
            digest.update(f"{ident}\0{name}\0{size}\n".encode())
        return digest.hexdigest()

    # --- what the workers found --------------------------------------------------------------------------------------------

    def add(self, found: Iterable[Found]) -> None:
        """Write down what became of files."""
        rows = [(QUARANTINED if one.reason else None, *one[1:], one.ident) for one in found]
        names = ("kind", "reason", *Found._fields[2:])
        self._db.execute("BEGIN")
        self._db.executemany(f"UPDATE files SET {', '.join(f'{name} = ?' for name in names)} WHERE ident = ?", rows)  # noqa: S608
        self._db.execute("COMMIT")

    def found(self, host: int) -> Iterator[Found]:
        """What ``add`` was told of one host's files."""
        columns = ", ".join(Found._fields)
        sql = f"SELECT {columns} FROM files WHERE split IS NOT NULL AND host = ? ORDER BY ident"  # noqa: S608
        return (Found(*row) for row in self._rows(sql, (host,)))

    # --- decisions ---------------------------------------------------------------------------------------------------------

    def drop_copies(self) -> None:
        """Keep one of each picture: test before valid before train. Copies that disagree on the class all go."""
        self._db.executescript(
            f"""
            CREATE INDEX files_sha256 ON files (sha256) WHERE sha256 IS NOT NULL;
            CREATE TEMP TABLE torn AS
              SELECT sha256, MIN(folder) || ', ' || MAX(folder) || iif(COUNT(DISTINCT folder) > 2, ', …', '') AS list
              FROM files WHERE {_KEPT} GROUP BY sha256 HAVING COUNT(DISTINCT folder) > 1;
            UPDATE files SET kind = '{QUARANTINED}', reason = 'the same picture is in several classes (' || torn.list || ')'
              FROM torn WHERE torn.sha256 = files.sha256;
            CREATE TEMP TABLE ranked AS
              SELECT ident, split, ROW_NUMBER() OVER w AS rank,
                FIRST_VALUE(ident) OVER w AS first, FIRST_VALUE(split) OVER w AS best
              FROM files WHERE {_KEPT} WINDOW w AS (PARTITION BY sha256 ORDER BY {_ORDER} DESC, name, ident);
            UPDATE files SET same_as = ranked.first, kind = CASE WHEN ranked.split = best THEN '{COPY}' ELSE '{LEAK}' END
              FROM ranked WHERE ranked.ident = files.ident AND ranked.rank > 1;
            DROP TABLE torn; DROP TABLE ranked;
            """  # noqa: S608 - our own words, no input
        )

    def hashes(self) -> Iterator[tuple[int, bytes, bytes]]:
        """``(ident, difference hash, perceptual hash)`` of the kept pictures that can be recognised."""
        return self._rows(f"SELECT ident, dhash, phash FROM files WHERE {_KEPT} AND dhash IS NOT NULL ORDER BY name, ident")  # noqa: S608

    def add_near(self, pairs: Iterable[tuple[int, int, int]]) -> None:
        """Write down look-alikes: ``(ident, ident, bits that differ)``."""
        self._db.execute("BEGIN")
        self._db.executemany("INSERT OR IGNORE INTO near VALUES (?, ?, ?)", pairs)
        self._db.execute("COMMIT")

    def drop_near_leaks(self) -> None:
        """A look-alike of a held-out picture leaves: valid for test's sake, then train for that of what is still held out."""
        for split, held in (("valid", "('test')"), ("train", "('valid', 'test')")):
            self._db.execute(
                f"""WITH both AS (
                     SELECT one AS ident, other AS held, distance FROM near UNION ALL SELECT other, one, distance FROM near),
                   lost AS (SELECT files.ident AS ident, both.held AS held,
                       ROW_NUMBER() OVER (PARTITION BY files.ident ORDER BY both.distance, kept.name, kept.ident) AS rank
                     FROM both JOIN files ON files.ident = both.ident JOIN files AS kept ON kept.ident = both.held
                     WHERE files.split = ? AND files.kind IS NULL AND kept.kind IS NULL AND kept.split IN {held})
                   UPDATE files SET kind = ?, same_as = lost.held FROM lost WHERE lost.ident = files.ident AND lost.rank = 1""",  # noqa: S608
                (split, NEAR_LEAK),
            )

    # --- answers -----------------------------------------------------------------------------------------------------------

    def classes(self) -> list[str]:
        """Folders of the pictures that are kept, sorted."""
        return [row[0] for row in self._rows(f"SELECT DISTINCT folder FROM files WHERE {_KEPT} ORDER BY folder")]  # noqa: S608

    def balance(self) -> dict[str, dict[str, int]]:
        """Kept pictures by split and class folder."""
        counts: dict[str, dict[str, int]] = {split: {} for split in layout.SPLITS}
        for split, folder, count in self._rows(f"SELECT split, folder, COUNT(*) FROM files WHERE {_KEPT} GROUP BY 1, 2"):  # noqa: S608
            counts[split][folder] = count
        return counts

    def kinds(self) -> dict[str, int]:
        """How many files were left out, by kind."""
        return dict(self._rows("SELECT kind, COUNT(*) FROM files WHERE kind IS NOT NULL GROUP BY kind"))

    def reasons(self, folder: str | None = None) -> list[tuple[str, int]]:
        """Why files were quarantined, without the details in brackets, and how often; the most frequent first."""
        brief = "CASE WHEN instr(reason, ' (') THEN substr(reason, 1, instr(reason, ' (') - 1) ELSE reason END"
        where = "kind = ? AND (? IS NULL OR folder = ?)"
        sql = f"SELECT {brief}, COUNT(*) FROM files WHERE {where} GROUP BY 1 ORDER BY 2 DESC, 1"  # noqa: S608
        return list(self._rows(sql, (QUARANTINED, folder, folder)))

    def refused_by_class(self) -> dict[str, dict[str, int]]:
        """Files that were left out, by class folder and kind."""
        counts: dict[str, dict[str, int]] = {}
        sql = "SELECT folder, kind, COUNT(*) FROM files WHERE kind IS NOT NULL AND folder IS NOT NULL GROUP BY 1, 2"
        for folder, kind, count in self._rows(sql):
            counts.setdefault(folder, {})[kind] = count
        return counts

    def refused(self, kinds: Sequence[str], limit: int = -1) -> Iterator[dict[str, Any]]:
        """Files that were left out, by name: ``file, kind, split`` and ``reason`` or ``same_as``."""
        marks = ", ".join("?" * len(kinds))
        sql = (
            "SELECT files.name, files.kind, files.split, files.reason, other.name FROM files "  # noqa: S608
            f"LEFT JOIN files AS other ON other.ident = files.same_as WHERE files.kind IN ({marks}) "
            "ORDER BY files.name, files.ident LIMIT ?"
        )
        for name, kind, split, reason, other in self._rows(sql, (*kinds, limit)):
            entry = {"file": name, "kind": kind, "split": split, "reason": reason, "same_as": other}
            yield {key: value for key, value in entry.items() if value is not None}

    def refused_pictures(self, host: int, limit: int) -> list[tuple[str, str, int, int]]:
        """``(name, spool, start, size)`` of the first files that were left out though they are pictures, on one host."""
        chosen = "kind IS NOT NULL AND size > 0 AND host = ? ORDER BY name, ident LIMIT ?"
        return list(self._rows(f"SELECT name, spool, start, size FROM files WHERE {chosen}", (host, limit)))  # noqa: S608

    def near_duplicates(self, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """Look-alikes that are both kept, which means in one split: their number, and the first of them."""
        pairs = (
            "FROM near JOIN files AS a ON a.ident = near.one JOIN files AS b ON b.ident = near.other "
            "WHERE a.kind IS NULL AND b.kind IS NULL AND a.split = b.split"
        )
        rows = self._rows(f"SELECT a.name, b.name, a.split, distance {pairs} ORDER BY distance, a.name, b.name LIMIT ?", (limit,))
        listed = [
            {"file": one, "looks_like": other, "kind": "near-duplicate", "split": split, "distance": distance}
            for one, other, split, distance in rows
        ]
        return int(self._one(f"SELECT COUNT(*) {pairs}")), listed

    def short_sides(self) -> dict[str, int]:
        """Smallest, median and largest short side of the kept pictures, in pixels."""
        count = int(self._one(f"SELECT COUNT(*) FROM files WHERE {_KEPT}"))  # noqa: S608
        sql = f"SELECT min(width, height) FROM files WHERE {_KEPT} ORDER BY 1 LIMIT 1 OFFSET ?"  # noqa: S608
        return {name: int(self._one(sql, (at,))) for name, at in (("smallest", 0), ("median", count // 2), ("largest", count - 1))}

    # --- the plan ----------------------------------------------------------------------------------------------------------

    def pictures(self) -> Iterator[tuple[str, str, str]]:
        """``(split, folder, sha256)`` of the kept pictures, sorted so."""
        return self._rows(f"SELECT split, folder, sha256 FROM files WHERE {_KEPT} ORDER BY {_ORDER}, folder, sha256")  # noqa: S608

    def plan(self, classes: Sequence[str], limit: int) -> list[Shard]:
        """Put each kept picture into a shard ``<split>-NNNNN.tar`` of at most ``limit`` bytes of pictures.

        A shard holds the pictures of one host. Within a host they are sorted by hash, which spreads the classes over the
        shards: a reader that shuffles within shards sees all of them.
        """
        index = {name: number for number, name in enumerate(classes)}
        shards: list[Shard] = []
        rows = self._rows(f"SELECT split, host, size, ident, folder FROM files WHERE {_KEPT} ORDER BY {_ORDER}, host, sha256")  # noqa: S608

        def placed() -> Iterator[tuple[int, str, int]]:
            numbers = dict.fromkeys(layout.SPLITS, 0)
            for (split, host), group in itertools.groupby(rows, key=lambda row: (row[0], row[1])):
                for part in _filled(group, limit):
                    name = f"{split}-{numbers[split]:05d}.tar"
                    numbers[split] += 1
                    shards.append(Shard(name, split, len(part), shard_bytes([row[2] for row in part]), host))
                    yield from ((row[3], name, index[row[4]]) for row in part)

        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO plan (ident, shard, class_index) VALUES (?, ?, ?)", placed())
        self._db.execute("COMMIT")
        self._db.execute("CREATE INDEX plan_shard ON plan (shard, position)")
        return shards

    def members(self, shard: str) -> list[Member]:
        """What goes into one shard, in order."""
        columns = f"{_MEMBER}, spool, start, size"
        sql = f"SELECT {columns} FROM plan JOIN files USING (ident) WHERE shard = ? ORDER BY position"  # noqa: S608
        return [Member(*row) for row in self._rows(sql, (shard,))]

    def manifest(self) -> Iterator[tuple[Any, ...]]:
        """``MANIFEST`` columns of every stored picture, in the order of the shards."""
        columns = f"name, split, folder, sha256, width, height, size, shard, {_MEMBER}, class_index"
        return self._rows(f"SELECT {columns} FROM plan JOIN files USING (ident) ORDER BY position")  # noqa: S608


def _filled(rows: Iterable[Any], limit: int) -> Iterator[list[Any]]:
    """Rows in lists of at most ``limit`` bytes (their third column), or of one row."""
    part: list[Any] = []
    total = 0
    for row in rows:
        if part and total + row[2] > limit:
            yield part
            part, total = [], 0
        part.append(row)
        total += row[2]
    if part:
        yield part


MANIFEST = ("name", "split", "folder", "sha256", "width", "height", "size", "shard", "member", "class_index")
