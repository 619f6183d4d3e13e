"""Ray Serve with our own model code and form, two replicas: the container that AWS points to."""

import os
import sys
from pathlib import Path

from ray import serve
from starlette.requests import Request

sys.path.insert(0, os.environ["BENCH_MODEL_CODE"])


@serve.deployment(num_replicas=2, max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Classifier:
    def __init__(self) -> None:
        sys.path.insert(0, os.environ["BENCH_MODEL_CODE"])
        from classifier.served_model import ServedModel

        self.model = ServedModel(Path(os.environ["BENCH_MODEL"]))

    async def __call__(self, request: Request) -> dict[str, object]:
        from inference import decoded, predict_fn

        return predict_fn(decoded(await request.body()), self.model)


app = Classifier.bind()
