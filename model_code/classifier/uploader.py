"""Copies what a job writes to S3 while it runs."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from classifier import storage


class Uploader:
    """Copies new and grown files of local folders to S3 in a thread, and all that is left when it ends.

    A failed upload is reported once and does not stop the training.
    """

    def __init__(self, folders: dict[Path, str], every_s: float = 5.0) -> None:
        self._folders, self._every = folders, every_s
        self._sent: dict[Path, tuple[int, int]] = {}
        self._stop, self._warned = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    def __enter__(self) -> Uploader:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        self.sync()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self.sync()

    def sync(self) -> None:
        """Upload every file that changed since it was last sent."""
        for folder, uri in self._folders.items():
            for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
                if path.is_file() and not path.name.startswith(".") and path.suffix != ".tmp":
                    self._send(path, f"{uri}/{path.relative_to(folder).as_posix()}")

    def _send(self, path: Path, uri: str) -> None:
        try:
            stat = path.stat()
            if self._sent.get(path) == (stat.st_size, stat.st_mtime_ns):
                return
            storage.upload(path, uri)
            self._sent[path] = (stat.st_size, stat.st_mtime_ns)
        except Exception as problem:
            if not self._warned and path.exists():  # smdebug renames temporary files while we look
                self._warned = True
                print(f"note: {uri} was not uploaded ({type(problem).__name__}: {problem})", flush=True)
