"""Prompts for the tasks that the client offers by name. Instruct models take them as chat, others as plain text."""

Messages = list[dict[str, str]]


def translation(text: str, source: str, target: str) -> Messages:
    """Ask for `text`, written in `source`, in the language `target`."""
    instruction = f"Translate the following text from {source} to {target}. Reply with the translation only."
    return _ask(f"{instruction}\n\n{text}")


def answer(question: str, context: str | None) -> Messages:
    """Ask a question, about `context` if there is one."""
    if context is None:
        return _ask(f"Answer the question briefly.\n\nQuestion: {question}")
    return _ask(f"Answer the question briefly, using only the context.\n\nContext: {context}\n\nQuestion: {question}")


def code(task: str, language: str) -> Messages:
    """Ask for a program."""
    return _ask(f"Write {language} code for the following task. Reply with the code only.\n\n{task}")


def plain(messages: Messages) -> str:
    """The same conversation for a model that has no chat template."""
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:"])


def _ask(content: str) -> Messages:
    return [{"role": "user", "content": content}]
