"""What else the deployed API and the state machine do with a model: several pictures, heat maps, a whole prefix."""

from __future__ import annotations

import base64
import csv
import io
import json
import urllib.parse

import psutil
import pyarrow.parquet as pq
import pytest
from deployment import inside, typical

pytestmark = pytest.mark.pipeline


def test_several_pictures_at_once_as_json_and_as_a_form(finished, deployed, digits):
    pictures = {label: typical(digits, label).read_bytes() for label in ("2", "6")}
    body = json.dumps({"images": [base64.b64encode(one).decode() for one in [*pictures.values(), b"broken"]]}).encode()
    status, answer = deployed.request("predict/batch?top_k=1", body, {"Content-Type": "application/json", **deployed.authorized})
    assert status == 200, answer
    assert [result["predictions"][0]["label"] for result in answer["results"][:2]] == list(pictures)
    assert answer["results"][2]["error"]["code"] == "not_decodable"
    parts = [f'--b\r\nContent-Disposition: form-data; name="f"; filename="{label}"\r\n\r\n'.encode() for label in pictures]
    form = b"".join(head + one + b"\r\n" for head, one in zip(parts, pictures.values(), strict=True)) + b"--b--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=b", **deployed.authorized}
    status, again = deployed.request("predict/batch?top_k=1", form, kind)
    assert (status, again["results"]) == (200, answer["results"][:2])


def test_nothing_of_the_local_cloud_can_be_reached_from_another_machine(finished, deployed):
    """The cloud itself, its functions and the endpoint's server: an endpoint has no token of its own."""
    ours = [one for one in psutil.process_iter() if inside(one, [deployed.cloud.root])]
    heard = {(one.pid, at.laddr) for one in ours for at in one.net_connections() if at.status == psutil.CONN_LISTEN}
    assert len({process for process, _ in heard}) >= 2, "the cloud and the endpoint's server listen"
    assert {at.ip for _, at in heard} <= {"127.0.0.1", "::1"}, heard


def test_a_heat_map_comes_through_the_gateway_byte_for_byte(finished, deployed, digits):
    picture = typical(digits, "6").read_bytes()
    headers = {"Content-Type": "image/png", "Accept": "image/png", **deployed.authorized}
    content, answered = deployed.fetch("explain", picture, headers)
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert urllib.parse.unquote(answered["X-Label"]) == "6"


def test_the_artifact_says_in_which_form_it_serves_and_why(finished, deployed):
    key = finished.output["model_data_url"].removeprefix(f"s3://{deployed.outputs['DataBucket']}/")
    run = key.split("/")[1]
    content = (
        deployed.cloud.client("s3")
        .get_object(Bucket=deployed.outputs["DataBucket"], Key=f"runs/{run}/evaluation/evaluation.json")["Body"]
        .read()
    )
    forms = json.loads(content)["forms"]
    assert {form["form"] for form in forms} >= {"onnxruntime-fp32", "onnxruntime-int8", "openvino-fp32", "openvino-int8"}
    (chosen,) = [form for form in forms if form["chosen"]]
    reference = next(form for form in forms if form["form"] == "onnxruntime-fp32")
    assert chosen["valid_top1"] >= reference["valid_top1"] - 0.005
    assert chosen["batch1_ms"] <= reference["batch1_ms"]
    status, labels = deployed.request("labels", None, deployed.authorized)
    assert status == 200
    assert len(labels["labels"]) == 10


def test_a_whole_prefix_is_classified_by_one_execution(finished, deployed, digits):
    s3, bucket = deployed.cloud.client("s3"), deployed.outputs["DataBucket"]
    for label in ("3", "7"):
        for path in sorted((digits / "test" / label).glob("*.png"))[:5]:
            s3.put_object(Bucket=bucket, Key=f"incoming/new/{label}/{path.name}", Body=path.read_bytes())
    s3.put_object(Bucket=bucket, Key="incoming/new/notes.txt", Body=b"no picture")
    denied = deployed.denied()
    _, ended = deployed.execute({"action": "batch", "input": f"s3://{bucket}/incoming/new/"})
    assert ended["status"] == "SUCCEEDED", ended.get("cause")
    assert deployed.denied() == denied
    place = json.loads(ended["output"])["predictions_uri"].removeprefix(f"s3://{bucket}/")
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=bucket, Prefix=place)["Contents"]]
    assert len(keys) == 3
    found = {key.rpartition(".")[2]: s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}
    rows = pq.read_table(io.BytesIO(found["parquet"])).to_pylist()
    assert len(rows) == 11
    right = [row for row in rows if row["label"] == row["file"].split("/")[0]]
    assert len(right) >= 8
    assert [row["file"] for row in rows if row["error"]] == ["notes.txt"]
    assert json.loads(found["json"])["pictures"] == 11
    assert [line["file"] for line in csv.DictReader(io.StringIO(found["csv"].decode()))] == [row["file"] for row in rows]
