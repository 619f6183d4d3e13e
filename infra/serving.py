"""PredictApi: the public HTTP interface with its token, Lambdas and page; ServerImage: where the serving image comes from."""

from __future__ import annotations

import json
from pathlib import Path

from aws_cdk import Aws, Duration, Fn, RemovalPolicy
from aws_cdk import aws_apigateway as apigateway
from aws_cdk import aws_codebuild as codebuild
from aws_cdk import aws_ecr as ecr
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_s3_assets as assets
from aws_cdk import aws_secretsmanager as secretsmanager
from constructs import Construct

from infra import code
from infra.config import StageConfig
from infra.functions import Function, log_group
from infra.operations import metric_namespace

# Without these, API Gateway decodes uploads as text and corrupts them. Listed one by one beside the wildcard, so that nothing
# depends on how a wildcard is matched.
BINARY_TYPES = [
    "multipart/form-data",
    "image/*",
    "image/jpeg",
    "image/jpg",
    "image/png",
    "image/webp",
    "image/bmp",
    "image/x-ms-bmp",
    "image/tiff",
    "application/x-image",
    "application/octet-stream",
]

_Error = tuple[str, apigateway.ResponseType, str, str, str, dict[str, str]]

_ADDRESSES = "Use POST /predict, POST /predict/batch, POST /explain, GET /labels, GET /health, GET /openapi.json or GET /."
# With IAM, API Gateway gives the same answer to an unknown address and to a call without a signature.
_NO_SUCH: _Error = (
    "MissingToken",
    apigateway.ResponseType.MISSING_AUTHENTICATION_TOKEN,
    "404",
    "not_found",
    f"There is no such address. {_ADDRESSES}",
    {},
)
_UNSIGNED: _Error = (
    "MissingToken",
    apigateway.ResponseType.MISSING_AUTHENTICATION_TOKEN,
    "403",
    "forbidden",
    f"The call is not signed with AWS credentials (Signature Version 4), or there is no such address. {_ADDRESSES}",
    {},
)
_ERRORS: tuple[_Error, ...] = (
    (
        "Unauthorized",
        apigateway.ResponseType.UNAUTHORIZED,
        "401",
        "unauthorized",
        "Send the header 'Authorization: Bearer <token>' with the token from Secrets Manager (stack output TokenSecretArn).",
        {"WWW-Authenticate": "'Bearer'"},
    ),
    ("Forbidden", apigateway.ResponseType.ACCESS_DENIED, "403", "forbidden", "This token may not do that.", {}),
    (
        "TooLarge",
        apigateway.ResponseType.REQUEST_TOO_LARGE,
        "413",
        "too_large",
        "The picture is too large; send it scaled down.",
        {},
    ),
    (
        "WrongType",
        apigateway.ResponseType.UNSUPPORTED_MEDIA_TYPE,
        "415",
        "unsupported_media_type",
        "Send a picture with Content-Type image/jpeg, image/png, image/webp, image/bmp or image/tiff, or JSON.",
        {},
    ),
    (
        "Throttled",
        apigateway.ResponseType.THROTTLED,
        "429",
        "throttled",
        "Too many requests at once; wait a second and send it again.",
        {"Retry-After": "'1'"},
    ),
    ("ClientError", apigateway.ResponseType.DEFAULT_4_XX, "", "bad_request", "", {}),
    ("ServerError", apigateway.ResponseType.DEFAULT_5_XX, "", "server_error", "", {"Retry-After": "'5'"}),
)


class ServerImage(Construct):
    """The serving image's repository and the CodeBuild project that fills it: no Docker on the user's machine."""

    def __init__(self, scope: Construct, construct_id: str, *, config: StageConfig, role: iam.Role) -> None:
        super().__init__(scope, construct_id)
        folder, self.tag = code.server_folder(config.endpoint.gpu)
        self.name = f"{config.prefix}-server"
        self.repository = ecr.Repository(
            self,
            "Repository",
            repository_name=self.name,
            image_scan_on_push=True,
            image_tag_mutability=ecr.TagMutability.IMMUTABLE,
            encryption=ecr.RepositoryEncryption.AES_256,
            lifecycle_rules=[ecr.LifecycleRule(description="Keep the last images for a way back", max_image_count=10)],
            removal_policy=RemovalPolicy.DESTROY if config.destroys_data else RemovalPolicy.RETAIN,
            empty_on_delete=config.destroys_data,
        )
        source = assets.Asset(self, "Source", path=str(folder))
        self.project = self._project(config, role, source)
        self.repository.grant_pull_push(role)
        self.uri = f"{self.repository.repository_uri}:{self.tag}"

    def _project(self, config: StageConfig, role: iam.Role, source: assets.Asset) -> codebuild.Project:
        """Build and push one tag."""
        commands = {
            "pre_build": 'aws ecr get-login-password | docker login --username AWS --password-stdin "${REPOSITORY_URI%%/*}"',
            "build": 'docker build --tag "$REPOSITORY_URI:$IMAGE_TAG" .',
            # Tags never change: when another execution built the same image meanwhile, that one is used.
            "post_build": (
                'docker push "$REPOSITORY_URI:$IMAGE_TAG" || docker manifest inspect "$REPOSITORY_URI:$IMAGE_TAG" > /dev/null'
            ),
        }
        phases = {name: {"commands": [command], "on-failure": "ABORT"} for name, command in commands.items()}
        variables = {
            "REPOSITORY_URI": self.repository.repository_uri,
            "IMAGE_TAG": self.tag,
            # SageMaker does not read the image index that attestations make. A variable, unlike the option, suits any builder.
            "BUILDX_NO_DEFAULT_ATTESTATIONS": "1",
        }
        return codebuild.Project(
            self,
            "Project",
            project_name=self.name,
            description="Builds the serving image from model_code/Dockerfile",
            role=role,
            source=codebuild.Source.s3(bucket=source.bucket, path=source.s3_object_key),
            build_spec=codebuild.BuildSpec.from_object({"version": "0.2", "phases": phases}),
            environment=codebuild.BuildEnvironment(
                build_image=codebuild.LinuxBuildImage.STANDARD_7_0,
                compute_type=codebuild.ComputeType.MEDIUM if config.endpoint.gpu else codebuild.ComputeType.SMALL,
                privileged=True,
            ),
            environment_variables={name: codebuild.BuildEnvironmentVariable(value=value) for name, value in variables.items()},
            timeout=Duration.minutes(30),
            queued_timeout=Duration.minutes(30),
            grant_report_group_permissions=False,
            logging=codebuild.LoggingOptions(
                cloud_watch=codebuild.CloudWatchLoggingOptions(log_group=log_group(self, "Log", config=config))
            ),
        )


class PredictApi(Construct):
    """The POSTs and GET /labels behind a token (or IAM); GET /, /health and /openapi.json open."""

    def __init__(self, scope: Construct, construct_id: str, *, config: StageConfig, bucket: s3.IBucket, machine_arn: str) -> None:
        super().__init__(scope, construct_id)
        self.config = config
        self.machine_arn = machine_arn
        self.secret = self._secret() if config.api.auth == "token" else None
        self.predict = self._predict(bucket)
        self.api = self._rest_api()
        self.authorize: Function | None = None
        authorizer = self._authorizer()
        integration = apigateway.LambdaIntegration(self.predict.function, proxy=True, timeout=Duration.seconds(29))
        closed = {"authorizer": authorizer} if authorizer else {"authorization_type": apigateway.AuthorizationType.IAM}
        self.api.root.add_method("GET", integration)
        self.api.root.add_resource("health").add_method("GET", integration)
        self.api.root.add_resource("openapi.json").add_method("GET", integration)
        labels = self.api.root.add_resource("labels")
        labels.add_method("GET", integration, **closed)
        predict = self.api.root.add_resource("predict")
        asked = [predict, predict.add_resource("batch"), self.api.root.add_resource("explain")]
        for resource in asked:
            resource.add_method("POST", integration, **closed)
        if config.api.cors_origins:
            for resource in (labels, *asked):
                # Browsers ask first, without a token. The Lambda names the one origin that it was asked from.
                resource.add_cors_preflight(
                    allow_origins=list(config.api.cors_origins),
                    allow_methods=["GET" if resource is labels else "POST"],
                    allow_headers=["Authorization", "Content-Type", "Accept"],
                    max_age=Duration.hours(1),
                )
        self._gateway_responses()

    @property
    def url(self) -> str:
        """Address of the API without a trailing slash, from the configured template."""
        template = self.config.api_url.rstrip("/")
        places = {
            "api": self.api.rest_api_id,
            "region": Aws.REGION,
            "suffix": Aws.URL_SUFFIX,
            "stage": self.config.stage,
        }
        used = {name: value for name, value in places.items() if f"{{{name}}}" in template}
        for name in used:
            template = template.replace(f"{{{name}}}", f"${{{name}}}")
        return Fn.sub(template, used)

    def _secret(self) -> secretsmanager.Secret:
        """A token made by AWS: it appears in no template, log or shell history."""
        return secretsmanager.Secret(
            self,
            "Token",
            description=f"Bearer token of the {self.config.prefix} API",
            generate_secret_string=secretsmanager.SecretStringGenerator(password_length=48, exclude_punctuation=True),
            removal_policy=RemovalPolicy.DESTROY if self.config.destroys_data else RemovalPolicy.RETAIN,
        )

    def _predict(self, bucket: s3.IBucket) -> Function:
        """The Lambda behind every address, with the page beside its code."""
        page = {"index.html": code.ROOT / "web" / "index.html"}
        return Function(
            self,
            "Predict",
            config=self.config,
            code=code.lambda_folder("predict", page),
            handler="handler.handle",
            description="Answers the classifier's HTTP API",
            environment={
                "ENDPOINT_NAME": self.config.prefix,
                "DATA_BUCKET": bucket.bucket_name,
                "STATE_MACHINE_NAME": self.config.prefix,
                "STATE_MACHINE_ARN": self.machine_arn,
                "WAKES": "true" if self.config.endpoint.sleeps else "false",
                "CORS_ORIGINS": ",".join(self.config.api.cors_origins),
                "METRIC_NAMESPACE": metric_namespace(self.config),
                "MAX_MEGAPIXELS": str(self.config.api.max_megapixels),
                **self._endpoint_limits(),
                "AUTH": self.config.api.auth,
            },
            timeout_s=29,
            memory_mb=512,
        )

    def _endpoint_limits(self) -> dict[str, str]:
        """What the Lambda must know of the endpoint: a serverless one takes 4 MB, and starts after a pause."""
        serverless = self.config.endpoint.mode == "serverless"
        return {"MAX_BYTES": "4000000" if serverless else "4718592", "ON_DEMAND": "true" if serverless else "false"}

    def _rest_api(self) -> apigateway.RestApi:
        """The API with one stage, its access log and its limits."""
        config = self.config
        access_log = log_group(self, "AccessLog", config=config)
        fields = {
            "requestId": "$context.requestId",
            "ip": "$context.identity.sourceIp",
            "time": "$context.requestTime",
            "method": "$context.httpMethod",
            "path": "$context.path",
            "status": "$context.status",
            "length": "$context.responseLength",
            "latency_ms": "$context.responseLatency",
            "error": "$context.error.message",
        }
        api = apigateway.RestApi(
            self,
            "Api",
            rest_api_name=config.prefix,
            description=f"Image classifier {config.prefix}",
            endpoint_types=[apigateway.EndpointType.REGIONAL],
            binary_media_types=BINARY_TYPES,
            cloud_watch_role=True,
            deploy_options=apigateway.StageOptions(
                stage_name=config.stage,
                throttling_rate_limit=config.api.throttle_rate,
                throttling_burst_limit=config.api.throttle_burst,
                logging_level=apigateway.MethodLoggingLevel.ERROR,
                data_trace_enabled=False,
                metrics_enabled=True,
                tracing_enabled=config.tracing,
                access_log_destination=apigateway.LogGroupLogDestination(access_log),
                access_log_format=apigateway.AccessLogFormat.custom(json.dumps(fields)),
            ),
        )
        # API Gateway would make this log group itself, and keep its entries for ever.
        name = f"API-Gateway-Execution-Logs_{api.rest_api_id}/{config.stage}"
        api.deployment_stage.node.add_dependency(log_group(self, "ExecutionLog", config=config, name=name))
        # CDK's own output would contradict ApiUrl wherever the address is configured.
        api.node.try_remove_child("Endpoint")
        return api

    def _authorizer(self) -> apigateway.TokenAuthorizer | None:
        """The token's check; None with IAM, where API Gateway itself checks the signature."""
        if self.secret is None:
            return None
        self.authorize = Function(
            self,
            "Authorize",
            config=self.config,
            code=code.lambda_folder("authorize"),
            handler="authorize.handle",
            description="Compares the bearer token with the secret",
            environment={"TOKEN_SECRET_ARN": self.secret.secret_arn},
            timeout_s=10,
        )
        self.secret.grant_read(self.authorize.role)
        return apigateway.TokenAuthorizer(
            self,
            "TokenAuthorizer",
            handler=self.authorize.function,
            # A changed token works, and an old one stops working, within a minute: 30 s here and 30 s in the Lambda.
            results_cache_ttl=Duration.seconds(30),
        )

    def _readable_elsewhere(self) -> dict[str, str]:
        """Lets pages of other origins read API Gateway's own errors, which name no secret; it cannot tell origins apart."""
        return {"Access-Control-Allow-Origin": "'*'"} if self.config.api.cors_origins else {}

    def _gateway_responses(self) -> None:
        """API Gateway's own errors in the envelope of all others."""
        signed = self.config.api.auth == "iam"
        for name, kind, status, error, message, headers in [*_ERRORS[:2], _UNSIGNED if signed else _NO_SUCH, *_ERRORS[2:]]:
            text = json.dumps(message) if message else "$context.error.messageString"
            self.api.add_gateway_response(
                name,
                type=kind,
                status_code=status or None,
                response_headers={**headers, "Cache-Control": "'no-store'", **self._readable_elsewhere()},
                templates={
                    "application/json": f'{{"error": {{"code": "{error}", "message": {text}}}, "request_id": "$context.requestId"}}'
                },
            )


def smoke_test(
    scope: Construct, construct_id: str, *, config: StageConfig, url: str, secret: secretsmanager.ISecret | None, folder: Path
) -> Function:
    """The Lambda that posts known pictures to the real API before a model counts as deployed."""
    environment = {"API_URL": url, "AUTH": config.api.auth}
    if secret is not None:
        environment["TOKEN_SECRET_ARN"] = secret.secret_arn
    function = Function(
        scope,
        construct_id,
        config=config,
        code=folder,
        handler="smoke_test.handle",
        description="Posts known pictures to the API and checks the answers",
        environment=environment,
        timeout_s=300,
    )
    if secret is not None:
        secret.grant_read(function.role)
    return function
