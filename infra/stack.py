"""The stack: a table of contents. Constructs, the grants that introduce them to each other, and outputs."""

from __future__ import annotations

from aws_cdk import Aws, CfnElement, CfnOutput, RemovalPolicy, Stack
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_s3_assets as assets
from aws_cdk import aws_sagemaker as sagemaker
from constructs import Construct

from infra import acknowledgements, code
from infra.config import StageConfig
from infra.functions import Function
from infra.operations import IdleSwitch, Notifications, OnDestroy, Watch, clean_up
from infra.pipeline import Pipeline
from infra.roles import JobRoles, allow, debugger_image, grant_orchestration, read_keys, service_role, training_image
from infra.serving import PredictApi, ServerImage, smoke_test
from infra.storage import Storage


class ImageClassifier(Stack):
    """From a folder of pictures to an answered POST: one stage of the classifier."""

    def __init__(self, scope: Construct, construct_id: str, *, config: StageConfig) -> None:
        super().__init__(scope, construct_id, description=f"Image classifier {config.prefix}: training, serving, web page")
        archive, code_hash = code.model_code_archive()
        source = assets.Asset(self, "ModelCode", path=str(archive))
        deploy_folder = code.lambda_folder("deploy")

        storage = Storage(self, "Storage", config=config)
        data = storage.data
        jobs = JobRoles(self, "Jobs", config=config, bucket=data, code=source)
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
        machine_role = service_role(self, "StateMachineRole", "states.amazonaws.com", "Runs the pipeline")
        pipeline = Pipeline(
            self,
            "Pipeline",
            config=config,
            role=machine_role,
            values={
                "DataBucket": data.bucket_name,
                "CodeUri": source.s3_object_url,
                "CodeHash": code_hash,
                "ProcessingImage": training_image(self, config.processing.gpu),
                "TuningImage": training_image(self, config.tuning_jobs.gpu),
                "TrainingImage": training_image(self, config.training.gpu),
                **{f"{name}Arn": role.role_arn for name, role in jobs.roles.items()},
                "EndpointRoleArn": jobs.endpoint.role_arn,
                "ServerImage": config.serving_image_uri or server.uri,
                "ServerRepository": server.repository.repository_name,
                "ServerTag": server.tag,
                "ServerProject": server.project.project_name,
                "SmokeTestFunctionArn": smoke.function.function_arn,
                "CleanUpFunctionArn": cleaner.function.function_arn,
                "TopicArn": notifications.topic.topic_arn,
                "ApiUrl": predict.url,
                **({"DebuggerImage": debugger_image(self)} if config.managed_debugger else {}),
            },
        )
        machine = pipeline.machine
        Watch(self, "Watch", config=config, api=predict.api, machine=machine, topic=notifications.topic)
        on_destroy = OnDestroy(self, "OnDestroy", config=config, folder=deploy_folder, machine=machine)
        on_destroy.resource.node.add_dependency(packages)
        idle = None
        if config.endpoint.sleeps:
            idle = IdleSwitch(self, "IdleSwitch", config=config, folder=deploy_folder, machine_arn=machine_arn)

        # Who may do what with whom.
        roles = [role.role_arn for role in [*jobs.roles.values(), jobs.endpoint]]
        grant_orchestration(machine_role, config=config, bucket=data, job_roles=roles)
        # Register resolves the image's digest and the artifact's tag with its caller's rights.
        allow(machine_role, ["ecr:BatchGetImage", "ecr:DescribeImages"], [server.repository.repository_arn])
        allow(machine_role, ["s3:GetObject"], [data.arn_for_objects("models/*")])
        allow(
            machine_role,
            ["codebuild:StartBuild", "codebuild:StopBuild", "codebuild:BatchGetBuilds"],
            [server.project.project_arn],
        )
        smoke.function.grant_invoke(machine_role)
        cleaner.function.grant_invoke(machine_role)
        notifications.topic.grant_publish(machine_role)
        server.repository.grant_pull(jobs.endpoint)
        endpoint = f"arn:{Aws.PARTITION}:sagemaker:{Aws.REGION}:{Aws.ACCOUNT_ID}:endpoint/{config.prefix}"
        predict.predict.allow(["sagemaker:InvokeEndpoint"], [endpoint])
        read_keys(predict.predict.role, data, ("champion.json", "models/*/labels.json"))
        if config.endpoint.sleeps:
            predict.predict.allow(["states:StartExecution"], [machine_arn])
            predict.predict.allow(["states:DescribeExecution"], [f"{machine_arn.replace(':stateMachine:', ':execution:')}:wake-*"])
        read_keys(smoke.role, data, ("models/*/smoke/*",))
        if config.api.auth == "iam":
            smoke.allow(["execute-api:Invoke"], [predict.api.arn_for_execute_api("POST", "/predict", config.stage)])

        secret = predict.secret.secret_arn if predict.secret else "none: calls are signed with AWS credentials (api.auth iam)"
        outputs = {
            "ApiUrl": predict.url,
            "StateMachineArn": machine.state_machine_arn,
            "DataBucket": data.bucket_name,
            "TokenSecretArn": secret,
        }
        for name, value in outputs.items():
            CfnOutput(self, name, value=value)
        self._accept_findings(config, data, jobs, machine_role, build_role, server, predict, on_destroy, [smoke, cleaner], idle)

    def _accept_findings(
        self,
        config: StageConfig,
        data: s3.Bucket,
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
        if config.endpoint.sleeps:
            acknowledgements.accept_for_waking(predict, config=config)

    def _id(self, construct: Construct) -> str:
        """The name of a construct's resource in the template."""
        child = construct.node.default_child
        return self.get_logical_id(child) if isinstance(child, CfnElement) else ""
