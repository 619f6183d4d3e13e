"""Instances of one job that share the work: who they are, and how they tell each other what they found.

SageMaker starts a processing job of several instances with the same command everywhere and writes their names into
``/opt/ml/config/resourceconfig.json``. They meet in a folder of S3 that belongs to this one job (``exchange_uri``).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from classifier import storage
from classifier.errors import ConfigError, DataError, base_dir

POLL_S = 2.0


class Hosts:
    """The instances of this job, in an order on which all agree. A job of one instance needs no exchange."""

    def __init__(self, names: list[str], mine: int, uri: str, wait_s: float) -> None:
        self.names, self.mine, self._uri, self._wait_s = names, mine, uri.rstrip("/"), wait_s

    @classmethod
    def of_this_job(cls, uri: str, wait_s: float) -> Hosts:
        """Raises ConfigError when there are several instances and no place where they can meet."""
        path = base_dir() / "config" / "resourceconfig.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"current_host": "one", "hosts": ["one"]}
        names = sorted(found["hosts"])
        if len(names) > 1 and not uri:
            raise ConfigError(f"{len(names)} instances share the work but exchange_uri is empty: name a folder for this job alone")
        return cls(names, names.index(found["current_host"]), uri, wait_s)

    @property
    def first(self) -> bool:
        """Whether this instance writes what exists once."""
        return self.mine == 0

    def tell(self, name: str, path: Path) -> None:
        """Leave a file for the others, complete as soon as it is seen."""
        if len(self.names) > 1:
            target = f"{self._uri}/{self.names[self.mine]}.{name}"
            if not storage.is_file(target):
                storage.upload(path, target)  # an object is not seen before it is whole
                return
            storage.upload(path, target + ".partial")
            final = Path(unquote(urlsplit(target).path))
            final.with_name(final.name + ".partial").replace(final)

    def tell_text(self, name: str, text: str) -> None:
        """``tell`` with a small file of text."""
        if len(self.names) > 1:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / name
                path.write_text(text, encoding="utf-8")
                self.tell(name, path)

    def collect(self, name: str, folder: Path, use: Callable[[str, Path], None]) -> None:
        """Give every other host's file to ``use``, as they come. Raises DataError for one that failed or is late."""
        missing = [host for host in self.names if host != self.names[self.mine]]
        deadline = time.monotonic() + self._wait_s
        while missing:
            for host in list(missing):
                if self._there(f"{host}.{name}"):
                    target = folder / f"{host}.{name}"
                    storage.download(f"{self._uri}/{host}.{name}", target)
                    use(host, target)
                    missing.remove(host)
                elif (reason := storage.read_optional(f"{self._uri}/{host}.failed")) is not None:
                    raise DataError(f"instance {host} failed: {reason.decode('utf-8', 'replace')}")
            if missing and time.monotonic() > deadline:
                raise DataError(
                    f"nothing was heard of instance {', '.join(missing)} for {self._wait_s:.0f} s: look at its log, "
                    "or raise exchange_wait_s"
                )
            if missing:
                time.sleep(min(POLL_S, self._wait_s / 10))

    def _there(self, name: str) -> bool:
        try:
            storage.head(f"{self._uri}/{name}")
        except DataError:
            return False
        return True
