"""What our own code reads and writes, found in its source: the definition's names cannot fall behind it unnoticed."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import botocore
import botocore.session

from infra import code, pipeline
from infra.config import MachineInput, QualityGate, Range, Tuning

Json = dict[str, Any]

CLASSIFIER = code.MODEL_CODE / "classifier"
LAMBDAS = code.ROOT / "lambdas"

READ_BY_OTHERS = frozenset(
    {
        # pip, https://pip.pypa.io/en/stable/topics/configuration/#environment-variables
        *("PIP_NO_DEPS", "PIP_ROOT_USER_ACTION", "PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_INDEX", "PIP_FIND_LINKS"),
        # protobuf, https://protobuf.dev/reference/python/python-generated/
        "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION",
        # smdebug, smdebug/core/config_constants.py
        *("SMDEBUG_CONFIG_FILE_PATH", "SMPROFILER_CONFIG_PATH", "LOG_LEVEL"),
    }
)
"""Environment variables of jobs that libraries read."""

TOOLKIT = frozenset({"sagemaker_program", "sagemaker_submit_directory", "sagemaker_torch_distributed_enabled"})
"""Hyperparameters that the training toolkit takes for itself (sagemaker_training/params.py, sagemaker_pytorch_container)."""

PACKAGE_FACTS = frozenset(
    {
        *("run", "top1", "dataset_hash", "code_hash", "labels_uri", "smoke_uri", "training_job", "recipe", "backbone"),
        *("learning_rate", "batch_size"),
    }
)
"""A model package's metadata: what the deployment of an older package reads, and what people look for in the console."""

_TEXT, _NUMBER, _NOTHING = (str,), (int, float), (type(None),)
OUTPUT_FACTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("run", "api_url", "endpoint", "report_uri", "model_package", "model_data_url", "dataset_hash"), _TEXT),
    **dict.fromkeys(("input", "predictions_uri"), _TEXT),
    **dict.fromkeys(("training_job", "tuning_job"), (*_TEXT, *_NOTHING)),
    "test_top1": _NUMBER,
    "champion_top1": (*_NUMBER, *_NOTHING),
    "rules_fired": (list,),
    "checks": (list,),
    "best_hyperparameters": (dict, *_NOTHING),
}
"""Names in an execution's output and their types, as docs/operations.md tells them."""


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A module's syntax."""
    return ast.parse(path.read_text())


def literal_keys(path: Path, function: str, variable: str) -> dict[str, Any]:
    """Keys of the dictionary that ``function`` assigns to ``variable``. Raises LookupError when the code looks otherwise."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            for inner in ast.walk(node):
                if (
                    isinstance(inner, ast.Assign)
                    and isinstance(inner.value, ast.Dict)
                    and any(isinstance(target, ast.Name) and target.id == variable for target in inner.targets)
                ):
                    return {str(key.value): None for key in inner.value.keys if isinstance(key, ast.Constant)}
    raise LookupError(f"{path}: {function} assigns no dictionary to {variable}; correct infra/verify/contracts.py")


@functools.cache
def documents() -> dict[str, Any]:
    """Variable -> the fields of the JSON file that is read into it; None stands for a value without known fields."""
    dataset = literal_keys(CLASSIFIER / "preparation.py", "_describe", "result")
    dataset["num_pictures"] = dict.fromkeys(("train", "valid", "test"))
    return {
        "dataset": dataset,
        "champion": dict.fromkeys((*pipeline.CHAMPION, "endpoint_config")),
        "summary": literal_keys(CLASSIFIER / "evaluation.py", "_write", "summary"),
        "request": {
            **dict.fromkeys(MachineInput.model_fields),
            "tuning": {
                **dict.fromkeys(Tuning.model_fields),
                "ranges": dict.fromkeys(code.hyperparameters(), dict.fromkeys(Range.model_fields)),
            },
            "quality_gate": dict.fromkeys(QualityGate.model_fields),
            "hyperparameters": dict.fromkeys(code.hyperparameters()),
        },
        "static": dict.fromkeys(code.hyperparameters()),
        "best": dict.fromkeys(code.hyperparameters()),
    }


@functools.cache
def script_flags(script: str) -> frozenset[str]:
    """Flags of one of model_code's scripts: the fields of the class of flags that it defines or imports."""
    for node in ast.walk(parsed(code.MODEL_CODE / script)):
        if isinstance(node, ast.ClassDef) and node.name == "Flags":
            return _fields(code.MODEL_CODE / script, "Flags")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("classifier."):
            for name in node.names:
                if name.name.endswith("Flags"):
                    return _fields(CLASSIFIER / f"{node.module.split('.')[1]}.py", name.name)
    raise LookupError(f"{script} imports no class of flags; correct infra/verify/contracts.py")


def _fields(path: Path, name: str) -> frozenset[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return frozenset(
                item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            )
    raise LookupError(f"{path} has no class {name}; correct infra/verify/contracts.py")


@functools.cache
def environment_names() -> frozenset[str]:
    """Environment variables that the jobs' code, or a library that it uses, reads."""
    text = "\n".join(path.read_text() for path in sorted(code.MODEL_CODE.rglob("*.py")))
    own = re.findall(r"environ(?:\.get)?[\[(]\s*[\"']([A-Z][A-Z0-9_]+)[\"']", text)
    return READ_BY_OTHERS | frozenset(own)


def handler_file(handler: str) -> Path:
    """The source of a Lambda's handler such as ``smoke_test.handle``."""
    (found,) = LAMBDAS.glob(f"*/{handler.partition('.')[0]}.py")
    return found


@functools.cache
def event_keys(handler: str) -> frozenset[str]:
    """Fields of its event that a Lambda reads."""
    text = handler_file(handler).read_text()
    return frozenset(re.findall(r"event(?:\.get)?[\[(]\s*[\"'](\w+)[\"']", text))


@functools.cache
def modules_of(handler: str) -> dict[str, Path]:
    """The Lambda's own modules that its handler imports, itself included."""
    start = handler_file(handler)
    found, todo = {start.stem: start}, [start]
    while todo:
        for node in ast.walk(parsed(todo.pop())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                path = start.parent / f"{name}.py"
                if name not in found and path.is_file():
                    found[name] = path
                    todo.append(path)
    return found


@functools.cache
def _operations(service: str) -> dict[str, str]:
    """Method of the boto3 client -> operation."""
    model = botocore.session.get_session().get_service_model(service)
    return {str(botocore.xform_name(name)): name for name in model.operation_names}


def clients_of(modules: tuple[Path, ...]) -> frozenset[str]:
    """Services whose boto3 clients the modules make."""
    text = "\n".join(path.read_text() for path in modules)
    return frozenset(re.findall(r"boto3\.(?:Session\(\)\.)?client\(\s*[\"']([a-z0-9-]+)[\"']", text))


@functools.cache
def calls_of(modules: tuple[Path, ...], services: frozenset[str]) -> frozenset[tuple[str, str]]:
    """``(service, operation)`` of every AWS call in the modules: a client's method, called or handed on, or a paginator's name."""
    found = set()
    for path in modules:
        for node in ast.walk(parsed(path)):
            name = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
            if not isinstance(name, str):
                continue
            for service in services:
                if name in _operations(service):
                    found.add((service, _operations(service)[name]))
    return frozenset(found)
