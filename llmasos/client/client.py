"""The client for programs without an event loop: the same methods, on a loop in a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from llmasos.client.async_client import DEFAULT_MODEL, AsyncLLMasOS, Options
from llmasos.client.events import OnEvent, ignore
from llmasos.config import ClientConfig
from llmasos.errors import UsageError

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[AsyncLLMasOS, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["LLMasOS", P], T]:
    """The same method, with the same signature, that returns when it is done."""

    @wraps(method)
    def wait_for(self: "LLMasOS", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.wait(method(self.asynchronous, *args, **kwargs))

    return wait_for


class LLMasOS:
    """A client of one swarm, for programs without an event loop. A context manager; see `AsyncLLMasOS`.

    `asynchronous` is the `AsyncLLMasOS` that it runs; `on_event` is called in the thread of its loop.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str],
        *,
        config: ClientConfig | None = None,
        api_key: str | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self.asynchronous = AsyncLLMasOS(endpoint, config=config, api_key=api_key, on_event=on_event)
        self._calls: set[asyncio.Task[Any]] = set()  # what somebody waits for; touched on the loop only
        self._door = threading.Lock()  # behind it a call is on the loop, or it has not begun
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmasos-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        try:
            self.wait(self.asynchronous.__aenter__())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the swarm. Calls of other threads end with a UsageError. May be called twice."""
        with self._door:
            if self._closed or not self._thread.is_alive():
                return
            self._closed = True
            leaving = asyncio.run_coroutine_threadsafe(self._leave(), self._loop)
        try:
            leaving.result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    generate_text = _blocking(AsyncLLMasOS.generate_text)
    generate = _blocking(AsyncLLMasOS.generate)
    generate_batch = _blocking(AsyncLLMasOS.generate_batch)
    chat = _blocking(AsyncLLMasOS.chat)
    translate = _blocking(AsyncLLMasOS.translate)
    answer = _blocking(AsyncLLMasOS.answer)
    generate_code = _blocking(AsyncLLMasOS.generate_code)
    models = _blocking(AsyncLLMasOS.models)
    status = _blocking(AsyncLLMasOS.status)

    def stream_text(self, prompt: str, model_name: str = DEFAULT_MODEL, **options: Unpack[Options]) -> Iterator[str]:
        """See `AsyncLLMasOS.stream_text`."""
        pieces = self.asynchronous.stream_text(prompt, model_name, **options)
        try:
            while (piece := self.wait(_next_or_none(pieces))) is not None:
                yield piece
        finally:
            self.wait(_finish(pieces))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the client's loop, and wait for it; for what `asynchronous` offers and this class does not.

        Raises UsageError once the client is closed.
        """
        with self._door:
            if self._closed or not self._thread.is_alive():
                work.close()
                raise UsageError("the client is closed", hint="make a new one: with LLMasOS(endpoint=…) as client:")
            future = asyncio.run_coroutine_threadsafe(self._call(work), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise UsageError("the client was closed before the call was done") from None
        except BaseException:
            future.cancel()  # Ctrl-C in the caller's thread ends the generation too
            raise

    async def _call(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            return await work
        finally:
            self._calls.discard(task)

    async def _leave(self) -> None:
        """End the calls while there is a swarm to take leave of, then everything else."""
        await _end(self._calls)
        try:
            await self.asynchronous.close()
        finally:
            await _end(asyncio.all_tasks() - {asyncio.current_task()})


async def _end(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _next_or_none(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


async def _finish(pieces: AsyncIterator[str]) -> None:
    close = getattr(pieces, "aclose", None)
    if close is not None:
        await close()
