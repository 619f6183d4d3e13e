"""Pipeline: the state machine, its states in the order in which they run.

The definition is Amazon States Language with JSONata, held as plain dictionaries: what is written here is what the console
shows. Run-time facts live in variables (``Assign``); failures of any state end in CleanUp, a message, and ``Failed``.
"""

from __future__ import annotations

import json

from aws_cdk import aws_iam as iam
from aws_cdk import aws_stepfunctions as sfn
from constructs import Construct

from infra import code, inputs, requests
from infra.config import FEATURE_RECIPES, StageConfig
from infra.functions import log_group
from infra.requests import Json, ask

SDK = "arn:aws:states:::aws-sdk"
OPTIMIZED = "arn:aws:states:::sagemaker"

CHANGING = ["Creating", "Updating", "SystemUpdating", "RollingBack"]
"""States of an endpoint that SageMaker is changing."""
WAITING = [*CHANGING, "Deleting", "Unknown"]
"""States of an endpoint that pass; Unknown: SageMaker could not be asked just now."""

# AWS names throttling and lack of quota differently by integration; anything else is not worth a second try.
BUSY = [
    "SageMaker.AmazonSageMakerException",
    "SageMaker.SageMakerException",
    "SageMaker.ResourceLimitExceededException",
    "SageMaker.ThrottlingException",
]
SCALING_BUSY = [
    "ApplicationAutoScaling.ApplicationAutoScalingException",
    "ApplicationAutoScaling.ConcurrentUpdateException",
    "ApplicationAutoScaling.InternalServiceException",
]
LAMBDA_BUSY = [
    "Lambda.ServiceException",
    "Lambda.AWSLambdaException",
    "Lambda.SdkClientException",
    "Lambda.TooManyRequestsException",
]

JOB_STATES = ("PrepareData", "CacheFeatures", "Tune", "Train", "Evaluate", "Report", "ClassifyBatch")

OVERTAKEN = "EndpointOvertaken"
OVERTAKEN_ADVICE = 'To serve that one, start an execution with "action": "deploy" and this "model_package".'
ADVICE = {
    "PrepareData": "Look at the source and at runs/<run>/prepare/report.json.",
    "CheckBatchSize": "Start again with smaller values in tuning.batch_size, or with more pictures.",
    "CacheFeatures": "Check that backbone and pretrained fit each other.",
    "Tune": "Correct what the reason names; the trials' logs, listed with the tuning job in SageMaker, tell more.",
    "Train": "Open the training job's log in CloudWatch.",
    "Evaluate": "Open the processing job's log in CloudWatch.",
    "Report": "Open the processing job's log in CloudWatch; the trained model is kept in the run's folder.",
    "BuildServer": "Open the build's log in CodeBuild.",
    "Deploy": "The endpoint's FailureReason is above; its log is in CloudWatch under /aws/sagemaker/Endpoints.",
    "ReadChampion": "No model is deployed yet: start an execution with {}, or name a model_package.",
    "ClassifyBatch": "Open the processing job's log in CloudWatch.",
    "SmokeTest": "The new model gave wrong answers through the API and was taken back; the previous one serves.",
}
MAX_CAPACITY_RETRIES = 3
# A report on what there is takes a minute or two; the rest is the machine's start. Nobody waits long for news of a failure.
LATE_REPORT_LIMIT_S = 900
CAPACITY_PAUSE_S = 300
ROLLBACK_S = 600
"""How long SageMaker may take to go back to the previous configuration, beyond the deadline."""


def definition(config: StageConfig) -> Json:
    """The whole state machine in Amazon States Language."""
    return {
        "Comment": f"{config.prefix}: pictures in, a tested classifier behind an HTTP API out",
        "QueryLanguage": "JSONata",
        "StartAt": "ReadInput",
        "States": {
            **_input_states(config),
            **_data_states(config),
            **_training_states(config),
            **_evaluation_states(config),
            **_registration_states(config),
            **_deployment_states(config),
            **_batch_states(config),
            **_restore_states(config),
            **_failure_states(config),
        },
    }


# --- input -----------------------------------------------------------------------------------------------------------------


def _input_states(config: StageConfig) -> Json:
    """Defaults, checks, and what follows from the fields."""
    return {
        "ReadInput": {
            "Type": "Pass",
            "Comment": "The stage's defaults under the execution's input",
            "Assign": {
                "run": ask("$states.context.Execution.Name"),
                "request": ask(inputs.merge(config)),
                # Every variable exists from the start: an unassigned one would end an execution with an obscure error.
                "attempt": 0,
                "polls": 0,
                "tuning_job": None,
                "training_job": None,
                "processing_jobs": dict.fromkeys(requests.PROCESSING_STATES, "none"),
                "report_uri": "",
                "rules_fired": "",
                "best": None,
                "batch_sizes": [],
                "model_name": "",
                "endpoint_config": "",
                "previous_config": "",
                "kept": {"endpoint_config": "", "model": ""},
                "endpoint": {"status": "Unknown", "config": "", "reason": "", "instances": 0},
                "champion": {},
                "champion_top1": None,
                "dataset": {"dataset_hash": ""},
                "checks": [],
                "failure": {"state": "", "error": "", "cause": ""},
            },
            "Next": "CheckInput",
        },
        "CheckInput": {
            "Type": "Pass",
            "Assign": {"check": {"problem": ask(inputs.check(config))}},
            "Next": "InputAccepted",
        },
        "InputAccepted": {
            "Type": "Choice",
            "Choices": [{"Condition": ask("$check.problem != ''"), "Next": "InvalidInput"}],
            "Default": "ResolveInput",
        },
        "InvalidInput": {"Type": "Fail", "Error": "InvalidInput", "Cause": ask("$check.problem")},
        "ResolveInput": {
            "Type": "Pass",
            "Comment": "Keys become URIs, numbers become the strings that SageMaker wants",
            "Assign": {
                "source": ask(f"$contains($request.source, ':') ? $request.source : {requests.key_uri('$request.source')}"),
                "pretrained": ask(f"{_weights_by_name()} ? $request.pretrained : 'channel'"),
                "pretrained_uri": ask(
                    f"{_weights_by_name()} ? '' : $contains($request.pretrained, ':') ? $request.pretrained : "
                    f"{requests.key_uri('$request.pretrained')}"
                ),
                "static": ask(_static()),
                "epochs": ask(_epochs()),
            },
            "Next": "ChooseAction",
        },
        "ChooseAction": {
            "Type": "Choice",
            "Choices": [
                {"Condition": ask("$request.dry_run"), "Next": "DryRun"},
                {
                    "Condition": ask("$request.action = 'deploy' or ($request.action = 'batch' and $request.model_package != '')"),
                    "Next": "ReadPackage",
                },
                {"Condition": ask("$request.action = 'batch'"), "Next": "ReadChampion"},
            ],
            "Default": "PrepareData",
        },
        **_dry_run_states(),
    }


def _dry_run_states() -> Json:
    """``{"dry_run": true}``: quotas, data and images are asked for; nothing is started."""
    addresses = {"deploy": "''", "batch": requests.pictures_uri()}
    source = "".join(f"$request.action = '{action}' ? {value} : " for action, value in addresses.items()) + "$source"
    weights = "$request.action = 'train' ? $pretrained_uri : ''"
    ask_aws = _lambda(
        "DryRun",
        "DryRun",
        {"source": ask(source), "weights": ask(weights), "parallel": ask("$string($request.tuning.max_parallel_jobs)")},
    )
    ask_aws |= {
        "TimeoutSeconds": 90,
        "Assign": {"checks": ask("$states.result.Payload.checks")},
        "Catch": _catch("DryRun", "DryRunFailed"),
        "Next": "DryRunDone",
    }
    return {
        "DryRun": ask_aws,
        "DryRunDone": {"Type": "Succeed", "Output": {"run": ask("$run"), "checks": ask("$checks")}},
        "DryRunFailed": {"Type": "Fail", "Error": "DryRunFailed", "Cause": ask(_reason())},
    }


def _weights_by_name() -> str:
    """Whether weights are named rather than given as a file."""
    return "$request.pretrained in ['torchvision', 'none']"


def _epochs() -> str:
    """JSONata source of the most epochs that a trial may train: what Hyperband shares out."""
    default, recipes = code.epochs_by_recipe()
    given, searched = "$request.hyperparameters.epochs", "$request.tuning.ranges.epochs"
    own = f"$lookup({json.dumps(recipes)}, $request.recipe)"
    # A value that is no number is left to the trials, which refuse it with a sentence.
    usual = f"$exists({given}) ? $given({given}) : $exists({own}) ? {own} : {default}"
    most = f"$max($append([], $map($type({searched}) = 'array' ? {searched} : [{searched}.max], $given)))"
    return (
        f"($given := function($value) {{ $contains($string($value), /^[1-9][0-9]*$/) ? $number($value) : {default} }}; "
        f"$exists({searched}) ? ({most}) : ({usual}))"
    )


def _static() -> str:
    """JSONata source of the hyperparameters that are not searched, all as strings. SageMaker refuses a name that is both."""
    own = (
        "{'recipe': $request.recipe, 'backbone': $request.backbone, "
        f"'pretrained': {_weights_by_name()} ? $request.pretrained : 'channel', 'image_size': $request.image_size}}"
    )
    return (
        f"$merge($append([{{}}], $each($merge([$request.hyperparameters, {own}]), function($value, $name) "
        "{ $exists($lookup($request.tuning.ranges, $name)) ? {} : {$name: $string($value)} })))"
    )


# --- data, training, evaluation --------------------------------------------------------------------------------------------


def _data_states(config: StageConfig) -> Json:
    """Pictures to a checked data set, and features when the backbone is frozen."""
    processing = config.processing
    prepared = _read_json("ReadPrepared", "prepare/result.json", "dataset", "CheckBatchSize")
    pictures = "$parse($states.result.Body).num_pictures.train"
    fitting = f"$filter($request.tuning.batch_size, function($size) {{ $size <= {pictures} }})"
    prepared["Assign"]["batch_sizes"] = ask(f"$append([], {fitting})")
    return {
        "PrepareData": _processing_job("PrepareData", requests.prepare(config), processing.wait_s, "ReadPrepared"),
        "ReadPrepared": prepared,
        "CheckBatchSize": {
            "Type": "Choice",
            "Comment": "Batches that the data set cannot fill are left out of the search",
            "Choices": [{"Condition": ask("$count($batch_sizes) = 0"), "Next": "BatchTooLarge"}],
            "Default": "ChooseFeatures",
        },
        "BatchTooLarge": {
            "Type": "Pass",
            "Assign": {"failure": {"state": "CheckBatchSize", "error": "BatchTooLarge", "cause": ask(_batch_too_large())}},
            "Next": "CleanUp",
        },
        "ChooseFeatures": {
            "Type": "Choice",
            "Choices": [{"Condition": ask(f"$request.recipe in {json.dumps(FEATURE_RECIPES)}"), "Next": "CacheFeatures"}],
            "Default": "Tune",
        },
        "CacheFeatures": _processing_job("CacheFeatures", requests.cache_features(config), processing.wait_s, "Tune"),
    }


def _batch_too_large() -> str:
    """JSONata source of the sentence about batch sizes of which none fits."""
    return (
        "'tuning.batch_size is ' & $string($request.tuning.batch_size) & '; expected at least one value of at most ' & "
        "$string($dataset.num_pictures.train) & ', the number of training pictures'"
    )


def _training_states(config: StageConfig) -> Json:
    """The search, and the final training with what it found."""
    search_s = min(5 * 86_400, config.tuning_jobs.wait_s * config.max_trials)
    tune = _job("Tune", "createHyperParameterTuningJob", requests.tuning(config), search_s, "Train")
    tune["Assign"] = {"best": ask(_found()), "tuning_job": ask("$states.result.HyperParameterTuningJobName")}
    tune["Catch"] = _catch("Tune", "TrialsFailed", tuning_job=_failed_name("HyperParameterTuningJobName", "'none'"))
    train = _job("Train", "createTrainingJob", requests.training(config), config.training.wait_s, "Evaluate")
    train["Assign"] = {
        "training_job": ask("$states.result.TrainingJobName"),
        "trained_model": ask("$states.result.ModelArtifacts.S3ModelArtifacts"),
    }
    train["Catch"] = _catch("Train", "CapacityMissing", training_job=_failed_name("TrainingJobName", "'none'"))
    return {"Tune": tune, **_trial_failure_states(), "Train": train}


def _found() -> str:
    """JSONata source of the best hyperparameters.

    A warm start on identical data knows an overall best, which may be an earlier search's trial; it counts when that search had
    searched the same hyperparameters, because the others' values stand in no answer.
    """
    return (
        "($names := function($job) { $join($sort($append([], $keys($job.TunedHyperParameters))), ' ') }; "
        "$own := $states.result.BestTrainingJob; $overall := $states.result.OverallBestTrainingJob; "
        "$job := $exists($overall) ? ($names($overall) = $names($own) ? $overall : $own) : $own; "
        "$exists($job.TunedHyperParameters) ? "
        "$sift($job.TunedHyperParameters, function($value, $name) { $not($contains($name, /^_/)) }) : "
        "$error('No trial completed with an objective; open the trials in SageMaker to see why.'))"
    )


def _trial_failure_states() -> Json:
    """A failed tuning job only counts its failed trials: the first one's own reason takes the place of that sentence.

    It also lets a lack of capacity, which only the trials name, be waited out.
    """
    described = _described("$failure.cause")
    tuning = "$parse($failure.cause)"
    first = "$states.result.TrainingJobSummaries[0]"
    sentence = f"'Trial ' & {first}.TrainingJobName & ': ' & {first}.FailureReason"
    read = _task(
        "ReadTrialFailure",
        f"{SDK}:sagemaker:listTrainingJobsForHyperParameterTuningJob",
        {
            "HyperParameterTuningJobName": ask(f"{tuning}.HyperParameterTuningJobName"),
            "StatusEquals": "Failed",
            "SortBy": "CreationTime",
            "SortOrder": "Ascending",
            "MaxResults": 1,
        },
        "CapacityMissing",
    )
    read["Retry"] = [_retry(["SageMaker.ThrottlingException"])]
    read["Assign"] = {
        "failure": {
            "state": ask("$failure.state"),
            "error": ask("$failure.error"),
            "cause": ask(f"$exists({first}.FailureReason) ? {sentence} : $failure.cause"),
        }
    }
    # The tuning job's own sentence is better than none.
    read["Catch"] = [{"ErrorEquals": ["States.ALL"], "Next": "CapacityMissing"}]
    return {
        "TrialsFailed": {
            "Type": "Choice",
            "Choices": [
                {
                    "Condition": ask(f"{described} ? {tuning}.HyperParameterTuningJobStatus = 'Failed' : false"),
                    "Next": "ReadTrialFailure",
                }
            ],
            "Default": "CapacityMissing",
        },
        "ReadTrialFailure": read,
    }


def _evaluation_states(config: StageConfig) -> Json:
    """The test split, the report, and the decision. The report comes first: a refused model is worth reading about."""
    processing = config.processing
    read = _read_json("ReadEvaluation", "evaluation/summary.json", "summary", "Report")
    top1 = "$parse($states.result.Body).champion_top1"
    read["Assign"]["champion_top1"] = ask(f"$type({top1}) = 'number' ? {top1} : null")
    good_enough = (
        "$summary.top1 >= $request.quality_gate.min_top1 and ($type($summary.champion_top1) = 'number' ? "
        "$summary.top1 + 0.000000001 >= $summary.champion_top1 - $request.quality_gate.max_drop : true)"
    )
    # The page is told of the gate's verdict before the gate is reached: a second report for it would be a second job.
    outcome = f"{good_enough} ? '' : 'Refused: ' & {_shortfall()} & '. Nothing was deployed.'"
    report = _job("Report", "createProcessingJob", requests.report(config, outcome), processing.wait_s, "QualityGate")
    report["Assign"] = {
        "report_uri": ask(requests.run_uri("report/report.html")),
        # The job's last word: the names of the rules that fired.
        "rules_fired": ask("$exists($states.result.ExitMessage) ? $states.result.ExitMessage : ''"),
    }
    return {
        "Evaluate": _processing_job("Evaluate", requests.evaluate(config), processing.wait_s, "ReadEvaluation"),
        "ReadEvaluation": read,
        "Report": report,
        "QualityGate": {
            "Type": "Choice",
            "Choices": [{"Condition": ask(good_enough), "Next": _after_gate(config)}],
            "Default": "NotifyRefused",
        },
        "NotifyRefused": {
            **_publish(f"{config.prefix}: model refused", _refusal()),
            "Catch": [{"ErrorEquals": ["States.ALL"], "Next": "TidyUpRefused"}],
            "Next": "TidyUpRefused",
        },
        "TidyUpRefused": _clean_up("TidyUpRefused", "QualityGateFailed"),
        "QualityGateFailed": {"Type": "Fail", "Error": "QualityGateFailed", "Cause": ask(_refusal())},
    }


def _shortfall() -> str:
    """JSONata source: what a refused model reached, and what was expected."""
    return (
        "'Test top1 is ' & $string($round($summary.top1, 4)) & '; expected at least ' & "
        "$string($request.quality_gate.min_top1) & ($type($summary.champion_top1) = 'number' ? ' and at most ' & "
        "$string($request.quality_gate.max_drop) & ' below the serving model with ' & "
        "$string($round($summary.champion_top1, 4)) : '')"
    )


def _refusal() -> str:
    """JSONata source of the message about a refused model: the numbers, the report, and what to do."""
    return (
        f"{_shortfall()} & '. Nothing was deployed; the endpoint is as before. Report: ' & "
        f"{requests.run_uri('report/report.html')} & '. Give more data or epochs, another backbone, or another quality_gate.'"
    )


# --- server image and registration -----------------------------------------------------------------------------------------


def _after_gate(config: StageConfig) -> str:
    """The first state behind the gate."""
    return "UseServerImage" if config.serving_image_uri else "FindServerImage"


def _registration_states(config: StageConfig) -> Json:
    """The serving image, built when its tag is missing, and the model package."""
    states = _given_image() if config.serving_image_uri else _built_image()
    register = _task("Register", f"{SDK}:sagemaker:createModelPackage", requests.model_package(config), "CreateModel")
    register["Assign"] = {
        "champion": {
            "model_package": ask("$states.result.ModelPackageArn"),
            "model_data_url": ask("$summary.model_data_url"),
            "labels_uri": ask("$summary.labels_uri"),
            "smoke_uri": ask("$summary.smoke_uri"),
            "run": ask("$run"),
            "top1": ask("$summary.top1"),
            "dataset_hash": ask("$dataset.dataset_hash"),
            "image": ask("$image"),
        }
    }
    return {**states, "Register": register, **_package_states()}


def _given_image() -> Json:
    """An image from the configuration."""
    return {"UseServerImage": {"Type": "Pass", "Assign": {"image": "${ServerImage}"}, "Next": "Register"}}


def _built_image() -> Json:
    """An image of our own: its tag is a hash of everything in it, so an existing tag needs no build."""
    find = _task(
        "FindServerImage",
        # Not describeImages: this one answers a missing tag with an empty list instead of an error.
        f"{SDK}:ecr:batchGetImage",
        {"RepositoryName": "${ServerRepository}", "ImageIds": [{"ImageTag": "${ServerTag}"}]},
        "ChooseBuild",
    )
    find["Retry"] = [_retry(["Ecr.ServerException", "Ecr.EcrException", "Ecr.SdkClientException"])]
    find["Assign"] = {"image": "${ServerImage}", "image_found": ask("$count($states.result.Images) > 0")}
    choose = {"Type": "Choice", "Choices": [{"Condition": ask("$image_found"), "Next": "Register"}], "Default": "BuildServer"}
    build = _task(
        "BuildServer",
        "arn:aws:states:::codebuild:startBuild.sync",
        {
            "ProjectName": "${ServerProject}",
            "EnvironmentVariablesOverride": [{"Name": "IMAGE_TAG", "Value": "${ServerTag}", "Type": "PLAINTEXT"}],
        },
        "Register",
        timeout_s=3600,
    )
    build["Retry"] = [_retry(["CodeBuild.AccountLimitExceededException", "CodeBuild.AWSCodeBuildException"])]
    build["Assign"] = {"image": "${ServerImage}"}
    return {"FindServerImage": find, "ChooseBuild": choose, "BuildServer": build}


def _package_states() -> Json:
    """The facts come from a model package instead of a run."""
    read = _task(
        "ReadPackage",
        f"{SDK}:sagemaker:describeModelPackage",
        {"ModelPackageName": ask("$request.model_package")},
        "UsePackage",
    )
    facts = "$states.result.CustomerMetadataProperties"
    container = "$states.result.InferenceSpecification.Containers[0]"
    read["Assign"] = {
        "champion": {
            "model_package": ask("$states.result.ModelPackageArn"),
            "model_data_url": ask(f"{container}.ModelDataUrl"),
            "labels_uri": ask(f"{facts}.labels_uri"),
            "smoke_uri": ask(f"{facts}.smoke_uri"),
            "run": ask(f"{facts}.run"),
            "top1": ask(f"$number({facts}.top1)"),
            "dataset_hash": ask(f"{facts}.dataset_hash"),
            "image": ask(f"{container}.Image"),
        },
    }
    use = {
        "Type": "Choice",
        "Choices": [{"Condition": ask("$request.action = 'batch'"), "Next": "ClassifyBatch"}],
        "Default": "CreateModel",
    }
    return {"ReadPackage": read, "UsePackage": use}


# --- batch -----------------------------------------------------------------------------------------------------------------


def _batch_states(config: StageConfig) -> Json:
    """``action: batch``: the champion, or the package that is named, classifies a whole prefix. Nothing is deployed."""
    champion = _task("ReadChampion", f"{SDK}:s3:getObject", {"Bucket": "${DataBucket}", "Key": "champion.json"}, "ClassifyBatch")
    champion["Retry"] = [_retry(["S3.S3Exception", "S3.SdkClientException"])]
    champion["Assign"] = {"champion": ask("$parse($states.result.Body)")}
    done = {
        "run": ask("$run"),
        "input": ask("$request.input"),
        "predictions_uri": ask(requests.run_uri("batch/")),
        "model_package": ask("$champion.model_package"),
        "test_top1": ask("$champion.top1"),
    }
    classify = _job("ClassifyBatch", "createProcessingJob", requests.batch(config), config.processing.wait_s, "BatchDone")
    return {
        "ReadChampion": champion,
        "ClassifyBatch": classify,
        "BatchDone": {"Type": "Succeed", "Output": done},
    }


# --- deployment ------------------------------------------------------------------------------------------------------------


def _deployment_states(config: StageConfig) -> Json:
    """Model, configuration, endpoint; then known pictures through the real API before the model counts as deployed."""
    name = "$substringAfter($states.result.{0}, '/')"
    model = _task("CreateModel", f"{OPTIMIZED}:createModel", requests.model(config), "CreateEndpointConfig")
    model["Assign"] = {"model_name": ask(name.format("ModelArn"))}
    endpoint_config = _task(
        "CreateEndpointConfig", f"{OPTIMIZED}:createEndpointConfig", requests.endpoint_config(config), "FindEndpoint"
    )
    endpoint_config["Assign"] = {"endpoint_config": ask(name.format("EndpointConfigArn"))}
    return {
        "CreateModel": model,
        "CreateEndpointConfig": endpoint_config,
        **_change_states(config),
        **_wait_states(config),
        **_proof_states(config),
    }


def _change_states(config: StageConfig) -> Json:
    """Create or update, never two changes at once: an endpoint in motion is waited for."""
    create = _task("CreateEndpoint", f"{OPTIMIZED}:createEndpoint", requests.create_endpoint(config), "WaitForEndpoint")
    create["Assign"] = {"polls": 0, "previous_config": ""}
    unscaled = config.endpoint.mode == "realtime" and not config.endpoint.scales
    changed = "StopScaling" if unscaled else "UpdateEndpoint"
    update = _task("UpdateEndpoint", f"{OPTIMIZED}:updateEndpoint", requests.update_endpoint(config), "WaitForEndpoint")
    update["Assign"] = {"polls": 0, "previous_config": ask("$endpoint.config")}
    # Another execution may change the endpoint between our look and our call.
    create["Catch"], update["Catch"] = _catch("CreateEndpoint", "EndpointTaken"), _catch("UpdateEndpoint", "EndpointTaken")
    delete = _task("DeleteFailedEndpoint", f"{SDK}:sagemaker:deleteEndpoint", {"EndpointName": config.prefix}, "WaitForOthers")
    in_time = f"$polls < {_max_polls(config)}"
    return {
        "FindEndpoint": _describe(config, "FindEndpoint", "Deploy"),
        "Deploy": {
            "Type": "Choice",
            "Choices": [
                {"Condition": ask("$endpoint.status = 'Missing'"), "Next": "CreateEndpoint"},
                {
                    "Condition": ask("$endpoint.status in ['InService', 'OutOfService', 'UpdateRollbackFailed']"),
                    "Next": changed,
                },
                {"Condition": ask(f"$endpoint.status = 'Failed' and {in_time}"), "Next": "DeleteFailedEndpoint"},
                {"Condition": ask(f"$endpoint.status in {json.dumps(WAITING)} and {in_time}"), "Next": "WaitForOthers"},
            ],
            "Default": "DeployFailed",
        },
        "CreateEndpoint": create,
        **(_stop_scaling_states(config) if unscaled else {}),
        "UpdateEndpoint": update,
        "DeleteFailedEndpoint": delete,
        "EndpointTaken": {
            "Type": "Choice",
            "Comment": "Two executions at once: the one that comes second waits for the first, and deploys after it",
            "Choices": [
                {
                    "Condition": ask(f"$contains($failure.cause, /already existing|in-progress/) and {in_time}"),
                    "Next": "WaitForOthers",
                }
            ],
            "Default": "CleanUp",
        },
        "WaitForOthers": {"Type": "Wait", "Seconds": config.poll_seconds, "Next": "FindEndpoint"},
    }


def _stop_scaling_states(config: StageConfig) -> Json:
    """What an earlier configuration had scaled is not scaled any more; SageMaker wants that before other machines too."""
    stop = _task(
        "StopScaling", f"{SDK}:applicationautoscaling:deregisterScalableTarget", requests.scalable_target(config), "UpdateEndpoint"
    )
    stop["Retry"] = [_retry(SCALING_BUSY)]
    # Most often: nothing was scaled.
    stop["Catch"] = [
        {"ErrorEquals": ["ApplicationAutoScaling.ObjectNotFoundException"], "Next": "UpdateEndpoint"},
        *_catch("StopScaling"),
    ]
    return {"StopScaling": stop}


def _scale_states(config: StageConfig) -> Json:
    """Target tracking on the new machines. Without it a deployment would not be what was asked for, so its failure undoes it."""
    calls = {"ScaleEndpoint": ("registerScalableTarget", requests.register_target(config), "FollowLoad")}
    calls["FollowLoad"] = ("putScalingPolicy", requests.scaling_policy(config), "SmokeTest")
    states = {}
    for name, (call, request, following) in calls.items():
        states[name] = _task(name, f"{SDK}:applicationautoscaling:{call}", request, following)
        states[name]["Retry"] = [_retry(SCALING_BUSY)]
        states[name]["Catch"] = _catch(name, "CheckCurrent")
    return states


def _wait_states(config: StageConfig) -> Json:
    """Look until the endpoint serves the new configuration, with a deadline: AWS has no ``.sync`` for endpoints."""
    most = _max_polls(config)
    # SageMaker's own limit is the same as ours, and what it begins then is worth waiting for.
    going_back = f"$endpoint.status = 'RollingBack' and $polls < {most + -(-ROLLBACK_S // config.poll_seconds)}"
    moving = f"$endpoint.status in {json.dumps(WAITING)} and $polls < {most} or {going_back}"
    return {
        "WaitForEndpoint": {"Type": "Wait", "Seconds": config.poll_seconds, "Next": "CheckEndpoint"},
        "CheckEndpoint": _describe(config, "CheckEndpoint", "EndpointReady"),
        "EndpointReady": {
            "Type": "Choice",
            "Choices": [
                {
                    "Condition": ask("$endpoint.status = 'InService' and $endpoint.config = $endpoint_config"),
                    "Next": "ScaleEndpoint" if config.endpoint.scales else "SmokeTest",
                },
                {"Condition": ask(moving), "Next": "WaitForEndpoint"},
            ],
            "Default": "DeployFailed",
        },
        **(_scale_states(config) if config.endpoint.scales else {}),
        "DeployFailed": {
            "Type": "Pass",
            "Assign": {"failure": _missed(config)},
            "Next": "CheckCurrent",
        },
    }


def _missed(config: StageConfig) -> Json:
    """Why the endpoint does not serve the new configuration."""
    return {
        "state": "Deploy",
        "error": "EndpointNotInService",
        "cause": ask(
            f"'Endpoint {config.prefix} is ' & $endpoint.status & ' with configuration ' & $endpoint.config & "
            f"'; expected InService with ' & $endpoint_config & ' within {config.endpoint.deadline_s} s.' & "
            "($endpoint.reason = '' ? '' : ' ' & $endpoint.reason)"
        ),
    }


def _proof_states(config: StageConfig) -> Json:
    """The smoke test, and what makes the new model the champion."""
    smoke = _lambda("SmokeTest", "SmokeTest", {"smoke_uri": ask("$champion.smoke_uri"), "run": ask("$champion.run")})
    smoke |= {"Next": "CheckServed", "Catch": _catch("SmokeTest", "CheckCurrent")}
    champion = {**{name: ask(f"$champion.{name}") for name in CHAMPION}, "endpoint_config": ask("$endpoint_config")}
    write = _task(
        "WriteChampion",
        f"{SDK}:s3:putObject",
        {
            "Bucket": "${DataBucket}",
            "Key": "champion.json",
            "ContentType": "application/json",
            "Body": champion,
        },
        "TidyUp",
    )
    # A model that has served well is what the endpoint goes back to when another execution replaces it and fails.
    kept = {"endpoint_config": ask("$endpoint_config"), "model": ask("$model_name")}
    write["Assign"] = {"kept": kept}
    write["Catch"] = _catch("WriteChampion", "CheckCurrent")
    write["Retry"] = [_retry(["S3.S3Exception", "S3.SdkClientException"])]
    message = (
        f"'Run ' & $run & ' serves on endpoint {config.prefix}: test top1 ' & $string($round($champion.top1, 4)) & "
        "'. API: ${ApiUrl} Report: s3://${DataBucket}/runs/' & $champion.run & '/report/report.html'"
    )
    return {
        "SmokeTest": smoke,
        "CheckServed": _describe(config, "CheckServed", "StillServed"),
        "StillServed": {
            "Type": "Choice",
            "Comment": "champion.json is not overwritten with what another execution has replaced",
            "Choices": [
                {
                    "Condition": ask("$not($endpoint.config in ['', $endpoint_config])"),
                    "Next": "CleanUp",
                    "Assign": {"failure": _overtaken("'WriteChampion'", "'The smoke test passed.'"), "kept": kept},
                }
            ],
            "Default": "WriteChampion",
        },
        "WriteChampion": write,
        "TidyUp": _clean_up("TidyUp", "Publish"),
        "Publish": {
            **_publish(f"{config.prefix}: model deployed", message),
            # A message that cannot be sent does not undo a working deployment.
            "Catch": [{"ErrorEquals": ["States.ALL"], "Next": "Done"}],
            "Next": "Done",
        },
        "Done": {"Type": "Succeed", "Output": _result(config)},
    }


CHAMPION = ("model_package", "model_data_url", "labels_uri", "smoke_uri", "run", "top1", "dataset_hash", "image")
"""Fields of champion.json, beside the endpoint configuration's name."""


def _result(config: StageConfig) -> Json:
    """The execution's output."""
    return {
        "run": ask("$run"),
        "api_url": "${ApiUrl}",
        "endpoint": config.prefix,
        "report_uri": ask("'s3://${DataBucket}/runs/' & $champion.run & '/report/report.html'"),
        "model_package": ask("$champion.model_package"),
        "model_data_url": ask("$champion.model_data_url"),
        "test_top1": ask("$champion.top1"),
        # With action deploy nothing was trained: these are null.
        **{name: ask(f"$exists(${name}) ? ${name} : null") for name in ("champion_top1", "training_job", "tuning_job")},
        "rules_fired": ask("$append([], $filter($split($rules_fired, ','), function($name) { $not($name in ['', 'none']) }))"),
        "best_hyperparameters": ask("$exists($best) ? $best : null"),
        "dataset_hash": ask("$champion.dataset_hash"),
    }


def _max_polls(config: StageConfig) -> int:
    """How often an endpoint is looked at before its deadline."""
    return -(-config.endpoint.deadline_s // config.poll_seconds)


def _describe(config: StageConfig, name: str, following: str) -> Json:
    """DescribeEndpoint into ``$endpoint``. SageMaker answers a missing endpoint with a ValidationException and a sentence."""
    state = _task(name, f"{SDK}:sagemaker:describeEndpoint", {"EndpointName": config.prefix}, following)
    polled = ask("$polls + 1")
    instances = "$states.result.ProductionVariants[0].DesiredInstanceCount"
    state["Assign"] = {
        "polls": polled,
        "endpoint": {
            "status": ask("$states.result.EndpointStatus"),
            "config": ask("$states.result.EndpointConfigName"),
            "reason": ask("$exists($states.result.FailureReason) ? $states.result.FailureReason : ''"),
            "instances": ask(f"$exists({instances}) ? {instances} : 0"),
        },
    }
    missing = {
        "status": ask(
            "$contains($states.errorOutput.Cause, 'ould not find') ? 'Missing' : "
            "$contains($states.errorOutput.Cause, /Throttling|Rate exceeded|Status Code: 5|Unable to execute/) or "
            "$states.errorOutput.Error = 'States.Timeout' ? 'Unknown' : 'Refused'"
        ),
        "config": "",
        "reason": ask("$states.errorOutput.Cause"),
        "instances": 0,
    }
    state["Retry"] = [_retry(["SageMaker.ThrottlingException"])]
    state["Catch"] = [
        {"ErrorEquals": ["States.ALL"], "Assign": {"polls": polled, "endpoint": missing}, "Next": following},
    ]
    return state


# --- when something fails --------------------------------------------------------------------------------------------------


def _restore_states(config: StageConfig) -> Json:
    """The previous configuration comes back; a first deployment that failed leaves no endpoint behind."""
    restore = _task(
        "RestorePrevious",
        f"{OPTIMIZED}:updateEndpoint",
        requests.restore_endpoint(config),
        "WaitForRestore",
    )
    restore["Assign"] = {"polls": 0}
    restore["Retry"] = [_retry(["States.TaskFailed"], interval_s=5, attempts=4)]
    restore["Catch"] = [{"ErrorEquals": ["States.ALL"], "Next": "CleanUp"}]
    lost = (
        "' The previous configuration ' & $previous_config & ' did not come back: the endpoint is ' & $endpoint.status & "
        "' with ' & $endpoint.config & '. ' & $endpoint.reason"
    )
    remove = _task("RemoveEndpoint", f"{SDK}:sagemaker:deleteEndpoint", {"EndpointName": config.prefix}, "CleanUp")
    remove["Catch"] = [{"ErrorEquals": ["States.ALL"], "Next": "CleanUp"}]
    moving = f"$endpoint.status in {json.dumps(WAITING)} and $polls < {_max_polls(config)}"
    return {
        # The endpoint as it is now: another execution may have changed it since we looked, and its model is not ours to take back.
        "CheckCurrent": _describe(config, "CheckCurrent", "HasPrevious"),
        "HasPrevious": {
            "Type": "Choice",
            "Choices": [
                {"Condition": ask("$endpoint.config in ['', $previous_config]"), "Next": "CleanUp"},
                {
                    "Condition": ask("$endpoint.config != $endpoint_config"),
                    "Next": "CleanUp",
                    "Assign": {"failure": _overtaken("$failure.state", _reason())},
                },
                {"Condition": ask("$previous_config != ''"), "Next": "RestorePrevious"},
            ],
            "Default": "RemoveEndpoint",
        },
        "RestorePrevious": restore,
        "WaitForRestore": {"Type": "Wait", "Seconds": config.poll_seconds, "Next": "CheckRestore"},
        "CheckRestore": _describe(config, "CheckRestore", "Restored"),
        "Restored": {
            "Type": "Choice",
            "Choices": [
                {"Condition": ask(moving), "Next": "WaitForRestore"},
                {"Condition": ask("$endpoint.config = $previous_config"), "Next": "CleanUp"},
            ],
            "Default": "NotRestored",
        },
        "NotRestored": {
            "Type": "Pass",
            "Assign": {
                "failure": {
                    "state": ask("$failure.state"),
                    "error": ask("$failure.error"),
                    "cause": ask(f"{_reason()} & {lost}"),
                }
            },
            "Next": "CleanUp",
        },
        "RemoveEndpoint": remove,
    }


def _failure_states(config: StageConfig) -> Json:
    """Lack of capacity is waited out; anything else removes what this execution made, is reported, and ends in Failed."""
    scarce = (
        f"$attempt < {MAX_CAPACITY_RETRIES} and $contains($failure.cause, "
        "/CapacityError|InsufficientInstanceCapacity|insufficient capacity/)"
    )
    return {
        "CapacityMissing": {
            "Type": "Choice",
            "Choices": [{"Condition": ask(scarce), "Next": "WaitForCapacity", "Assign": {"attempt": ask("$attempt + 1")}}],
            "Default": "CleanUp",
        },
        "WaitForCapacity": {"Type": "Wait", "Seconds": CAPACITY_PAUSE_S, "Next": "TryAgain"},
        "TryAgain": {
            "Type": "Choice",
            "Choices": [{"Condition": ask(f"$failure.state = '{name}'"), "Next": name} for name in JOB_STATES],
            "Default": "CleanUp",
        },
        "CleanUp": _clean_up("CleanUp", "ChooseReport"),
        **_late_report_states(config),
        "NotifyFailure": {
            **_publish("Classifier run failed", _explanation(config)),
            "Catch": [{"ErrorEquals": ["States.ALL"], "Next": "Failed"}],
            "Next": "Failed",
        },
        "Failed": {"Type": "Fail", "Error": ask("$failure.state & 'Failed'"), "Cause": ask(_explanation(config))},
    }


def _late_report_states(config: StageConfig) -> Json:
    """The page on a run that failed, with what is known of it. Best effort: its own failure hides nothing.

    ``action: deploy`` has no run to report on; where the report itself failed, a second one would fail as well.
    """
    limit_s = min(LATE_REPORT_LIMIT_S, config.processing.max_runtime_s)
    request = requests.report(config, f"$failure.state & ' failed: ' & {_reason()}")
    request["StoppingCondition"] = {"MaxRuntimeInSeconds": limit_s}
    report = _task("ReportFailure", f"{OPTIMIZED}:createProcessingJob.sync", request, "NotifyFailure", timeout_s=limit_s + 900)
    report["Assign"] = {"report_uri": ask(requests.run_uri("report/report.html"))}
    report["Catch"] = [{"ErrorEquals": ["States.ALL"], "Next": "NotifyFailure"}]
    worthwhile = "$request.action = 'train' and $failure.state != 'Report'"
    return {
        "ChooseReport": {
            "Type": "Choice",
            "Choices": [{"Condition": ask(worthwhile), "Next": "ReportFailure"}],
            "Default": "NotifyFailure",
        },
        "ReportFailure": report,
    }


def _overtaken(state: str, why: str) -> Json:
    """What failed because another execution's configuration took the place of this one's; ``state`` and ``why`` are JSONata."""
    theirs = (
        "' Another execution deployed meanwhile: the endpoint is ' & $endpoint.status & ' with ' & $endpoint.config & "
        "'. The model of this run is ' & $champion.model_package & '.'"
    )
    return {"state": ask(state), "error": OVERTAKEN, "cause": ask(f"{why} & {theirs}")}


def _described(cause: str) -> str:
    """JSONata source: whether a failure's cause is a job's description, as ``.sync`` gives it, rather than a sentence.

    JSONata's regular expressions have no flag for a dot that matches line ends: the form is tested by first and last letters.
    """
    return f"($substring({cause}, 0, 2) = '{{\"' ? $substring({cause}, -1) = '}}' : false)"


def _reason() -> str:
    """JSONata source: why a state failed. A job's own message is dug out of its description."""
    return (
        f"($c := $failure.cause; $facts := {_described('$c')} ? $parse($c) : {{}}; "
        "$exists($facts.ExitMessage) ? $facts.ExitMessage : $exists($facts.FailureReason) ? $facts.FailureReason : "
        "$exists($facts.errorMessage) ? $facts.errorMessage : "
        "($phase := $facts.Build.Phases[PhaseStatus in ['FAILED', 'FAULT', 'TIMED_OUT', 'STOPPED']][0]; "
        "$exists($phase) ? $phase.PhaseType & ' ' & $phase.PhaseStatus & ': ' & $phase.Contexts[0].Message : $c))"
    )


def _explanation(config: StageConfig) -> str:
    """JSONata source: which state failed, why, what to do, and where the report is."""
    advice = {state: text for state, text in ADVICE.items() if not (state == "BuildServer" and config.serving_image_uri)}
    still = (
        f"' Endpoint {config.prefix} is still ' & $endpoint.status & ', and nothing that it may need was removed. Look at it in "
        "SageMaker once it rests; an execution started meanwhile waits for it.'"
    )
    return (
        f"($why := {_reason()}; "
        f"$advice := $failure.error = '{OVERTAKEN}' ? '{OVERTAKEN_ADVICE}' : $lookup({json.dumps(advice)}, $failure.state); "
        "$end := $substring($why, -1) in ['.', '!', '?'] ? ' ' : '. '; "
        "'Run ' & $run & ' failed in ' & $failure.state & ' (' & $failure.error & '): ' & $substring($why, 0, 2000) & $end & "
        "($exists($advice) ? $advice : 'Open the execution in the Step Functions console.') & "
        f"($failure.error = '{OVERTAKEN}' ? '' : $endpoint.status in {json.dumps(CHANGING)} ? {still} : "
        "' What this run had deployed was removed; a model that served before still does.') & "
        "($report_uri = '' ? '' : ' Report: ' & $report_uri))"
    )


# --- building blocks -------------------------------------------------------------------------------------------------------


def _task(name: str, resource: str, arguments: Json | str, following: str, *, timeout_s: int = 300) -> Json:
    """A Task with a time limit, retries when AWS is busy, and a way out."""
    return {
        "Type": "Task",
        "Resource": resource,
        "Arguments": arguments,
        "TimeoutSeconds": timeout_s,
        "Retry": [_retry(BUSY)],
        "Catch": _catch(name),
        "Next": following,
    }


def _job(name: str, call: str, request: Json | str, limit_s: int, following: str) -> Json:
    """A SageMaker job that the state waits for. Half an hour more than the job's own limit: SageMaker starts and uploads too."""
    state = _task(name, f"{OPTIMIZED}:{call}.sync", request, following, timeout_s=limit_s + 1800)
    state["Catch"] = _catch(name, "CapacityMissing")
    return state


def _processing_job(name: str, request: Json, limit_s: int, following: str) -> Json:
    """A processing job whose name is kept for the report: it tells the job's duration and cost."""
    state = _job(name, "createProcessingJob", request, limit_s, following)
    kept = f"$merge([$processing_jobs, {{'{name}': {{0}}}}])"
    state["Assign"] = {"processing_jobs": ask(kept.replace("{0}", "$states.result.ProcessingJobName"))}
    failed = _failed_name("ProcessingJobName", f"$processing_jobs.{name}")
    state["Catch"] = _catch(name, "CapacityMissing", processing_jobs=kept.replace("{0}", failed))
    return state


def _failed_name(field: str, otherwise: str) -> str:
    """JSONata source: the name of the job that failed, from its description; ``otherwise`` when it did not even start."""
    cause = "$string($states.errorOutput.Cause)"
    return (
        f"($c := {cause}; {_described('$c')} ? ($name := $parse($c).{field}; $exists($name) ? $name : {otherwise}) : {otherwise})"
    )


def _read_json(name: str, key: str, variable: str, following: str) -> Json:
    """A small JSON file of this run into a variable."""
    request = {"Bucket": "${DataBucket}", "Key": ask(f"'runs/' & $run & '/{key}'")}
    state = _task(name, f"{SDK}:s3:getObject", request, following)
    state["Retry"] = [_retry(["S3.S3Exception", "S3.SdkClientException"])]
    state["Assign"] = {variable: ask("$parse($states.result.Body)")}
    return state


def _lambda(name: str, function: str, payload: Json) -> Json:
    """A call of one of our Lambdas."""
    state = _task(
        name,
        "arn:aws:states:::lambda:invoke",
        {"FunctionName": f"${{{function}FunctionArn}}", "Payload": payload},
        "",
        timeout_s=900,
    )
    state["Retry"] = [_retry(LAMBDA_BUSY)]
    return state


def _clean_up(name: str, following: str) -> Json:
    """Removes what the execution made and nobody needs: after a failure all of it, otherwise what a call made whose answer was
    lost, so that it was made again. Best effort: nothing is decided by it."""
    kept = {field: ask(f"$kept.{field}") for field in ("endpoint_config", "model")}
    state = _lambda(name, "CleanUp", {"run": ask(requests.run_key()), **kept})
    return {**state, "Catch": [{"ErrorEquals": ["States.ALL"], "Next": following}], "Next": following}


def _publish(subject: str, message: str) -> Json:
    """A message to the operations topic; ``message`` is JSONata source."""
    return {
        "Type": "Task",
        "Resource": "arn:aws:states:::sns:publish",
        "Arguments": {"TopicArn": "${TopicArn}", "Subject": subject, "Message": ask(message)},
        "TimeoutSeconds": 60,
        "Retry": [_retry(["SNS.InternalErrorException", "SNS.ThrottledException"])],
    }


def _retry(errors: list[str], *, interval_s: int = 3, attempts: int = 3) -> Json:
    """Growing pauses with jitter, so that parallel executions do not collide again."""
    return {
        "ErrorEquals": errors,
        "IntervalSeconds": interval_s,
        "BackoffRate": 2,
        "MaxAttempts": attempts,
        "MaxDelaySeconds": 120,
        "JitterStrategy": "FULL",
    }


def _catch(name: str, following: str = "CleanUp", **variables: str) -> list[Json]:
    """Remember which state failed and why; ``variables`` are JSONata sources of what else to remember."""
    failure = {
        "state": name,
        "error": ask("$states.errorOutput.Error"),
        "cause": ask("$exists($states.errorOutput.Cause) ? $string($states.errorOutput.Cause) : ''"),
    }
    assigned = {"failure": failure, **{variable: ask(source) for variable, source in variables.items()}}
    return [{"ErrorEquals": ["States.ALL"], "Assign": assigned, "Next": following}]


class Pipeline(Construct):
    """The state machine with its log group. ``values`` fill the definition's ``${Name}`` places."""

    def __init__(
        self, scope: Construct, construct_id: str, *, config: StageConfig, role: iam.IRole, values: dict[str, str]
    ) -> None:
        super().__init__(scope, construct_id)
        # Under this prefix CloudWatch does not grow the account's resource policy with every log group.
        group = log_group(self, "Log", config=config, name=f"/aws/vendedlogs/states/{config.prefix}")
        self.machine = sfn.StateMachine(
            self,
            "StateMachine",
            state_machine_name=config.prefix,
            definition_body=sfn.DefinitionBody.from_string(json.dumps(definition(config), ensure_ascii=False)),
            definition_substitutions=values,
            role=role,
            tracing_enabled=config.tracing,
            logs=sfn.LogOptions(destination=group, level=sfn.LogLevel.ALL, include_execution_data=True),
        )
