"""``python -m infra.verify``: every stage and configuration against everything that can be checked without an account."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from infra.config import ConfigError
from infra.verify import check, tools
from infra.verify.configurations import CONFIGURATIONS, config_of
from infra.verify.deployment import Deployment, SynthesisError, synthesise_all
from infra.verify.findings import Finding

Json = dict[str, Any]


def verify(name: str, context: dict[str, str], template: Json) -> tuple[str, list[Finding], float]:
    """``(name, findings, seconds)`` of one configuration."""
    started = time.monotonic()
    deployment = Deployment(template)
    found = [*check.check(config_of(context), deployment), *tools.check(deployment)]
    return name, found, time.monotonic() - started


def main(argv: list[str]) -> int:
    """Verify what the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make verify", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"configurations (default: all of {', '.join(CONFIGURATIONS)})")
    parser.add_argument("--no-secrets", action="store_true", help="leave the secret scan out")
    flags = parser.parse_args(argv)
    unknown = sorted(set(flags.names) - set(CONFIGURATIONS))
    if unknown:
        parser.error(f"{', '.join(unknown)} is no configuration; expected some of {', '.join(CONFIGURATIONS)}")
    chosen = {name: CONFIGURATIONS[name] for name in flags.names or CONFIGURATIONS}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            templates = synthesise_all(Path(folder), chosen)
        except (SynthesisError, ConfigError) as error:
            print(error, file=sys.stderr)
            return 1
    print(f"synthesised {len(chosen)} configurations, CDK's validation and cdk-nag content ({time.monotonic() - started:.0f} s)")
    faults = 0
    with ProcessPoolExecutor(2) as pool:
        for name, found, seconds in pool.map(verify, chosen, chosen.values(), templates.values()):
            faults += _tell(name, found, seconds)
    before = time.monotonic()
    faults += _tell(
        "asl-validator",
        list(tools.asl_validator({name: Deployment(t).machine for name, t in templates.items()})),
        time.monotonic() - before,
    )
    if not flags.no_secrets:
        before = time.monotonic()
        faults += _tell("secrets", list(tools.secrets()), time.monotonic() - before)
    print(f"{faults or 'no'} findings ({time.monotonic() - started:.0f} s)")
    return 1 if faults else 0


def _tell(name: str, found: list[Finding], seconds: float) -> int:
    """One line for a configuration, and one for each finding."""
    print(f"{name:<20} {f'{len(found)} findings' if found else 'clean':<12} {seconds:5.1f} s", flush=True)
    for finding in found:
        print(f"  {finding}", flush=True)
    return len(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
