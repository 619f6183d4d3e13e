"""Where AWS keeps the training container and the managed debugger's rules, by region.

Tables, not calls: synthesis needs no network and no SageMaker SDK. A test compares them with ``sagemaker.core.image_uris``
(frameworks ``pytorch-amzn2023``, version 2.13, and ``debugger``).
"""

from __future__ import annotations

REPOSITORY = "pytorch"
CPU_TAG = "2.13-cpu-amzn2023-sagemaker"
GPU_TAG = "2.13-cu133-amzn2023-sagemaker"

_MOST = "763104351884"
_USUAL_REGIONS = (
    "ap-northeast-1 ap-northeast-2 ap-south-1 ap-southeast-1 ap-southeast-2 ca-central-1 eu-central-1 eu-north-1 eu-west-1 "
    "eu-west-2 eu-west-3 sa-east-1 us-east-1 us-east-2 us-west-1 us-west-2"
)
_EXCEPTIONS = {
    "af-south-1": "626614931356",
    "ap-east-1": "871362719292",
    "ap-east-2": "975050140332",
    "ap-northeast-3": "364406365360",
    "ap-south-2": "772153158452",
    "ap-southeast-3": "907027046896",
    "ap-southeast-4": "457447274322",
    "ap-southeast-5": "550225433462",
    "ap-southeast-6": "633930458069",
    "ap-southeast-7": "590183813437",
    "ca-west-1": "204538143572",
    "cn-north-1": "727897471807",
    "cn-northwest-1": "727897471807",
    "eu-central-2": "380420809688",
    "eu-south-1": "692866216735",
    "eu-south-2": "503227376785",
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "me-south-1": "217643126080",
    "mx-central-1": "637423239942",
    "us-gov-east-1": "446045086412",
    "us-gov-west-1": "442386744353",
}

ACCOUNTS: dict[str, str] = {**dict.fromkeys(_USUAL_REGIONS.split(), _MOST), **_EXCEPTIONS}
"""Region -> account that owns the container repository there."""

DEBUGGER_REPOSITORY = "sagemaker-debugger-rules"
DEBUGGER_TAG = "latest"
DEBUGGER_ACCOUNTS: dict[str, str] = {
    "af-south-1": "314341159256",
    "ap-east-1": "199566480951",
    "ap-northeast-1": "430734990657",
    "ap-northeast-2": "578805364391",
    "ap-northeast-3": "479947661362",
    "ap-south-1": "904829902805",
    "ap-southeast-1": "972752614525",
    "ap-southeast-2": "184798709955",
    "ca-central-1": "519511493484",
    "cn-north-1": "618459771430",
    "cn-northwest-1": "658757709296",
    "eu-central-1": "482524230118",
    "eu-north-1": "314864569078",
    "eu-south-1": "563282790590",
    "eu-west-1": "929884845733",
    "eu-west-2": "250201462417",
    "eu-west-3": "447278800020",
    "me-south-1": "986000313247",
    "sa-east-1": "818342061345",
    "us-east-1": "503895931360",
    "us-east-2": "915447279597",
    "us-gov-west-1": "515509971035",
    "us-west-1": "685455198987",
    "us-west-2": "895741380848",
}
"""Region -> account that owns the rules' container there. AWS offers SageMaker Debugger in no other region."""


def tag(gpu: bool) -> str:
    """The container's tag for a machine with or without an NVIDIA GPU."""
    return GPU_TAG if gpu else CPU_TAG
