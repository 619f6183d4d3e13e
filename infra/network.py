"""Network: a VPC without a way to the internet, for stages that ask for one of their own."""

from __future__ import annotations

from aws_cdk import Aws, RemovalPolicy
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.config import StageConfig
from infra.functions import log_group
from infra.roles import allow

SERVICES = {
    "EcrApi": ec2.InterfaceVpcEndpointAwsService.ECR,
    "EcrDocker": ec2.InterfaceVpcEndpointAwsService.ECR_DOCKER,
    "Logs": ec2.InterfaceVpcEndpointAwsService.CLOUDWATCH_LOGS,
    "Metrics": ec2.InterfaceVpcEndpointAwsService.CLOUDWATCH_MONITORING,
    "SageMaker": ec2.InterfaceVpcEndpointAwsService.SAGEMAKER_API,
    "Keys": ec2.InterfaceVpcEndpointAwsService.KMS,
    "Tokens": ec2.InterfaceVpcEndpointAwsService.STS,
}
"""What jobs and endpoint call, beside S3: each costs money by the hour and zone (docs/costs.md)."""


class Network(Construct):
    """Two private subnets, the endpoints that our jobs need, and the one security group that they share."""

    def __init__(self, scope: Construct, construct_id: str, *, config: StageConfig) -> None:
        super().__init__(scope, construct_id)
        private = ec2.SubnetConfiguration(name="Private", subnet_type=ec2.SubnetType.PRIVATE_ISOLATED, cidr_mask=24)
        self.vpc = ec2.Vpc(
            self, "Vpc", max_azs=2, nat_gateways=0, subnet_configuration=[private], restrict_default_security_group=False
        )
        self._flow_log(config)
        self.vpc.add_gateway_endpoint("S3", service=ec2.GatewayVpcEndpointAwsService.S3)
        # Machines of one training talk to each other on any port.
        self.group = ec2.SecurityGroup(self, "Jobs", vpc=self.vpc, description=f"Jobs and endpoint of {config.prefix}")
        self.group.add_ingress_rule(self.group, ec2.Port.all_traffic(), "Machines of one training")
        endpoints = ec2.SecurityGroup(
            self, "Endpoints", vpc=self.vpc, description="Endpoints of AWS services", allow_all_outbound=False
        )
        endpoints.add_ingress_rule(self.group, ec2.Port.tcp(443), "Jobs and endpoint")
        for name, service in SERVICES.items():
            self.vpc.add_interface_endpoint(name, service=service, security_groups=[endpoints], open=False)

    def _flow_log(self, config: StageConfig) -> None:
        """Refused connections only: in a network without a way out these are the ones to look at."""
        group = log_group(self, "FlowLog", config=config)
        service = iam.ServicePrincipal(
            "vpc-flow-logs.amazonaws.com", conditions={"StringEquals": {"aws:SourceAccount": Aws.ACCOUNT_ID}}
        )
        role = iam.Role(self, "FlowLogRole", assumed_by=service, description="Writes the network's log")
        allow(role, ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"], [group.log_group_arn])
        ec2.CfnFlowLog(
            self,
            "FlowLogs",
            resource_id=self.vpc.vpc_id,
            resource_type="VPC",
            traffic_type="REJECT",
            log_destination_type="cloud-watch-logs",
            log_group_name=group.log_group_name,
            deliver_logs_permission_arn=role.role_arn,
        ).apply_removal_policy(RemovalPolicy.DESTROY)

    def values(self) -> dict[str, str]:
        """What fills the places in the state machine's definition."""
        first, second = self.vpc.isolated_subnets[:2]
        return {"Subnet1": first.subnet_id, "Subnet2": second.subnet_id, "SecurityGroup": self.group.security_group_id}
