"""Row 7: model artifacts that are damaged, cut off, swapped, or hold a pickle with code. The old model serves; nothing is run."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier import evaluation, model
from classifier.errors import DataError, WeightsError
from classifier.served_model import ModelError, ServedModel, sha256
from fault_table import Landed
from local_fakes import BUCKET, ROLE, SERVER_URI, Client, FakeCloud, serving_cloud, wait
from model_fakes import MODEL_CODE
from serving_fakes import colour, write_model, write_onnx

from local_cloud.images import Images
from local_cloud.sagemaker import SageMaker, Settings

pytestmark = pytest.mark.fault(7)

PROGRAM = f"""
import runpy, sys
sys.path.insert(0, {str(MODEL_CODE)!r})
runpy.run_path({str(MODEL_CODE / "server.py")!r}, run_name="__main__")
"""
BUSY = ("Creating", "Updating", "RollingBack", "Deleting")


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def write_artifact(folder: Path, **changes: Any) -> Path:
    """A good artifact as the evaluation leaves it: with the hashes of its files."""
    write_model(folder, **changes)
    description = json.loads((folder / "model.json").read_text())
    names = ("model.onnx", "head.npy", "selftest/0.png")
    (folder / "model.json").write_text(json.dumps({**description, "sha256": {name: sha256(folder / name) for name in names}}))
    return folder


# --- the faults: each takes a good artifact and a place where code would leave its mark ------------------------------------


def one_bit(folder: Path, mark: Path) -> None:
    """In the middle of the weights: the network still loads, and may still pass its self-test."""
    path = folder / "model.onnx"
    data = bytearray(path.read_bytes())
    at = data.index(np.float32(4).tobytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def cut_off(folder: Path, mark: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-40])


def empty(folder: Path, mark: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")


def swapped(folder: Path, mark: Path) -> None:
    """Another model's weights under this one's description."""
    write_onnx(folder / "model.onnx", weights=np.roll(np.eye(3, dtype=np.float32) * 4, 1, axis=0))


def swapped_with_its_hash(folder: Path, mark: Path) -> None:
    """By somebody who corrects the hash as well: the self-test tells."""
    swapped(folder, mark)
    change(folder, sha256={"model.onnx": sha256(folder / "model.onnx")})


def pickle_for_network(folder: Path, mark: Path) -> None:
    (folder / "model.onnx").write_bytes(pickle.dumps(Bomb(mark)))
    change(folder, sha256={})


def pickle_for_head(folder: Path, mark: Path) -> None:
    np.save(folder / "head.npy", np.array([Bomb(mark)], dtype=object), allow_pickle=True)


def pickle_for_picture(folder: Path, mark: Path) -> None:
    (folder / "selftest" / "0.png").write_bytes(pickle.dumps(Bomb(mark)))
    change(folder, sha256={})


def no_description(folder: Path, mark: Path) -> None:
    (folder / "model.json").unlink()


def half_a_description(folder: Path, mark: Path) -> None:
    path = folder / "model.json"
    path.write_text(path.read_text()[:100])


def description_of_another_form(folder: Path, mark: Path) -> None:
    change(folder, form="pickle")


def climbing_form(folder: Path, mark: Path) -> None:
    """A self-test's picture outside of the artifact."""
    change(folder, selftest=[{"file": "../../../../etc/passwd", "label": "green", "probability": 1}])


def no_numbers(folder: Path, mark: Path) -> None:
    weights = np.full((3, 3), np.nan, dtype=np.float32)
    write_onnx(folder / "model.onnx", weights=weights)
    change(folder, sha256={})


def change(folder: Path, **changes: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FAULTS: list[Callable[[Path, Path], None]] = [
    one_bit, cut_off, empty, swapped, swapped_with_its_hash, pickle_for_network, pickle_for_head, pickle_for_picture,
    no_description, half_a_description, description_of_another_form, climbing_form, no_numbers,
]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoiled_artifact_is_refused_and_nothing_in_it_runs(tmp_path: Path, landed: Landed, fault: Callable[[Path, Path], None]):
    folder, mark = write_artifact(tmp_path / "model"), tmp_path / "mark"
    ServedModel(folder).self_test(5000)
    before = contents(folder)
    fault(folder, mark)
    assert contents(folder) != before
    with pytest.raises((ModelError, Exception)) as problem:
        ServedModel(folder).self_test(5000)
    assert str(problem.value)
    assert not mark.exists()
    landed()


# --- at an endpoint, under load --------------------------------------------------------------------------------------------


def packed(folder: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(folder).as_posix())
    return out.getvalue()


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCloud]:
    with serving_cloud(tmp_path_factory.mktemp("cloud"), PROGRAM) as made:
        yield made


@pytest.fixture(scope="module")
def sagemaker(cloud: FakeCloud) -> Iterator[SageMaker]:
    service = SageMaker(cloud, Images(cloud), Settings(grace=2, health_deadline=8, invocation_timeout=10, deployment_speed=100))
    yield service
    service.stop()


@pytest.fixture(scope="module")
def endpoint(cloud: FakeCloud, sagemaker: SageMaker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Client, str]:
    """A real server behind an endpoint, with a good model."""
    call = Client(sagemaker)
    configure(cloud, call, "good", packed(write_artifact(tmp_path_factory.mktemp("good") / "model")))
    call("CreateEndpoint", EndpointName="e", EndpointConfigName="good")
    assert wait(lambda: call("DescribeEndpoint", EndpointName="e"), "EndpointStatus", BUSY)["EndpointStatus"] == "InService"
    return call, "e"


def configure(cloud: FakeCloud, call: Client, name: str, artifact: bytes) -> None:
    cloud.put(f"models/{name}.tar.gz", artifact)
    container = {"Image": SERVER_URI, "ModelDataUrl": f"s3://{BUCKET}/models/{name}.tar.gz"}
    call("CreateModel", ModelName=name, PrimaryContainer=container, ExecutionRoleArn=ROLE)
    variant = {"VariantName": "main", "ModelName": name, "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
    call("CreateEndpointConfig", EndpointConfigName=name, ProductionVariants=[variant])


def truncated(artifact: bytes) -> bytes:
    return artifact[: len(artifact) // 2]


def flipped(artifact: bytes) -> bytes:
    middle = len(artifact) // 2
    return artifact[:middle] + bytes([artifact[middle] ^ 0xFF]) + artifact[middle + 1 :]


def a_label(artifact: bytes) -> bytes:
    """Where nothing but gzip's checksum tells: all can be unpacked, and the server would find nothing wrong."""
    flat = gzip.compress(gzip.decompress(artifact), compresslevel=0)
    assert flat.count(b'"green"') == 2  # among the labels, and the self-test's
    return flat.replace(b'"green"', b'"groan"')


def no_archive(artifact: bytes) -> bytes:
    return pickle.dumps([1])


WHOLE: list[Callable[[bytes], bytes]] = [truncated, flipped, a_label, no_archive]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [one_bit, cut_off, swapped_with_its_hash, pickle_for_network, pickle_for_head, *WHOLE])
def test_the_old_model_serves_on(cloud, sagemaker, endpoint, tmp_path: Path, landed: Landed, fault: Callable[..., Any]):
    call, name = endpoint
    mark, folder = tmp_path / "mark", write_artifact(tmp_path / "model", run="bad")
    if fault in WHOLE:
        artifact = fault(packed(folder))
    else:
        fault(folder, mark)
        artifact = packed(folder)
    configure(cloud, call, fault.__name__.replace("_", "-"), artifact)
    seen: Counter[Any] = Counter()
    stopped = threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            status, _, body = sagemaker.invoke_endpoint(name, colour("green"), {"content-type": "image/png"})
            answer = json.loads(body) if status == 200 else {}
            seen[status, answer.get("model", {}).get("run"), answer.get("predictions", [{}])[0].get("label")] += 1
            time.sleep(0.01)

    asking = threading.Thread(target=ask)
    asking.start()
    call("UpdateEndpoint", EndpointName=name, EndpointConfigName=fault.__name__.replace("_", "-"))
    described = wait(lambda: call("DescribeEndpoint", EndpointName=name), "EndpointStatus", BUSY)
    time.sleep(1)  # it serves afterwards too
    stopped.set()
    asking.join()
    assert (described["EndpointStatus"], described["EndpointConfigName"]) == ("InService", "good")
    assert described["FailureReason"]
    assert set(seen) == {(200, "colours", "green")}
    assert seen.total() > 20
    assert not mark.exists()
    landed()


# --- where artifacts and weights are read for training and evaluation ------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", data: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(data) if kind == tarfile.REGTYPE else 0
    return info, data


@pytest.mark.parametrize(
    "made",
    [
        member("../escape"), member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("hard", tarfile.LNKTYPE, "../../etc/passwd"), member("device", tarfile.CHRTYPE), member("fifo", tarfile.FIFOTYPE),
    ],
    ids=lambda made: made[0].name,
)  # fmt: skip
def test_an_artifact_that_climbs_out_is_refused_by_the_evaluation(
    tmp_path: Path, landed: Landed, made: tuple[tarfile.TarInfo, bytes]
):
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as tar:
        tar.addfile(made[0], io.BytesIO(made[1]))
    (tmp_path / "jail" / "model").mkdir(parents=True)
    with pytest.raises(DataError, match="not a readable model artifact"):
        evaluation.unpack_model(tmp_path / "model.tar.gz", tmp_path / "jail" / "model")
    assert not (tmp_path / "jail" / "escape").exists()
    landed()


def test_a_byte_that_is_not_what_it_was_is_found_wherever_it_is(tmp_path: Path, landed: Landed):
    folder = write_artifact(tmp_path / "model")
    artifact, before, archive, said = packed(folder), contents(folder), tmp_path / "model.tar.gz", []
    places = range(0, len(artifact), 3)
    for at in places:
        archive.write_bytes(artifact[:at] + bytes([artifact[at] ^ 0xFF]) + artifact[at + 1 :])
        out = tmp_path / str(at)
        try:
            assert contents(evaluation.unpack_model(archive, out)) == before, f"byte {at}: another model was taken"
        except DataError as problem:
            said.append(str(problem))
    assert all("not a readable model artifact" in one for one in said)
    assert len(said) >= len(places) - 10  # gzip's header has bytes that mean nothing here: the time and who wrote it
    landed()


def test_an_absolute_name_in_an_artifact_stays_inside(tmp_path: Path, landed: Landed):
    outside = tmp_path / "outside"
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as tar:
        info, data = member(str(outside))
        tar.addfile(info, io.BytesIO(data))
    (tmp_path / "model").mkdir()
    evaluation.unpack_model(tmp_path / "model.tar.gz", tmp_path / "model")
    assert not outside.exists()
    assert [path.name for path in (tmp_path / "model").rglob("outside")] == ["outside"]
    landed()


def plain_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Bomb(mark)}))


def torch_pickle(path: Path, mark: Path) -> None:
    torch.save({"weight": Bomb(mark)}, path)


def old_torch_pickle(path: Path, mark: Path) -> None:
    torch.save({"weight": Bomb(mark)}, path, _use_new_zipfile_serialization=False)


def whole_module(path: Path, mark: Path) -> None:
    """``torch.save(model)`` instead of its state: a pickle of classes."""
    torch.save(torch.nn.Linear(2, 2), path)


def pickle_in_a_zip(path: Path, mark: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, pickle.dumps(Bomb(mark)) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("write", [plain_pickle, torch_pickle, old_torch_pickle, whole_module, pickle_in_a_zip])
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.safetensors"])
def test_weights_that_hold_code_are_refused_and_do_not_run(
    tmp_path: Path, landed: Landed, write: Callable[[Path, Path], None], name: str
):
    mark = tmp_path / "mark"
    write(tmp_path / name, mark)
    assert b"mkdir" in (tmp_path / name).read_bytes() or write is whole_module
    with pytest.raises(WeightsError):
        model.read_state(tmp_path / name)
    assert not mark.exists()
    landed()


def test_a_checkpoint_that_holds_code_counts_as_none(tmp_path: Path, landed: Landed, capsys: pytest.CaptureFixture[str]):
    from classifier import checkpoint

    torch_pickle(tmp_path / checkpoint.NAME, tmp_path / "mark")
    assert checkpoint.load(tmp_path) is None
    assert "is damaged" in capsys.readouterr().out
    assert not (tmp_path / "mark").exists()
    landed()
