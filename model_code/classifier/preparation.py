"""Pictures in, a checked and content-addressed data set out. Memory stays bounded: pictures stream through a spool file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps

from classifier import layout, serving, sources, storage
from classifier.errors import ConfigError, DataError, UserError

SHARD_BYTES = 64 * 2**20
JPEG_QUALITY = 95
MAX_PNG_BYTES = 64 * 2**10
"""A PNG source that stays this small is kept lossless."""
LISTED = 200
"""How many quarantined or duplicate files report.json names; all are counted."""


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
    near_duplicates: bool = False
    """Also count pictures that look the same (difference hash) in train and in valid or test."""

    def check(self) -> None:
        """Raises ConfigError."""
        if not 16 <= self.picture_size <= 4096:
            raise ConfigError(f"picture_size={self.picture_size} is outside 16 to 4096")
        if not 0 <= self.max_quarantined_share <= 1:
            raise ConfigError(f"max_quarantined_share={self.max_quarantined_share} is outside 0 to 1")
        if self.min_pictures_per_class < 1:
            raise ConfigError(f"min_pictures_per_class={self.min_pictures_per_class} is below 1")

    def hosts(self) -> list[str]:
        """The allow-list in lower case."""
        return [host.strip().lower() for host in self.allowed_hosts.split(",") if host.strip()]


@dataclass
class Record:
    """One accepted picture. ``offset`` and ``size`` locate its bytes in the spool; ``look`` is its difference hash."""

    name: str
    split: str
    folder: str
    sha256: str
    extension: str
    width: int
    height: int
    size: int
    offset: int = 0
    look: str = ""
    shard: str = ""
    member: str = ""


@dataclass
class Outcome:
    """What preparation found."""

    records: list[Record] = field(default_factory=list)
    quarantined: list[dict[str, str]] = field(default_factory=list)
    duplicates: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    split: str = "given"


def normalise_picture(data: bytes, picture_size: int) -> tuple[bytes, str, int, int]:
    """``(bytes, extension, width, height)`` of the stored form. Raises PictureError.

    A JPEG that is upright and small enough is kept byte for byte, so that it is not compressed twice.
    """
    header = serving.open_picture(data)
    source_format = header.format
    orientation = header.getexif().get(0x0112, 1)
    try:
        header.load()
        fits = min(header.size) <= picture_size
        if source_format == "JPEG" and fits and orientation == 1 and header.mode in ("RGB", "L"):
            return data, "jpg", header.width, header.height
        grey = header.mode == "L"
        upright = ImageOps.exif_transpose(header)
        picture: Image.Image = upright if grey else serving.to_rgb(upright)
        if not fits:
            picture = serving.resize_short_side(picture, picture_size)
    except Exception as problem:
        raise serving.PictureError(f"damaged picture ({type(problem).__name__}: {str(problem)[:100]})") from problem
    out = io.BytesIO()
    if source_format == "PNG":
        picture.save(out, "PNG", optimize=False)
        if out.tell() <= MAX_PNG_BYTES:
            return out.getvalue(), "png", picture.width, picture.height
        out = io.BytesIO()
    picture.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue(), "jpg", picture.width, picture.height


def _look(data: bytes) -> str:
    import imagehash

    with Image.open(io.BytesIO(data)) as picture:
        return str(imagehash.dhash(picture))


def _process(item: sources.Item, flags: PrepareFlags, where: layout.Place) -> tuple[Record, bytes] | str:
    """A picture's record and stored bytes, or the reason for its quarantine."""
    if item.size > sources.MAX_FILE_BYTES:
        return f"{item.size:,} bytes are more than {sources.MAX_FILE_BYTES:,}"
    if item.size == 0:
        return "empty file"
    try:
        stored, extension, width, height = normalise_picture(item.read(), flags.picture_size)
    except (serving.PictureError, UserError) as problem:
        return str(problem)
    digest = hashlib.sha256(stored).hexdigest()
    look = _look(stored) if flags.near_duplicates else ""
    return Record(item.name, where.split, where.folder, digest, extension, width, height, len(stored), look=look), stored


def _stream(
    source: sources.Source, places: dict[str, layout.Place], flags: PrepareFlags
) -> Iterator[tuple[str, tuple[Record, bytes] | str]]:
    """Results in the source's order with at most a few dozen pictures in flight."""
    threads = max(2, os.cpu_count() or 2)
    waiting: deque[tuple[str, Future[tuple[Record, bytes] | str]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in source.items():
            if item.name not in places:
                continue
            waiting.append((item.name, pool.submit(_process, item, flags, places[item.name])))
            if len(waiting) >= threads * 8:
                name, future = waiting.popleft()
                yield name, future.result()
        while waiting:
            name, future = waiting.popleft()
            yield name, future.result()


def collect(source: sources.Source, flags: PrepareFlags, spool: BinaryIO) -> Outcome:
    """Read, check and spool every picture, then drop duplicates."""
    names = source.names()
    places, split, notes = layout.place(names, flags.seed)
    outcome = Outcome(split=split, notes=notes)
    stray = [name for name in names if name not in places and not layout.is_hidden(name)]
    outcome.quarantined += [{"file": name, "reason": "not in a class folder"} for name in stray]
    said = time.monotonic()
    for done, (name, result) in enumerate(_stream(source, places, flags), start=1):
        if isinstance(result, str):
            outcome.quarantined.append({"file": name, "reason": result})
        else:
            record, stored = result
            record.offset = spool.tell()
            spool.write(stored)
            outcome.records.append(record)
        if time.monotonic() - said > 2:
            said = time.monotonic()
            print(f"progress pictures={done}/{len(places)}", flush=True)
    outcome.records = _without_duplicates(outcome)
    return outcome


def _without_duplicates(outcome: Outcome) -> list[Record]:
    """Keep one of each picture: test before valid before train. Copies that disagree on the class all go."""
    rank = {"test": 0, "valid": 1, "train": 2}
    folders: dict[str, set[str]] = {}
    for record in outcome.records:
        folders.setdefault(record.sha256, set()).add(record.folder)
    kept: dict[str, Record] = {}
    for record in sorted(outcome.records, key=lambda r: (rank[r.split], r.name)):
        if len(folders[record.sha256]) > 1:
            found = ", ".join(sorted(folders[record.sha256])[:5])
            outcome.quarantined.append({"file": record.name, "reason": f"the same picture is in several classes: {found}"})
        elif record.sha256 in kept:
            first = kept[record.sha256]
            kind = "leak" if first.split != record.split else "copy"
            outcome.duplicates.append({"file": record.name, "same_as": first.name, "kind": kind, "split": record.split})
        else:
            kept[record.sha256] = record
    order = {split: index for index, split in enumerate(layout.SPLITS)}
    return sorted(kept.values(), key=lambda r: (order[r.split], r.folder, r.sha256))


def near_leaks(records: list[Record]) -> list[dict[str, str]]:
    """Train pictures whose difference hash equals that of a valid or test picture."""
    held = {record.look: record for record in records if record.split != "train" and record.look}
    return [
        {"file": record.name, "looks_like": held[record.look].name}
        for record in records
        if record.split == "train" and record.look in held
    ]


def dataset_hash(records: list[Record], picture_size: int) -> str:
    """16 hex digits that depend on the stored pictures, their classes and splits, and nothing else."""
    digest = hashlib.sha256(f"v1 {picture_size}\n".encode())
    for record in records:  # sorted by (split, folder, sha256)
        digest.update(f"{record.split}\0{record.folder}\0{record.sha256}\n".encode())
    return digest.hexdigest()[:16]


def check(outcome: Outcome, flags: PrepareFlags) -> None:
    """Raises DataError when too little is left to train on."""
    usable, bad = len(outcome.records), len(outcome.quarantined)
    if usable == 0:
        first = outcome.quarantined[0] if outcome.quarantined else {"file": "-", "reason": "-"}
        raise DataError(f"no usable picture among {bad} files (first: {first['file']}: {first['reason']}): check the source")
    if bad > flags.max_quarantined_share * (usable + bad):
        reason, count = Counter(entry["reason"] for entry in outcome.quarantined).most_common(1)[0]
        raise DataError(
            f"{bad} of {usable + bad} files were quarantined, more than max_quarantined_share={flags.max_quarantined_share:g} "
            f"(most often, {count} times: {reason}): clean the source or raise the limit"
        )
    train = Counter(record.folder for record in outcome.records if record.split == "train")
    folders = sorted({record.folder for record in outcome.records})
    if len(folders) < 2:
        raise DataError(f"only the class {folders[0]!r} has usable pictures: a classifier needs at least two")
    small = [folder for folder in folders if train[folder] < flags.min_pictures_per_class]
    if small:
        raise DataError(
            f"{len(small)} classes have fewer than {flags.min_pictures_per_class} training pictures "
            f"({', '.join(f'{name!r}: {train[name]}' for name in small[:5])}): add pictures or remove the folders"
        )
    for split in ("valid", "test"):
        if not any(record.split == split for record in outcome.records):
            raise DataError(f"no {split} pictures are left: add some, or leave the split folders out and they are drawn")


def write_shards(records: list[Record], spool: BinaryIO, folder: Path, classes: list[str]) -> list[dict[str, Any]]:
    """Deterministic tar shards ``<split>-NNNNN.tar`` of at most SHARD_BYTES; fills in each record's shard and member."""
    folder.mkdir(parents=True)
    index = {name: number for number, name in enumerate(classes)}
    shards: list[dict[str, Any]] = []
    for split in layout.SPLITS:
        rows = [record for record in records if record.split == split]
        # Spread the classes over the shards: a reader that shuffles within shards sees all of them.
        rows.sort(key=lambda r: r.sha256)
        number, position = 0, 0
        while position < len(rows):
            name, total, first = f"{split}-{number:05d}.tar", 0, position
            with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
                while position < len(rows) and (position == first or total + rows[position].size <= SHARD_BYTES):
                    record = rows[position]
                    record.shard, record.member = name, f"{index[record.folder]:05d}/{record.sha256[:40]}.{record.extension}"
                    spool.seek(record.offset)
                    info = tarfile.TarInfo(record.member)
                    info.size, info.mode = record.size, 0o644
                    tar.addfile(info, io.BytesIO(spool.read(record.size)))
                    total += record.size
                    position += 1
            shards.append({"name": name, "split": split, "pictures": position - first})
            number += 1
    return shards


def write_manifest(records: list[Record], classes: list[str], path: Path) -> None:
    """manifest.parquet: one row per stored picture."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("name", "split", "folder", "sha256", "width", "height", "size", "shard", "member")
    columns: dict[str, list[Any]] = {name: [getattr(record, name) for record in records] for name in names}
    columns["class_index"] = [classes.index(record.folder) for record in records]
    pq.write_table(pa.table(columns), path)


def build_report(outcome: Outcome, flags: PrepareFlags, classes: list[str]) -> dict[str, Any]:
    """report.json: what was found, counted in full and named up to LISTED."""
    counts = layout.balance(layout.Place(record.split, record.folder) for record in outcome.records)
    near = near_leaks(outcome.records) if flags.near_duplicates else []
    sizes = sorted(min(record.width, record.height) for record in outcome.records)
    return {
        "source": flags.source,
        "split": outcome.split,
        "notes": outcome.notes,
        "classes": [{"folder": name, **{split: counts[split][name] for split in layout.SPLITS}} for name in classes],
        "num_quarantined": len(outcome.quarantined),
        "quarantined": outcome.quarantined[:LISTED],
        "quarantine_reasons": dict(Counter(entry["reason"].split(" (")[0] for entry in outcome.quarantined).most_common(20)),
        "num_duplicates": len(outcome.duplicates),
        "num_leaks": sum(entry["kind"] == "leak" for entry in outcome.duplicates),
        "duplicates": outcome.duplicates[:LISTED],
        "num_near_duplicates": len(near) if flags.near_duplicates else None,
        "near_duplicates": near[:LISTED],
        "short_side": {"smallest": sizes[0], "median": sizes[len(sizes) // 2], "largest": sizes[-1]},
        "picture_size": flags.picture_size,
    }


def write_json(path: Path, value: object) -> None:
    """Readable, sorted, with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_dataset(outcome: Outcome, flags: PrepareFlags, spool: BinaryIO) -> tuple[str, dict[str, Any], dict[str, Any]]:
    classes = sorted({record.folder for record in outcome.records})
    labels = layout.readable_labels(classes)
    key = dataset_hash(outcome.records, flags.picture_size)
    folder = Path(flags.dataset) / key
    shards = write_shards(outcome.records, spool, folder / "shards", classes)
    write_manifest(outcome.records, classes, folder / "manifest.parquet")
    report = build_report(outcome, flags, classes)
    counts = {split: sum(record.split == split for record in outcome.records) for split in layout.SPLITS}
    description = {
        "format": 1,
        "hash": key,
        "classes": classes,
        "labels": labels,
        "num_pictures": counts,
        "picture_size": flags.picture_size,
        "shards": shards,
    }
    write_json(folder / "dataset.json", description)
    write_json(folder / "report.json", report)
    return key, description, report


def code_hash() -> str:
    """Hash of the modules that decide what a prepared picture looks like."""
    digest = hashlib.sha256()
    for name in ("preparation.py", "layout.py", "serving.py", "sources.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def fingerprint(flags: PrepareFlags) -> str | None:
    """Names source content + code + flags; None when the origin cannot be identified cheaply."""
    content = sources.cheap_fingerprint(flags.source, flags.hosts())
    if content is None:
        return None
    relevant = {k: v for k, v in asdict(flags).items() if k not in ("result", "dataset", "dataset_root", "allowed_hosts")}
    text = json.dumps(relevant, sort_keys=True) + code_hash() + content
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _reuse(flags: PrepareFlags, key: str) -> bool:
    """Write result.json from an earlier run's index entry when its data set is still there."""
    root = flags.dataset_root.rstrip("/")
    found = storage.read_json_optional(f"{root}/index/{key}.json")
    if found is None:
        return False
    report = storage.read_json_optional(f"{root}/{found['dataset_hash']}/report.json")
    if report is None:
        return False
    write_json(Path(flags.result) / "result.json", {**found, "reused": True})
    write_json(Path(flags.result) / "report.json", report)
    print(f"nothing changed: data set {found['dataset_hash']} is used again", flush=True)
    return True


def prepare(flags: PrepareFlags) -> None:
    """The whole of prepare.py. Raises DataError or ConfigError with one clear line."""
    flags.check()
    started = time.monotonic()
    Path(flags.dataset).mkdir(parents=True, exist_ok=True)
    key = fingerprint(flags)
    if key and _reuse(flags, key):
        return
    with tempfile.TemporaryDirectory(dir=Path(flags.dataset).parent) as work:
        source = sources.open_source(flags.source, flags.hosts(), Path(work))
        with tempfile.TemporaryFile(dir=work) as spool:
            outcome = collect(source, flags, spool)
            check(outcome, flags)
            dataset, description, report = _write_dataset(outcome, flags, spool)
    result = {
        "dataset_hash": dataset,
        "dataset_uri": f"{flags.dataset_root.rstrip('/')}/{dataset}/",
        "num_classes": len(description["classes"]),
        "num_pictures": description["num_pictures"],
        "num_quarantined": report["num_quarantined"],
        "split": outcome.split,
        "reused": False,
        "source": flags.source,
    }
    write_json(Path(flags.result) / "result.json", result)
    write_json(Path(flags.result) / "report.json", report)
    if key:
        write_json(Path(flags.dataset) / "index" / f"{key}.json", result)
    for note in outcome.notes:
        print(f"note: {note}", flush=True)
    seconds = time.monotonic() - started
    print(
        f"data set {dataset}: {result['num_classes']} classes, pictures {result['num_pictures']}, "
        f"{report['num_quarantined']} quarantined, {report['num_duplicates']} duplicates, seconds={seconds:.1f}",
        flush=True,
    )
