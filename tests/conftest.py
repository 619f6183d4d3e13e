"""Shared fixtures: the local cloud, and the real pictures when they are at hand."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

pytest_plugins = ["fault_table", "deployment", "workers"]

PROJECT = Path(__file__).resolve().parent.parent
# smdebug's generated code needs protobuf's pure-Python mode, chosen before the first import.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
# Tests and what they start share the cores: threads that wait for one another sleep, for awake they keep others from working.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# ministack, imported by some tests, would otherwise leave a folder in /tmp.
os.environ.setdefault("STATE_DIR", str(PROJECT / "build" / "ministack"))
REAL_DATA = (PROJECT / os.environ.get("REAL_DATA", "../shared")).resolve()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real pictures and weights (``$REAL_DATA``); the test is skipped, and says so, where it is absent."""
    if not (REAL_DATA / "data").is_dir():
        pytest.skip(f"no real pictures at {REAL_DATA}; name their folder with REAL_DATA")
    return REAL_DATA


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: tests share the cores with each other's processes, and sums come out in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Configuration -> template, all of them; cdk-nag's and CDK's own findings would be errors."""
    from infra.verify.configurations import CONFIGURATIONS
    from infra.verify.deployment import synthesise_all

    return synthesise_all(tmp_path_factory.mktemp("assemblies"), CONFIGURATIONS)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def free_port() -> int:
    """A port for this module's own server; the local cloud has another."""
    return unused_port()


@pytest.fixture
def own_port() -> int:
    """A port for this test's own server."""
    return unused_port()


@dataclass(frozen=True)
class CloudUnderTest:
    """A running local cloud."""

    root: Path
    url: str

    def client(self, service: str, session: boto3.Session | None = None):
        """A client of the account's root, or of ``session``."""
        from local_cloud import emulator

        return (session or emulator.root_session()).client(service, endpoint_url=self.url, region_name=emulator.REGION)


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudUnderTest]:
    """The local cloud in a process of its own, as ``make run`` starts it."""
    from rich.console import Console

    from local_cloud import run

    root, port = tmp_path_factory.mktemp("cloud") / "root", unused_port()
    with run.cloud(port, root, Console(quiet=True)):
        yield CloudUnderTest(root, f"http://localhost:{port}")


# No --disable-gpu: with it a new page stalls more often (2 of 114 on a busy machine, 1 of 466 without): it gets no animation frame.
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, headless; the test is skipped, and says so, where there is none."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
