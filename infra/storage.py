"""Storage: the data bucket, the bucket for its access logs, and the key with which all of the stage is encrypted."""

from __future__ import annotations

from aws_cdk import Aws, CfnResource, Duration, RemovalPolicy, Stack
from aws_cdk import aws_ecr as ecr
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_lambda as lambda_
from aws_cdk import aws_logs as logs
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_secretsmanager as secretsmanager
from aws_cdk import aws_stepfunctions as sfn
from constructs import Construct

from infra.config import StageConfig
from infra.functions import log_group


class Storage(Construct):
    """Encrypted, private, versioned, TLS only. Nothing in them is public, and nothing old is kept for ever."""

    def __init__(self, scope: Construct, construct_id: str, *, config: StageConfig) -> None:
        super().__init__(scope, construct_id)
        self.key = self._key(config)
        self.data: s3.IBucket
        if config.data_bucket:
            self.data = s3.Bucket.from_bucket_attributes(self, "Data", bucket_name=config.data_bucket, encryption_key=self.key)
            return
        # S3 writes access logs to buckets with its own keys only.
        logs = self._bucket("Logs", config, rules=[self._expiry("logs", config.retention_days)])
        data = self._bucket("Data", config, rules=self._data_rules(config), logs=logs, key=self.key)
        if config.triggers.incoming:
            announce(data)
        self.data = data
        if config.destroys_data:
            self._keep_the_emptiers_log(config, [logs, data])

    def _key(self, config: StageConfig) -> kms.IKey | None:
        """The stage's own key, an existing one, or none: AWS's keys then."""
        if config.kms_key != "create":
            return kms.Key.from_key_arn(self, "Key", config.kms_key) if config.kms_key else None
        key = kms.Key(
            self,
            "Key",
            description=f"Everything that {config.prefix} stores",
            enable_key_rotation=True,
            pending_window=Duration.days(7),
            removal_policy=RemovalPolicy.DESTROY if config.destroys_data else RemovalPolicy.RETAIN,
        )
        # CloudWatch Logs asks with its own name, on behalf of this account's log groups:
        # https://docs.aws.amazon.com/AmazonCloudWatch/latest/logs/encrypt-log-data-kms.html
        groups = f"arn:{Aws.PARTITION}:logs:{Aws.REGION}:{Aws.ACCOUNT_ID}:log-group:*"
        key.add_to_resource_policy(
            iam.PolicyStatement(
                principals=[iam.ServicePrincipal(f"logs.{Aws.REGION}.amazonaws.com")],
                actions=["kms:Encrypt", "kms:Decrypt", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:DescribeKey"],
                resources=["*"],
                conditions={"ArnLike": {"kms:EncryptionContext:aws:logs:arn": groups}},
            )
        )
        return key

    def _bucket(
        self,
        name: str,
        config: StageConfig,
        *,
        rules: list[s3.LifecycleRule],
        logs: s3.Bucket | None = None,
        key: kms.IKey | None = None,
    ) -> s3.Bucket:
        """One bucket with everything that all our buckets have in common."""
        common = s3.LifecycleRule(
            id="unfinished-and-superseded",
            abort_incomplete_multipart_upload_after=Duration.days(2),
            noncurrent_version_expiration=Duration.days(config.retention_days),
            expired_object_delete_marker=True,
        )
        return s3.Bucket(
            self,
            name,
            encryption=s3.BucketEncryption.KMS if key else s3.BucketEncryption.S3_MANAGED,
            encryption_key=key,
            # One key operation for many objects: without it each of a data set's files would be paid for.
            bucket_key_enabled=True if key else None,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            versioned=True,
            lifecycle_rules=[common, *rules],
            server_access_logs_bucket=logs,
            server_access_logs_prefix="data/" if logs else None,
            removal_policy=RemovalPolicy.DESTROY if config.destroys_data else RemovalPolicy.RETAIN,
            auto_delete_objects=config.destroys_data,
        )

    def _keep_the_emptiers_log(self, config: StageConfig, buckets: list[s3.Bucket]) -> None:
        """The log of CDK's function that empties buckets: made by the stack, so that it expires, and goes with the stack.

        Lambda would make it otherwise, for ever. It is there before a bucket's emptying and goes after it.
        """
        provider = Stack.of(self).node.find_child("Custom::S3AutoDeleteObjectsCustomResourceProvider")
        handler = provider.node.find_child("Handler")
        if isinstance(handler, CfnResource):
            group = log_group(self, "EmptierLog", config=config, name=f"/aws/lambda/{handler.ref}")
            for bucket in buckets:
                bucket.node.find_child("AutoDeleteObjectsCustomResource").node.add_dependency(group)

    def _data_rules(self, config: StageConfig) -> list[s3.LifecycleRule]:
        """Bulky intermediate results, marked by the jobs' tag-free key layout, move to cheaper storage or go.

        S3 filters by prefix only, and runs begin with their own name, so all of ``runs/`` shares one rule: tensors, features
        and checkpoints are of no use after some months, and models and data sets live under other prefixes.
        """
        return [
            self._expiry("runs", max(config.retention_days, 30), "runs/"),
            s3.LifecycleRule(
                id="datasets-to-infrequent-access",
                prefix="datasets/",
                transitions=[s3.Transition(storage_class=s3.StorageClass.INTELLIGENT_TIERING, transition_after=Duration.days(30))],
            ),
        ]

    def _expiry(self, name: str, days: int, prefix: str | None = None) -> s3.LifecycleRule:
        """A rule that deletes what is older than ``days``."""
        return s3.LifecycleRule(id=f"{name}-expire", prefix=prefix, expiration=Duration.days(days))


def announce(bucket: s3.Bucket) -> None:
    """Let a bucket tell EventBridge of new objects. CDK's own way would add a Lambda that sets what CloudFormation can say."""
    resource = bucket.node.default_child
    if isinstance(resource, s3.CfnBucket):
        resource.notification_configuration = s3.CfnBucket.NotificationConfigurationProperty(
            event_bridge_configuration=s3.CfnBucket.EventBridgeConfigurationProperty(event_bridge_enabled=True)
        )


def encrypt(scope: Construct, key: kms.IKey) -> None:
    """Everything below ``scope`` that stores something is encrypted with the stage's own key; buckets already are.

    One place for all of it: a new log group or function cannot forget it.
    """
    for node in scope.node.find_all():
        if isinstance(node, logs.CfnLogGroup | secretsmanager.CfnSecret):
            node.kms_key_id = key.key_arn
        elif isinstance(node, lambda_.CfnFunction):
            node.kms_key_arn = key.key_arn
        elif isinstance(node, ecr.CfnRepository):
            node.encryption_configuration = ecr.CfnRepository.EncryptionConfigurationProperty(
                encryption_type="KMS", kms_key=key.key_arn
            )
        elif isinstance(node, sfn.CfnStateMachine):
            node.encryption_configuration = sfn.CfnStateMachine.EncryptionConfigurationProperty(
                type="CUSTOMER_MANAGED_KMS_KEY", kms_key_id=key.key_arn, kms_data_key_reuse_period_seconds=300
            )
