"""What the documentation names exists: commands, paths, variables, fields, links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from infra.config import MachineInput, QualityGate, Tuning

PROJECT = Path(__file__).resolve().parents[2]
README = (PROJECT / "README.md").read_text()
CONTRIBUTING = (PROJECT / "CONTRIBUTING.md").read_text()
MAKEFILE = (PROJECT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
DESCRIBED = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
FOLDERS = ("app.py", "docs", "infra", "lambdas", "local_cloud", "model_code", "notebooks", "tests", "web")


def tracked(*patterns: str) -> list[Path]:
    """Files under version control; those of the work tree where there is no git (an unpacked archive)."""
    try:
        listed = subprocess.run(["git", "ls-files", *patterns], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
        return [PROJECT / name for name in listed.splitlines() if (PROJECT / name).exists()]
    except (OSError, subprocess.CalledProcessError):
        found = [*PROJECT.glob("*.md"), *PROJECT.glob("*/*.md"), *PROJECT.glob("docs/**/*")]
        return [path for path in found if any(path.match(pattern) for pattern in patterns)]


DOCUMENTS = tracked("*.md")
assert PROJECT / "README.md" in DOCUMENTS


def named(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def section(text: str, title: str) -> str:
    """The text below ``## title``, up to the next heading of its level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found.group(1)


def rows(text: str) -> list[list[str]]:
    """Cells of every table row; escaped bars stay."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# ---- make ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_help() -> str:
    return subprocess.run(["make", "--no-print-directory", "help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout


def test_every_make_target_that_is_named_exists() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    found = set(re.findall(r"(?:`|^|\()make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert {"run", "test", "check"} <= found
    assert found <= TARGETS


def test_help_lists_every_target_with_a_description_and_every_public_target_has_one(make_help: str) -> None:
    assert set(re.findall(r"^  make ([a-z-]+) ", make_help, re.MULTILINE)) - {"run takes"} >= DESCRIBED
    phony = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())
    assert phony - DESCRIBED == {"versions"}, "give the target a '## description'"


def variables() -> list[str]:
    table = next(part for part in README.split("\n\n") if part.startswith("| variable |"))
    return [codes(row[0])[0] for row in rows(table)[1:]]


def test_every_variable_of_make_run_is_handled_and_listed(make_help: str) -> None:
    recipe = MAKEFILE.split("\nrun:", 1)[1].split("\n\n", 1)[0]
    assert len(variables()) == 7
    for name in variables():
        assert re.search(rf"^{name} \?=", MAKEFILE, re.MULTILINE), f"{name} has no default in the Makefile"
        assert re.search(rf"\$\$?\(?{name}\b|\$\(if \$\({name}\)", recipe), f"{name} does not reach the launcher"
        assert f"{name}=" in make_help


def test_values_reach_the_launcher_as_they_are() -> None:
    given = ["PORT=4601", "EXIT=1", "DATA=a folder/it's", 'INPUT={"recipe": "head"}']
    exported = re.findall(r"^export (.*)$", MAKEFILE, re.MULTILINE)[0].split()
    assert set(exported) == set(variables()) - {"PORT", "EXIT"}
    shown = subprocess.run(["make", "-n", "run", *given], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert '--data "$DATA"' in shown, "the shell, not make, puts the value in: quotes and spaces survive"
    assert '--input "$INPUT"' in shown
    assert "--port 4601 --exit" in shown


def test_the_variables_of_make_report_and_make_compare_reach_the_script() -> None:
    given = ["RUN=s3://b/runs/it's", "BUCKET=s3://b c", "OUT=a folder"]
    for target, word in (("report", '--uri "$RUN"'), ("compare", '--uri "$BUCKET"')):
        shown = subprocess.run(["make", "-n", target, *given], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
        assert f'local_cloud.report {target} {word} --out "$OUT"' in shown
    assert {"RUN", "BUCKET", "OUT", "IMAGE", "STAGE"} == set(re.findall(r"^export (.*)$", MAKEFILE, re.MULTILINE)[1].split())


# ---- Paths --------------------------------------------------------------------------------------------------------------


def paths_of(text: str) -> set[str]:
    """Backticked words that begin with a folder of this repository, and paths that pytest is given."""
    words = [word for code in codes(text) for word in code.split()]
    found = {word.split("::")[0] for word in words if word.split("/")[0] in FOLDERS}
    return {word for word in found if not re.search(r"[<>…{]", word)}


def exists(path: str) -> bool:
    return any(PROJECT.glob(path)) if "*" in path else (PROJECT / path).exists()


def test_every_path_of_the_file_map_exists() -> None:
    cells = [code for row in rows(section(README, "File map"))[1:] for code in codes(row[0])]
    assert len(cells) >= 7
    assert [path for path in cells if not (PROJECT / path).exists()] == []
    for folder in FOLDERS:
        assert folder in {path.rstrip("/") for path in cells}, f"{folder} is not in the file map"


def test_the_file_map_describes_what_is_in_the_folders() -> None:
    for row in rows(section(README, "File map"))[1:]:
        folders = [PROJECT / path for path in codes(row[0])]
        for word in codes(row[1]):
            if word.endswith((".py", "/")):
                assert any((folder / word).exists() for folder in folders if folder.is_dir()), f"{row[0]}: {word}"


def test_every_path_of_the_contributing_table_exists() -> None:
    table = section(CONTRIBUTING, "To change X, edit Y, test with Z")
    found = paths_of(table)
    assert len(found) > 15
    assert sorted(path for path in found if not exists(path)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    assert sorted(path for path in paths_of(document.read_text()) if not exists(path)) == []


# ---- Fields -------------------------------------------------------------------------------------------------------------


def test_the_input_table_has_the_machine_s_fields() -> None:
    table = {codes(row[0])[0]: row[1] for row in rows(section(README, "Input of the state machine"))[1:]}
    assert list(table) == list(MachineInput.model_fields)
    assert set(Tuning.model_fields) <= set(codes(table["tuning"]))
    assert set(codes(table["quality_gate"])) == set(QualityGate.model_fields)
    for name in ("action", "recipe"):
        choices = MachineInput.model_json_schema()["properties"][name]["enum"]
        assert set(choices) <= set(codes(table[name]))


# ---- Links --------------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """A heading's anchor on GitHub."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_local_link_resolves(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (document.parent / unquote(path)).resolve() if path else document
        if not place.exists() or not place.is_relative_to(PROJECT) or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert broken == []


# ---- Words --------------------------------------------------------------------------------------------------------------

_UNWANTED = re.compile(r"(?<![\w.])/(?:root|home|Users|mnt|var|srv)/|\.\./shared\b|\b(?:TODO|FIXME|XXX)\b", re.IGNORECASE)


@pytest.mark.parametrize("document", [*DOCUMENTS, *tracked("docs/*.svg", "docs/**/*.svg")], ids=named)
def test_no_document_names_one_machine_or_its_users(document: Path) -> None:
    found = [line.strip() for line in document.read_text().splitlines() if _UNWANTED.search(line)]
    assert found == []


def test_the_word_list_finds_what_it_is_for() -> None:
    assert _UNWANTED.search("see /home/someone/model.pth")
    assert _UNWANTED.search("TODO: measure")
    assert not _UNWANTED.search("https://aws.amazon.com/home/ and the homework of `infra/home.py`")
