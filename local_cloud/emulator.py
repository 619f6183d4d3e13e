"""Every name of ministack that the local cloud uses, and nothing else of it.

ministack (PyPI, pinned exactly) is run unmodified, with ``AUTH=true``. Two of its dictionaries and a handful of functions are not a
public interface; they are gathered here, and ``tests/unit/test_local_emulator.py`` fails when a new version moves one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import string
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import boto3
import botocore.exceptions

from local_cloud.service import Caller, Permission, ServiceError

ROOT_ACCESS_KEY_ID = "test"
"""ministack's root credentials: the deployer's, and the cloud's own book-keeping's."""
ROOT_SECRET_ACCESS_KEY = "test"  # noqa: S105 - ministack's published default
ACCOUNT = "000000000000"
REGION = "us-east-1"
FUNCTION_PROCESSES = max(4, 2 * (os.cpu_count() or 1))
"""Execution environments of a function on this machine."""


def configure(root: Path, port: int) -> None:
    """Set ministack's environment; must run before ``application`` imports it, which reads it once."""
    scratch = root / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        AUTH="true",
        GATEWAY_PORT=str(port),
        BIND_HOST="127.0.0.1",
        IOT_MTLS_ENABLED="0",  # a listener for MQTT on every interface, which nothing here needs
        LAMBDA_EXECUTOR="local",
        LAMBDA_STRICT="0",
        LOG_LEVEL="WARNING",
        MINISTACK_REGION=REGION,
        TMPDIR=str(scratch),
        STATE_DIR=str(root / "ministack"),
        S3_DATA_DIR=str(root / "s3"),
        # Lambda's Node.js runtime brings the AWS SDK, which CDK's bucket-emptying function requires; here npm does (package.json).
        NODE_PATH=str(Path(__file__).resolve().parent.parent / "node_modules"),
        AWS_DEFAULT_REGION=REGION,
        AWS_ENDPOINT_URL=f"http://localhost:{port}",
        # An address instead of a name: the JavaScript SDK would put the bucket's name before a name, and look for that host.
        AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID=ROOT_ACCESS_KEY_ID,
        AWS_SECRET_ACCESS_KEY=ROOT_SECRET_ACCESS_KEY,
        AWS_EC2_METADATA_DISABLED="true",
    )


def application() -> Any:
    """ministack's ASGI application."""
    from ministack.app import app

    return app


def root_session() -> boto3.Session:
    """The account's root."""
    return boto3.Session(ROOT_ACCESS_KEY_ID, ROOT_SECRET_ACCESS_KEY, region_name=REGION)


# ---- Who calls, and may they ------------------------------------------------------------------------------------------


def authenticate(
    scope: dict[str, Any], headers: dict[str, str], body: bytes, permissions: list[Permission], service: str
) -> Caller:
    """Check the request's signature and each permission with ministack's own policy engine.

    Raises ``ServiceError`` with AWS's codes: a failed signature (403) or ``AccessDeniedException`` (400 in JSON protocols).
    """
    from ministack.app import _request_account_scope
    from ministack.core import iam_evaluator, responses, router

    query = parse_qs(scope.get("query_string", b"").decode(), keep_blank_values=True)
    key = router.extract_access_key_id(headers, query)
    if key:
        responses.set_request_account_id(_request_account_scope(key))
    responses.set_request_region(router.extract_region(headers, query))
    iam_evaluator.pin_request_origin((scope.get("client") or ("127.0.0.1",))[0], True)
    raw_path = scope.get("raw_path") or quote(scope["path"]).encode()
    iam_evaluator.pin_signed_request(scope["method"], raw_path.decode("latin-1"), query, scope["headers"])
    iam_evaluator.pin_signed_body(body)
    for permission in permissions:
        _enforce(key, permission, service)
    return Caller(key, str((iam_evaluator.resolve_caller_identity(key) or {}).get("userArn", "unknown")))


def _enforce(access_key_id: str, permission: Permission, service: str) -> None:
    from ministack.core import iam_evaluator

    denied = iam_evaluator.enforce(
        access_key_id, permission.action, service, REGION, resource_arn=permission.resource, service_context=permission.context
    )
    if isinstance(denied, iam_evaluator.AuthError):
        raise ServiceError(denied.code, denied.message, 403)
    if denied is not None:
        raise ServiceError(
            "AccessDeniedException",
            f"User: {denied.principal_arn} is not authorized to perform: {permission.action} on resource: {permission.resource}",
        )


def caller(headers: dict[str, str], query_string: bytes) -> str:
    """ARN of who signed a request, unchecked; of the account's root where nobody did."""
    from ministack.core import iam_evaluator

    return str(iam_evaluator.request_caller_arn(headers, parse_qs(query_string.decode("latin-1"), keep_blank_values=True)))


def record_decisions(write: Callable[[dict[str, str]], None]) -> None:
    """Tell ``write`` of every decision of the policy engine: principal, action, resource, decision. The root's are none."""
    from ministack.core import iam_evaluator

    decide = iam_evaluator.evaluate

    def recorded(context: Any, policies: Any, *limits: Any) -> Any:
        result = decide(context, policies, *limits)
        found = {"principal": context.principal_arn, "action": context.action, "resource": context.resource_arn}
        write({**found, "decision": result.decision})
        return result

    iam_evaluator.evaluate = recorded


def correct_log_group_arns() -> None:
    """IAM is asked about a log group as AWS asks, with ``:*`` behind its name (ministack: without, which ``…:*`` does not allow).

    https://docs.aws.amazon.com/AmazonCloudWatch/latest/logs/iam-access-control-overview-cwl.html: all actions but those of tags.
    """
    from ministack.core import iam_evaluator

    decide = iam_evaluator.evaluate
    group = re.compile(r"arn:aws:logs:[^:]+:\d+:log-group:[^:]+")

    def named(context: Any, policies: Any, *limits: Any) -> Any:
        if group.fullmatch(context.resource_arn) and "Tag" not in context.action:
            context = replace(context, resource_arn=f"{context.resource_arn}:*")
        return decide(context, policies, *limits)

    iam_evaluator.evaluate = named


def assume(role_arn: str, service: str, name: str) -> boto3.Session:
    """Credentials of a role as an AWS service assumes it: the trust policy must name ``service``, and its conditions hold.

    AWS sets ``aws:SourceAccount`` to the account on whose behalf it acts; so does this.
    """
    from ministack.services import sts

    client = root_session().client("iam", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    role_name = role_arn.rsplit("/", 1)[-1]
    try:
        role = client.get_role(RoleName=role_name)["Role"]
    except botocore.exceptions.ClientError as error:
        raise ServiceError("ValidationException", f"The role {role_arn} does not exist: create it, or correct the ARN") from error
    if not _trusts(role["AssumeRolePolicyDocument"], service):
        raise ServiceError(
            "ValidationException",
            f"{service} cannot assume the role {role_arn}: its trust policy must allow sts:AssumeRole to the principal {service}",
        )
    key, secret, token = f"ASIA{uuid.uuid4().hex[:16].upper()}", uuid.uuid4().hex, uuid.uuid4().hex
    sts.register_session(
        key,
        {
            "Arn": f"arn:aws:sts::{ACCOUNT}:assumed-role/{role_name}/{name[:64]}",
            "UserId": f"{role['RoleId']}:{name[:64]}",
            "SecretAccessKey": secret,
            "SessionToken": token,
            "Expiration": time.time() + 12 * 3600,
        },
    )
    return boto3.Session(key, secret, token, region_name=REGION)


def _trusts(document: Any, service: str) -> bool:
    policy = json.loads(document) if isinstance(document, str) else document
    return any(_statement_trusts(statement, service) for statement in policy.get("Statement", []))


def _statement_trusts(statement: dict[str, Any], service: str) -> bool:
    from ministack.core import iam_evaluator

    principals = statement.get("Principal", {}).get("Service", [])
    context = iam_evaluator.EvalContext(
        principal_arn=service, principal_type="Service", principal_account=ACCOUNT, action="sts:AssumeRole", resource_arn="*",
        region=REGION, service_context={"aws:sourceaccount": ACCOUNT},
    )  # fmt: skip
    return (
        statement.get("Effect") == "Allow"
        and service in ([principals] if isinstance(principals, str) else principals)
        and bool(iam_evaluator._conditions_met(statement.get("Condition", {}), context))
    )


# ---- CloudFormation ---------------------------------------------------------------------------------------------------


def add_resource_type(
    name: str,
    create: Callable[[str, dict[str, Any], str], tuple[str, dict[str, Any]]],
    delete: Callable[[str, dict[str, Any]], None],
) -> None:
    """Teach CloudFormation a type it lacks. ``create(logical_id, properties, stack)`` gives the physical id and attributes."""
    from ministack.services.cloudformation import provisioners

    if name in provisioners._RESOURCE_HANDLERS:
        raise RuntimeError(f"ministack now provisions {name} itself: remove it from local_cloud/emulator.py's callers")
    provisioners._RESOURCE_HANDLERS[name] = {"create": create, "delete": delete}


def correct_secrets() -> None:
    """Two corrections of ministack's secrets, so that a template means what it means on AWS.

    ``Ref`` of a secret is its ARN (ministack: its name, which no policy's resource matches), and a generated secret honours
    ``ExcludePunctuation`` and comes from the system's random source (ministack: neither).
    https://docs.aws.amazon.com/AWSCloudFormation/latest/TemplateReference/aws-resource-secretsmanager-secret.html
    """
    from ministack.services.cloudformation import provisioners

    handlers = provisioners._RESOURCE_HANDLERS["AWS::SecretsManager::Secret"]
    create, update, delete = handlers["create"], handlers["update"], handlers["delete"]

    def by_arn(made: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        return str(made[1].get("Arn", made[0])), made[1]

    handlers["create"] = lambda logical_id, given, stack: by_arn(create(logical_id, _generated(given), stack))
    handlers["update"] = lambda arn, *given: by_arn(update(_secret_name(arn), *given))
    handlers["delete"] = lambda arn, *given: delete(_secret_name(arn), *given)


def correct_bucket_tags() -> None:
    """A template's tags reach its buckets (ministack: they do not): CDK's clean-up empties only a bucket that is tagged for it."""
    from ministack.services import s3
    from ministack.services.cloudformation import provisioners

    handlers = provisioners._RESOURCE_HANDLERS["AWS::S3::Bucket"]
    create, update = handlers["create"], handlers["update"]

    def tagged(made: tuple[str, dict[str, Any]], given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        s3._bucket_tags[made[0]] = {str(tag["Key"]): str(tag["Value"]) for tag in given.get("Tags", [])}
        return made

    handlers["create"] = lambda logical_id, given, stack: tagged(create(logical_id, given, stack), given)
    handlers["update"] = lambda physical_id, old, new, stack: tagged(update(physical_id, old, new, stack), new)


def correct_build_logs() -> None:
    """A template's log group reaches its CodeBuild project (ministack: it does not, and builds write to the default one)."""
    from ministack.services import codebuild
    from ministack.services.cloudformation import provisioners

    handlers = provisioners._RESOURCE_HANDLERS["AWS::CodeBuild::Project"]
    create, update = handlers["create"], handlers["update"]

    def logged(made: tuple[str, dict[str, Any]], given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        codebuild._projects[made[0]]["logsConfig"] = provisioners._codebuild_cfn_to_api(given.get("LogsConfig", {}))
        return made

    shape = codebuild._project_shape
    codebuild._project_shape = lambda project: {**shape(project), "logsConfig": project.get("logsConfig", {})}
    handlers["create"] = lambda logical_id, given, stack: logged(create(logical_id, given, stack), given)
    handlers["update"] = lambda physical_id, old, new, stack: logged(update(physical_id, old, new, stack), new)


def correct_function_deletion() -> None:
    """A deleted stack's functions take their processes and folders with them (ministack: idle ones stay until the cloud ends)."""
    from ministack.services import lambda_svc
    from ministack.services.cloudformation import provisioners

    handlers = provisioners._RESOURCE_HANDLERS["AWS::Lambda::Function"]
    delete = handlers["delete"]

    def ended(physical_id: str, given: dict[str, Any]) -> None:
        delete(physical_id, given)
        lambda_svc.invalidate_worker(physical_id, account=ACCOUNT, region=REGION)

    handlers["delete"] = ended


def bound_function_processes() -> None:
    """At most ``FUNCTION_PROCESSES`` for a function: a further invocation waits for one of them.

    ministack starts one for every invocation under way, as AWS starts an execution environment, but counts the start towards the
    function's timeout. Fifty at once take so long on a few cores that functions end by it. A function that calls itself as deep
    as that would wait for ever.
    """
    from ministack.services import lambda_svc

    acquire, release, freed = lambda_svc.acquire_worker, lambda_svc.release_worker, threading.Condition()

    def acquired(*function: Any, **named: Any) -> Any:
        with freed:
            while (worker := acquire(*function, **{**named, "max_concurrency": FUNCTION_PROCESSES}))[0] is None:
                freed.wait(0.5)  # a process that was ended instead of released makes room too
            return worker

    def released(worker: Any) -> None:
        release(worker)
        with freed:
            freed.notify_all()

    lambda_svc.acquire_worker, lambda_svc.release_worker = acquired, released


def watch_repository_deletion(gone: Callable[[str], None]) -> None:
    """``gone(name)`` after a repository was deleted by a stack or a request: ministack does not know what images are made of."""
    from ministack.services import ecr

    delete = ecr._delete_repository

    def deleted(request: dict[str, Any]) -> Any:
        answer = delete(request)
        if answer[0] == 200:
            gone(str(request["repositoryName"]))
        return answer

    ecr._delete_repository = deleted


def count_embedded_metrics() -> None:
    """Metrics that a Lambda writes into its log in CloudWatch's embedded metric format become metrics, as AWS makes them.

    https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
    """
    from ministack.services import cloudwatch, lambda_svc

    write = lambda_svc._emit_lambda_logs

    def count(func: dict[str, Any], request_id: str, log_text: str, *rest: Any, **named: Any) -> None:
        write(func, request_id, log_text, *rest, **named)
        for namespace, name, value, dimensions in embedded_metrics(log_text or ""):
            cloudwatch.record_metric(namespace, name, value, "Count", dimensions)
            cloudwatch._evaluate_all_alarms()

    lambda_svc._emit_lambda_logs = count


def correct_alarms() -> None:
    """What ministack's alarms lack.

    An alarm without data in its window, whose missing data are not breaching, falls silent (ministack: it keeps its state).
    An alarm over several metrics is kept and stays INSUFFICIENT_DATA: nobody computes it here (ministack: its stack fails).
    """
    from ministack.services import cloudwatch
    from ministack.services.cloudformation import provisioners

    record = provisioners._cw_metric_alarm_record

    def kept(name: str, given: dict[str, Any]) -> dict[str, Any]:
        if not given.get("Metrics"):
            return dict(record(name, given))
        one = {**given, "Metrics": None, "Namespace": "several", "MetricName": "several"}
        return {**record(name, one), "Namespace": "", "MetricName": "", "Metrics": given["Metrics"]}

    provisioners._cw_metric_alarm_record = kept
    evaluate = cloudwatch._evaluate_alarm

    def silenced(alarm: dict[str, Any]) -> None:
        evaluate(alarm)
        if alarm.get("TreatMissingData") != "notBreaching" or alarm.get("StateValue") != "ALARM" or not alarm.get("MetricName"):
            return
        start = time.time() - alarm.get("Period", 60) * alarm.get("EvaluationPeriods", 1)
        name = (alarm["Namespace"], alarm["MetricName"])
        if not any(
            point["Timestamp"] >= start for key, points in cloudwatch._metrics.items() if key[:2] == name for point in points
        ):
            alarm["StateValue"], alarm["StateReason"] = "OK", "No data in the alarm's window: treated as not breaching"

    cloudwatch._evaluate_alarm = silenced


def embedded_metrics(log_text: str) -> list[tuple[str, str, float, dict[str, str]]]:
    """``(namespace, metric, value, dimensions)`` of the lines that are metrics."""
    found = []
    for line in log_text.splitlines():
        if not line.startswith('{"_aws"'):
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = json.loads(line)
            for rule in content["_aws"]["CloudWatchMetrics"]:
                dimensions = {name: str(content[name]) for names in rule["Dimensions"] for name in names}
                found += [(rule["Namespace"], m["Name"], float(content[m["Name"]]), dimensions) for m in rule["Metrics"]]
    return found


def _generated(properties: dict[str, Any]) -> dict[str, Any]:
    """The secret's properties with a generated text in place of the rule for it."""
    rule = properties.get("GenerateSecretString")
    if rule is None or "SecretStringTemplate" in rule:
        return properties
    kinds = {
        "ExcludeLowercase": string.ascii_lowercase,
        "ExcludeUppercase": string.ascii_uppercase,
        "ExcludeNumbers": string.digits,
        "ExcludePunctuation": string.punctuation,
    }
    alphabet = "".join(text for name, text in kinds.items() if str(rule.get(name, False)).lower() != "true")
    allowed = [character for character in alphabet if character not in rule.get("ExcludeCharacters", "")]
    text = "".join(secrets.choice(allowed) for _ in range(int(rule.get("PasswordLength", 32))))
    return {**properties, "SecretString": text}


def _secret_name(arn: str) -> str:
    """``arn:…:secret:<name>-<6 characters>`` → ``<name>``."""
    return arn.split(":secret:", 1)[1].rsplit("-", 1)[0] if ":secret:" in arn else arn
