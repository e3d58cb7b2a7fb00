"""The forms in which reward sources see a prompt: messages with roles, or one text in which every turn names its speaker."""

from __future__ import annotations

from stages.corpora.conversations.messages import Message, Prompt, as_question, content_text, transcript


def conversation(prompt: Prompt) -> list[Message]:
    """The prompt as messages, without a reply. A text prompt becomes one user message."""
    return as_question(prompt) if isinstance(prompt, str) else [dict(message) for message in prompt]


def full_text(prompt: Prompt, completion: str) -> str:
    """Prompt and completion as one text that ends with the completion. In a conversation every turn names its speaker."""
    before = transcript(prompt)
    if not isinstance(prompt, str) and before != content_text(prompt[0]):
        return f"{before}\n\nassistant: {completion}"
    joined = not before or before[-1].isspace() or completion[:1].isspace()
    return before + completion if joined else f"{before} {completion}"
