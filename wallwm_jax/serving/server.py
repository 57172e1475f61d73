"""The websocket server: many robots, one policy, one inference at a time.

The protocol is that of openpi's policy server: on connection a binary frame with the metadata, then per request a
binary frame with the reply, or a text frame that says what is wrong; the connection stays open. `GET /healthz` answers
200 where requests are served, 503 while the programs compile or the server stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgpack
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.protocol import State

from wallwm_jax.console import UserError, phase
from wallwm_jax.inference.latent_conditioner import LatentConditioner
from wallwm_jax.inference.planner import VlmPlanner
from wallwm_jax.inference.policy import Policy
from wallwm_jax.serving import wire
from wallwm_jax.serving.event_clock import time_sources
from wallwm_jax.serving.messages import DURATION_HEAD, Executed, Reader, Request, describe
from wallwm_jax.serving.session import Session
from wallwm_jax.serving.watchdog import Calibration

HEALTH = "/healthz"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What the server bears.

    Attributes:
      message_bytes: of one request; larger ones close the connection (code 1009).
      queue: requests that wait or run; further ones are told "busy".
      clients: connections; further ones are refused (HTTP 503).
      silence_s: a client that does not answer a ping, or take its reply, for so long is dropped.
      drain_s: how long a stop waits for the requests that it found.
    """

    message_bytes: int = 32 * 2**20
    queue: int = 16
    clients: int = 64
    silence_s: float = 20.0
    drain_s: float = 30.0


class PolicyServer:
    """Serves one policy.

    Args:
      policy: all that runs it runs in one thread.
      calibrations: decoding mode → that of the watchdog.
      modes: of decoding, that are served; None is all that the policy has, event mode first.
      latents: tell unified mode what to do in place of the prompt's words; None leaves it to these.
      planner: asked in unified mode how long the event still takes that a request says is under way; of batch size 1.
      host, port: where to listen; port 0 takes a free one.
      seed: of each session's sampling noise.
      limits: what to bear.
      warm: compile every program before the first request.
    """

    def __init__(
        self,
        policy: Policy,
        calibrations: Mapping[str, Calibration] | None = None,
        *,
        modes: Sequence[str] | None = None,
        latents: LatentConditioner | None = None,
        planner: VlmPlanner | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        seed: int = 0,
        limits: Limits | None = None,
        warm: bool = True,
    ) -> None:
        self.host, self.port = host, port
        self._policy, self._calibrations, self._seed, self._warm = policy, calibrations or {}, seed, warm
        self._limits = limits or Limits()
        self._modes, self._latents, self._planner = tuple(modes or policy.modes), latents, planner
        self._event_time = time_sources(policy.event_mode, planner) if "unified" in self._modes else []
        self._reader = Reader(policy, self._modes, latents=latents is not None, event_time=self._event_time)
        alarms = {
            mode: {"threshold": one.threshold, "events": one.events}
            for mode, one in self._calibrations.items()
            if mode in self._modes and not (latents and mode == "unified")
        }
        self._metadata = wire.packb(
            describe(policy, self._modes)
            | {
                "event_time": self._event_time,
                "watchdog": alarms or None,
                "max_message_bytes": self._limits.message_bytes,
            }
        )
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._jobs = 0  # requests that wait, run, or whose reply is on its way

    def stop(self) -> None:
        """Ends `run` after the requests under way; call it in the server's event loop."""
        self._stopping.set()

    async def run(self, listening: Callable[[], Any] = lambda: None) -> None:
        """Serves until `stop`; calls `listening` once the port is open, which is before the programs are compiled.

        Raises:
          UserError: the port cannot be opened.
        """
        try:
            server = await serve(
                self._handle,
                self.host,
                self.port,
                process_request=self._admit,
                origins=[None],  # robots send none; a page in somebody's browser does
                compression=None,
                max_size=self._limits.message_bytes,
                max_queue=2,
                ping_interval=self._limits.silence_s,
                ping_timeout=self._limits.silence_s,
                close_timeout=1.0,
            )
        except OSError as error:
            raise UserError(f"cannot listen on {self.host}:{self.port} ({error}); choose another --port") from error
        self.port = server.sockets[0].getsockname()[1]
        listening()
        warming = asyncio.create_task(self._warm_up())
        try:
            await _first(asyncio.shield(warming), self._stopping.wait())
            if warming.done():
                warming.result()
            await self._stopping.wait()
        finally:
            self._stopping.set()
            await self._drain(server)
            await warming

    async def _warm_up(self) -> None:
        """Compiles program by program, so that a stop need not wait for all."""
        loop = asyncio.get_running_loop()
        for name, compile_it in self._programs() if self._warm else ():
            if self._stopping.is_set():
                return
            with phase(f"warm {name}"):
                await loop.run_in_executor(self._engine, compile_it)
        self._ready.set()

    def _programs(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """What is to be compiled, by name."""
        mode, unified = self._policy.event_mode, self._policy.unified_mode
        for bucket in mode.buckets if "event" in self._modes else ():
            yield f"bucket of {bucket} latents", functools.partial(mode.warm_up, [bucket], video=True)
        if unified and "unified" in self._modes:
            yield f"chunks of {unified.chunk} actions", functools.partial(unified.warm_up, video=True)
        if self._latents:
            yield "latents", self._latents.warm_up
        if DURATION_HEAD in self._event_time:
            yield "duration head", functools.partial(mode.warm_up, [])
        if self._planner:
            yield "planner", self._planner.warm_up

    async def _drain(self, server: Server) -> None:
        """No new connections or requests; those under way are answered, then everybody is sent away."""
        until = time.monotonic() + self._limits.drain_s
        while self._jobs and time.monotonic() < until:
            await asyncio.sleep(0.01)
        server.close(reason="the server stops")
        await server.wait_closed()
        self._engine.shutdown(wait=self._jobs == 0, cancel_futures=True)

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Health checks, and robots while there is room."""
        serving = self._ready.is_set() and not self._stopping.is_set()
        if request.path == HEALTH:
            if serving:
                return connection.respond(http.HTTPStatus.OK, "OK\n")
            state = "stopping" if self._stopping.is_set() else "warming up"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{state}\n")
        if self._stopping.is_set() or len(connection.server.connections) >= self._limits.clients:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "full or stopping; try again later\n")
        return None

    async def _handle(self, connection: ServerConnection) -> None:
        """One robot, from the metadata to its end."""
        session = Session(self._policy, self._calibrations, self._seed, self._latents, self._planner)
        with contextlib.suppress(ConnectionClosed):
            await _first(self._ready.wait(), connection.wait_closed())
            await connection.send(self._metadata)
            async for data in connection:
                received = time.perf_counter()
                self._jobs += 1
                try:
                    reply = await self._reply(connection, session, data, received)
                    async with asyncio.timeout(self._limits.silence_s):
                        await connection.send(reply)
                    if isinstance(reply, bytes) and not self._stopping.is_set():
                        asyncio.get_running_loop().run_in_executor(self._engine, session.imagine)
                except TimeoutError:
                    connection.transport.abort()
                    return
                finally:
                    self._jobs -= 1

    async def _reply(self, connection: ServerConnection, session: Session, data: Any, received: float) -> bytes | str:
        """The reply to one message; a text is an error."""
        if self._stopping.is_set():
            return "the server stops; ask another one"
        if self._jobs > self._limits.queue:
            return f"busy: {self._limits.queue} requests are waiting already; try again in a moment"
        try:
            if isinstance(data, str):
                raise UserError("a request is a binary frame of msgpack; this one is text")
            message = self._reader.read(wire.unpackb(data))
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._engine, self._infer, connection, session, message, received)
        except UserError as error:
            return str(error)
        except Exception as error:  # whatever a request sets off, the others go on
            _log.exception("a request failed")
            return f"internal error ({type(error).__name__}); the server's log says more"

    def _infer(
        self, connection: ServerConnection, session: Session, message: Request | Executed, received: float
    ) -> bytes:
        """In the engine's thread: runs the policy and packs its answer."""
        if connection.state is not State.OPEN:
            raise UserError("the robot is gone")  # nobody reads this; the engine is free for the next one
        begun = time.perf_counter()
        reply, seconds = session.answer(message)
        done = time.perf_counter()
        packer = msgpack.Packer(default=wire.pack_numpy, autoreset=False)
        packer.pack_map_header(len(reply) + 1)
        for name, value in reply.items():
            packer.pack(name)
            packer.pack(value)
        packed = time.perf_counter()
        timing = {"queue": begun - received, **seconds, "total": packed - received, "pack": packed - done}
        packer.pack("server_timing")
        packer.pack({f"{name}_ms": 1e3 * spent for name, spent in timing.items()})
        return packer.bytes()


@contextlib.contextmanager
def running(server: PolicyServer) -> Iterator[PolicyServer]:
    """Serves in a thread of this process inside the block, ready at its beginning; for notebooks, benchmarks, tests."""
    listening, loops, failures = threading.Event(), [], []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.run(listening.set)

    def target() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failures.append(error)
            listening.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    listening.wait()
    try:
        if failures:
            raise failures[0]
        yield server
    finally:
        if thread.is_alive():
            loops[0].call_soon_threadsafe(server.stop)
        thread.join()


async def _first(*waiting: Awaitable[Any]) -> None:
    """Returns when the first of them is done."""
    tasks = [asyncio.ensure_future(one) for one in waiting]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
