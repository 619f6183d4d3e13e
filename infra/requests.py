"""The SageMaker requests, one function each, in AWS's own field names.

Fixed values are plain; values known only in an execution are JSONata (``{% … %}``), which Step Functions evaluates. ``Raw``
marks JSONata inside a structure that ``jsonata`` renders as one expression. Variables of the state machine:
``$run`` (execution name), ``$request`` (checked input), ``$dataset`` (prepare's result.json), ``$static`` (hyperparameters that are
not searched), ``$batch_sizes`` (those that the data set can fill), ``$best`` (hyperparameters found by the search),
``$processing_jobs`` (state -> its job's name, ``none`` where it did not run).
``${Name}`` is filled in by CloudFormation (DefinitionSubstitutions).
"""

from __future__ import annotations

import json
from typing import Any

from infra.config import FEATURE_RECIPES, Endpoint, Jobs, StageConfig
from infra.inputs import GRID_LEARNING_RATES
from infra.machines import has_local_storage

Json = dict[str, Any]

INPUT = "/opt/ml/processing/input"
CHANNELS = "/opt/ml/input/data"
OUTPUT = "/opt/ml/processing/output"

OBJECTIVE = {"Name": "valid:best_top1", "Regex": "best_valid_top1=([0-9.]+)"}
METRICS = [
    OBJECTIVE,
    {"Name": "train:loss", "Regex": " train_loss=([0-9.]+)"},
    {"Name": "train:top1", "Regex": " train_top1=([0-9.]+)"},
    {"Name": "valid:loss", "Regex": " valid_loss=([0-9.]+)"},
    {"Name": "valid:top1", "Regex": " valid_top1=([0-9.]+)"},
]

JOB_ENVIRONMENT = {
    "PIP_NO_DEPS": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
}

_UNPACK_AND_RUN = (
    f'cd {INPUT}/code && tar -xzf *.gz && python -m pip install -q --no-deps -r requirements.txt && exec python "$0" "$@"'
)


class Raw(str):
    """JSONata source inside a structure given to ``jsonata``."""

    __slots__ = ()


def jsonata(value: Any) -> str:
    """A Python structure as JSONata source: literals as JSON, ``Raw`` as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {jsonata(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(jsonata(item) for item in value) + "]"
    return json.dumps(value)


def ask(expression: str) -> str:
    """The form in which Step Functions recognises an expression."""
    return "{% " + expression + " %}"


def key_uri(*parts: str) -> str:
    """JSONata (not yet wrapped) for ``s3://<data bucket>/…``; parts are JSONata sources, joined by ``/``."""
    return "'s3://${DataBucket}/' & " + " & '/' & ".join(parts)


def run_uri(folder: str) -> str:
    """JSONata source for a folder of this run."""
    return f"'s3://${{DataBucket}}/runs/' & $run & '/{folder}'"


EXECUTION = "$states.context.Execution.Id & '/' & $states.context.Execution.StartTime"


def run_key() -> str:
    """JSONata source for 8 hex digits of the execution: what it made is found by them, also what it was never told of.

    SageMaker never forgets the name of a job, Step Functions forgets that of an execution when its state machine is deleted:
    with the start in it, a stack that was destroyed and deployed again may run the same names.
    """
    return f"$substring($hash({EXECUTION}, 'SHA-256'), 0, 8)"


def unique() -> str:
    """JSONata source for 16 hex digits that differ on every execution, redrive, state and retry; the first 8 are ``run_key``."""
    return (
        f"{run_key()} & "
        f"$substring($hash({EXECUTION} & '/' & $string($states.context.Execution.RedriveCount) & '/' & "
        "$states.context.State.Name & '/' & $string($states.context.State.RetryCount) & '/' & $string($attempt), 'SHA-256'), 0, 8)"
    )


def job_name(config: StageConfig, kind: str = "") -> str:
    """The expression for a job's name: ``<prefix>-<kind>-<16 hex digits>``, at most 32 characters without a kind."""
    middle = f"-{kind}-" if kind else "-"
    return ask(f"'{config.prefix}{middle}' & {unique()}")


def tags(config: StageConfig) -> list[Json]:
    """Tags of everything an execution makes: cost reports group by them."""
    return [*stage_tags(config), {"Key": "run", "Value": ask("$run")}]


def stage_tags(config: StageConfig) -> list[Json]:
    """Tags of what belongs to the stage rather than to one execution."""
    return [{"Key": "project", "Value": config.prefix}, *({"Key": key, "Value": value} for key, value in config.tags.items())]


# --- network and keys ------------------------------------------------------------------------------------------------------

ISOLATED = ("feat", "batch")
"""Processing jobs that need no network: they run a model on what their inputs bring."""


def vpc(config: StageConfig) -> Json:
    """``{"VpcConfig": …}`` where jobs and endpoint have their network interfaces in a VPC; nothing otherwise."""
    network = config.network
    if not network.own:
        return {}
    if network.vpc == "create":
        return {"VpcConfig": {"Subnets": ["${Subnet1}", "${Subnet2}"], "SecurityGroupIds": ["${SecurityGroup}"]}}
    return {"VpcConfig": {"Subnets": list(network.subnet_ids), "SecurityGroupIds": list(network.security_group_ids)}}


def packages(config: StageConfig, folder: str) -> dict[str, str]:
    """The environment in which pip takes its packages from ``folder`` instead of from PyPI."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder} if config.network.wheels else {}


def output_key(config: StageConfig) -> Json:
    """``{"KmsKeyId": …}`` for what a job writes, where the stage has a key of its own."""
    return {"KmsKeyId": "${KeyArn}"} if config.kms_key else {}


def volume_key(config: StageConfig, instance_type: str) -> Json:
    """``{"VolumeKmsKeyId": …}``. Machines with local disks encrypt these themselves, and SageMaker takes no key for them.

    https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_ResourceConfig.html#VolumeKmsKeyId
    """
    return {"VolumeKmsKeyId": "${KeyArn}"} if config.kms_key and not has_local_storage(instance_type) else {}


# --- processing jobs -------------------------------------------------------------------------------------------------------


def prepare(config: StageConfig) -> Json:
    """PrepareData: pictures in, a content-addressed data set and ``result.json`` out."""
    flags = {
        "source": ask("$source"),
        "dataset_root": "s3://${DataBucket}/datasets",
        "result": f"{OUTPUT}/result",
        "dataset": f"{OUTPUT}/datasets",
        "picture_size": ask("$string($request.image_size < 64 ? $request.image_size : $round($request.image_size * 8 / 7))"),
        "seed": "0",
        "min_pictures_per_class": "2",
        "max_quarantined_share": "0.2",
        "allowed_hosts": ",".join(config.allowed_hosts) or "none",
        # Where the instances of one job meet; a retry must not find what the attempt before it left there.
        "exchange_uri": ask(f"{run_uri('prepare-parts')} & '/' & {unique()}"),
    }
    outputs = {"dataset": ("datasets", "s3://${DataBucket}/datasets"), "result": ("result", ask(run_uri("prepare")))}
    return _processing(config, "prep", "PrepareRole", "prepare.py", flags, [], outputs)


_FEATURE_DEFAULTS = {
    "resize_size": "0",
    "feature_views": "4",
    "horizontal_flip": "true",
    "random_resized_crop_min_scale": "0.35",
    "seed": "0",
}
"""Hyperparameters that shape the cached features, with the training code's defaults."""


def cache_features(config: StageConfig) -> Json:
    """CacheFeatures: the frozen backbone's features of every picture, computed once for all trials."""
    flags = {
        "dataset": f"{INPUT}/dataset",
        "pretrained_dir": f"{INPUT}/pretrained",
        "backbone": ask("$request.backbone"),
        "pretrained": ask("$pretrained"),
        "image_size": ask("$string($request.image_size)"),
        **{name: ask(f"$exists($static.{name}) ? $static.{name} : '{default}'") for name, default in _FEATURE_DEFAULTS.items()},
        "features": f"{OUTPUT}/features",
    }
    fixed = [_code(), *_wheels(config), _read("dataset", ask("$dataset.dataset_uri"))]
    optional = _read("pretrained", Raw("$pretrained_uri"))
    inputs = ask(f"$append({jsonata(_unwrapped(fixed))}, $pretrained = 'channel' ? [{jsonata(optional)}] : [])")
    outputs = {"features": ("features", ask(run_uri("features")))}
    return _processing(config, "feat", "FeaturesRole", "cache_features.py", flags, inputs, outputs)


def evaluate(config: StageConfig) -> Json:
    """Evaluate: the test split once, against the serving champion too; writes the servable artifact."""
    flags = {
        "dataset": f"{INPUT}/dataset",
        "model": f"{INPUT}/model",
        "champion_uri": "s3://${DataBucket}/champion.json",
        "evaluation": f"{OUTPUT}/evaluation",
        "artifact": f"{OUTPUT}/model",
        "dataset_hash": ask("$dataset.dataset_hash"),
        "code_hash": "${CodeHash}",
        "run": ask("$run"),
    }
    inputs = [_read("dataset", ask("$dataset.dataset_uri")), _read("model", ask("$trained_model"))]
    outputs = {
        "evaluation": ("evaluation", ask(run_uri("evaluation"))),
        "model": ("model", ask("'s3://${DataBucket}/models/' & $run")),
    }
    return _processing(config, "eval", "EvaluateRole", "evaluate.py", flags, inputs, outputs)


PROCESSING_STATES = ("PrepareData", "CacheFeatures", "Evaluate")
"""States whose processing jobs the report is told, by ``$processing_jobs``."""


def report(config: StageConfig, outcome: str) -> Json:
    """Report: rules and the profiler report, and one page on the whole run.

    ``outcome`` is JSONata source: why the run failed or was refused, for the page's head; an empty text when all is well.
    """
    flags = {
        "run": ask("$run"),
        "run_dir": f"{INPUT}/run",
        "run_uri": ask("'s3://${DataBucket}/runs/' & $run"),
        "tuning_job": ask("$type($tuning_job) = 'string' ? $tuning_job : 'none'"),
        "training_job": ask("$type($training_job) = 'string' ? $training_job : 'none'"),
        "processing_jobs": ask(" & ',' & ".join(f"$processing_jobs.{state}" for state in PROCESSING_STATES)),
        "outcome": ask(one_line(outcome)),
        "report": f"{OUTPUT}/report",
        "rules": f"{OUTPUT}/rules",
    }
    # The run's files are fetched by the job itself: SageMaker fails a job of which an input is empty, and a run that failed
    # left only some of them.
    outputs = {"report": ("report", ask(run_uri("report"))), "rules": ("rules", ask(run_uri("rule-output")))}
    return _processing(config, "report", "ReportRole", "report.py", flags, [], outputs)


def batch(config: StageConfig) -> Json:
    """ClassifyBatch: every picture under a prefix, shared over machines by key; Parquet and CSV from each of them."""
    flags = {"input": f"{INPUT}/pictures", "model": f"{INPUT}/model", "predictions": f"{OUTPUT}/predictions"}
    pictures = _read("pictures", ask(pictures_uri()))
    pictures["S3Input"]["S3DataDistributionType"] = "ShardedByS3Key"
    outputs = {"predictions": ("predictions", ask(run_uri("batch")))}
    inputs = [pictures, _read("model", ask("$champion.model_data_url"))]
    return _processing(config, "batch", "BatchRole", "batch.py", flags, inputs, outputs)


def pictures_uri() -> str:
    """JSONata source: where the pictures of ``action: batch`` lie."""
    return f"($contains($request.input, ':') ? $request.input : {key_uri('$request.input')})"


def one_line(text: str) -> str:
    """JSONata source: ``text`` as a container's argument, which holds one line of at most 256 characters."""
    line = rf"$replace({text}, /\s+/, ' ')"
    return f"($line := {line}; $length($line) > 256 ? $substring($line, 0, 255) & '…' : $line)"


def _processing(
    config: StageConfig, kind: str, role: str, script: str, flags: dict[str, str], inputs: list[Json] | str, outputs: Json
) -> Json:
    """CreateProcessingJob for one of our scripts; ``inputs`` is a list, or one expression that yields it."""
    machine = config.processing
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    return {
        "ProcessingJobName": job_name(config, kind),
        "RoleArn": f"${{{role}Arn}}",
        "AppSpecification": {
            "ImageUri": "${ProcessingImage}",
            "ContainerEntrypoint": ["/bin/bash", "-c", _UNPACK_AND_RUN, script],
            "ContainerArguments": arguments,
        },
        "ProcessingInputs": inputs if isinstance(inputs, str) else [_code(), *_wheels(config), *inputs],
        "ProcessingOutputConfig": {
            "Outputs": [
                {
                    "OutputName": name,
                    "S3Output": {"S3Uri": uri, "LocalPath": f"{OUTPUT}/{folder}", "S3UploadMode": "EndOfJob"},
                }
                for name, (folder, uri) in outputs.items()
            ],
            **output_key(config),
        },
        "ProcessingResources": {
            "ClusterConfig": {
                "InstanceCount": {"prep": config.prepare_instances, "batch": config.batch_instances}.get(kind, 1),
                "InstanceType": machine.instance_type,
                "VolumeSizeInGB": machine.volume_gb,
                **volume_key(config, machine.instance_type),
            }
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": machine.max_runtime_s},
        "Environment": {**JOB_ENVIRONMENT, **packages(config, f"{INPUT}/wheels"), "LOG_LEVEL": config.log_level},
        **_processing_network(config, kind),
        "Tags": tags(config),
    }


def _processing_network(config: StageConfig, kind: str) -> Json:
    """``NetworkConfig``, where the stage wants one."""
    network: Json = vpc(config)
    if config.network.isolation and kind in ISOLATED:
        network["EnableNetworkIsolation"] = True
    return {"NetworkConfig": network} if network else {}


def _wheels(config: StageConfig) -> list[Json]:
    """The ProcessingInput with Python packages, for stages that take none from PyPI."""
    return [_read("wheels", f"s3://${{DataBucket}}/{config.network.wheels}")] if config.network.wheels else []


def _read(name: str, uri: str, folder: str = "") -> Json:
    """A ProcessingInput: an S3 prefix copied to ``/opt/ml/processing/input/<folder>`` before the job starts."""
    return {
        "InputName": name,
        "S3Input": {
            "S3Uri": uri,
            "LocalPath": f"{INPUT}/{folder or name}",
            "S3DataType": "S3Prefix",
            "S3InputMode": "File",
            "S3DataDistributionType": "FullyReplicated",
            "S3CompressionType": "None",
        },
    }


def _code() -> Json:
    """The ProcessingInput with our own code."""
    return _read("code", "${CodeUri}")


def _unwrapped(value: Any) -> Any:
    """The structure with its ``{% … %}`` strings as ``Raw``, to be put inside a larger expression."""
    if isinstance(value, str) and not isinstance(value, Raw) and value.startswith("{% "):
        return Raw(value.removeprefix("{% ").removesuffix(" %}"))
    if isinstance(value, dict):
        return {key: _unwrapped(item) for key, item in value.items()}
    return [_unwrapped(item) for item in value] if isinstance(value, list) else value


# --- training --------------------------------------------------------------------------------------------------------------


def tuning(config: StageConfig) -> str:
    """CreateHyperParameterTuningJob: trials of ``hpo.py`` over the ranges, judged on the validation split.

    One expression, because WarmStartConfig must be absent, not empty, when there is nothing to start from.
    """
    machine = config.tuning_jobs
    definition = {
        **_training_job(config, machine, "tuning"),
        "AlgorithmSpecification": {
            "TrainingImage": "${TuningImage}",
            "TrainingInputMode": "File",
            "MetricDefinitions": METRICS,
        },
        "StaticHyperParameters": ask(f"$merge([$static, {jsonata(_toolkit(config, 'hpo.py', machine))}])"),
    }
    if machine.spot:
        definition["CheckpointConfig"] = _checkpoints("tuning")
    request = {
        "HyperParameterTuningJobName": job_name(config),
        "HyperParameterTuningJobConfig": ask(_search()),
        "TrainingJobDefinition": definition,
        "Tags": tags(config),
    }
    parents = "$map($request.tuning.warm_start, function($name) { {'HyperParameterTuningJobName': $name} })"
    warm = {
        "ParentHyperParameterTuningJobs": Raw(f"$append([], {parents})"),
        "WarmStartType": Raw("$request.tuning.warm_start_type"),
    }
    optional = f"$count($request.tuning.warm_start) > 0 ? {{'WarmStartConfig': {jsonata(warm)}}} : {{}}"
    return ask(f"$merge([{jsonata(_unwrapped(request))}, {optional}])")


def _search() -> str:
    """JSONata source of HyperParameterTuningJobConfig."""
    limits = (
        # SageMaker refuses more jobs at once than there are in all, and a number of jobs for a grid.
        "$request.tuning.strategy = 'Grid' ? {'MaxParallelTrainingJobs': $min([$request.tuning.max_parallel_jobs, $trials])} : "
        "{'MaxParallelTrainingJobs': $min([$request.tuning.max_parallel_jobs, $request.tuning.max_jobs]), "
        "'MaxNumberOfTrainingJobs': $request.tuning.max_jobs}"
    )
    settings = {
        "Strategy": Raw("$request.tuning.strategy"),
        "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": OBJECTIVE["Name"]},
        "ResourceLimits": Raw(limits),
        "ParameterRanges": Raw("$ranges"),
        # Hyperband stops trials by itself and refuses the other mechanism.
        "TrainingJobEarlyStoppingType": Raw("$request.tuning.strategy = 'Hyperband' ? 'Off' : $request.tuning.early_stopping"),
    }
    hyperband = {"HyperbandStrategyConfig": {"MinResource": 1, "MaxResource": Raw("$epochs")}}
    sizes = "$append([], $map($ranges.CategoricalParameterRanges, function($one) { $count($one.Values) }))"
    strategy = f"$request.tuning.strategy = 'Hyperband' ? {{'StrategyConfig': {jsonata(hyperband)}}} : {{}}"
    return (
        f"($ranges := {_ranges()}; $trials := $reduce({sizes}, function($a, $b) {{ $a * $b }}, 1); "
        f"$merge([{jsonata(settings)}, {strategy}]))"
    )


def _ranges() -> str:
    """JSONata source of ParameterRanges: learning rate, batch size, and what ``tuning.ranges`` adds.

    Grid search knows only categories: a few learning rates on a logarithmic scale.
    """
    rate = "$request.tuning.learning_rate"
    steps = GRID_LEARNING_RATES - 1
    grid = f"$map([0..{steps}], function($k) {{ $string($round({rate}[0] * $power({rate}[1] / {rate}[0], $k / {steps}), 6)) }})"
    continuous = {
        "Name": "learning_rate",
        "MinValue": Raw(f"$string({rate}[0])"),
        "MaxValue": Raw(f"$string({rate}[1])"),
        "ScalingType": "Logarithmic",
    }
    sizes = {"Name": "batch_size", "Values": Raw(_texts("$batch_sizes"))}
    bounds = {
        "Name": Raw("$name"),
        "MinValue": Raw("$string($one.min)"),
        "MaxValue": Raw("$string($one.max)"),
        "ScalingType": Raw("$exists($one.scale) ? $one.scale : 'Auto'"),
    }
    values = {"Name": Raw("$name"), "Values": Raw(_texts("$one"))}
    whole = "($exists($one.integer) ? $one.integer : false)"
    lists = _chosen("$type($one) = 'array'", values)
    real = _chosen(f"$type($one) = 'object' ? $not({whole}) : false", bounds)
    integers = _chosen(f"$type($one) = 'object' ? {whole} : false", bounds)
    return (
        "($given := $request.tuning.ranges; $names := $append([], $keys($given)); $request.tuning.strategy = 'Grid' ? "
        f"{{'CategoricalParameterRanges': $append([{{'Name': 'learning_rate', 'Values': {grid}}}, {jsonata(sizes)}], {lists})}} : "
        f"{{'ContinuousParameterRanges': $append([{jsonata(continuous)}], {real}), 'IntegerParameterRanges': {integers}, "
        f"'CategoricalParameterRanges': $append([{jsonata(sizes)}], {lists})}})"
    )


def _chosen(condition: str, form: Json) -> str:
    """JSONata: the further ranges ``$one`` called ``$name`` for which ``condition`` holds, each in AWS's ``form``."""
    one = "($one := $lookup($given, $name); "
    chosen = f"$filter($names, function($name) {{ {one}{condition}) }})"
    return f"$append([], $map({chosen}, function($name) {{ {one}{jsonata(form)}) }}))"


def _texts(values: str) -> str:
    """JSONata: a list's values as the strings that SageMaker wants."""
    return f"$append([], $map({values}, function($value) {{ $string($value) }}))"


def training(config: StageConfig) -> Json:
    """CreateTrainingJob: ``train_model.py`` with the best trial's hyperparameters over the static ones."""
    request = {
        **_training_job(config, config.training, "training"),
        "TrainingJobName": job_name(config, "train"),
        "AlgorithmSpecification": {
            "TrainingImage": "${TrainingImage}",
            "TrainingInputMode": "File",
            "MetricDefinitions": METRICS,
        },
        "HyperParameters": ask(f"$merge([$static, $best, {jsonata(_toolkit(config, 'train_model.py', config.training))}])"),
        "CheckpointConfig": _checkpoints("training"),
        "Tags": tags(config),
    }
    if not config.network.isolation:
        request["Environment"] = {**request["Environment"], "RUN_OUTPUT_URI": ask("'s3://${DataBucket}/runs/' & $run")}
    # Without these fields the profiler is off. Even to switch it off is not asked: a closed service need not accept its fields.
    if not config.managed_debugger:
        return request
    request["Environment"] = {**request["Environment"], **_OWN_HOOK_ONLY}
    return request | managed_debugger()


MANAGED_RULES = ("LossNotDecreasing", "Overfit", "Overtraining")
"""AWS's rules that need the losses alone. Those on weights and gradients want every value; our hook saves their statistics."""

_OWN_HOOK_ONLY = {
    "SMDEBUG_CONFIG_FILE_PATH": "/opt/ml/input/config/no-debughookconfig.json",
    "SMPROFILER_CONFIG_PATH": "/opt/ml/input/config/no-profilerconfig.json",
}
"""SageMaker mounts the configuration of its own hook and profiler, which smdebug would obey: these name files that do not exist, so
that the hook of the training code stays the only one. The managed rules read what that one writes to ``LocalPath``."""


def managed_debugger() -> Json:
    """SageMaker Debugger's fields, for accounts that still have it (closed to new customers since 2026-07-30).

    SageMaker adds ``/<job>/debug-output`` and ``/<job>/profiler-output`` to the paths; a prefix of its own keeps them apart from
    what the training uploads itself.
    """
    managed = ask(run_uri("managed"))
    return {
        "DebugHookConfig": {
            "S3OutputPath": managed,
            "LocalPath": "/opt/ml/output/tensors",
            "CollectionConfigurations": [{"CollectionName": "losses"}],
        },
        "DebugRuleConfigurations": [_managed_rule(name, managed) for name in MANAGED_RULES],
        "ProfilerConfig": {"S3OutputPath": managed, "ProfilingIntervalInMilliseconds": 500},
        "ProfilerRuleConfigurations": [_managed_rule("ProfilerReport", managed)],
    }


def _managed_rule(name: str, output: str) -> Json:
    """One of AWS's built-in rules, run in AWS's container beside the training."""
    return {
        "RuleConfigurationName": name,
        "RuleEvaluatorImage": "${DebuggerImage}",
        "RuleParameters": {"rule_to_invoke": name},
        "S3OutputPath": output,
    }


def _training_job(config: StageConfig, machine: Jobs, folder: str) -> Json:
    """What a trial and the final training have in common."""
    stopping = {"MaxRuntimeInSeconds": machine.max_runtime_s}
    if machine.spot:
        stopping["MaxWaitTimeInSeconds"] = machine.wait_s
    return {
        "RoleArn": "${TrainingRoleArn}",
        "InputDataConfig": ask(_channels(config)),
        "OutputDataConfig": {"S3OutputPath": ask(run_uri(folder)), **output_key(config)},
        "ResourceConfig": {
            "InstanceType": machine.instance_type,
            "InstanceCount": machine.instance_count,
            "VolumeSizeInGB": machine.volume_gb,
            **volume_key(config, machine.instance_type),
        },
        "StoppingCondition": stopping,
        "EnableManagedSpotTraining": machine.spot,
        # Gradients travel between the machines of a training.
        "EnableInterContainerTrafficEncryption": machine.instance_count > 1,
        "Environment": {**JOB_ENVIRONMENT, **packages(config, f"{CHANNELS}/wheels"), "LOG_LEVEL": config.log_level},
        **vpc(config),
        **({"EnableNetworkIsolation": True} if config.network.isolation else {}),
    }


def _checkpoints(folder: str) -> Json:
    """CheckpointConfig; trials and final training apart, because all of a folder comes back when a job starts again."""
    return {"S3Uri": ask(run_uri(f"checkpoints/{folder}")), "LocalPath": "/opt/ml/checkpoints"}


def _channels(config: StageConfig) -> str:
    """JSONata source of InputDataConfig: features only for recipes that use them, weights only when they come from S3."""
    always = [_channel("dataset", Raw("$dataset.dataset_uri"))]
    if config.network.wheels:
        always.append(_channel("wheels", f"s3://${{DataBucket}}/{config.network.wheels}"))
    if config.network.isolation:
        always.append(_channel("code", "${CodeUri}"))
    features = _channel("features", Raw(run_uri("features/")))
    weights = _channel("pretrained", Raw("$pretrained_uri"))
    return (
        f"$append($append({jsonata(always)}, $request.recipe in {json.dumps(FEATURE_RECIPES)} ? [{jsonata(features)}] : []), "
        f"$pretrained = 'channel' ? [{jsonata(weights)}] : [])"
    )


def _channel(name: str, uri: str) -> Json:
    """A training channel: an S3 prefix copied to ``/opt/ml/input/data/<name>``."""
    return {
        "ChannelName": name,
        "DataSource": {
            "S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"},
        },
        "InputMode": "File",
    }


def _toolkit(config: StageConfig, script: str, machine: Jobs) -> dict[str, str]:
    """What tells the training toolkit which script of which archive to run, and whether under torchrun: values are JSON."""
    # Without a network the code comes through a channel.
    code = f"{CHANNELS}/code/${{CodeFile}}" if config.network.isolation else "${CodeUri}"
    program = {"sagemaker_program": script, "sagemaker_submit_directory": code}
    return program | ({"sagemaker_torch_distributed_enabled": "true"} if machine.distributed else {})


# --- serving ---------------------------------------------------------------------------------------------------------------


def model_package(config: StageConfig) -> Json:
    """CreateModelPackage: the tested model with its lineage, as a version in the stage's group."""
    return {
        "ModelPackageGroupName": config.prefix,
        "ModelPackageDescription": ask("'Run ' & $run & ', test top1 ' & $string($round($summary.top1, 4))"),
        "ModelApprovalStatus": "Approved",
        "InferenceSpecification": {
            "Containers": [{"Image": ask("$image"), "ModelDataUrl": ask("$summary.model_data_url")}],
            "SupportedContentTypes": ["image/jpeg", "image/png", "image/webp", "application/x-image"],
            "SupportedResponseMIMETypes": ["application/json"],
        },
        "ModelMetrics": {
            "ModelQuality": {
                "Statistics": {
                    "ContentType": "application/json",
                    "S3Uri": ask(run_uri("evaluation/evaluation.json")),
                }
            }
        },
        "CustomerMetadataProperties": {
            "run": ask("$run"),
            "top1": ask("$string($summary.top1)"),
            "dataset_hash": ask("$dataset.dataset_hash"),
            "code_hash": "${CodeHash}",
            "labels_uri": ask("$summary.labels_uri"),
            "smoke_uri": ask("$summary.smoke_uri"),
            "training_job": ask("$training_job"),
            "recipe": ask("$request.recipe"),
            "backbone": ask("$request.backbone"),
            "learning_rate": ask("$string($best.learning_rate)"),
            "batch_size": ask("$string($best.batch_size)"),
        },
    }


def model(config: StageConfig) -> Json:
    """CreateModel: image, artifact and role, from the model package's facts."""
    return {
        "ModelName": job_name(config),
        "PrimaryContainer": {"Image": ask("$champion.image"), "ModelDataUrl": ask("$champion.model_data_url")},
        "ExecutionRoleArn": "${EndpointRoleArn}",
        **vpc(config),
        **({"EnableNetworkIsolation": True} if config.network.isolation else {}),
        "Tags": tags(config),
    }


def endpoint_config(config: StageConfig) -> Json:
    """CreateEndpointConfig: serverless, or real-time machines."""
    endpoint = config.endpoint
    variant: Json = {"VariantName": "main", "ModelName": ask("$model_name")}
    if endpoint.mode == "serverless":
        variant["ServerlessConfig"] = {"MemorySizeInMB": endpoint.memory_mb, "MaxConcurrency": endpoint.max_concurrency}
    else:
        variant |= {
            "InstanceType": endpoint.instance_type,
            "InitialInstanceCount": endpoint.min_instances,
            "InitialVariantWeight": 1,
            "ContainerStartupHealthCheckTimeoutInSeconds": endpoint.startup_s,
        }
    request = {"EndpointConfigName": job_name(config), "ProductionVariants": [variant], "Tags": tags(config)}
    if endpoint.mode == "realtime" and config.kms_key and not has_local_storage(endpoint.instance_type):
        request["KmsKeyId"] = "${KeyArn}"
    return request


def create_endpoint(config: StageConfig) -> Json:
    """CreateEndpoint under the stage's stable name."""
    return {
        "EndpointName": config.prefix,
        "EndpointConfigName": ask("$endpoint_config"),
        "Tags": stage_tags(config),
    }


def update_endpoint(config: StageConfig) -> Json:
    """UpdateEndpoint to the new configuration; a real-time endpoint goes back by itself when one of its alarms rings meanwhile."""
    request: Json = {"EndpointName": config.prefix, "EndpointConfigName": ask("$endpoint_config")}
    if config.endpoint.mode == "realtime":
        request["DeploymentConfig"] = {
            **_shifting(config.endpoint),
            "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": name} for name in rollback_alarms(config)]},
        }
        if config.endpoint.scales:
            # As many machines as scaling has made of the old ones.
            request["RetainAllVariantProperties"] = ask("$endpoint.instances > 0")
    return request


def restore_endpoint(config: StageConfig) -> Json:
    """UpdateEndpoint back to what served before: at once, and whatever rings because of the model that goes."""
    request: Json = {"EndpointName": config.prefix, "EndpointConfigName": ask("$previous_config")}
    if config.endpoint.mode == "realtime":
        routing = {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 0}
        request["DeploymentConfig"] = {"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": routing}}
    return request


def _shifting(endpoint: Endpoint) -> Json:
    """How traffic goes over to the new model."""
    # Our own deadline may be shorter than what SageMaker accepts here.
    limit_s = max(600, endpoint.deadline_s)
    share = {"Type": "CAPACITY_PERCENT", "Value": endpoint.canary_percent}
    if endpoint.update == "rolling":
        rolling = {"MaximumBatchSize": share, "WaitIntervalInSeconds": endpoint.bake_s}
        return {"RollingUpdatePolicy": {**rolling, "MaximumExecutionTimeoutInSeconds": limit_s}}
    routing: Json = {"Type": endpoint.update.upper(), "WaitIntervalInSeconds": endpoint.bake_s}
    if endpoint.update == "canary":
        routing["CanarySize"] = share
    return {
        "BlueGreenUpdatePolicy": {
            "TrafficRoutingConfiguration": routing,
            "TerminationWaitInSeconds": 60,
            "MaximumExecutionTimeoutInSeconds": limit_s,
        }
    }


def rollback_alarms(config: StageConfig) -> list[str]:
    """Names of the alarms that take a new model back: errors, slowness, answers that make no sense."""
    return [f"{config.prefix}-rollback-{what}" for what in ("errors", "latency", "invalid")]


def scalable_target(config: StageConfig) -> Json:
    """What Application Auto Scaling calls the endpoint's machines."""
    return {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{config.prefix}/variant/main",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }


def register_target(config: StageConfig) -> Json:
    """RegisterScalableTarget: how few and how many machines there may be."""
    endpoint = config.endpoint
    return {**scalable_target(config), "MinCapacity": endpoint.min_instances, "MaxCapacity": endpoint.max_instances}


def scaling_policy(config: StageConfig) -> Json:
    """PutScalingPolicy: so many machines that each gets about the configured number of requests a minute."""
    endpoint = config.endpoint
    return {
        **scalable_target(config),
        "PolicyName": f"{config.prefix}-invocations",
        "PolicyType": "TargetTrackingScaling",
        "TargetTrackingScalingPolicyConfiguration": {
            "TargetValue": endpoint.target_invocations_per_minute,
            "PredefinedMetricSpecification": {"PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"},
            "ScaleOutCooldown": endpoint.scale_out_cooldown_s,
            "ScaleInCooldown": endpoint.scale_in_cooldown_s,
        },
    }
