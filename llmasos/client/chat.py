"""llmasos chat: a conversation in the terminal. Answers go to stdout, everything else to stderr.

One session serves the whole conversation: a turn sends only what the last did not.
"""

import asyncio
import contextlib
import json
import signal
import sys
import termios
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from llmasos.client.options import add_codec, add_draft, add_numbers, client_config, with_address
from llmasos.console import say, talk, whole
from llmasos.errors import LLMasOSError, UsageError

if TYPE_CHECKING:
    from llmasos.client.async_client import AsyncLLMasOS
    from llmasos.client.events import Event
    from llmasos.client.generate import Dialogue
    from llmasos.client.generation import Generation

HISTORY_FILE = Path("~/.llmasos_chat_history")
ROOM_TOKENS = 4_096
"""What each hop reserves for a conversation; shorter where the context is. It opens a larger session when needed."""

PROMPT = "you > "
HELP = """  /system TEXT      what the model is told before the conversation
  /temperature N    0 takes the likeliest token
  /max N            most tokens of an answer
  /seed N           the same seed gives the same answer; /seed alone: none
  /retry            the last answer again     /undo   forget the last question and answer
  /reset            begin anew                /route  which peers serve this conversation
  /save FILE        write the conversation    /load FILE   go on with one
  /help             this                      /exit   or Ctrl-D"""


@dataclass(slots=True)
class Conversation:
    """What has been said, and how to answer. Pure: commands change it, and say what to tell the user."""

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    temperature: float = 0.7
    max_tokens: int = 512
    seed: int | None = None
    ended: bool = False
    asks: bool = False  # the last turn is a question that wants an answer
    shows_route: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat template takes them."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def hear(self, line: str) -> str:
        """A line of the user. Returns what to say about it; raises UsageError for a command that cannot be."""
        self.asks = self.shows_route = False
        if not line.startswith("/"):
            if line.strip():
                self.turns.append({"role": "user", "content": line})
                self.asks = True
            return ""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        match name:
            case "exit" | "quit":
                self.ended = True
            case "help":
                return HELP
            case "reset":
                self.turns.clear()
                return "begun anew"
            case "undo":
                self._forget_answer()
                if self.turns:
                    self.turns.pop()
                return f"{len(self.turns) // 2} turns are left"
            case "retry":
                self._forget_answer()
                self.asks = bool(self.turns)
                return "" if self.asks else "nothing has been asked yet"
            case "route":
                self.shows_route = True
            case "system":
                self.system = rest
                return f"the model is told: {rest}" if rest else "the model is told nothing of mine"
            case "temperature":
                self.temperature = _number(name, rest)
            case "max":
                self.max_tokens = int(_number(name, rest, least=1))
            case "seed":
                self.seed = int(_number(name, rest)) if rest else None
            case "save":
                return self._save(rest)
            case "load":
                return self._load(rest)
            case _:
                raise UsageError(f"/{name} is no command", hint="/help lists them")
        return ""

    def answered(self, text: str) -> None:
        """The model's turn, whole or cut short."""
        self.turns.append({"role": "assistant", "content": text})
        self.asks = False

    def _forget_answer(self) -> None:
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()

    def _save(self, name: str) -> str:
        if not name:
            raise UsageError("/save needs a file", hint="/save talk.json")
        try:
            Path(name).write_text(json.dumps(self.messages, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{name} cannot be written: {error.strerror}") from error
        return f"saved to {name}"

    def _load(self, name: str) -> str:
        try:
            found = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{name or 'nothing'} cannot be read: {error}", hint="/load talk.json") from error
        if not isinstance(found, list) or not all(_is_message(message) for message in found):
            raise UsageError(f"{name} is no conversation", hint="a list of objects with role and content: see /save")
        self.system = "".join(message["content"] for message in found if message["role"] == "system")
        self.turns = [message for message in found if message["role"] != "system"]
        return f"{len(self.turns)} messages"


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _number(name: str, text: str, least: float = 0) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value < 2**63:
        raise UsageError(f"/{name} needs a number from {least:g} up", hint=f"/{name} 1")
    return value


class Speaker:
    """Asks the model, in one session as long as that holds."""

    def __init__(self, client: "AsyncLLMasOS", model: str) -> None:
        self._client = client
        self._model = model
        self._stack = AsyncExitStack()
        self._dialogue: Dialogue | None = None
        self._room = 0

    async def close(self) -> None:
        """End the session."""
        self._dialogue = None
        await self._stack.aclose()

    @property
    def route(self) -> str:
        """The hops of the session, for people."""
        if self._dialogue is None:
            return "no session is open"
        return " → ".join(f"{hop.span} on {hop.peer[-8:]}" for hop in self._dialogue.session.route.hops)

    def hint(self, error: LLMasOSError) -> str:
        """What to type next, in this swarm."""
        return with_address(error.hint, self._client.endpoints)

    async def answer(self, conversation: Conversation) -> AsyncGenerator["str | Generation", None]:
        """Pieces of the answer, and all about it at last."""
        from llmasos.blocks.sampling import SamplingParams
        from llmasos.client.generation import Generation, GenerationRequest, Piece

        generator = await self._client.generator(self._model)
        ids = await generator.encode(generator.chat_prompt(conversation.messages), special=False)
        sampling = SamplingParams(temperature=conversation.temperature, seed=conversation.seed)
        request = GenerationRequest("", max_new_tokens=conversation.max_tokens, sampling=sampling)
        new_tokens = request.new_tokens(len(ids), generator.spec.context_tokens)
        dialogue = await self._session(ids, new_tokens, generator.spec.context_tokens)
        try:
            async with aclosing(generator.events(request, dialogue, ids, new_tokens)) as events:
                async for event in events:
                    if isinstance(event, Piece):
                        yield event.text
                    elif isinstance(event, Generation):
                        yield event
        except LLMasOSError:
            await self.close()  # the next turn tries with a fresh one
            raise

    async def _session(self, ids: list[int], new_tokens: int, context: int) -> "Dialogue":
        tokens = len(ids) + new_tokens
        if self._dialogue is None or tokens > self._room:
            await self.close()
            self._room = min(max(2 * tokens, ROOM_TOKENS), context)
            self._stack = AsyncExitStack()
            opened = self._client.dialogue(self._model, self._room, new_tokens=64, prompt_ids=ids)
            self._dialogue = await self._stack.enter_async_context(opened)
        return self._dialogue


class Keyboard:
    """Lines of the user, without holding up the event loop: pings of the session go on while somebody types."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        if self.is_terminal:
            self._settings = termios.tcgetattr(sys.stdin)
            self._load_history()

    def _load_history(self) -> None:
        with contextlib.suppress(ImportError, OSError):
            import readline

            readline.set_history_length(1_000)
            readline.read_history_file(HISTORY_FILE.expanduser())

    def close(self) -> None:
        """Keep what was typed for the next time, and leave the terminal as it was: somebody may still wait for a line,
        with the terminal set up for that."""
        if self.is_terminal:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._settings)
            with contextlib.suppress(ImportError, OSError):
                import readline

                readline.write_history_file(HISTORY_FILE.expanduser())

    def remind(self) -> None:
        """Ctrl-C was pressed while a line is typed: say what ends the chat, and show the line again."""
        import readline

        say("\n(Ctrl-C again, or Ctrl-D, ends the chat)", style="dim")
        sys.stdout.write(PROMPT + readline.get_line_buffer())
        sys.stdout.flush()

    async def line(self) -> str | None:
        """The next line; None at the end of input."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str | None] = loop.create_future()

        def settle(line: str | None) -> None:
            if not answer.done():
                answer.set_result(line)

        def read() -> None:
            try:
                line: str | None = input(PROMPT if self.is_terminal else "")
            except (EOFError, UnicodeDecodeError, OSError):
                line = None
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, line)

        # A daemon: a thread that waits for a line cannot be stopped, and must not hold up the end.
        threading.Thread(target=read, name="keyboard", daemon=True).start()
        return await answer


def add_chat(command: ArgumentParser) -> None:
    """The options of `llmasos chat`."""
    defaults = Conversation()
    command.add_argument("--join", action="append", required=True, metavar="MULTIADDR", help="a peer of the swarm")
    command.add_argument("--model", default="smollm2", help="alias, directory, .gguf file or hub id")
    command.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    command.add_argument("--temperature", type=float, default=defaults.temperature, help="(default: %(default)s)")
    command.add_argument("--max-new-tokens", type=whole(1), default=defaults.max_tokens, help="(default: %(default)s)")
    command.add_argument("--seed", type=int, help="the same seed gives the same answers")
    add_numbers(command)
    add_codec(command)
    add_draft(command)


async def chat(args: Namespace) -> None:
    """Talk until the user has enough."""
    say(f"joining the swarm, loading the ends of {args.model}")
    from llmasos.blocks.lean import import_lean

    import_lean()
    from llmasos.client.async_client import AsyncLLMasOS

    conversation = replace(
        Conversation(),
        system=args.system,
        temperature=args.temperature,
        max_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    async with AsyncLLMasOS(args.join, config=client_config(args), on_event=tell_event) as client:
        generator = await client.generator(args.model)
        generator.chat_prompt([{"role": "user", "content": "?"}])  # a model that cannot chat says so now
        speaker = Speaker(client, args.model)
        keyboard = Keyboard()
        say("Ctrl-C stops an answer, /help lists commands, Ctrl-D ends\n", style="dim")
        try:
            await _talk(conversation, speaker, keyboard)
        finally:
            keyboard.close()
            await speaker.close()


def tell_event(event: "Event") -> None:
    """Lost peers, and waiting for others, in a line of their own: an answer may be half written."""
    say(f"\n({event})", style="dim")


class CtrlC:
    """Ctrl-C, for as long as this is entered: it interrupts nothing by itself, and no press is lost."""

    def __init__(self) -> None:
        self._pressed = asyncio.Event()

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._pressed.set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)

    async def comes_before(self, task: "asyncio.Task[Any]") -> bool:
        """Whether it is pressed before a task comes to its end."""
        waiting = asyncio.create_task(self._pressed.wait(), name="Ctrl-C")
        try:
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            return not task.done()
        finally:
            waiting.cancel()
            self._pressed.clear()


async def _talk(conversation: Conversation, speaker: Speaker, keyboard: Keyboard) -> None:
    with CtrlC() as ctrl_c:
        while not conversation.ended:
            line = await _typed(keyboard, ctrl_c)
            if line is None:
                return
            try:
                if said := conversation.hear(line):
                    say(said, style="dim")
            except UsageError as error:
                say(f"{error.message}; {error.hint}", style="red")
            if conversation.shows_route:
                say(speaker.route, style="dim")
            if conversation.asks:
                answer = asyncio.create_task(_answer(conversation, speaker), name="answer")
                if await ctrl_c.comes_before(answer):
                    answer.cancel()
                    await asyncio.wait([answer])
                    say("\n(stopped)", style="dim")
                else:
                    answer.result()


async def _typed(keyboard: Keyboard, ctrl_c: CtrlC) -> str | None:
    """The next line; None at the end of input, or when the user does not want to type any."""
    line = asyncio.create_task(keyboard.line(), name="keyboard")
    for last in (not keyboard.is_terminal, True):
        if not await ctrl_c.comes_before(line):
            return line.result()
        if last:
            break
        keyboard.remind()
    line.cancel()
    return None


async def _answer(conversation: Conversation, speaker: Speaker) -> None:
    """Write an answer to stdout as it comes. What was written before it was stopped counts as said."""
    written, failed = "", False
    try:
        async with aclosing(speaker.answer(conversation)) as pieces:
            async for piece in pieces:
                if not isinstance(piece, str):
                    sys.stdout.write("\n")
                    if talk.is_terminal:
                        say(f"{piece.completion_tokens} tokens, {piece.tokens_per_s:.1f} tokens/s\n", style="dim")
                    continue
                written += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
    except LLMasOSError as error:
        failed = True
        say(f"\nerror: {error.message}", style="bold red")
        if hint := speaker.hint(error):
            say(f"  {hint}")
    finally:
        sys.stdout.flush()
        if written or not failed:  # else the question stands, and /retry asks it again
            conversation.answered(written)
