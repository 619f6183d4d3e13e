"""Fuzzing: pictures for everything that reads a picture, and inputs for the state machine's own checks. Ten minutes in all, slowly.

What fails is written to ``corpus/`` and tried first from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from classifier import pictures as preparing
from classifier.errors import UserError
from classifier.serving import PictureError, decode
from fault_table import Landed
from hostile_pictures import hostile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.config import MachineInput
from infra.pipeline import definition
from infra.verify import walk
from infra.verify.configurations import config_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lambdas" / "predict"))

import pictures as checking

CORPUS = Path(__file__).parent / "corpus"

# --- pictures ----------------------------------------------------------------------------------------------------------------


def _decoded(data: bytes) -> None:
    """The container's decoder."""
    with contextlib.suppress(PictureError):
        picture = decode(data)
        assert picture.mode == "RGB"
        assert picture.width * picture.height <= 64_000_000


def _prepared(data: bytes) -> None:
    """Preparation: what it stores can be read."""
    with contextlib.suppress(PictureError, UserError):
        stored = preparing.normalise(data, 64)
        assert decode(stored.data).size


def _headed(data: bytes) -> None:
    """The Lambda, which looks at headers alone."""
    with contextlib.suppress(checking.NotAPictureError):
        header = checking.read_header(data)
        assert header.width > 0
        assert header.height > 0


READERS: list[Callable[[bytes], None]] = [_decoded, _prepared, _headed]


def seeds() -> list[bytes]:
    """Small pictures of all kinds, and those that were hard once."""
    found = [path.read_bytes() for path in sorted((CORPUS / "pictures").glob("*.bin"))]
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        for mode in ("RGB", "L", "CMYK") if kind in ("JPEG", "TIFF") else ("RGB", "L", "P"):
            out = io.BytesIO()
            image = Image.effect_noise((24, 17), 60)
            image.convert("RGB").convert(mode).save(out, kind)
            found.append(out.getvalue())
    return found + [content for _, content, _ in hostile(26) if len(content) < 20_000]


def mutated(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """One to eight changes: bits, bytes, lengths, pieces left out, doubled, or of another picture."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 9)):
        at = chance.randrange(len(changed) + 1) if changed else 0
        kind = chance.randrange(7)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at:at] = chance.randbytes(chance.randrange(1, 9))
        elif kind == 2:
            del changed[at : at + chance.randrange(1, 40)]
        elif kind == 3:
            changed[at : at + 4] = chance.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1"])
        elif kind == 4:
            changed[at:at] = changed[at : at + chance.randrange(1, 60)]
        elif kind == 5:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            changed[at : at + 20] = other[start : start + chance.randrange(60)]
        else:
            del changed[at:]
    return bytes(changed[:200_000])


def fuzz(seconds: float, landed: Landed) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed={seed}")
    chance, known = random.Random(seed), seeds()
    end, tried = time.monotonic() + seconds, 0
    queue: Iterator[bytes] = iter(known)
    while time.monotonic() < end:
        data = next(queue, None) or mutated(chance.choice(known), chance, known)
        for read in READERS:
            try:
                read(data)
            except Exception as problem:
                path = CORPUS / "pictures" / f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
                raise AssertionError(f"{read.__name__}: {type(problem).__name__}: {problem}; kept as {path.name}") from problem
        tried += 1
    landed(tried)
    print(f"pictures={tried}")


@pytest.mark.fault("pictures")
def test_mutated_pictures_are_read_or_refused(landed: Landed):
    fuzz(8, landed)


@pytest.mark.fault("pictures")
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_mutated_pictures_are_read_or_refused_for_five_minutes(landed: Landed):
    fuzz(300, landed)


# --- the state machine's input -------------------------------------------------------------------------------------------------

CONFIG = config_of({"stage": "dev"})
MACHINE = definition(CONFIG)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "none", "torchvision", "head", "lp-ft", "train", "deploy", "batch", "incoming/x/", "s3://x/", "https://x/y.zip",
                     "$", "{% 1 %}", "'", '"', "\\", "${DataBucket}", "../", "a" * 300, "\u202e", "\0", "0", "1e999", "NaN"]),
)  # fmt: skip
NUMBERS = st.one_of(st.integers(-(10**18), 10**18), st.floats(allow_nan=False, allow_infinity=False), st.integers(-3, 300))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
LISTS = st.lists(st.sampled_from([None, [], [[]], {}, "", 64]), min_size=1, max_size=2)
RANGES = st.fixed_dictionaries(
    {"min": st.one_of(st.just(0.1), VALUES), "max": st.just(0.5)}, optional={"scale": VALUES, "integer": VALUES}
)
GROUPS = {
    "tuning": ["strategy", "max_jobs", "max_parallel_jobs", "batch_size", "learning_rate", "ranges", "warm_start", "seed"],
    "hyperparameters": ["epochs", "learning_rate", "batch_size", "optimizer", "weight_decay", "nonsense"],
    "quality_gate": ["min_top1", "max_drop"],
}
FIELDS = ["action", "source", "recipe", "backbone", "pretrained", "image_size", "model_package", "input", "dry_run", "tuning",
          "hyperparameters", "quality_gate", "nonsense"]  # fmt: skip
PATHS = [
    *([name] for name in FIELDS),
    *([group, name] for group, names in GROUPS.items() for name in names),
    *(["tuning", "ranges", name] for name in ("epochs", "optimizer")),
]


@st.composite
def inputs(draw: Any) -> Any:
    """An input with fields that exist and values that should not, most of the time."""
    if draw(st.integers(0, 19)) == 0:
        return draw(VALUES)
    chosen = draw(st.lists(st.sampled_from(FIELDS), max_size=4, unique=True))
    made: dict[str, Any] = {}
    for name in chosen:
        group = GROUPS.get(name)
        if group and draw(st.integers(0, 4)):
            made[name] = draw(st.dictionaries(st.sampled_from(group), VALUES, max_size=3))
        else:
            made[name] = draw(VALUES)
    return made


@st.composite
def near_misses(draw: Any) -> Any:
    """One value somewhere, so that no other field's fault hides it."""
    made = draw(st.one_of(VALUES, LISTS, RANGES))
    for name in reversed(draw(st.sampled_from(PATHS))):
        made = {name: made}
    return made


def check(given_input: Any) -> None:
    """The execution ends in one of its own ends, no expression fails, and nothing starts that no stage may have as its default."""
    machine = walk.Walk(MACHINE, walk.Account())
    last, output = machine.run(given_input)
    assert MACHINE["States"][last]["Type"] in ("Succeed", "Fail")
    assert "States.QueryEvaluationError" not in machine.caught, output
    if last == "InvalidInput":
        assert not machine.asked
        assert output["Cause"].strip()
    else:
        MachineInput.model_validate(merged(given_input))


def merged(given_input: dict[str, Any]) -> dict[str, Any]:
    """An input laid over the stage's defaults, in Python."""
    defaults = CONFIG.input.model_dump(mode="json")
    groups = {name: {**defaults[name], **given_input.get(name, {})} for name in GROUPS}
    return {**defaults, **given_input, **groups}


def corpus_inputs() -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted((CORPUS / "inputs").glob("*.json"))]


def fuzz_inputs(examples: int, landed: Landed) -> None:
    tried, hard = 0, None

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(given_input=st.one_of(inputs(), near_misses()))
    def try_one(given_input: Any) -> None:
        nonlocal tried, hard
        tried += 1
        try:
            check(given_input)
        except Exception:
            hard = given_input
            raise

    for one in corpus_inputs():
        check(one)
    try:
        try_one()
    except Exception:  # the last that failed is the smallest
        text = json.dumps(hard, sort_keys=True)
        (CORPUS / "inputs" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json").write_text(text + "\n")
        raise
    landed(tried)
    print(f"inputs={tried}")


@pytest.mark.fault("inputs")
def test_any_input_ends_in_a_sentence(landed: Landed):
    fuzz_inputs(60, landed)


@pytest.mark.fault("inputs")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_input_ends_in_a_sentence_for_five_minutes(landed: Landed):
    end = time.monotonic() + 300
    while time.monotonic() < end:
        fuzz_inputs(100, landed)


def test_the_corpus_is_what_was_hard_once():
    """Each of its files passes now; a file that nobody can read would be no corpus."""
    for path in (CORPUS / "pictures").glob("*.bin"):
        for read in READERS:
            read(path.read_bytes())
    for one in corpus_inputs():
        check(one)
