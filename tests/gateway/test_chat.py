"""The conversation of `llmasos chat`: what commands do to it. Its terminal side is tested on processes."""

import json
from pathlib import Path

import pytest

from llmasos.client.chat import Conversation
from llmasos.errors import UsageError


def talked(*turns: str) -> Conversation:
    """A conversation in which each question was answered with itself."""
    conversation = Conversation()
    for turn in turns:
        conversation.hear(turn)
        conversation.answered(turn.upper())
    return conversation


def test_a_line_is_a_question_and_an_empty_one_is_none() -> None:
    conversation = Conversation()
    conversation.hear("Hello")
    assert conversation.asks
    assert conversation.messages == [{"role": "user", "content": "Hello"}]
    conversation.hear("  ")
    assert not conversation.asks


def test_retry_asks_the_last_question_again() -> None:
    conversation = talked("one", "two")
    conversation.hear("/retry")
    assert conversation.asks
    assert [message["content"] for message in conversation.messages] == ["one", "ONE", "two"]
    assert Conversation().hear("/retry") == "nothing has been asked yet"


def test_undo_forgets_a_question_and_its_answer() -> None:
    conversation = talked("one", "two")
    assert conversation.hear("/undo") == "1 turns are left"
    assert [message["content"] for message in conversation.messages] == ["one", "ONE"]


def test_reset_keeps_what_the_model_is_told() -> None:
    conversation = talked("one")
    conversation.hear("/system Be brief.")
    conversation.hear("/reset")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_settings() -> None:
    conversation = Conversation()
    for line in ("/temperature 0.3", "/max 40", "/seed 7"):
        conversation.hear(line)
    assert (conversation.temperature, conversation.max_tokens, conversation.seed) == (0.3, 40, 7)
    conversation.hear("/seed")
    assert conversation.seed is None
    conversation.hear("/exit")
    assert conversation.ended


@pytest.mark.parametrize("line", ["/dance", "/temperature hot", "/max 0", "/save", "/load nowhere.json", "/seed -1"])
def test_a_command_that_cannot_be(line: str) -> None:
    with pytest.raises(UsageError):
        Conversation().hear(line)


def test_a_conversation_is_saved_and_loaded(tmp_path: Path) -> None:
    conversation = talked("Grüße")
    conversation.hear("/system Be kind.")
    file = tmp_path / "talk.json"
    conversation.hear(f"/save {file}")
    assert json.loads(file.read_text())[1] == {"role": "user", "content": "Grüße"}
    other = Conversation()
    assert other.hear(f"/load {file}") == "2 messages"
    assert other.messages == conversation.messages
    file.write_text('[{"role": "user"}]')
    with pytest.raises(UsageError, match="no conversation"):
        other.hear(f"/load {file}")
