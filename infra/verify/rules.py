"""Each request against botocore's model of its service, and against what the service enforces beyond its model.

The rules that no model states are AWS's own, from the API reference of each operation (https://docs.aws.amazon.com/sagemaker/latest/
APIReference/) and the pages named beside them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from infra import code, requests
from infra.verify import contracts
from infra.verify.findings import Finding, shown
from infra.verify.language import Call, call_of
from local_cloud.interpreter import to_request
from local_cloud.validation import problems

Json = dict[str, Any]
Said = Iterator[tuple[str, str]]
"""``(value, remedy)`` of each fault."""

_EXPRESSION_MARK = "{%"


def check(machine: Json, state: str, request: Any, handlers: dict[str, str], alarms: frozenset[str]) -> list[Finding]:
    """Everything wrong with the request of one state. ``handlers``: function ARN -> handler; ``alarms``: names in the template."""
    definition = machine["States"][state]
    try:
        call = call_of(definition["Resource"])
    except ValueError as error:
        return [Finding("request", state, shown(definition["Resource"]), str(error))]
    try:
        native = to_request(request, call.model.input_shape, call.operation) if call.model.input_shape else {}
    except ValueError as error:
        return [Finding("request", state, shown(error), f"see {call.service}'s {call.operation}")]
    said = [(value, f"see {call.service}'s {call.operation}") for value in _modelled(call, native)]
    if not said:
        said = list(_beyond(call, native, definition, handlers, alarms))
    return [Finding("request", state, shown(value), remedy) for value, remedy in said]


def _modelled(call: Call, request: Json) -> list[str]:
    """Faults by botocore's model: required and unknown fields, types, enums, patterns, lengths, ranges."""
    if call.service == "lambda":
        request = {name: value for name, value in request.items() if name != "Payload"}
    return _problems(call, json.dumps(request, sort_keys=True, default=lambda value: {"bytes": value.decode()}))


@functools.lru_cache(maxsize=20_000)
def _problems(call: Call, text: str) -> list[str]:
    def blob(value: Json) -> Any:
        return value["bytes"].encode() if set(value) == {"bytes"} else value

    return problems(call.model, json.loads(text, object_hook=blob))


def _beyond(call: Call, request: Json, definition: Json, handlers: dict[str, str], alarms: frozenset[str]) -> Said:
    if _EXPRESSION_MARK in json.dumps(request, default=str):
        yield "an expression was sent as text", "write it as {% … %} alone: Step Functions evaluates only whole strings"
    rules: dict[str, Callable[[Json], Said]] = {
        "CreateProcessingJob": _processing,
        "CreateTrainingJob": _training,
        "CreateHyperParameterTuningJob": _tuning,
        "CreateModelPackage": _package,
        "CreateModel": _model,
        "CreateEndpointConfig": _endpoint_config,
        "RegisterScalableTarget": _target,
        "PutScalingPolicy": _target,
        "DeregisterScalableTarget": _target,
    }
    if call.operation in rules:
        yield from rules[call.operation](request)
    if call.operation == "UpdateEndpoint":
        yield from _update(request, alarms)
    if call.service == "lambda":
        yield from _invoke(request, handlers)
    if call.service == "s3":
        yield from _object(request)
    if call.sync:
        yield from _limits(request, definition)
    yield from _tags(request.get("Tags", []))


def _limits(request: Json, definition: Json) -> Said:
    """A state that gives up before its job has reached its own limit leaves a job behind that nobody waits for."""
    limits = request.get("TrainingJobDefinition", request).get("StoppingCondition", {})
    longest = max(limits.get("MaxWaitTimeInSeconds", 0), limits.get("MaxRuntimeInSeconds", 0))
    if definition["TimeoutSeconds"] <= longest:
        yield f"TimeoutSeconds is {definition['TimeoutSeconds']}", f"expected more than the job's own {longest} s"


def _tags(tags: list[Json]) -> Said:
    keys = [tag["Key"] for tag in tags]
    if len(keys) != len(set(keys)) or len(keys) > 50:
        yield f"tags {keys}", "expected at most 50 tags with different keys"
    for tag in tags:
        # https://docs.aws.amazon.com/tag-editor/latest/userguide/best-practices-and-strats.html
        if tag["Key"].lower().startswith("aws:") or not re.fullmatch(r"[\w .:/=+@-]*", tag["Value"]):
            yield (
                f"tag {tag['Key']}={tag['Value']}",
                "expected letters, digits, spaces and . : / = + - @ _, and no name that begins with aws:",
            )


def _uri(value: Any) -> Said:
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/\S+", str(value)) or "//" in str(value)[5:]:
        yield f"address {shown(value)}", "expected s3://<bucket>/<key> without spaces or empty folders"


def _unique(what: str, values: list[Any]) -> Said:
    if len(values) != len(set(values)):
        yield f"{what} {values}", "expected each name once"


def _environment(values: dict[str, str]) -> Said:
    for name in values:
        if name not in contracts.environment_names():
            yield f"environment variable {name}", "neither our code nor a library of ours reads it; correct or remove it"
    level = values.get("LOG_LEVEL", "INFO")
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        yield f"LOG_LEVEL is {level}", "expected DEBUG, INFO, WARNING or ERROR"
    for name, value in values.items():
        places = (f"{requests.INPUT}/wheels", f"{requests.CHANNELS}/wheels")
        if name == "PIP_FIND_LINKS":
            if value not in places:
                yield f"PIP_FIND_LINKS is {value}", f"expected one of {', '.join(places)}"
        elif value != _SWITCHES.get(name, value):
            yield f"{name} is {value}", f"expected {_SWITCHES[name]}"


_SWITCHES = {
    **dict.fromkeys(("PIP_NO_DEPS", "PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_INDEX"), "1"),
    "PIP_ROOT_USER_ACTION": "ignore",
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
}
"""Environment variables of libraries that have one value in our jobs."""


# --- jobs ------------------------------------------------------------------------------------------------------------------


def _processing(request: Json) -> Said:
    program = request["AppSpecification"]
    entry, arguments = program.get("ContainerEntrypoint", []), program.get("ContainerArguments", [])
    script = entry[-1] if entry else ""
    if entry[:2] != ["/bin/bash", "-c"] or len(entry) != 4 or "tar -xzf" not in entry[2] or 'exec python "$0" "$@"' not in entry[2]:
        yield f"ContainerEntrypoint {shown(entry)}", "expected bash, which unpacks the code and runs the script"
    elif not script.endswith(".py") or not (code.MODEL_CODE / script).is_file():
        yield f"script {script}", "expected a script of model_code/"
    else:
        yield from _flags(script, arguments)
    inputs, outputs = request.get("ProcessingInputs", []), request["ProcessingOutputConfig"]["Outputs"]
    yield from _unique("InputName", [one["InputName"] for one in inputs])
    yield from _unique("OutputName", [one["OutputName"] for one in outputs])
    paths = [one["S3Input"]["LocalPath"] for one in inputs] + [one["S3Output"]["LocalPath"] for one in outputs]
    yield from _unique("LocalPath", paths)
    for path in paths:
        # https://docs.aws.amazon.com/sagemaker/latest/dg/build-your-own-processing-container.html
        if not path.startswith("/opt/ml/processing/"):
            yield f"LocalPath {path}", "expected a folder below /opt/ml/processing/"
    if not any(one["S3Input"]["LocalPath"] == f"{requests.INPUT}/code" for one in inputs):
        yield f"LocalPath {paths}", f"expected the code at {requests.INPUT}/code, where the container looks for it"
    for one in inputs:
        yield from _uri(one["S3Input"]["S3Uri"])
        if one["S3Input"].get("S3DataType") == "S3Prefix" and one["S3Input"].get("S3InputMode") not in ("File", "Pipe"):
            yield f"input {one['InputName']}", "expected S3InputMode File"
    for one in outputs:
        yield from _uri(one["S3Output"]["S3Uri"])
    named = {value for value in arguments if isinstance(value, str) and value.startswith("/opt/ml/processing/")}
    for value in named:
        if not any(
            value == path or value.startswith(f"{path}/")
            for path in [*paths, f"{requests.INPUT}/pretrained", f"{requests.INPUT}/run"]
        ):
            yield f"folder {value}", f"expected one of the job's own: {', '.join(paths)}"
    yield from _environment(request.get("Environment", {}))


def _flags(script: str, arguments: list[str]) -> Said:
    known, given = contracts.script_flags(script), arguments[::2]
    for flag in given:
        if flag.removeprefix("--") not in known or not flag.startswith("--"):
            yield f"flag {flag}", f"{script} takes {', '.join(sorted(known))}"
    yield from _unique("flag", given)
    for flag, value in zip(given, arguments[1::2], strict=False):
        if "uri" in flag and value.startswith("s3:"):
            yield from _uri(value)


def _channels(request: Json) -> Said:
    channels = request["InputDataConfig"]
    names = [one["ChannelName"] for one in channels]
    yield from _unique("ChannelName", names)
    for name in names:
        if name not in ("dataset", "features", "pretrained", "wheels", "code"):
            yield f"channel {name}", "the training reads dataset, features and pretrained, pip wheels, and the toolkit code"
    if "dataset" not in names:
        yield f"channels {names}", "expected dataset among them"
    for one in channels:
        yield from _uri(one["DataSource"]["S3DataSource"]["S3Uri"])
    yield from _uri(request["OutputDataConfig"]["S3OutputPath"])
    if "CheckpointConfig" in request:
        yield from _uri(request["CheckpointConfig"]["S3Uri"])
        if request["CheckpointConfig"].get("LocalPath", "/opt/ml/checkpoints") != "/opt/ml/checkpoints":
            yield (
                f"checkpoints in {request['CheckpointConfig']['LocalPath']}",
                "expected /opt/ml/checkpoints, where the training writes them",
            )


def _spot(request: Json) -> Said:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/model-managed-spot-training.html"""
    limits, spot = request["StoppingCondition"], request.get("EnableManagedSpotTraining", False)
    if spot and limits.get("MaxWaitTimeInSeconds", 0) < limits["MaxRuntimeInSeconds"]:
        yield f"StoppingCondition {limits}", "expected MaxWaitTimeInSeconds of at least MaxRuntimeInSeconds with spot training"
    if not spot and "MaxWaitTimeInSeconds" in limits:
        yield f"StoppingCondition {limits}", "expected no MaxWaitTimeInSeconds without spot training"
    if spot and "CheckpointConfig" not in request:
        yield "spot training without CheckpointConfig", "add it: an interrupted job would begin again"


def _hyperparameters(values: dict[str, str]) -> Said:
    known = {*contracts.documents()["static"], *contracts.TOOLKIT}
    for name in values:
        if name not in known:
            yield f"hyperparameter {name}", "the training code has none of this name"
    program = values.get("sagemaker_program", "")
    if not (code.MODEL_CODE / program).is_file() or not program.endswith(".py"):
        yield f"sagemaker_program is {program}", "expected a script of model_code/"
    archive = values.get("sagemaker_submit_directory", "")
    if not archive.startswith(f"{requests.CHANNELS}/code/"):
        yield from _uri(archive)
    if not archive.endswith(".gz"):
        yield f"sagemaker_submit_directory is {archive}", "expected the archive with our code"
    if values.get("sagemaker_torch_distributed_enabled", "true") != "true":
        yield "sagemaker_torch_distributed_enabled", "expected true, or leave it out"


def _metrics(request: Json) -> list[str]:
    return [one["Name"] for one in request["AlgorithmSpecification"].get("MetricDefinitions", [])]


TRAININGS_LINE = (
    "epoch=3/8 train_loss=0.5100 train_top1=0.9100 valid_loss=0.4200 valid_top1=0.9300 best_valid_top1=0.9312 "
    "learning_rate=0.0195 seconds=2.2"
)
"""A line as trainings print them (``classifier.training.Epoch.line``), for the metrics' patterns."""


def _metric_definitions(request: Json) -> Said:
    yield from _unique("metric", _metrics(request))
    for one in request["AlgorithmSpecification"].get("MetricDefinitions", []):
        try:
            found = re.findall(one["Regex"], TRAININGS_LINE)
        except re.error as error:
            yield f"metric {one['Name']}: {one['Regex']}", f"correct the pattern: {error}"
            continue
        if len(found) != 1 or not re.fullmatch(r"[0-9.]+", str(found[0])):
            yield f"metric {one['Name']}: {one['Regex']}", f"expected one number in a line such as {TRAININGS_LINE!r}"
        split, _, what = one["Name"].partition(":")
        if (split, what) not in {
            ("train", "loss"),
            ("train", "top1"),
            ("valid", "loss"),
            ("valid", "top1"),
            ("valid", "best_top1"),
        }:
            yield f"metric {one['Name']}", "expected train: or valid: with loss, top1 or best_top1, as the report reads them"


def _machines(resources: Json, request: Json, values: Json) -> Said:
    encrypted = request.get("EnableInterContainerTrafficEncryption", False)
    if resources["InstanceCount"] > 1 and not encrypted:
        yield "EnableInterContainerTrafficEncryption is false", "expected true: gradients travel between several machines"
    if resources["InstanceCount"] == 1 and encrypted:
        yield "EnableInterContainerTrafficEncryption is true", "expected false with one machine"
    if resources["InstanceCount"] > 1 and "sagemaker_torch_distributed_enabled" not in values:
        yield f"{resources['InstanceCount']} machines without torchrun", "expected sagemaker_torch_distributed_enabled"


def _training(request: Json) -> Said:
    yield from _channels(request)
    yield from _spot(request)
    yield from _hyperparameters(request["HyperParameters"])
    for name in ("learning_rate", "batch_size"):
        if name not in request["HyperParameters"]:
            yield f"hyperparameter {name} is missing", "expected what the search found"
    yield from _metric_definitions(request)
    yield from _machines(request["ResourceConfig"], request, request["HyperParameters"])
    environment = request.get("Environment", {})
    yield from _environment(environment)
    if "RUN_OUTPUT_URI" in environment:
        yield from _uri(environment["RUN_OUTPUT_URI"])
    yield from _debugger(request)


def _debugger(request: Json) -> Said:
    """https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_ProfilerConfig.html"""
    profiler = request.get("ProfilerConfig")
    if profiler and profiler["ProfilingIntervalInMilliseconds"] not in (100, 200, 500, 1000, 5000, 60000):
        yield (
            f"ProfilingIntervalInMilliseconds is {profiler['ProfilingIntervalInMilliseconds']}",
            "expected 100, 200, 500, 1000, 5000 or 60000",
        )
    hook = request.get("DebugHookConfig")
    if hook and hook.get("LocalPath", "/opt/ml/output/tensors") != "/opt/ml/output/tensors":
        yield f"LocalPath {hook['LocalPath']}", "expected /opt/ml/output/tensors, where smdebug writes"
    for name in ("DebugRuleConfigurations", "ProfilerRuleConfigurations"):
        for rule in request.get(name, []):
            if rule["RuleParameters"] != {"rule_to_invoke": rule["RuleConfigurationName"]}:
                yield f"rule {shown(rule['RuleParameters'])}", "expected rule_to_invoke with the rule's name"
    for collection in (hook or {}).get("CollectionConfigurations", []):
        if collection.get("CollectionName") not in ("losses", "weights", "gradients", "biases"):
            yield f"collection {collection.get('CollectionName')}", "expected one of smdebug's built-in collections"


def _tuning(request: Json) -> Said:
    search, definition = request["HyperParameterTuningJobConfig"], request["TrainingJobDefinition"]
    yield from _channels(definition)
    yield from _spot(definition)
    static = definition["StaticHyperParameters"]
    yield from _hyperparameters(static)
    yield from _metric_definitions(definition)
    yield from _machines(definition["ResourceConfig"], definition, static)
    yield from _environment(definition.get("Environment", {}))
    objective = search["HyperParameterTuningJobObjective"]["MetricName"]
    if objective not in _metrics(definition):
        yield f"objective {objective}", f"expected one of the metrics {', '.join(_metrics(definition))}"
    ranges = search["ParameterRanges"]
    names = [one["Name"] for kind in ranges.values() for one in kind]
    yield from _unique("range", names)
    for name in sorted(set(names) & set(static)):
        yield f"{name} is static and searched", "SageMaker refuses a hyperparameter that is both"
    for name in names:
        if name not in contracts.documents()["static"]:
            yield f"range {name}", "the training code has no such hyperparameter"
    for name in ("learning_rate", "batch_size"):
        if name not in names:
            yield f"ranges {names}", f"expected {name} among them"
    yield from _bounds(ranges)
    yield from _strategy(search)


def _bounds(ranges: Json) -> Said:
    for kind in ("ContinuousParameterRanges", "IntegerParameterRanges"):
        for one in ranges.get(kind, []):
            low, high = float(one["MinValue"]), float(one["MaxValue"])
            if not low < high or (one.get("ScalingType") == "Logarithmic" and low <= 0):
                yield f"range {one}", "expected MinValue < MaxValue, above 0 on a logarithmic scale"
            if kind.startswith("Integer") and not (low.is_integer() and high.is_integer()):
                yield f"range {one}", "expected whole numbers"


def _strategy(search: Json) -> Said:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/automatic-model-tuning-how-it-works.html"""
    strategy, limits, ranges = search["Strategy"], search["ResourceLimits"], search["ParameterRanges"]
    if strategy == "Grid":
        if any(ranges.get(kind) for kind in ("ContinuousParameterRanges", "IntegerParameterRanges")):
            yield "Grid with ranges of numbers", "expected categories only"
        if "MaxNumberOfTrainingJobs" in limits:
            yield "Grid with MaxNumberOfTrainingJobs", "leave it out: the grid decides"
    elif limits["MaxParallelTrainingJobs"] > limits.get("MaxNumberOfTrainingJobs", 0):
        yield f"ResourceLimits {limits}", "expected no more jobs at once than in all"
    hyperband = search.get("StrategyConfig", {}).get("HyperbandStrategyConfig")
    if (strategy == "Hyperband") != (hyperband is not None):
        yield (
            f"strategy {strategy} with StrategyConfig {hyperband}",
            "expected HyperbandStrategyConfig with Hyperband, and only then",
        )
    if strategy == "Hyperband" and search.get("TrainingJobEarlyStoppingType", "Off") != "Off":
        yield "Hyperband with early stopping", "expected TrainingJobEarlyStoppingType Off"
    if hyperband and not 1 <= hyperband["MinResource"] <= hyperband["MaxResource"]:
        yield f"HyperbandStrategyConfig {hyperband}", "expected 1 <= MinResource <= MaxResource"


# --- models and endpoints --------------------------------------------------------------------------------------------------


def _package(request: Json) -> Said:
    for one in request["InferenceSpecification"]["Containers"]:
        yield from _uri(one["ModelDataUrl"])
        yield from _archive(one["ModelDataUrl"])
        yield from _image(one["Image"])
    metadata = request.get("CustomerMetadataProperties", {})
    for name in sorted(set(metadata) ^ contracts.PACKAGE_FACTS):
        yield f"metadata {name}", "expected exactly the names in infra/verify/contracts.py, which a later deployment reads"
    if request.get("ModelApprovalStatus") != "Approved":
        yield f"ModelApprovalStatus is {request.get('ModelApprovalStatus')}", "expected Approved: the gate has decided"
    quality = request.get("ModelMetrics", {}).get("ModelQuality", {}).get("Statistics", {})
    yield from _uri(quality.get("S3Uri", ""))
    if quality.get("ContentType") != "application/json":
        yield f"ContentType is {quality.get('ContentType')}", "expected application/json"
    specification = request["InferenceSpecification"]
    for mime in [*specification["SupportedContentTypes"], *specification["SupportedResponseMIMETypes"]]:
        if not re.fullmatch(r"[a-z]+/[a-z.+-]+", mime):
            yield f"type {mime}", "expected a media type such as image/jpeg"


def _image(value: str) -> Said:
    if not re.fullmatch(r"[0-9]{12}\.dkr\.ecr\.[a-z0-9-]+\.amazonaws\.com/[a-z0-9/._-]+(:[\w.-]+|@sha256:[0-9a-f]{64})", value):
        yield f"image {value}", "expected <account>.dkr.ecr.<region>.amazonaws.com/<repository>:<tag>"


def _archive(value: str) -> Said:
    if not value.endswith("model.tar.gz"):
        yield f"artifact {value}", "expected …/model.tar.gz"


def _model(request: Json) -> Said:
    container = request["PrimaryContainer"]
    yield from _image(container.get("Image", ""))
    yield from _uri(container.get("ModelDataUrl", ""))
    yield from _archive(container.get("ModelDataUrl", ""))


def _endpoint_config(request: Json) -> Said:
    for variant in request["ProductionVariants"]:
        serverless, machine = "ServerlessConfig" in variant, "InstanceType" in variant
        if serverless == machine:
            yield f"variant {shown(variant)}", "expected ServerlessConfig or machines, one of them"
        if machine and variant.get("InitialInstanceCount", 0) < 1:
            yield f"InitialInstanceCount is {variant.get('InitialInstanceCount')}", "expected at least one machine"
        if serverless and "ContainerStartupHealthCheckTimeoutInSeconds" in variant:
            yield "ContainerStartupHealthCheckTimeoutInSeconds", "serverless endpoints do not take it"
        if variant["VariantName"] != "main":
            yield f"VariantName is {variant['VariantName']}", "expected main, as alarms and scaling name it"
        if not re.search(r"-[0-9a-f]{16}$", variant["ModelName"]):
            yield f"ModelName is {variant['ModelName']}", "expected the model that this execution made"


def _update(request: Json, alarms: frozenset[str]) -> Said:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/deployment-guardrails.html"""
    how = request.get("DeploymentConfig")
    if how is None:
        return
    both = [name for name in ("BlueGreenUpdatePolicy", "RollingUpdatePolicy") if name in how]
    if len(both) != 1:
        yield f"DeploymentConfig with {both}", "expected one policy"
        return
    for one in how.get("AutoRollbackConfiguration", {}).get("Alarms", []):
        if one["AlarmName"] not in alarms:
            yield f"alarm {one['AlarmName']}", f"the template makes {', '.join(sorted(alarms))}"
    if both == ["RollingUpdatePolicy"]:
        size = how["RollingUpdatePolicy"]["MaximumBatchSize"]
        if size["Type"] == "CAPACITY_PERCENT" and not 5 <= size["Value"] <= 50:
            yield f"MaximumBatchSize {size}", "expected 5 to 50 percent"
        return
    policy = how["BlueGreenUpdatePolicy"]
    routing = policy["TrafficRoutingConfiguration"]
    if (routing["Type"] == "CANARY") != ("CanarySize" in routing):
        yield f"routing {routing}", "expected CanarySize with CANARY, and only then"
    if routing.get("CanarySize", {}).get("Type") == "CAPACITY_PERCENT" and not 1 <= routing["CanarySize"]["Value"] <= 50:
        yield f"CanarySize {routing['CanarySize']}", "expected 1 to 50 percent"
    needed = routing["WaitIntervalInSeconds"] + policy.get("TerminationWaitInSeconds", 0)
    if policy.get("MaximumExecutionTimeoutInSeconds", 28_800) <= needed:
        yield (
            f"MaximumExecutionTimeoutInSeconds {policy.get('MaximumExecutionTimeoutInSeconds')}",
            f"expected more than the waits' {needed} s",
        )


def _target(request: Json) -> Said:
    if not re.fullmatch(r"endpoint/[a-zA-Z0-9-]{1,63}/variant/main", request["ResourceId"]):
        yield f"ResourceId {request['ResourceId']}", "expected endpoint/<name>/variant/main"
    if request.get("MinCapacity", 0) > request.get("MaxCapacity", request.get("MinCapacity", 0)):
        yield f"capacity {request}", "expected MinCapacity <= MaxCapacity"
    if request["ServiceNamespace"] != "sagemaker" or request["ScalableDimension"] != "sagemaker:variant:DesiredInstanceCount":
        yield f"dimension {request['ScalableDimension']}", "expected sagemaker:variant:DesiredInstanceCount"
    tracking = request.get("TargetTrackingScalingPolicyConfiguration")
    if tracking is not None:
        metric = tracking.get("PredefinedMetricSpecification", {}).get("PredefinedMetricType")
        if metric != "SageMakerVariantInvocationsPerInstance":
            yield f"metric {metric}", "expected SageMakerVariantInvocationsPerInstance, the one that endpoints have"


# --- other services --------------------------------------------------------------------------------------------------------


def _invoke(request: Json, handlers: dict[str, str]) -> Said:
    handler = handlers.get(request["FunctionName"])
    if handler is None:
        yield f"function {request['FunctionName']}", "the template makes no such function"
        return
    payload = request.get("Payload", b"{}")
    given = json.loads(payload) if isinstance(payload, bytes | str) else payload
    known = contracts.event_keys(handler)
    for name in sorted(set(given) ^ set(known)):
        yield f"payload field {name}", f"{handler} reads {', '.join(sorted(known))}"
    for name, value in given.items():
        if not isinstance(value, str):
            yield f"payload field {name} is {value!r}", "expected a text"


def _object(request: Json) -> Said:
    if not re.fullmatch(r"(runs/[^/]+/(prepare/result|evaluation/summary)|champion)\.json", request["Key"]):
        yield f"key {request['Key']}", "expected a file that a job of ours writes, or champion.json"
    if "Body" in request:
        body = json.loads(request["Body"])
        if request.get("ContentType") != "application/json" or not all(
            isinstance(value, str | int | float) for value in body.values()
        ):
            yield f"body {shown(body)}", "expected a flat JSON object"
        read = {"model_package", "endpoint_config", "labels_uri", "run", "dataset_hash", "top1", "model_data_url"}
        for name in sorted(set(body) & (read | {"smoke_uri", "image"}) - {"top1"}):
            if not isinstance(body[name], str):
                yield f"champion.json's {name} is {body[name]!r}", "expected a text"
        if not 0 <= body.get("top1", 0) <= 1:
            yield f"champion.json's top1 is {body['top1']!r}", "expected a share from 0 to 1"
        for name in sorted(read - set(body)):
            yield f"champion.json without {name}", "lambdas/predict and evaluate.py read it"
        for name in sorted(set(body) - read - {"smoke_uri", "image"}):
            yield f"champion.json with {name}", "nothing reads it"
