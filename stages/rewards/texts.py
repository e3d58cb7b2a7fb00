"""What reward sources are shown of a prompt: messages with roles, or one text that says who said what."""

from __future__ import annotations

from stages.corpora.messages import Message, Prompt, as_question, content_text, transcript


def conversation(prompt: Prompt) -> list[Message]:
    """The prompt as messages, without a reply; a text is one turn of the user."""
    return as_question(prompt) if isinstance(prompt, str) else [dict(message) for message in prompt]


def whole_text(prompt: Prompt, completion: str) -> str:
    """Prompt and completion as one text, which ends with the completion. In a conversation every turn names its speaker."""
    before = transcript(prompt)
    if not isinstance(prompt, str) and before != content_text(prompt[0]):
        return f"{before}\n\nassistant: {completion}"
    joined = not before or before[-1].isspace() or completion[:1].isspace()
    return before + completion if joined else f"{before} {completion}"
