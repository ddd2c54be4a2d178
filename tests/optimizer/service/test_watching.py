"""Streams of who may follow no more."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from optimizer.service import jobs_pb2 as pb
from optimizer.service.app import Parts, Settings, make_parts, make_service
from optimizer.service.auth import Scope, Unauthenticated
from optimizer.service.database import DatabaseUnavailable
from optimizer.service.feed import Feed
from optimizer.service.metrics import ServiceMetrics
from optimizer.service.records import Submission
from optimizer.service.rpc import JobsService, make_server
from optimizer.service.watching import Watched


@dataclass
class Follower:
    parts: Parts
    settings: Settings
    job_id: str
    key_id: str
    headers: dict[str, str]

    def revoke(self) -> None:
        assert self.parts.authenticator.keys is not None
        assert self.parts.authenticator.keys.revoke(self.key_id)


@pytest.fixture
def follower(settings: Settings) -> Iterator[Follower]:
    """With a key of its own, of a job that waits."""
    guarded = replace(settings, keys=True, recheck_s=0.02)
    parts = make_parts(guarded)
    assert parts.authenticator.keys is not None
    job, _ = parts.ledger.submit(Submission("me", "m", {"spec": {}}))
    key, text = parts.authenticator.keys.make("ann", [Scope.READ])
    yield Follower(parts, guarded, job.id, key.id, {"Authorization": f"Bearer {text}"})
    parts.database.close()


def test_events_end_with_the_reason_when_the_key_is_revoked(follower: Follower) -> None:
    app: FastAPI = make_service(follower.parts, follower.settings)
    with TestClient(app, base_url="http://localhost") as client, ThreadPoolExecutor(1) as threads:
        url = f"/v1/jobs/{follower.job_id}/events/stream"
        following = threads.submit(client.get, url, headers=follower.headers)
        while app.state.feed.n_followers == 0 and not following.done():
            pass
        follower.revoke()
        text = following.result(30).text
        assert app.state.feed.n_followers == 0
    assert "event: end" not in text
    told = text.partition("event: refused")[2].partition("data: ")[2].partition("\n")[0]
    problem = json.loads(told)
    assert (problem["status"], problem["detail"]) == (401, "this API key was revoked")


@pytest.mark.parametrize("name", ["Follow", "Logs"])
def test_grpc_stream_ends_unauthenticated_when_the_key_is_revoked(
    follower: Follower, name: str
) -> None:
    parts = follower.parts

    async def follow() -> Any:
        feed = Feed(parts.ledger)
        metrics = ServiceMetrics(parts.ledger)
        service = JobsService(parts.operations, parts.authenticator, metrics, feed, 0.02)
        server, port = make_server(service, 1_000, None, "127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stream = channel.unary_stream(
                    f"/trimserve.jobs.v1.Jobs/{name}",
                    request_serializer=pb.FollowRequest.SerializeToString,
                    response_deserializer=pb.Event.FromString,
                )
                metadata = (("authorization", follower.headers["Authorization"]),)
                call = stream(pb.FollowRequest(id=follower.job_id), metadata=metadata, timeout=30)
                if name == "Follow":
                    assert (await call.read()).number == 1
                await asyncio.to_thread(follower.revoke)
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    await call.read()
                return ended.value
        finally:
            await server.stop(0)
            feed.close()

    error = asyncio.run(follow())
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "revoked" in error.details()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_follower_is_looked_at_as_often_as_said_and_again_when_the_database_was_away() -> None:
    clock, looks = Clock(), []

    def check() -> None:
        looks.append(clock.now_s)
        if clock.now_s == 20:
            raise DatabaseUnavailable("jobs", "away")
        if clock.now_s == 45:
            raise Unauthenticated("revoked")

    async def seconds() -> AsyncGenerator[float, None]:
        for _ in range(20):
            yield clock.now_s
            clock.now_s += 5

    async def follow() -> list[float]:
        seen: list[float] = []
        watched = Watched(check, 10.0, clock)
        try:
            async for one in watched.stream(seconds()):
                seen += [one]
        except Unauthenticated:
            return seen
        raise AssertionError("nobody was refused")

    assert asyncio.run(follow()) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert looks == [10, 20, 25, 35, 45]
