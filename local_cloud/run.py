"""``make run``: synthesize, start the local cloud, deploy, run the state machine, and serve its API until Ctrl-C.

What it does is what a person does on AWS: ``cdk bootstrap``, ``cdk deploy``, start the machine, POST a picture. See ``--help``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from local_cloud import emulator, live, source
from local_cloud.progress import Follower

PROJECT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 60


class RunError(Exception):
    """Something the user can mend; printed as one message, exit code 1."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="", help="folder, archive, https:// or s3:// address, or 'dogs'; default: handwritten digits"
    )
    parser.add_argument("--weights", default="", help="state dict of a torchvision backbone; default: none for the digits")
    parser.add_argument("--backbone", default="", help="torchvision model name; default: recognised from --weights")
    parser.add_argument("--input", default="{}", help="JSON merged over the state machine's input")
    parser.add_argument("--override", default="", help="JSON merged over the stage of cdk.json")
    parser.add_argument("--port", type=int, default=4566, help="port of the local cloud on the loopback interface")
    parser.add_argument("--exit", action="store_true", help="post one test picture, print the answer and a line of JSON, and exit")
    return parser.parse_args()


def main() -> None:
    """Run; every refusal is one clear message and exit code 1."""
    arguments = _arguments()
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scratch = source.scratch_folder()
    try:
        _run(arguments, console, scratch)
    except (RunError, source.SourceError) as error:
        _fail(console, str(error))
    except KeyboardInterrupt:
        console.print("\nStopped.")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fail(console: Console, message: str) -> NoReturn:
    console.print(f"\nerror: {message}", style="bold red", markup=False)
    raise SystemExit(1)


def _run(arguments: argparse.Namespace, console: Console, scratch: Path) -> None:
    started_s = time.monotonic()
    chosen = source.choose(arguments.data, scratch)
    weights = source.checked_weights(arguments.weights) if arguments.weights else None
    machine_input = _machine_input(arguments, chosen, weights)
    override = _override(arguments.override, chosen)
    _check_port(arguments.port)
    os.environ["AWS_ENDPOINT_URL"] = f"http://localhost:{arguments.port}"
    console.print(f"Data: {chosen.note}", markup=False)
    with cloud(arguments.port, scratch / "cloud", console) as root:
        outputs = deploy(arguments.port, chosen.stage, override, root, console)
        upload(chosen, weights, outputs["DataBucket"], console)
        follower, ended = execute(outputs, machine_input, root, console)
        kept = keep(outputs, ended, root)
        _describe_data(kept, console)
        if ended["status"] != "SUCCEEDED":
            raise RunError(_failure_message(ended, kept))
        _announce(outputs, ended, kept, console)
        if arguments.exit:
            _post_and_report(outputs, ended, kept, follower, time.monotonic() - started_s, console)
        else:
            console.print("Serving until Ctrl-C.")
            signal.pause()


# ---- Before anything is started -----------------------------------------------------------------------------------------


def _machine_input(arguments: argparse.Namespace, chosen: source.Source, weights: Path | None) -> dict[str, Any]:
    """The execution's input: ``{}`` for the digits; what DATA, WEIGHTS and INPUT say otherwise. INPUT wins."""
    try:
        given = json.loads(arguments.input or "{}")
    except ValueError as error:
        raise RunError(
            f'INPUT={arguments.input}: not JSON ({error}). Example: INPUT=\'{{"tuning": {{"max_jobs": 2}}}}\''
        ) from error
    if not isinstance(given, dict):
        raise RunError(f'INPUT={arguments.input}: expected a JSON object, e.g. \'{{"recipe": "head"}}\'')
    answer: dict[str, Any] = {"source": chosen.source} if chosen.source else {}
    if weights is not None:
        backbone = arguments.backbone or _recognise(weights)
        answer |= {"pretrained": f"incoming/weights/{weights.name}", "backbone": backbone, "recipe": "head", "image_size": 224}
    elif arguments.backbone:
        answer["backbone"] = arguments.backbone
    return {**answer, **given}


def _override(text: str, chosen: source.Source) -> dict[str, Any]:
    """OVERRIDE as an object over two settings of our own: the host that DATA names is allowed, and endpoints are asked often."""
    try:
        override = json.loads(text or "{}")
    except ValueError as error:
        raise RunError(f"OVERRIDE={text}: not JSON ({error}). Example: OVERRIDE='{{\"max_trials\": 8}}'") from error
    if not isinstance(override, dict):
        raise RunError(f"OVERRIDE={text}: expected a JSON object, e.g. '{{\"max_trials\": 8}}'")
    hosts = {"allowed_hosts": list(chosen.allowed_hosts)} if chosen.allowed_hosts else {}
    return {"poll_seconds": 1, **hosts, **override}


def _recognise(weights: Path) -> str:
    """Architecture of a state dict, found in a child process: it needs torch, which this one does without."""
    command = [sys.executable, "-m", "classifier.model", str(weights)]
    found = subprocess.run(command, cwd=PROJECT / "model_code", capture_output=True, text=True, check=False)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["unknown"])[-1]
        raise RunError(f"WEIGHTS={weights}: {reason}. Name the architecture with BACKBONE=<torchvision model>")
    return found.stdout.strip()


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RunError(
                f"port {port} is in use ({error.strerror}). Stop what listens there, or choose another: make run PORT=4600"
            ) from error


# ---- The cloud and the stack --------------------------------------------------------------------------------------------


@contextmanager
def cloud(port: int, root: Path, console: Console) -> Iterator[Path]:
    """The local cloud as a child process. It ends when this process ends, however hard: its standard input closes."""
    root.mkdir(parents=True)
    log = root / "cloud.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "local_cloud.cloud", "--port", str(port), "--root", str(root), "--lifeline"]
        child = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True)
        try:
            _wait_until_up(child, port, log)
            console.print(f"Local cloud: AWS_ENDPOINT_URL=http://localhost:{port}")
            yield root
        except RunError:
            raise
        except Exception as error:
            # Whoever calls a cloud that has died hears of a refused connection, which says little.
            with suppress(subprocess.TimeoutExpired):
                child.wait(1)
            if child.returncode is None:
                raise
            raise RunError(
                f"the local cloud ended (exit code {child.returncode}); run it again. Its last lines:\n{_tail(log)}"
            ) from error
        finally:
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdin is not None:
                child.stdin.close()


def _wait_until_up(child: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if child.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/_ministack/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RunError(f"the local cloud did not start within {START_TIMEOUT_S} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:]) if log.exists() else ""


def cdk_environment(port: int, root: Path) -> dict[str, str]:
    """What the CDK's command line needs to take the local cloud for AWS."""
    url = f"http://localhost:{port}"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "AWS_ENDPOINT_URL": url,
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": emulator.ROOT_ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": emulator.ROOT_SECRET_ACCESS_KEY,
        "AWS_DEFAULT_REGION": emulator.REGION,
        "AWS_REGION": emulator.REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "CDK_DISABLE_CLI_TELEMETRY": "true",
        "CDK_DEFAULT_ACCOUNT": emulator.ACCOUNT,
        "CDK_DEFAULT_REGION": emulator.REGION,
        "JSII_SILENCE_WARNING_UNTESTED_NODE_VERSION": "1",
        "JSII_SILENCE_WARNING_DEPRECATED_NODE_VERSION": "1",
        "JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION": "1",
        "TMPDIR": str(root),
    }
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        environment.pop(name, None)
    return environment


def deploy(port: int, stage: str, override: dict[str, Any], root: Path, console: Console) -> dict[str, str]:
    """``cdk bootstrap`` and ``cdk deploy`` with the pinned CLI; returns the stack's outputs."""
    environment, url = cdk_environment(port, root), f"http://localhost:{port}"
    cdk = str(PROJECT / "node_modules" / ".bin" / "cdk")
    context = ["-c", f"stage={stage}", "-c", f"api_url={url}/restapis/{{api}}/{{stage}}/_user_request_"]
    if override:
        context += ["-c", f"override={json.dumps(override)}"]
    out, outputs = root / "cdk.out", root / "outputs.json"
    # Synthesized once, and deployed from there: the template that CloudFormation gets is the one on disk.
    _cdk([cdk, "synth", "--quiet", "--output", str(out), *context], environment, root, console, "Synthesizing")
    bootstrap = [cdk, "bootstrap", "--app", str(out), f"aws://{emulator.ACCOUNT}/{emulator.REGION}"]
    _cdk(bootstrap, environment, root, console, "Bootstrapping")
    deploy = [cdk, "deploy", "--app", str(out), "--all", "--require-approval", "never", "--outputs-file", str(outputs)]
    _cdk(deploy, environment, root, console, "Deploying")
    return dict(next(iter(json.loads(outputs.read_text()).values())))


def _cdk(command: list[str], environment: dict[str, str], root: Path, console: Console, what: str) -> None:
    started_s = time.monotonic()
    console.print(f"{what} …")
    log = root / "cdk.log"
    with log.open("ab") as output:
        code = subprocess.run(command, cwd=PROJECT, env=environment, stdout=output, stderr=output, check=False).returncode
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RunError(f"{what} failed (exit code {code}):\n" + "\n".join(lines[-12:]))
    console.print(f"  {what.lower()} took {time.monotonic() - started_s:.1f} s")


def upload(chosen: source.Source, weights: Path | None, bucket: str, console: Console) -> None:
    s3 = client("s3")
    for path, folder in ((chosen.upload, "incoming"), (weights, "incoming/weights")):
        if path is not None:
            source.put(s3, bucket, path, f"{folder}/{path.name}")
            console.print(f"Uploaded {path.name} to s3://{bucket}/{folder}/", markup=False)


def client(service: str) -> Any:
    session: Any = emulator.root_session()
    return session.client(service, endpoint_url=os.environ["AWS_ENDPOINT_URL"])


# ---- The execution ------------------------------------------------------------------------------------------------------


def execute(
    outputs: dict[str, str], machine_input: dict[str, Any], root: Path, console: Console
) -> tuple[Follower, dict[str, Any]]:
    states = client("stepfunctions")
    name = datetime.now(UTC).strftime("run-%Y%m%d-%H%M%S-%f")[:-3]  # to the millisecond: a name can be used once
    started = states.start_execution(stateMachineArn=outputs["StateMachineArn"], name=name, input=json.dumps(machine_input))
    console.print(f"Execution {name}, input {json.dumps(machine_input)}", markup=False)
    console.print(f"Live report: {os.environ['AWS_ENDPOINT_URL']}{live.PREFIX}{name}", markup=False)
    follower = Follower(
        states=states,
        sagemaker=client("sagemaker"),
        execution_arn=started["executionArn"],
        logs=root / "logs",
        console=console,
    )
    return follower, follower.follow()


def keep(outputs: dict[str, str], ended: dict[str, Any], root: Path) -> Path:
    """Copy the run's reports and logs out of the cloud, which takes its bucket with it; returns their folder."""
    kept = PROJECT / "build" / "runs" / str(ended["name"])
    kept.mkdir(parents=True, exist_ok=True)
    s3, prefix = client("s3"), f"runs/{ended['name']}/"
    for part in ("report", "rule-output", "evaluation", "prepare"):
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=outputs["DataBucket"], Prefix=prefix + part + "/"):
            for item in page.get("Contents", []):
                target = kept / item["Key"].removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                s3.download_file(outputs["DataBucket"], item["Key"], str(target))
    if (root / "logs").is_dir():
        shutil.copytree(root / "logs", kept / "logs", dirs_exist_ok=True)
    for log in ("cloud.log", "cdk.log", "denied.jsonl"):
        if (root / log).exists():
            shutil.copy(root / log, kept / log)
    (kept / "execution.json").write_text(json.dumps(ended, default=str, indent=1))
    return kept


def _describe_data(kept: Path, console: Console) -> None:
    """Say what preparation made of the pictures, as far as it came."""
    result = kept / "prepare" / "result.json"
    if not result.exists():
        return
    facts = json.loads(result.read_text())
    counts = ", ".join(f"{facts['num_pictures'].get(split, 0)} {split}" for split in ("train", "valid", "test"))
    made = (
        "as given"
        if facts["split"] == "given"
        else "made here, seeded and stratified, since the source had no valid or test folder"
    )
    refused = facts["num_quarantined"]
    console.print(f"\nData set {facts['dataset_hash']}: {facts['num_classes']} classes; {counts}; split {made}.", markup=False)
    if refused:
        console.print(
            f"{refused} file(s) were refused; their names and reasons: {kept / 'prepare' / 'refused.jsonl'}", markup=False
        )


def _failure_message(ended: dict[str, Any], kept: Path) -> str:
    cause = ended.get("cause") or ended.get("error") or "no cause given"
    page = kept / "report" / "report.html"
    known = page if page.exists() else kept
    return f"the execution {ended['name']} {ended['status'].lower().replace('_', ' ')}: {cause}\nWhat is known of it: {known}"


def _announce(outputs: dict[str, str], ended: dict[str, Any], kept: Path, console: Console) -> None:
    output = json.loads(ended["output"])
    example = _example(kept)
    token = client("secretsmanager").get_secret_value(SecretId=outputs["TokenSecretArn"])["SecretString"]
    console.print()
    console.print(f"Test accuracy (top 1): {output['test_top1']:.4f}")
    console.print(f"Report:                {kept / 'report' / 'report.html'}", markup=False)
    console.print(f"API:                   {outputs['ApiUrl']}", markup=False)
    print(
        f"Try it:\n  curl -s -H 'Authorization: Bearer {token}' -H 'Content-Type: {_type(example)}' "
        f"--data-binary @{example} {outputs['ApiUrl'].rstrip('/')}/predict"
    )


def _example(kept: Path) -> Path:
    smoke = json.loads((kept / "evaluation" / "smoke" / "smoke.json").read_text())
    return kept / "evaluation" / "smoke" / str(smoke[0]["file"])


def _type(picture: Path) -> str:
    return "image/png" if picture.suffix == ".png" else "image/jpeg"


def _post_and_report(
    outputs: dict[str, str], ended: dict[str, Any], kept: Path, follower: Follower, total_s: float, console: Console
) -> None:
    """POST one test picture as a user would, and close with one line of JSON."""
    example = _example(kept)
    expected = json.loads((example.parent / "smoke.json").read_text())[0]["expected"]
    token = client("secretsmanager").get_secret_value(SecretId=outputs["TokenSecretArn"])["SecretString"]
    request = urllib.request.Request(  # noqa: S310 - our own address
        f"{outputs['ApiUrl'].rstrip('/')}/predict",
        data=example.read_bytes(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": _type(example)},
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        answer = json.loads(response.read())
    console.print(f"Posted {example.name} (expected {expected}):", markup=False)
    print(json.dumps(answer, indent=1))
    print(
        json.dumps(
            {
                "test_top1": json.loads(ended["output"])["test_top1"],
                "api_url": outputs["ApiUrl"],
                "report": str(kept / "report" / "report.html"),
                "prediction": answer["predictions"][0]["label"],
                "expected": expected,
                "execution": ended["name"],
                "seconds": {**follower.seconds(), "total": round(total_s, 1)},
            }
        )
    )


if __name__ == "__main__":
    main()
