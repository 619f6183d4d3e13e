"""Executes a plain Dockerfile without Docker: a virtual environment for its Python, a folder for its files.

Understood: ``FROM python:<version>``, ``ARG``, ``ENV``, ``WORKDIR``, ``COPY`` and local ``ADD``, ``RUN`` with ``pip install``,
``mkdir`` and ``python -m compileall``, ``ENTRYPOINT`` and ``CMD`` in JSON form. ``IGNORED`` lists what changes nothing here;
the rest is refused.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from local_cloud.sagemaker.process import network_environment

IGNORED = {
    "USER": "the server runs as the user of this machine",
    "EXPOSE": "the port is given by SAGEMAKER_BIND_TO_PORT",
    "LABEL": "labels change nothing at run time",
    "MAINTAINER": "labels change nothing at run time",
    "HEALTHCHECK": "SageMaker asks /ping instead",
    "STOPSIGNAL": "SageMaker sends SIGTERM",
    "VOLUME": "folders are private in any case",
}
"""Dockerfile instructions accepted without effect: instruction → reason."""
IGNORED_COMMANDS = {
    **dict.fromkeys(("apt-get", "apt", "apk", "dnf", "yum", "microdnf"), "system packages are this machine's"),
    **dict.fromkeys(("useradd", "groupadd", "adduser", "addgroup", "chown", "chmod"), "the server runs as this machine's user"),
    **dict.fromkeys(("rm", "cd", "set", "true"), "there are no layers to keep small"),
}
"""Commands of RUN accepted without effect: command → reason."""
PIP_IGNORED = {"--no-cache-dir", "--disable-pip-version-check", "-q", "--quiet", "--no-input", "--root-user-action=ignore"}
"""Options of ``pip install`` accepted without effect: uv installs, and says nothing."""
PIP_KEPT = {
    "--require-hashes",
    "--no-deps",
    "--upgrade",
    "--no-build-isolation",
    "--only-binary=:all:",
    "--pre",
    "--no-binary=:all:",
}
"""Options of ``pip install`` that act as written."""
PIP_FILES = {"-r": "-r", "--requirement": "-r", "-c": "-c", "--constraint": "-c"}
_PIP_VALUES = {"--only-binary", "--no-binary"}
_BASE = re.compile(r"(?:public\.ecr\.aws/docker/library/|docker\.io/library/|docker\.io/)?python:(?P<tag>[\w.-]+)")
_VARIABLE = re.compile(r"\$(?:(?P<name>\w+)|\{(?P<braced>\w+)(?::-(?P<default>[^}]*))?\})")


class DockerfileError(Exception):
    """The Dockerfile cannot be executed here; the message names the line."""


@dataclass(frozen=True)
class Instruction:
    """One instruction with its arguments as written."""

    line: int
    keyword: str
    value: str


def parse(text: str) -> list[Instruction]:
    """Instructions in order; comments dropped, continued lines joined."""
    found: list[Instruction] = []
    parts: list[str] = []
    start = 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        start = start if parts else number
        parts.append(line.removesuffix("\\").strip())
        if not line.endswith("\\"):
            keyword, _, value = " ".join(parts).partition(" ")
            found.append(Instruction(start, keyword.upper(), value.strip()))
            parts = []
    if parts:
        raise DockerfileError(f"line {start}: the last instruction ends with a backslash: remove it.")
    return found


@dataclass
class Result:
    """What an image is made of."""

    root: Path
    venv: Path
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    base: str = ""


class Builder:
    """Executes instructions. ``run(command, env, folder)`` runs a program and returns its exit code; ``say`` takes log lines."""

    def __init__(
        self,
        context: Path,
        target: Path,
        run: Callable[[Sequence[str], Mapping[str, str], Path], int],
        say: Callable[[str], None],
    ) -> None:
        self._context, self._run_program, self._say = context.resolve(), run, say
        self.result = Result(root=target / "rootfs", venv=target / "venv")
        self._arguments: dict[str, str] = {}
        self.result.root.mkdir(parents=True)

    def build(self, text: str) -> Result:
        """Execute the whole file. Raises ``DockerfileError``."""
        instructions = parse(text)
        handlers = {
            "FROM": self._from,
            "ARG": self._arg,
            "ENV": self._env,
            "WORKDIR": self._workdir,
            "COPY": self._copy,
            "ADD": self._copy,
            "RUN": self._run,
            "ENTRYPOINT": self._entrypoint,
            "CMD": self._cmd,
        }
        for step, item in enumerate(instructions, 1):
            self._say(f"Step {step}/{len(instructions)} : {item.keyword} {item.value}")
            if item.keyword in IGNORED:
                self._say(f" ---> ignored: {IGNORED[item.keyword]}")
            elif item.keyword not in handlers:
                self._refuse(item, f"the instruction {item.keyword} is not emulated")
            elif not self.result.base and item.keyword not in ("FROM", "ARG"):
                self._refuse(item, "FROM must come first")
            else:
                handlers[item.keyword](item)
        if not self.result.entrypoint and not self.result.cmd:
            raise DockerfileError("the Dockerfile has neither ENTRYPOINT nor CMD: give ENTRYPOINT in JSON form.")
        return self.result

    # -- instructions --------------------------------------------------------------------------------------------------

    def _from(self, item: Instruction) -> None:
        words = [word for word in self._expand(item.value).split() if not word.startswith("--")]
        if self.result.base:
            self._refuse(item, "several stages are not emulated")
        found = _BASE.fullmatch(words[0]) if words else None
        if found is None:
            self._refuse(item, f"the base image {item.value!r} is not emulated; use python:<version>")
            return
        self.result.base = words[0]
        asked, here = found["tag"].split("-")[0], platform.python_version()
        if not (here + ".").startswith(asked + "."):
            self._say(f" ---> note: Python {here} of this machine stands for {words[0]}")
        self._must(item, ["venv", "--no-config", "--python", sys.executable, str(self.result.venv)])

    def _arg(self, item: Instruction) -> None:
        name, _, default = item.value.partition("=")
        self._arguments.setdefault(name.strip(), self._expand(default.strip().strip("\"'")))

    def _env(self, item: Instruction) -> None:
        words = shlex.split(item.value)
        if words and "=" not in words[0]:
            name, _, value = item.value.partition(" ")
            words = [f"{name}={value.strip()}"]
        for word in words:
            name, _, value = word.partition("=")
            self.result.env[name] = self._expand(value)

    def _workdir(self, item: Instruction) -> None:
        self.result.workdir = self._absolute(self._expand(item.value.strip("\"'")))
        self._place(self.result.workdir).mkdir(parents=True, exist_ok=True)
        self._remember(self.result.workdir)

    def _copy(self, item: Instruction) -> None:
        words = json.loads(item.value) if item.value.startswith("[") else shlex.split(item.value)
        flags = [word for word in words if word.startswith("--")]
        if any(flag.startswith("--from") for flag in flags):
            self._refuse(item, "several stages are not emulated")
        *sources, target = [self._expand(word) for word in words if not word.startswith("--")]
        if any("://" in source for source in sources) or (item.keyword == "ADD" and any(".tar" in source for source in sources)):
            self._refuse(item, "only plain files and folders of the source are copied")
        found = [path for source in sources for path in self._matches(item, source)]
        folder = target.endswith("/") or len(found) > 1 or target in (".", "..") or found[0].is_dir()
        place = self._place(self._absolute(target))
        folder = folder or place.is_dir()
        self._remember(self._absolute(target) if folder else str(PurePosixPath(self._absolute(target)).parent))
        for path in found:
            if path.is_dir():
                shutil.copytree(path, place, dirs_exist_ok=True)
            else:
                destination = place / path.name if folder else place
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, destination)

    def _matches(self, item: Instruction, source: str) -> list[Path]:
        pattern = source.lstrip("/").removeprefix("./") or "."
        found = [self._context] if pattern == "." else sorted(self._context.glob(pattern.rstrip("/")))
        for path in found:
            if not path.resolve().is_relative_to(self._context):
                self._refuse(item, f"{source!r} lies outside the source")
        if not found:
            self._refuse(item, f"{source!r} is not in the source")
        return found

    def _entrypoint(self, item: Instruction) -> None:
        self.result.entrypoint = self._words(item)
        self.result.cmd = []

    def _cmd(self, item: Instruction) -> None:
        self.result.cmd = self._words(item)

    def _words(self, item: Instruction) -> list[str]:
        try:
            words = json.loads(item.value)
        except ValueError:
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            self._refuse(item, f'{item.keyword} must be in JSON form, as ["python", "server.py"]')
        return list(words or [])

    # -- RUN -----------------------------------------------------------------------------------------------------------

    def _run(self, item: Instruction) -> None:
        for command in self._commands(item):
            program = PurePosixPath(command[0]).name
            if program in IGNORED_COMMANDS:
                self._say(f" ---> ignored: {shlex.join(command)} ({IGNORED_COMMANDS[program]})")
            elif program == "mkdir":
                for folder in (word for word in command[1:] if not word.startswith("-")):
                    self._place(self._absolute(folder)).mkdir(parents=True, exist_ok=True)
                    self._remember(self._absolute(folder))
            elif program in ("pip", "pip3") and command[1:2] == ["install"]:
                self._pip(item, command[2:])
            elif program in ("python", "python3") and command[1:4] == ["-m", "pip", "install"]:
                self._pip(item, command[4:])
            elif program in ("python", "python3") and command[1:3] == ["-m", "compileall"]:
                self._compile(item, command[3:])
            else:
                self._refuse(item, f"RUN {shlex.join(command)} is not emulated")

    def _commands(self, item: Instruction) -> list[list[str]]:
        if item.value.startswith("["):
            return [self._words(item)]
        lexer = shlex.shlex(item.value, posix=True, punctuation_chars="&;|<>()")
        lexer.whitespace_split = True
        lexer.commenters = ""
        commands: list[list[str]] = [[]]
        for word in lexer:
            if word in ("&&", ";"):
                commands.append([])
            elif set(word) <= set("&;|<>()"):
                self._refuse(item, f"{word!r} in RUN is not emulated")
            elif commands[-1] or not word.startswith(("--mount=", "--network=", "--security=")):
                commands[-1].append(self._expand(word))
        return [command for command in commands if command]

    def _pip(self, item: Instruction, words: Sequence[str]) -> None:
        """The same requirements with uv, which installs what pip would: same files, same hashes."""
        command: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            if word in PIP_IGNORED:
                continue
            if word == "--root-user-action":
                rest = rest[1:]
            elif word in PIP_KEPT:
                command.append(word)
            elif word in _PIP_VALUES and rest:
                command += [word, rest.pop(0)]
            elif name in PIP_FILES and (equals or rest):
                command += [PIP_FILES[name], str(self._place(self._absolute(value if equals else rest.pop(0))))]
            elif word.startswith("-"):
                self._refuse(item, f"the pip option {word} is not emulated")
            else:
                command.append(word)
        python = str(self.result.venv / "bin" / "python")
        self._must(item, ["pip", "install", "--python", python, *command])

    def _compile(self, item: Instruction, words: Sequence[str]) -> None:
        translated = [word if word.startswith("-") or word.isdigit() else str(self._place(self._absolute(word))) for word in words]
        code = self._run_program(
            [str(self.result.venv / "bin" / "python"), "-m", "compileall", *translated], self._environment(), self.result.root
        )
        if code:
            self._fail(item, code)

    def _must(self, item: Instruction, arguments: Sequence[str]) -> None:
        uv = Path(sys.executable).with_name("uv")
        program = str(uv) if uv.exists() else shutil.which("uv") or "uv"
        code = self._run_program([program, *arguments], self._environment(), self.result.root)
        if code:
            self._fail(item, code)

    @staticmethod
    def _environment() -> dict[str, str]:
        """uv's own settings and cache; nothing else of this machine."""
        kept = {name: value for name, value in os.environ.items() if name.startswith("UV_") or name in ("HOME", "XDG_CACHE_HOME")}
        return {**network_environment(), **kept, "PATH": "/usr/local/bin:/usr/bin:/bin", "UV_NO_PROGRESS": "1"}

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _expand(self, text: str) -> str:
        known = {**self._arguments, **self.result.env}
        return _VARIABLE.sub(lambda m: known.get(m["name"] or m["braced"]) or m["default"] or "", text)

    def _absolute(self, path: str) -> str:
        return os.path.normpath(PurePosixPath(self.result.workdir, path))

    def _place(self, path: str) -> Path:
        return Path(str(self.result.root) + path)

    def _remember(self, path: str) -> None:
        if path != "/":
            self.result.paths.add(path)

    @staticmethod
    def _refuse(item: Instruction, why: str) -> None:
        raise DockerfileError(
            f"line {item.line}: {why} by the local CodeBuild." if "emulated" in why else f"line {item.line}: {why}."
        )

    @staticmethod
    def _fail(item: Instruction, code: int) -> None:
        raise DockerfileError(
            f"line {item.line}: {item.keyword} {item.value} returned a non-zero code: {code}; its output stands above."
        )
