"""The client for programs without an event loop: the same methods, on a loop in a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from llmasos.client.async_client import DEFAULT_MODEL, AsyncLLMasOS, Options
from llmasos.client.generate import Generation
from llmasos.config import ClientConfig
from llmasos.errors import UsageError

T = TypeVar("T")


class LLMasOS:
    """A client of one swarm, for programs without an event loop. A context manager; see `AsyncLLMasOS`.

    `asynchronous` is the `AsyncLLMasOS` that it runs.
    """

    def __init__(self, endpoint: str | Sequence[str], *, config: ClientConfig | None = None) -> None:
        self.asynchronous = AsyncLLMasOS(endpoint, config=config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmasos-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        try:
            self.wait(self.asynchronous.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the swarm. May be called twice."""
        if self._thread.is_alive():
            self.wait(self.asynchronous.close())
            self._stop()

    def generate_text(
        self,
        prompt: str,
        model_name: str = DEFAULT_MODEL,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        return_full_text: bool = True,
    ) -> str:
        """See `AsyncLLMasOS.generate_text`."""
        return self.wait(
            self.asynchronous.generate_text(
                prompt,
                model_name,
                max_length,
                max_new_tokens,
                temperature,
                top_p,
                top_k,
                repetition_penalty,
                seed,
                stop,
                return_full_text,
            )
        )

    def generate(self, prompt: str, model_name: str = DEFAULT_MODEL, **options: Unpack[Options]) -> Generation:
        """See `AsyncLLMasOS.generate`."""
        return self.wait(self.asynchronous.generate(prompt, model_name, **options))

    def stream_text(self, prompt: str, model_name: str = DEFAULT_MODEL, **options: Unpack[Options]) -> Iterator[str]:
        """See `AsyncLLMasOS.stream_text`."""
        pieces = self.asynchronous.stream_text(prompt, model_name, **options)
        try:
            while (piece := self.wait(_next_or_none(pieces))) is not None:
                yield piece
        finally:
            self.wait(_finish(pieces))

    def generate_batch(
        self, prompts: Sequence[str], model_name: str = DEFAULT_MODEL, **options: Unpack[Options]
    ) -> list[Generation]:
        """See `AsyncLLMasOS.generate_batch`."""
        return self.wait(self.asynchronous.generate_batch(prompts, model_name, **options))

    def chat(
        self, messages: Sequence[dict[str, str]], model_name: str = DEFAULT_MODEL, **options: Unpack[Options]
    ) -> Generation:
        """See `AsyncLLMasOS.chat`."""
        return self.wait(self.asynchronous.chat(messages, model_name, **options))

    def translate(
        self, text: str, source: str, target: str, model_name: str = DEFAULT_MODEL, **options: Unpack[Options]
    ) -> str:
        """See `AsyncLLMasOS.translate`."""
        return self.wait(self.asynchronous.translate(text, source, target, model_name, **options))

    def answer(
        self,
        question: str,
        context: str | None = None,
        model_name: str = DEFAULT_MODEL,
        **options: Unpack[Options],
    ) -> str:
        """See `AsyncLLMasOS.answer`."""
        return self.wait(self.asynchronous.answer(question, context, model_name, **options))

    def generate_code(
        self, task: str, language: str = "Python", model_name: str = DEFAULT_MODEL, **options: Unpack[Options]
    ) -> str:
        """See `AsyncLLMasOS.generate_code`."""
        return self.wait(self.asynchronous.generate_code(task, language, model_name, **options))

    def models(self) -> list[str]:
        """See `AsyncLLMasOS.models`."""
        return self.wait(self.asynchronous.models())

    def status(self) -> dict[str, Any]:
        """See `AsyncLLMasOS.status`."""
        return self.wait(self.asynchronous.status())

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the client's loop, and wait for it; for what `asynchronous` offers and this class does not.

        Raises UsageError once the client is closed.
        """
        if not self._thread.is_alive():
            work.close()
            raise UsageError("the client is closed", hint="make a new one: with LLMasOS(endpoint=…) as client:")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the caller's thread ends the generation too
            raise

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next_or_none(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


async def _finish(pieces: AsyncIterator[str]) -> None:
    close = getattr(pieces, "aclose", None)
    if close is not None:
        await close()
