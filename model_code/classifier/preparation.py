"""Pictures in, a checked and content-addressed data set out.

1. The source is listed into a catalogue (SQLite) and every file gets its split, class and instance.
2. Worker processes read, check, resize and hash the files, once; stored bytes stay in their spools, facts go to the catalogue.
3. Copies, leaks and look-alikes are decided on the whole catalogue, the same on every instance.
4. Worker processes write the shards; the first instance describes them.

Memory does not grow with the number of pictures, but for some 100 bytes each while look-alikes are searched.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from classifier import catalogue, layout, lookalikes, pictures, sources, storage
from classifier.catalogue import Catalogue, Shard
from classifier.errors import ConfigError, DataError, one_line
from classifier.exchange import Hosts
from classifier.pictures import Found, Task, Worker
from classifier.workforce import CHUNK, CHUNK_BYTES, Rate, Workforce

SHARD_BYTES = 64 * 2**20
LISTED = 200
"""How many refused or duplicate files report.json names; all are counted, and refused.jsonl names all."""
SHOWN = 24
"""How many refused pictures have a thumbnail in the report. Most refused files cannot be decoded and have none."""
ROW_GROUP = 10_000
NEAR_DISTANCE = 12
"""Bits of 256. Measured on 300 dogs: 99 of 100 pictures stay within 12 when saved at half the size, at JPEG quality 50, or both,
on both hashes; among 1,200 different dogs the two closest are 71 apart, and of 1,797 digits no two agree on both hashes."""
DECIDED_BY = (
    "preparation.py",
    "catalogue.py",
    "layout.py",
    "lookalikes.py",
    "pictures.py",
    "serving.py",
    "sources.py",
)
"""Modules that decide what a data set holds: when one changes, sources are prepared again."""


@dataclass(frozen=True)
class PrepareFlags:
    """Flags of prepare.py."""

    source: str
    dataset_root: str
    result: str
    dataset: str
    picture_size: int = 256
    """Short side in pixels after the one resize; smaller pictures are left alone."""
    seed: int = 0
    min_pictures_per_class: int = 2
    max_quarantined_share: float = 0.2
    allowed_hosts: str = ""
    near_duplicate_distance: int = NEAR_DISTANCE
    """Bits, of 256, by which two perceptual hashes of look-alikes may differ; 0 does not look for them."""
    exchange_uri: str = ""
    """Folder (``s3://`` or ``file://``) of this job alone, in which its instances meet; needed for more than one."""
    exchange_wait_s: int = 3600
    """How long an instance waits for the others after it has done its own share."""

    def check(self) -> None:
        """Raises ConfigError."""
        if not 16 <= self.picture_size <= 4096:
            raise ConfigError(f"picture_size={self.picture_size} is outside 16 to 4096: choose a short side in pixels")
        if not 0 <= self.max_quarantined_share <= 1:
            raise ConfigError(f"max_quarantined_share={self.max_quarantined_share} is outside 0 to 1: choose a share")
        if self.min_pictures_per_class < 1:
            raise ConfigError(f"min_pictures_per_class={self.min_pictures_per_class} is below 1: choose 1 or more")
        if not 0 <= self.near_duplicate_distance <= 16:
            # Beyond, bands get so short that in a large set every picture shares some with hundreds.
            raise ConfigError(
                f"near_duplicate_distance={self.near_duplicate_distance} is outside 0 to 16 bits: "
                f"choose 0 (off) or about {NEAR_DISTANCE}"
            )
        if self.exchange_wait_s < 1:
            raise ConfigError(f"exchange_wait_s={self.exchange_wait_s} is below 1: choose a time in seconds")

    def hosts(self) -> list[str]:
        """The allow-list in lower case."""
        return [host.strip().lower() for host in self.allowed_hosts.split(",") if host.strip()]


# --- reading ---------------------------------------------------------------------------------------------------------------


def _tasks(source: sources.Source, table: Catalogue, host: int) -> Iterator[Task]:
    """This host's files; with their bytes where only this process can read them."""
    if source.reader() is not None:
        yield from table.tasks(host)
        return
    contents = enumerate(source.contents())
    for task in table.tasks(host):
        for ident, data in contents:
            if ident == task.ident:
                yield task._replace(data=data)
                break


def _chunks(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    chunk: list[Task] = []
    for task in tasks:
        if chunk and (len(chunk) >= CHUNK or sum(one.size for one in chunk) + task.size > CHUNK_BYTES):
            yield chunk
            chunk = []
        chunk.append(task)
    if chunk:
        yield chunk


class _NoReader:
    """Stands where every task brings its bytes along."""

    slow = False

    def read(self, name: str, size: int, locator: str) -> bytes:
        raise NotImplementedError


def look(source: sources.Source, table: Catalogue, flags: PrepareFlags, host: int, work: Path, workforce: Workforce) -> None:
    """Read and check this host's files once; what becomes of them is in ``table``, the pictures are in spools in ``work``."""
    worker = Worker(source.reader() or _NoReader(), flags.picture_size, flags.near_duplicate_distance > 0, str(work))
    rate = Rate(table.count_tasks(host))
    for found in workforce.run((worker.process, (chunk,)) for chunk in _chunks(_tasks(source, table, host))):
        table.add(found)
        rate.add(len(found))


# --- sharing ---------------------------------------------------------------------------------------------------------------

_PART = "records.parquet"
_LISTING = b"listing"
_OPTIONAL = ("reason", "dhash", "phash")
"""Fields of Found that may be None; Parquet holds them as empty."""


def _part_schema(listing: str) -> Any:
    import pyarrow as pa

    kinds = {"ident": pa.int64(), "width": pa.int32(), "height": pa.int32(), "size": pa.int64(), "start": pa.int64()}
    kinds |= {"dhash": pa.binary(), "phash": pa.binary()}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in Found._fields], metadata={_LISTING: listing})


def _write_rows(path: Path, schema: Any, rows: Iterable[Sequence[Any]]) -> None:
    """Rows to Parquet, a row group at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema) as writer:
        batch: list[Sequence[Any]] = []

        def flush() -> None:
            columns = zip(zip(*batch, strict=True), schema.types, strict=True)
            writer.write_batch(pa.RecordBatch.from_arrays([_column(values, kind) for values, kind in columns], schema=schema))
            batch.clear()

        for row in rows:
            batch.append(row)
            if len(batch) >= ROW_GROUP:
                flush()
        if batch:
            flush()


def _column(values: Sequence[Any], kind: Any) -> Any:
    """Numbers, texts or bytes as an Arrow column; None becomes 0 or empty.

    ``pyarrow.array`` would do, but it imports pandas where that is installed: more than a second in which one processor works.
    """
    import pyarrow as pa

    if pa.types.is_integer(kind):
        numbers = np.array([value or 0 for value in values], dtype=str(kind))
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(numbers.tobytes())])
    parts = [value.encode() if isinstance(value, str) else value or b"" for value in values]
    ends = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int32)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(parts))])


def share(table: Catalogue, hosts: Hosts, work: Path) -> None:
    """Tell the other instances what this one found, and learn what they did. Raises DataError for one that is missing."""
    if len(hosts.names) == 1:
        return
    import pyarrow.parquet as pq

    listing = table.listing_hash()
    _write_rows(work / _PART, _part_schema(listing), table.found(hosts.mine))
    hosts.tell(_PART, work / _PART)

    def use(host: str, path: Path) -> None:
        with pq.ParquetFile(path) as part:
            if part.schema_arrow.metadata[_LISTING].decode() != listing:
                raise DataError(f"instance {host} found other files than this one: the source changed meanwhile, start again")
            for batch in part.iter_batches(ROW_GROUP):
                rows = batch.to_pylist()
                table.add(Found(**{**row, **{name: row[name] or None for name in _OPTIONAL}}) for row in rows)

    hosts.collect(_PART, work, use)


# --- deciding --------------------------------------------------------------------------------------------------------------


def decide(table: Catalogue, flags: PrepareFlags) -> None:
    """Which pictures are kept. Raises DataError when too little is left to train on."""
    table.drop_copies()
    if flags.near_duplicate_distance:
        table.add_near(lookalikes.near_pairs(table.hashes(), flags.near_duplicate_distance))
        table.drop_near_leaks()
    check(table, flags)


def check(table: Catalogue, flags: PrepareFlags) -> None:
    """Raises DataError when too little is left to train on."""
    balance = table.balance()
    usable = sum(sum(counts.values()) for counts in balance.values())
    bad = table.kinds().get(catalogue.QUARANTINED, 0)
    if usable == 0:
        first = next(table.refused([catalogue.QUARANTINED], 1), {"file": "-", "reason": "-"})
        raise DataError(f"no usable picture among {bad} files (first: {first['file']}: {first['reason']}): check the source")
    _check_classes(table, balance, flags)
    if bad > flags.max_quarantined_share * (usable + bad):
        reason, count = table.reasons()[0]
        raise DataError(
            f"{bad} of {usable + bad} files were quarantined, more than max_quarantined_share={flags.max_quarantined_share:g} "
            f"(most often, {count} times: {reason}): clean the source or raise the limit"
        )
    for split in ("valid", "test"):
        if not balance[split]:
            raise DataError(f"no {split} pictures are left: add some, or leave the split folders out and they are drawn")


def _check_classes(table: Catalogue, balance: dict[str, dict[str, int]], flags: PrepareFlags) -> None:
    folders, train = table.folders(), balance["train"]
    empty = [folder for folder in folders if not train.get(folder)]
    if empty:
        raise DataError(
            f"{'class' if len(empty) == 1 else f'{len(empty)} classes, among them'} {empty[0]!r} "
            f"{'has' if len(empty) == 1 else 'have'} no usable training picture ({_why_empty(table, balance, empty[0])}): "
            "add pictures or remove the folder"
        )
    small = [folder for folder in folders if train[folder] < flags.min_pictures_per_class]
    if small:
        raise DataError(
            f"{len(small)} classes have fewer than {flags.min_pictures_per_class} training pictures "
            f"({', '.join(f'{name!r}: {train[name]}' for name in small[:5])}): add pictures or remove the folders"
        )


def _why_empty(table: Catalogue, balance: dict[str, dict[str, int]], folder: str) -> str:
    """What is there instead of training pictures."""
    found = [f"{count} {kind}" for kind, count in table.refused_by_class().get(folder, {}).items()]
    found += [f"{balance[split][folder]} in {split}" for split in ("valid", "test") if balance[split].get(folder)]
    reasons = table.reasons(folder)
    return (", ".join(found) or "its folder is empty") + (f", most often: {reasons[0][0]}" if reasons else "")


def dataset_hash(rows: Iterable[tuple[str, str, str]], picture_size: int) -> str:
    """16 hex digits that depend on the stored pictures, their classes and splits, and nothing else.

    ``rows``: ``(split, folder, sha256)``, sorted.
    """
    digest = hashlib.sha256(f"v2 {picture_size}\n".encode())
    for split, folder, sha256 in rows:
        digest.update(f"{split}\0{folder}\0{sha256}\n".encode())
    return digest.hexdigest()[:16]


# --- writing ---------------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    """Readable, sorted, with a final newline; never half a file."""
    _write(path, lambda partial: partial.write_text(_json(value), encoding="utf-8"))


def _json(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    partial.replace(path)


def write_manifest(table: Catalogue, path: Path) -> None:
    """manifest.parquet: one row per stored picture, in row groups."""
    import pyarrow as pa

    kinds = {name: pa.int32() for name in ("width", "height", "class_index")} | {"size": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in catalogue.MANIFEST])
    _write(path, lambda partial: _write_rows(partial, schema, table.manifest()))


def write_refused(table: Catalogue, path: Path) -> None:
    """refused.jsonl: every file that was left out, one JSON object a line."""

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            for entry in table.refused([catalogue.QUARANTINED, catalogue.COPY, catalogue.LEAK, catalogue.NEAR_LEAK]):
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    _write(path, write)


def write_thumbnails(table: Catalogue, host: int, work: Path, folder: Path) -> None:
    """``refused/<n>.jpg`` of pictures that this host read and that were left out; ``refused/thumbnails.json``: file → picture."""
    names = {}
    for number, (name, spool, start, size) in enumerate(table.refused_pictures(host, SHOWN)):
        with (work / spool).open("rb") as file:
            file.seek(start)
            pictures.write_thumbnail(file.read(size), folder / f"refused/{number}.jpg")
        names[name] = f"refused/{number}.jpg"
    write_json(folder / "refused" / "thumbnails.json", names)


def write_shards(table: Catalogue, shards: Iterable[Shard], folder: Path, work: Path, workforce: Workforce) -> None:
    """The shards whose pictures are in the spools in ``work``."""
    folder.mkdir(parents=True, exist_ok=True)
    calls = ((pictures.write_shard, (folder / shard.name, work, table.members(shard.name))) for shard in shards)
    for _ in workforce.run(calls):
        pass


def build_report(table: Catalogue, flags: PrepareFlags, classes: Sequence[str], split: str, notes: list[str]) -> dict[str, Any]:
    """report.json: what was found, counted in full and named up to LISTED."""
    balance, kinds = table.balance(), table.kinds()
    train = [balance["train"].get(name, 0) for name in classes]
    near, near_listed = table.near_duplicates(LISTED)
    removed = (catalogue.COPY, catalogue.LEAK, catalogue.NEAR_LEAK)
    searched = flags.near_duplicate_distance > 0
    return {
        "source": flags.source,
        "split": split,
        "notes": notes,
        "classes": [{"folder": name, **{part: balance[part].get(name, 0) for part in layout.SPLITS}} for name in classes],
        "imbalance_ratio": round(max(train) / min(train), 2),
        "num_quarantined": kinds.get(catalogue.QUARANTINED, 0),
        "quarantined": list(table.refused([catalogue.QUARANTINED], LISTED)),
        "quarantine_reasons": dict(table.reasons()[:20]),
        "refused_by_class": table.refused_by_class(),
        "num_duplicates": sum(kinds.get(kind, 0) for kind in removed),
        "num_leaks": kinds.get(catalogue.LEAK, 0),
        "num_near_leaks": kinds.get(catalogue.NEAR_LEAK, 0) if searched else None,
        "duplicates": list(table.refused(removed, LISTED)),
        "num_near_duplicates": near if searched else None,
        "near_duplicates": near_listed,
        "near_duplicate_distance": flags.near_duplicate_distance,
        "short_side": table.short_sides(),
        "picture_size": flags.picture_size,
    }


# --- what is there already -------------------------------------------------------------------------------------------------


def code_hash() -> str:
    """Hash of the modules that decide what a prepared picture looks like."""
    digest = hashlib.sha256()
    for name in DECIDED_BY:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def index_key(flags: PrepareFlags, content: str | None) -> str | None:
    """Names source content + code + flags; None when the origin cannot be identified cheaply."""
    if content is None:
        return None
    elsewhere = ("result", "dataset", "dataset_root", "allowed_hosts", "exchange_uri", "exchange_wait_s")
    relevant = {k: v for k, v in asdict(flags).items() if k not in elsewhere}
    text = json.dumps(relevant, sort_keys=True) + code_hash() + content
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_complete(root: str, name: str) -> bool:
    """Whether a data set is in the store with all its shards, each of the right size: an upload may have been cut off."""
    folder = f"{root.rstrip('/')}/{name}"
    description = storage.read_json_optional(f"{folder}/dataset.json")
    if description is None:
        return False
    sizes = {entry.name: entry.size for entry in storage.listing(f"{folder}/shards/")}
    return all("bytes" in shard and sizes.get(shard["name"]) == shard["bytes"] for shard in description["shards"])


def _reuse(flags: PrepareFlags, key: str | None, hosts: Hosts) -> bool:
    """Write the results of an earlier run when source, code and flags are the same and its data set is whole."""
    if key is None:
        return False
    index = f"{flags.dataset_root.rstrip('/')}/index/{key}"
    found = storage.read_json_optional(f"{index}.json")
    report, refused = (storage.read_optional(f"{index}/{name}") for name in ("report.json", "refused.jsonl"))
    if found is None or report is None or refused is None or not is_complete(flags.dataset_root, found["dataset_hash"]):
        return False
    if hosts.first:
        result = Path(flags.result)
        result.mkdir(parents=True, exist_ok=True)
        (result / "report.json").write_bytes(report)
        (result / "refused.jsonl").write_bytes(refused)
        storage.download_all(f"{index}/refused/", result / "refused")
        write_json(result / "result.json", {**found, "reused": True})
    print(f"nothing changed: data set {found['dataset_hash']} is used again", flush=True)
    return True


# --- the whole -------------------------------------------------------------------------------------------------------------


class Job:
    """One run of prepare.py on one instance, from the listing to the result."""

    def __init__(self, flags: PrepareFlags, hosts: Hosts, work: Path, workforce: Workforce) -> None:
        self._flags, self._hosts, self._work, self._workforce = flags, hosts, work, workforce
        self._table = Catalogue(work / "catalogue.sqlite")
        self._started = time.monotonic()

    def run(self) -> None:
        """Raises DataError or ConfigError with one clear line."""
        flags, hosts = self._flags, self._hosts
        known = sources.archive_tag(flags.source, flags.hosts())
        if _reuse(flags, index_key(flags, known), hosts):
            return
        source = sources.open_source(flags.source, flags.hosts(), self._work)
        split, notes = self._table.fill(source.entries(), flags.seed, len(hosts.names))
        # Only now is a prefix known; and an archive may have changed between the question and the download.
        key = index_key(flags, source.fingerprint())
        if known is None and _reuse(flags, key, hosts):
            return
        look(source, self._table, flags, hosts.mine, self._work, self._workforce)
        share(self._table, hosts, self._work)
        decide(self._table, flags)
        self._write(split, notes, key)

    def _write(self, split: str, notes: list[str], key: str | None) -> None:
        """Shards by every instance, then all the rest by the first; ``dataset.json`` comes last."""
        table, flags, hosts = self._table, self._flags, self._hosts
        name, classes = dataset_hash(table.pictures(), flags.picture_size), table.classes()
        folder = Path(flags.dataset) / name
        there = is_complete(flags.dataset_root, name)
        shards = table.plan(classes, SHARD_BYTES)
        if not there:
            mine = [shard for shard in shards if shard.host == hosts.mine]
            write_shards(table, mine, folder / "shards", self._work, self._workforce)
        done = f"{name} {'there' if there else 'written'}"
        hosts.tell_text("done", done)
        if not hosts.first:
            print(f"instance {hosts.names[hosts.mine]} has done its share of data set {name}", flush=True)
            return
        hosts.collect("done", self._work, lambda host, path: _same_decision(done, host, path))
        self._describe(name, classes, shards, there, build_report(table, flags, classes, split, notes), key)

    def _describe(
        self, name: str, classes: list[str], shards: list[Shard], there: bool, report: dict[str, Any], key: str | None
    ) -> None:
        table, flags, hosts = self._table, self._flags, self._hosts
        folder, counts = Path(flags.dataset) / name, {part: sum(table.balance()[part].values()) for part in layout.SPLITS}
        result = {
            "dataset_hash": name,
            "dataset_uri": f"{flags.dataset_root.rstrip('/')}/{name}/",
            "num_classes": len(classes),
            "num_pictures": counts,
            "num_quarantined": report["num_quarantined"],
            "split": report["split"],
            "reused": False,
            "source": flags.source,
        }
        targets = [Path(flags.result)] + ([Path(flags.dataset) / "index" / key] if key else []) + ([] if there else [folder])
        for target in targets:
            write_json(target / "report.json", report)
            write_refused(table, target / "refused.jsonl")
            write_thumbnails(table, hosts.mine, self._work, target)
        if not there:  # a data set that is whole is never written over: somebody may be reading it
            write_manifest(table, folder / "manifest.parquet")
            write_json(folder / "dataset.json", _description(name, classes, shards, counts, flags))
        if key:
            write_json(Path(flags.dataset) / "index" / f"{key}.json", result)
        write_json(Path(flags.result) / "result.json", result)
        self._say(result, report)

    def _say(self, result: dict[str, Any], report: dict[str, Any]) -> None:
        for note in report["notes"]:
            print(f"note: {note}", flush=True)
        print(
            f"data set {result['dataset_hash']}: {result['num_classes']} classes, pictures {result['num_pictures']}, "
            f"{report['num_quarantined']} quarantined, {report['num_duplicates']} duplicates "
            f"({report['num_leaks']} leaks, {report['num_near_leaks'] or 0} of look-alikes), "
            f"seconds={time.monotonic() - self._started:.1f}",
            flush=True,
        )

    def close(self) -> None:
        """Let go of the catalogue."""
        self._table.close()


def _description(name: str, classes: list[str], shards: list[Shard], counts: dict[str, int], flags: PrepareFlags) -> dict[str, Any]:
    """dataset.json."""
    return {
        "format": 1,
        "hash": name,
        "classes": classes,
        "labels": layout.readable_labels(classes),
        "num_pictures": counts,
        "picture_size": flags.picture_size,
        "shards": [
            {"name": shard.name, "split": shard.split, "pictures": shard.pictures, "bytes": shard.bytes} for shard in shards
        ],
    }


def _same_decision(ours: str, host: str, path: Path) -> None:
    theirs = path.read_text(encoding="utf-8")
    if theirs != ours:
        raise DataError(f"instance {host} came to {theirs!r}, this one to {ours!r}: the store or the code changed, start again")


def prepare(flags: PrepareFlags, workforce: Workforce | None = None) -> None:
    """The whole of prepare.py; without a ``workforce`` in this process. Raises DataError or ConfigError with one clear line."""
    flags.check()
    hosts = Hosts.of_this_job(flags.exchange_uri, flags.exchange_wait_s)
    Path(flags.dataset).mkdir(parents=True, exist_ok=True)
    # Beside the outputs: the job's volume is there, and it is the one that was sized for the pictures.
    with tempfile.TemporaryDirectory(dir=Path(flags.dataset).parent) as work:
        job = Job(flags, hosts, Path(work), workforce or Workforce())
        try:
            job.run()
        except BaseException as problem:
            _warn_others(hosts, problem)
            raise
        finally:
            job.close()


def _warn_others(hosts: Hosts, problem: BaseException) -> None:
    """Leave word of a failure, so that nobody waits; a failure to do so must not hide the first."""
    try:
        hosts.tell_text("failed", one_line(problem))
    except Exception as second:
        print(f"note: the other instances could not be told ({one_line(second)})", file=sys.stderr, flush=True)
