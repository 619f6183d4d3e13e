"""LitServe with eager torch and two workers."""

import os

import litserve
from eager import Eager
from fastapi import Request


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = Eager()

    def decode_request(self, request: Request) -> bytes:
        return request["file"].file.read()  # LitServe reads JSON or forms, no plain bodies

    def predict(self, body: bytes) -> dict[str, object]:
        return self.model.answer(body)

    def encode_response(self, output: dict[str, object]) -> dict[str, object]:
        return output


if __name__ == "__main__":
    server = litserve.LitServer(Api(api_path="/invocations"), accelerator="cpu", workers_per_device=2)
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False, log_level="error")
