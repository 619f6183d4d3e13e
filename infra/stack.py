"""The stack: a table of contents. Constructs, the grants that introduce them to each other, and outputs."""

from __future__ import annotations

from aws_cdk import Aws, CfnElement, CfnOutput, RemovalPolicy, Stack, Tags
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_s3_assets as assets
from aws_cdk import aws_sagemaker as sagemaker
from constructs import Construct

from infra import acknowledgements, code
from infra.config import StageConfig
from infra.functions import Function
from infra.inputs import UPLOADS
from infra.machines import has_local_storage
from infra.network import Network
from infra.operations import Budget, IdleSwitch, Notifications, OnDestroy, Watch, clean_up, dry_run
from infra.pipeline import Pipeline
from infra.roles import (
    PULL,
    JobRoles,
    allow,
    debugger_image,
    grant_key,
    grant_orchestration,
    read_keys,
    repository_of,
    service_role,
    training_image,
    training_repository,
)
from infra.serving import PredictApi, ServerImage, smoke_test
from infra.storage import Storage, encrypt
from infra.triggers import Triggers


class ImageClassifier(Stack):
    """From a folder of pictures to an answered POST: one stage of the classifier."""

    def __init__(self, scope: Construct, construct_id: str, *, config: StageConfig) -> None:
        super().__init__(scope, construct_id, description=f"Image classifier {config.prefix}: training, serving, web page")
        for name, value in config.tags.items():
            Tags.of(self).add(name, value)
        if config.permissions_boundary:
            boundary = iam.ManagedPolicy.from_managed_policy_arn(self, "Boundary", config.permissions_boundary)
            iam.PermissionsBoundary.of(self).apply(boundary)
        archive, code_hash = code.model_code_archive()
        source = assets.Asset(self, "ModelCode", path=str(archive))
        deploy_folder = code.lambda_folder("deploy")

        storage = Storage(self, "Storage", config=config)
        data = storage.data
        network = Network(self, "Network", config=config) if config.network.vpc == "create" else None
        jobs = JobRoles(self, "Jobs", config=config, bucket=data, code=source, key=storage.key)
        packages = sagemaker.CfnModelPackageGroup(
            self,
            "ModelPackages",
            model_package_group_name=config.prefix,
            model_package_group_description="Tested models with their lineage",
        )
        packages.apply_removal_policy(RemovalPolicy.DESTROY if config.destroys_data else RemovalPolicy.RETAIN)
        build_role = service_role(self, "BuildRole", "codebuild.amazonaws.com", "Builds the serving image")
        server = ServerImage(self, "Server", config=config, role=build_role)
        notifications = Notifications(self, "Notifications", config=config)
        # By name, not by reference: the state machine knows the API's address, and the API the state machine's.
        machine_arn = f"arn:{Aws.PARTITION}:states:{Aws.REGION}:{Aws.ACCOUNT_ID}:stateMachine:{config.prefix}"
        predict = PredictApi(self, "Predict", config=config, bucket=data, machine_arn=machine_arn)
        smoke = smoke_test(self, "SmokeTest", config=config, url=predict.url, secret=predict.secret, folder=deploy_folder)
        cleaner = clean_up(self, "CleanUp", config=config, folder=deploy_folder)
        server_image = config.serving_image_uri or server.uri
        images = {
            "ProcessingImage": training_image(self, config.processing.gpu),
            "TuningImage": training_image(self, config.tuning_jobs.gpu),
            "TrainingImage": training_image(self, config.training.gpu),
            "ServerImage": server_image,
        }
        rehearsal = dry_run(
            self, "DryRun", config=config, folder=deploy_folder, images=list(dict.fromkeys(images.values())), built_image=server.uri
        )
        machine_role = service_role(self, "StateMachineRole", "states.amazonaws.com", "Runs the pipeline")
        pipeline = Pipeline(
            self,
            "Pipeline",
            config=config,
            role=machine_role,
            values={
                "DataBucket": data.bucket_name,
                "CodeUri": source.s3_object_url,
                **({"CodeFile": source.s3_object_key} if config.network.isolation else {}),
                **(network.values() if network else {}),
                **({"KeyArn": storage.key.key_arn} if storage.key else {}),
                "CodeHash": code_hash,
                **images,
                **{f"{name}Arn": role.role_arn for name, role in jobs.roles.items()},
                "EndpointRoleArn": jobs.endpoint.role_arn,
                "ServerRepository": server.repository.repository_name,
                "ServerTag": server.tag,
                "ServerProject": server.project.project_name,
                "SmokeTestFunctionArn": smoke.function.function_arn,
                "CleanUpFunctionArn": cleaner.function.function_arn,
                "DryRunFunctionArn": rehearsal.function.function_arn,
                "TopicArn": notifications.topic.topic_arn,
                "ApiUrl": predict.url,
                **({"DebuggerImage": debugger_image(self)} if config.managed_debugger else {}),
            },
        )
        machine = pipeline.machine
        Watch(self, "Watch", config=config, api=predict.api, machine=machine, topic=notifications.topic)
        if config.monthly_budget_usd:
            Budget(self, "Budget", config=config)
        on_destroy = OnDestroy(self, "OnDestroy", config=config, folder=deploy_folder, machine=machine)
        on_destroy.resource.node.add_dependency(packages)
        idle = None
        if config.endpoint.sleeps:
            idle = IdleSwitch(self, "IdleSwitch", config=config, folder=deploy_folder, machine_arn=machine_arn)

        # Who may do what with whom.
        roles = [role.role_arn for role in [*jobs.roles.values(), jobs.endpoint]]
        grant_orchestration(machine_role, config=config, bucket=data, job_roles=roles)
        # Register resolves the image's digest and the artifact's tag with its caller's rights.
        serving = repository_of(config.serving_image_uri) if config.serving_image_uri else server.repository.repository_arn
        allow(machine_role, ["ecr:BatchGetImage", "ecr:DescribeImages"], [serving])
        allow(machine_role, ["s3:GetObject"], [data.arn_for_objects("models/*")])
        if not config.serving_image_uri:
            builds = ["codebuild:StartBuild", "codebuild:StopBuild", "codebuild:BatchGetBuilds"]
            allow(machine_role, builds, [server.project.project_arn])
        smoke.function.grant_invoke(machine_role)
        cleaner.function.grant_invoke(machine_role)
        rehearsal.function.grant_invoke(machine_role)
        notifications.topic.grant_publish(machine_role)
        # An older package may name the stage's own image also where another one is configured now.
        allow(jobs.endpoint, PULL, list(dict.fromkeys([serving, server.repository.repository_arn])))
        endpoint = f"arn:{Aws.PARTITION}:sagemaker:{Aws.REGION}:{Aws.ACCOUNT_ID}:endpoint/{config.prefix}"
        predict.predict.allow(["sagemaker:InvokeEndpoint"], [endpoint])
        read_keys(predict.predict.role, data, ("champion.json", "models/*/labels.json"))
        if config.endpoint.sleeps:
            predict.predict.allow(["states:StartExecution"], [machine_arn])
            predict.predict.allow(["states:DescribeExecution"], [f"{machine_arn.replace(':stateMachine:', ':execution:')}:wake-*"])
        read_keys(smoke.role, data, ("models/*/smoke/*",))
        if config.api.auth == "iam":
            smoke.allow(["execute-api:Invoke"], [predict.api.arn_for_execute_api("POST", "/predict", config.stage)])

        # It looks whether something lies there, and reads nothing.
        uploads = {"StringLike": {"s3:prefix": [f"{key}*" for key in UPLOADS]}}
        allow(rehearsal.role, ["s3:ListBucket"], [data.bucket_arn], uploads)
        for bucket in config.source_buckets:
            allow(rehearsal.role, ["s3:ListBucket"], [f"arn:{Aws.PARTITION}:s3:::{bucket}"])
        allow(rehearsal.role, ["ecr:BatchGetImage"], [training_repository(self), serving])
        if config.triggers.schedule or config.triggers.incoming:
            Triggers(self, "Triggers", config=config, bucket=data, machine_arn=machine_arn, folder=deploy_folder)
        if storage.key:
            readers = [predict.predict, smoke, *([predict.authorize] if predict.authorize else [])]
            self._grant_key(config, storage.key, machine_role, readers)

        secret = predict.secret.secret_arn if predict.secret else "none: calls are signed with AWS credentials (api.auth iam)"
        outputs = {
            "ApiUrl": predict.url,
            "StateMachineArn": machine.state_machine_arn,
            "DataBucket": data.bucket_name,
            "TokenSecretArn": secret,
        }
        for name, value in outputs.items():
            CfnOutput(self, name, value=value)
        self._accept_findings(
            config, data, jobs, machine_role, build_role, server, predict, on_destroy, [smoke, cleaner, rehearsal], idle
        )

    def _grant_key(self, config: StageConfig, key: kms.IKey, machine_role: iam.Role, readers: list[Function]) -> None:
        """Whoever reads or writes the bucket or reads the token needs the key."""
        encrypt(self, key)
        allow(machine_role, ["kms:Decrypt", "kms:GenerateDataKey*"], [key.key_arn])
        if config.endpoint.mode == "realtime" and not has_local_storage(config.endpoint.instance_type):
            grant_key(machine_role, key)
        for function in readers:
            function.allow(["kms:Decrypt"], [key.key_arn])

    def _accept_findings(
        self,
        config: StageConfig,
        data: s3.IBucket,
        jobs: JobRoles,
        machine_role: iam.Role,
        build_role: iam.Role,
        server: ServerImage,
        predict: PredictApi,
        on_destroy: OnDestroy,
        called: list[Function],
        idle: IdleSwitch | None,
    ) -> None:
        """cdk-nag's findings that we accept; the reasons are in ``acknowledgements``."""
        acknowledgements.accept_in_stack(self, config=config, data=data)
        acknowledgements.accept_for_jobs(jobs)
        acknowledgements.accept_for_machine(machine_role, [self._id(item.function) for item in called])
        acknowledgements.accept_for_build(build_role, self._id(server.project))
        acknowledgements.accept_for_server(server.project)
        acknowledgements.accept_for_api(predict)
        acknowledgements.accept_on_destroy(on_destroy, config=config)
        acknowledgements.accept_for_scaling([machine_role, on_destroy, *([idle] if idle else [])], config=config)
        acknowledgements.accept_for_clean_up(called[1])
        acknowledgements.accept_for_dry_run(called[-1])
        if not config.tracing:
            acknowledgements.accept_without_tracing(self.node.find_child("Pipeline"))
        acknowledgements.accept_for_sources(jobs, config=config)
        acknowledgements.accept_for_network(jobs, self.node.try_find_child("Network"))
        acknowledgements.accept_for_key([jobs])
        if config.endpoint.sleeps:
            acknowledgements.accept_for_waking(predict, config=config)

    def _id(self, construct: Construct) -> str:
        """The name of a construct's resource in the template."""
        child = construct.node.default_child
        return self.get_logical_id(child) if isinstance(child, CfnElement) else ""
