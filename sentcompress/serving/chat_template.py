"""Makes a prompt of a chat, with the tokenizer's chat template or one from a file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from sentcompress.errors import InputError
from sentcompress.serving.openai_form import APIError


class ChatTemplate:
    """A chat template. transformers runs it in a sandbox of Jinja: it sees the messages and nothing else.

    Args:
        tokenizer: with its own template, or none.
        text: a template in its place.

    Raises:
        InputError: the template has a mistake.
    """

    def __init__(self, tokenizer: Any, text: str | None = None) -> None:
        self._tokenizer = copy.copy(tokenizer)
        if text is not None:
            self._tokenizer.chat_template = text
            try:
                jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
            except jinja2.TemplateSyntaxError as error:
                raise InputError(
                    f"--chat-template: line {error.lineno}: {error.message}", fix="correct the template"
                ) from None

    @classmethod
    def from_file(cls, tokenizer: Any, file: Path | None) -> ChatTemplate:
        """The template in a file; without one, the tokenizer's own. Raises InputError."""
        if file is None:
            return cls(tokenizer)
        try:
            return cls(tokenizer, file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(
                f"--chat-template: {file}: {reason}", fix="give a file with a Jinja template"
            ) from None

    def render(self, messages: Sequence[dict[str, str]]) -> tuple[str, str]:
        """The prompt of a chat, and the beginning of it that other chats share: the system message.

        Raises:
            APIError: there is no template, or it refuses these messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise APIError(
                400,
                "this model has no chat template, so it cannot chat; use /v1/completions, or start the server with "
                "--chat-template FILE",
                code="no_chat_template",
            )
        prompt = self._apply(messages, True)
        if messages[0]["role"] != "system" or len(messages) < 2:
            return prompt, ""
        try:
            system = self._apply(messages[:1], False)
        except APIError:  # some templates want a user's message
            return prompt, ""
        return prompt, system if prompt.startswith(system) else ""

    def _apply(self, messages: Sequence[dict[str, str]], answers: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [*messages], tokenize=False, add_generation_prompt=answers
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise APIError(
                400, f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from None
        return str(text)
