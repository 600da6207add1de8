"""Copies of `bespoke serve` as a Ray Serve application.

    pip install "ray[serve]" httpx
    BESPOKE=target/release/bespoke MODEL=smollm2-135m-awq-g64 serve run integrations.ray_serve:app

Each replica runs one program and passes requests on to it, streams as streams; Ray starts, places and
replaces replicas and chooses among them. OpenAI's API is then at http://127.0.0.1:8000/v1.

Environment: BESPOKE, the program (`bespoke`); MODEL, what it serves; REPLICAS (2); CPUS, the cores
and threads of a replica (1).
"""

import asyncio
import os
import sys

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve

CPUS = int(os.environ.get("CPUS", "1"))
START_SECONDS = 300
api = FastAPI()


@serve.deployment(
    num_replicas=int(os.environ.get("REPLICAS", "2")),
    ray_actor_options={"num_cpus": CPUS},
    max_ongoing_requests=256,
    health_check_period_s=2,
    graceful_shutdown_timeout_s=40,
)
@serve.ingress(api)
class Bespoke:
    async def __init__(self, program, model):
        # NOTE: port 0 takes a free one, which the program names on standard error.
        self.program = await asyncio.create_subprocess_exec(
            program, "serve", "--model", model, "--threads", str(CPUS), "--port", "0",
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        url = await asyncio.wait_for(self.listening(), START_SECONDS)
        self.log = asyncio.create_task(self.pass_on_log())
        # NOTE: an answer may take as long as it needs; the replica's limit bounds how many do.
        limits = httpx.Limits(max_connections=256)
        self.client = httpx.AsyncClient(base_url=url, timeout=None, limits=limits)

    async def listening(self):
        """The address, as soon as the program says it."""
        async for line in self.program.stderr:
            sys.stderr.write(line.decode(errors="replace"))
            if line.startswith(b"listening on "):
                return line.decode().split()[-1]
        raise RuntimeError(f"the program ended with {await self.program.wait()}")

    async def pass_on_log(self):
        async for line in self.program.stderr:
            sys.stderr.write(line.decode(errors="replace"))

    async def check_health(self):
        if self.program.returncode is not None:
            raise RuntimeError(f"the program ended with {self.program.returncode}")
        (await self.client.get("/ready", timeout=5)).raise_for_status()

    @api.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def forward(self, path: str, request: Request):
        headers = {k: v for k, v in request.headers.items() if k in ("accept", "content-type")}
        sent = self.client.build_request(
            request.method, "/" + path, params=request.query_params, headers=headers,
            content=await request.body(),
        )  # fmt: skip
        try:
            answer = await self.client.send(sent, stream=True)
        except httpx.TransportError as error:
            message = f"the program behind this replica does not answer: {error}"
            return JSONResponse({"error": {"message": message, "type": "unavailable"}}, 503)
        # NOTE: closing the answer when the client has gone cancels the request.
        return StreamingResponse(
            self.body(answer),
            answer.status_code,
            media_type=answer.headers.get("content-type"),
        )

    @staticmethod
    async def body(answer):
        try:
            async for part in answer.aiter_raw():
                yield part
        finally:
            await answer.aclose()

    def __del__(self):
        program = getattr(self, "program", None)
        if program is not None and program.returncode is None:
            program.terminate()


app = Bespoke.bind(os.environ.get("BESPOKE", "bespoke"), os.environ.get("MODEL", "smollm2-135m"))
