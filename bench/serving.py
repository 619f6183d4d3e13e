"""Our serving container against others: same network, same pictures, same machine, load from another process.

Sections: ``throughput`` (all servers at 1, 4, 16 and 64 clients, and at half their own load), ``start`` (from the command to the
first answer), ``overload`` (ten times what the server can do, for minutes), ``sizes`` (small and large JPEGs), ``forms`` (what a
CPU makes of one network).
`python bench/serving.py throughput --seconds 8`. Peers get environments of their own below build/peers, made at the first run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
import psutil
import samples
from serving_load import FORM

PROJECT = Path(__file__).resolve().parent.parent
MODEL_CODE = PROJECT / "model_code"
HERE = Path(__file__).resolve().parent
PEERS = PROJECT / "build" / "peers"
PICTURES = 64
REFERENCE = "torchvision's Resize and CenterCrop, our model"
CLIENTS = (1, 4, 16, 64)
SIZES = ((500, 400), (1600, 1200), (4000, 3000))
ARCHITECTURE = "resnet18"
ENVIRONMENTS = {
    "torch": ["torch==2.13.0", "torchvision==0.28.0", "pillow", "fastapi==0.139.0", "uvicorn", "litserve==0.2.17",
              "python-multipart", "torchserve==0.12.0", "torch-model-archiver==0.12.0", "pyyaml", "packaging", "nvgpu", "captum"],
    "ray": ["ray[serve]==2.60.0", "grpcio-reflection<1.80", "onnxruntime", "openvino", "numpy", "pillow"],
}  # fmt: skip
Json = dict[str, Any]


# --- what is served --------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path) -> None:
    """JPEGs of 500 x 400 pixels: real dogs where they are at hand, else generated ones."""
    from PIL import Image

    folder.mkdir(parents=True)
    real = sorted((samples.real_data() / "data" / "dogs-120").glob("valid/*/*.jpg"))[:PICTURES]
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        if real:
            picture = Image.open(real[number % len(real)]).convert("RGB").resize((500, 400))
        else:
            picture = Image.fromarray(generator.integers(0, 255, (25, 20, 3), dtype=np.uint8)).resize(
                (500, 400), Image.Resampling.BICUBIC
            )
        picture.save(folder / f"{number:03}.jpg", quality=90)


def write_model(folder: Path, pictures: Path) -> list[Json]:
    """An artifact of ours and a state dict for the peers: one network, 1,000 classes, weights from a seed; its forms."""
    import torch
    from classifier import choosing, export, model, serving

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    network = model.build(ARCHITECTURE).eval()
    torch.save(network.state_dict(), folder / "weights.pt")
    explanation = export._write_network(network, 224, folder)
    preprocessing = serving.Preprocessing.of(224)
    files = sorted(pictures.glob("*.jpg"))
    squares = np.stack([serving.to_square(serving.decode(file.read_bytes()), 224) for file in files])
    with torch.inference_mode():
        labels = network(torch.from_numpy(serving.normalise(squares, preprocessing))).argmax(1).numpy()
    rows = choosing.choose(folder, choosing.Sample(squares, labels.astype(np.int64)), preprocessing)
    # Weights from a seed agree less than trained ones do: here the speed counts, on trained ones the choice is by accuracy.
    fastest = min((row for row in rows if row["batch1_ms"]), key=lambda row: row["batch1_ms"])["form"]
    description = {
        "architecture": ARCHITECTURE,
        "labels": [f"class {number}" for number in range(1000)],
        "preprocessing": preprocessing.to_json(),
        "explanation": explanation,
        "form": fastest,
        "forms": rows,
    }
    (folder / "model.json").write_text(json.dumps(description))
    return rows


# --- servers ---------------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """How a server is started and asked. ``environment`` names one of ENVIRONMENTS, or is empty for the project's own."""

    name: str
    command: Callable[[int, Path], list[str]]
    environment: str = ""
    path: str = "/invocations"
    variables: dict[str, str] = field(default_factory=dict)
    patience_s: float = 120
    form: bool = False
    """Whether a picture is sent in a multipart form."""


def _python(environment: str) -> str:
    return str(PEERS / environment / "bin" / "python") if environment else sys.executable


def _torchserve(port: int, work: Path) -> list[str]:
    """Archives the handler, and starts Java in the foreground."""
    store, binaries, peers = work / "store", PEERS / "torch" / "bin", HERE / "serving_peers"
    store.mkdir(exist_ok=True)
    archive = [str(binaries / "torch-model-archiver"), "--model-name", "m", "--version", "1", "--export-path", str(store)]
    archive += ["--force", "--handler", str(peers / "torchserve_handler.py"), "--extra-files", str(peers / "eager.py")]
    subprocess.run(archive, check=True, capture_output=True)
    (work / "ts.properties").write_text(
        f"inference_address=http://127.0.0.1:{port}\nmanagement_address=http://127.0.0.1:{port + 1}\n"
        f"metrics_address=http://127.0.0.1:{port + 2}\ngrpc_inference_port={port + 3}\ngrpc_management_port={port + 4}\n"
        "default_workers_per_model=2\ndisable_token_authorization=true\njob_queue_size=1000\n"
    )
    command = [str(binaries / "torchserve"), "--start", "--foreground", "--disable-token-auth", "--model-store", str(store)]
    return [*command, "--models", "m=m.mar", "--ts-config", str(work / "ts.properties")]


def _fastapi(port: int, processes: int) -> list[str]:
    command = [_python("torch"), "-m", "uvicorn", "fastapi_app:app", "--port", str(port), "--log-level", "error"]
    return [*command, "--workers", str(processes)] if processes > 1 else command


def _litserve(port: int, work: Path) -> list[str]:
    return [_python("torch"), str(HERE / "serving_peers" / "litserve_app.py")]


SERVERS = (
    Server(
        "ours",
        lambda port, work: [sys.executable, str(MODEL_CODE / "server.py"), "serve"],
        variables={"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072"},  # as the Dockerfile says
    ),
    Server("FastAPI, eager torch, 2 processes", lambda port, work: _fastapi(port, 2), "torch"),
    Server("FastAPI, eager torch, 1 process", lambda port, work: _fastapi(port, 1), "torch", variables={"BENCH_THREADS": "2"}),
    Server("LitServe, eager torch, 2 workers", _litserve, "torch", form=True),
    Server("TorchServe 0.12, eager torch, 2 workers", _torchserve, "torch", "/predictions/m"),
    Server(
        "Ray Serve, our form, 2 replicas",
        lambda port, work: [str(PEERS / "ray" / "bin" / "serve"), "run", "ray_app:app", "--route-prefix", "/invocations"],
        "ray",
    ),
)
"""The first is ours, the third the one whose start ours is compared with."""


def make_environment(name: str) -> bool:
    """A virtual environment for peers, made once; False when it cannot be made."""
    place = PEERS / name
    if (place / "made").is_file():
        return True
    uv = str(PROJECT / ".uv" / "bin" / "uv")
    for command in ([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(place)],
                    [uv, "pip", "install", "--quiet", "--python", str(place), *ENVIRONMENTS[name]]):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"note: the environment {name} could not be made: {done.stderr.strip()[-300:]}", file=sys.stderr)
            return False
    (place / "made").touch()
    return True


@contextmanager
def started(server: Server, model: Path, pictures: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, float]]:
    """``(process, port, seconds from the command to the first answer)``. Raises TimeoutError."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as work:
        own = {
            "SM_MODEL_DIR": str(model), "BENCH_MODEL": str(model), "BENCH_MODEL_CODE": str(MODEL_CODE), "BENCH_PORT": str(port),
            "SAGEMAKER_BIND_TO_PORT": str(port), "BIND_HOST": "127.0.0.1", "OMP_NUM_THREADS": "1", "LOG_LOCATION": work,
            "METRICS_LOCATION": work, "PYTHONPATH": str(HERE / "serving_peers"), "TS_NUMBER_OF_NETTY_THREADS": "2",
            "RAY_SERVE_HTTP_PORT": str(port), "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        if server.environment == "ray":
            port = 8000
        if server.environment:
            own["PATH"] = f"{PEERS / server.environment / 'bin'}:{os.environ['PATH']}"
        command = server.command(port, Path(work))
        begun = time.perf_counter()
        log = (Path(work) / "log").open("wb")
        process = subprocess.Popen(
            command, env={**os.environ, **own, **server.variables}, cwd=work, stdout=log, stderr=log, start_new_session=True
        )
        try:
            body, kind = sorted(pictures.glob("*.jpg"))[0].read_bytes(), "image/jpeg"
            if server.form:
                body, kind = FORM + body + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"
            while not _answers(f"http://127.0.0.1:{port}{server.path}", body, kind):
                if time.perf_counter() - begun > server.patience_s or process.poll() is not None:
                    raise TimeoutError(f"{server.name} did not answer: {(Path(work) / 'log').read_text()[-500:]}")
                time.sleep(0.01)
            yield process, port, time.perf_counter() - begun
        finally:
            _end(process)
            log.close()
            if server.environment == "ray":
                subprocess.run([str(PEERS / "ray" / "bin" / "ray"), "stop", "--force"], capture_output=True, check=False)


def _end(process: subprocess.Popen[bytes]) -> None:
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(8)
    for child in children:
        with suppress(psutil.Error):
            child.kill()


def _free_port() -> int:
    """A port with some free ones behind it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(int(probe.getsockname()[1]), 60_000)


def _answers(url: str, body: bytes, kind: str = "image/jpeg") -> bool:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": kind})  # noqa: S310 - a server of ours
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - a server of ours
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def memory_mb(pid: int) -> float:
    """PSS of a process tree: shared pages counted once."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 2**20


def load(port: int, server: Server, pictures: Path, clients: int, seconds: float, rate: float = 0) -> Json:
    """Load from a process of its own."""
    command = [sys.executable, str(HERE / "serving_load.py"), str(port), server.path, "--pictures", str(pictures)]
    command += ["--clients", str(clients), "--seconds", str(seconds), "--rate", str(rate), *(["--form"] if server.form else [])]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


# --- sections --------------------------------------------------------------------------------------------------------------


def limits(model: Path, pictures: Path, seconds: float) -> dict[str, float]:
    """Pictures a second of the model alone, and of decoding and model, on as many threads as there are CPUs; no HTTP."""
    from classifier.cpus import cpu_count
    from classifier.served_model import ServedModel
    from classifier.serving import normalise

    threads = cpu_count()
    served = ServedModel(model, threads)
    bodies = [file.read_bytes() for file in sorted(pictures.glob("*.jpg"))]
    ready = [normalise(served.square(served.decode(body))[None], served.preprocessing) for body in bodies]

    def rate(work: Callable[[int], object]) -> float:
        end = time.perf_counter() + seconds

        def run(first: int) -> int:
            count = 0
            while time.perf_counter() < end:
                work((first + count) % len(bodies))
                count += 1
            return count

        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(run, range(threads))) / seconds

    rate(lambda number: served.logits(ready[number]))
    return {
        "model alone": rate(lambda number: served.logits(ready[number])),
        "decoding + model": rate(lambda number: served.predict(served.decode(bodies[number]))),
    }


def bench_throughput(model: Path, pictures: Path, seconds: float) -> None:
    """All servers, all numbers of clients; each row is kept as soon as it is known."""
    rows: list[list[Any]] = []
    for name, rate in limits(model, pictures, seconds).items():
        rows.append([f"limit: {name}", None, None, rate, None, None, None, None, None])
    for server in SERVERS:
        if server.environment and not make_environment(server.environment):
            continue
        try:
            with started(server, model, pictures) as (process, port, start_s):
                load(port, server, pictures, 2, 2)
                found = {clients: load(port, server, pictures, clients, seconds) for clients in CLIENTS}
                half = load(port, server, pictures, 64, seconds, found[16]["per_s"] / 2)
                rates = [found[clients]["per_s"] for clients in CLIENTS]
                rows.append([server.name, *rates, found[16]["p99_ms"], half["p99_ms"], memory_mb(process.pid), start_s])
                print(rows[-1], {clients: one["statuses"] for clients, one in found.items()}, found[16]["client_cpu"], flush=True)
        except (TimeoutError, subprocess.CalledProcessError) as problem:
            print(f"note: {server.name} was left out: {problem}", file=sys.stderr)
    columns = ["server", *(f"pictures/s, {clients} clients" for clients in CLIENTS)]
    columns += ["p99 at 16, ms", "p99 at half load, ms", "memory, MB (PSS)", "first answer, s"]
    keep("throughput", harness.plain(columns, rows))


def bench_start(model: Path, pictures: Path, seconds: float) -> None:
    """From the command to the first answer, the fastest of three; and the memory then."""
    rows = []
    for server in SERVERS[:3:2]:
        if server.environment and not make_environment(server.environment):
            continue
        times, memory = [], 0.0
        for _ in range(3):
            with started(server, model, pictures) as (process, _, start_s):
                times.append(start_s)
                memory = memory_mb(process.pid)
        rows.append([server.name, min(times), memory])
        print(rows[-1], flush=True)
    keep("start", harness.plain(["server", "first answer, s", "memory, MB (PSS)"], rows))


def bench_overload(model: Path, pictures: Path, seconds: float) -> None:
    """Ten times what the server can do: what is accepted, what is refused, /ping meanwhile, memory, and the time after."""
    with started(SERVERS[0], model, pictures) as (process, port, _):
        usual = load(port, SERVERS[0], pictures, 16, 8)
        load(port, SERVERS[0], pictures, 64, 8)  # memory is compared with that of a server that is busy, not of one just started
        before_mb = memory_mb(process.pid)
        pings: list[float] = []
        early_mb, begun = 0.0, time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(load, port, SERVERS[0], pictures, 400, seconds, 10 * usual["per_s"])
            while not under_way.done():
                asked = time.perf_counter()
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=10) as answer:
                    assert answer.status == 200
                pings.append((time.perf_counter() - asked) * 1000)
                early_mb = memory_mb(process.pid) if time.perf_counter() - begun < 20 else early_mb
                time.sleep(0.5)
            found = under_way.result()
        ended, body = time.perf_counter(), sorted(pictures.glob("*.jpg"))[0].read_bytes()
        while not _answers(f"http://127.0.0.1:{port}/invocations", body):
            time.sleep(0.05)
        normal_s = time.perf_counter() - ended
        after_mb = memory_mb(process.pid)
    statuses = found["statuses"]
    rows = [
        ["requests a second sent, of what it can do", sum(statuses.values()) / found["seconds"] / usual["per_s"]],
        ["seconds", found["seconds"]],
        *[
            [f"answered with {status}" if status != "0" else "connections broken", count]
            for status, count in sorted(statuses.items())
        ],
        ["pictures/s meanwhile, of the usual", found["per_s"] / usual["per_s"]],
        ["p99 of the accepted, ms", found["p99_ms"]],
        ["slowest /ping, ms", max(pings)],
        ["memory before, MB", before_mb],
        ["memory after 20 s of it, MB", early_mb],
        ["memory after, MB", after_mb],
        ["normal again after, s", normal_s],
    ]
    for row in rows:
        print(row, flush=True)
    keep("overload", harness.plain(["overload", "value"], rows))


def bench_sizes(model: Path, pictures: Path, seconds: float) -> None:
    """From a JPEG's bytes to its class on one thread, against torchvision's Resize and CenterCrop before the same model."""
    from classifier.served_model import ServedModel
    from classifier.serving import normalise
    from PIL import Image
    from torchvision import transforms

    served, reference = ServedModel(model, 1), transforms.Compose([transforms.Resize(224), transforms.CenterCrop(224)])
    cases: dict[str, Json] = {}
    for width, height in SIZES:
        bodies = []
        for file in sorted(pictures.glob("*.jpg"))[:8]:
            out = io.BytesIO()
            Image.open(file).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
            bodies.append(out.getvalue())

        def theirs(bodies: list[bytes] = bodies) -> int:
            for body in bodies:
                square = np.asarray(reference(Image.open(io.BytesIO(body)).convert("RGB")))
                served.logits(normalise(square[None], served.preprocessing))
            return len(bodies)

        def ours(bodies: list[bytes] = bodies) -> int:
            for body in bodies:
                served.predict(served.decode(body))
            return len(bodies)

        name = f"{width}×{height}"
        cases[name] = harness.compare({REFERENCE: theirs, "ours": ours}, against=REFERENCE, rounds=7, title=name)
        print(name, {peer: row["median"] for peer, row in cases[name].items()}, flush=True)
    keep("sizes", harness.record("sizes", cases, against=REFERENCE))


def keep(section: str, found: Json) -> None:
    """Put a section into bench/results/serving.json."""
    path = harness.RESULTS / "serving.json"
    whole = harness.read("serving") if path.is_file() else {"name": "serving", "sections": {}}
    whole["sections"][section] = found
    harness.write(whole)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"throughput": bench_throughput, "start": bench_start, "sizes": bench_sizes, "overload": bench_overload}
    parser.add_argument("section", nargs="*", help=f"some of {', '.join(sections)}, forms; all without")
    parser.add_argument("--seconds", type=float, default=8, help="for each measurement")
    parser.add_argument("--overload-seconds", type=float, default=300)
    flags = parser.parse_args()
    sys.path.insert(0, str(MODEL_CODE))
    with tempfile.TemporaryDirectory() as work:
        pictures, model = Path(work) / "pictures", Path(work) / "model"
        write_pictures(pictures)
        rows = write_model(model, pictures)
        names = ["form", "batch1_ms", "batch8_ms", "agreement"]
        keep(
            "forms",
            harness.plain(
                ["form", "ms a picture", "ms for 8", "agreement with fp32"], [[row[name] for name in names] for row in rows]
            ),
        )
        for name, section in sections.items():
            if not flags.section or name in flags.section:
                section(model, pictures, flags.overload_seconds if name == "overload" else flags.seconds)


if __name__ == "__main__":
    main()
