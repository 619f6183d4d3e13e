"""TorchServe's handler: the same eager model, one picture a request."""

from eager import Eager


class Handler:
    def initialize(self, context: object) -> None:
        self.model = Eager()

    def handle(self, data: list[dict[str, bytes]], context: object) -> list[dict[str, object]]:
        return [self.model.answer(bytes(row.get("body") or row["data"])) for row in data]
