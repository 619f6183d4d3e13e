"""Storage: the data bucket, and the bucket for its access logs."""

from __future__ import annotations

from aws_cdk import Duration, RemovalPolicy
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.config import StageConfig


class Storage(Construct):
    """Encrypted, private, versioned, TLS only. Nothing in them is public, and nothing old is kept for ever."""

    def __init__(self, scope: Construct, construct_id: str, *, config: StageConfig) -> None:
        super().__init__(scope, construct_id)
        self.logs = self._bucket("Logs", config, rules=[self._expiry("logs", config.retention_days)])
        self.data = self._bucket("Data", config, rules=self._data_rules(config), logs=self.logs)

    def _bucket(self, name: str, config: StageConfig, *, rules: list[s3.LifecycleRule], logs: s3.Bucket | None = None) -> s3.Bucket:
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
            encryption=s3.BucketEncryption.S3_MANAGED,
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
