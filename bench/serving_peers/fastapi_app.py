"""A plain FastAPI service with eager torch: `uvicorn fastapi_app:app --workers 2`."""

from eager import Eager
from fastapi import FastAPI, Request

app = FastAPI()
model = Eager()


@app.get("/ping")
def ping() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/invocations")
async def invocations(request: Request) -> dict[str, object]:
    return model.answer(await request.body())
