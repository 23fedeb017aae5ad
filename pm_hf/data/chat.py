"""Conversations: reading a row's messages, and what the chat template makes of them."""

import json
from collections.abc import Sequence
from typing import Any, TypedDict

from pm_hf.data.columns import text_of
from pm_hf.errors import InputError

Messages = list[dict[str, Any]]


class Chat(TypedDict, total=False):
    """A chat prompt that is more than its messages.

    tools: those of the row's column `tools`. answer: what the completing message has besides role and content, and its
    content where that is no text.
    """

    messages: Messages
    tools: list
    answer: dict[str, Any]


Prompt = str | Messages | Chat


def conversation(messages: Sequence[Any], where: str, row: int, column: str) -> Messages:
    """A row's messages with all that they hold; InputError that names the row for one which is none.

    The content is text, text parts, or null beside other keys of an assistant's message.
    """
    made = []
    for number, message in enumerate(messages):
        what = f"{where}: column {column}, row {row}, message {number}"
        if not isinstance(message, dict):
            raise InputError(f'{what}: expected {{"role": …, "content": …}}, found {message!r:.80}')
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise InputError(f"{what} has no role; found {', '.join(message)}")
        content = {"content": _content(message, what)} if "content" in message else {}
        rest = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
        made.append({"role": message["role"], **content, **rest})
        if message.get("content") is None and not _says_otherwise(message):
            raise InputError(f"{where}: column {column} must hold text, row {row} holds None in message {number}")
    return made


def prompt_of(messages: Messages, tools: list | None, answer: dict[str, Any]) -> Prompt:
    """The messages alone where there is no more."""
    if not tools and not answer:
        return messages
    chat = Chat(messages=messages)
    if tools:
        chat["tools"] = tools
    if answer:
        chat["answer"] = answer
    return chat


def completion_of(message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(the text of the message that completes a prompt, what else it has; see `Chat`).

    The text of a message that has only other keys is these, as JSON; that of one which says nothing is empty.
    """
    content = message.get("content")
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    if isinstance(content, str) and (content or not rest):
        return content, rest
    if isinstance(content, list):
        return "".join(part["text"] for part in content), {**rest, "content": content}
    return json.dumps(rest, ensure_ascii=False), {**rest, "content": content}


def tools_of(value: Any, where: str, row: int) -> list | None:
    """The cell of the column `tools`: a list of objects, or the JSON text of one; None where there is none."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: column tools, row {row} is no JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(f"{where}: column tools, row {row}: expected a list of objects, found {value!r:.80}")
    return value


def messages_of(prompt: Messages | Chat) -> Messages:
    """Those of a chat prompt."""
    return prompt["messages"] if isinstance(prompt, dict) else prompt


def answer_of(prompt: Prompt) -> dict[str, Any]:
    """What the completing message has besides its text; see `Chat`."""
    return prompt.get("answer", {}) if isinstance(prompt, dict) else {}


def rendered(tokenizer: Any, prompt: Messages | Chat, answer: dict[str, Any] | None = None) -> str:
    """A chat as the tokenizer's template writes it: up to the turn that follows, or with `answer` to its end.

    InputError with the template's own words where it refuses, and where it leaves out tools, parts of a content or
    anything else that a message holds.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; use prompt and completion columns with text")
    messages = [dict(message) for message in [*messages_of(prompt), *([] if answer is None else [answer])]]
    tools = prompt.get("tools") if isinstance(prompt, dict) else None

    def written(messages: Messages, tools: Any) -> str:
        more = {"tools": tools} if tools else {}
        how = {"tokenize": False, "add_generation_prompt": answer is None}
        return str(tokenizer.apply_chat_template(messages, **how, **more))

    try:
        text = written(messages, tools)
    except Exception as error:  # a template may raise anything
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"the chat template refuses the conversation: {words}; change the row (what a system message says can "
            "stand in the first user message), or the tokenizer's chat template"
        ) from error
    held = {key for message in messages for key, value in message.items() if value not in (None, "", [], {})}
    template = str(tokenizer.chat_template)
    for name in sorted((held | ({"tools"} if tools else set())) - {"role", "content"}):
        bare = [{key: value for key, value in message.items() if key != name} for message in messages]
        # one that is not named may still be written, by a template that writes whatever there is
        if name not in template and written(bare, None if name == "tools" else tools) == text:
            raise InputError(f"the chat template has no place for {name}; write it into the content, or leave it out")
    for message in messages:
        content = message.get("content")
        lost = isinstance(content, list) and not all(part["text"].strip() in text for part in content)
        if lost or (isinstance(content, list) and (repr(content) in text or json.dumps(content) in text)):
            raise InputError("the chat template does not read a content of parts; write it as one text")
    return text


def _content(message: dict[str, Any], what: str) -> str | list | None:
    content = message["content"]
    if content is None:
        return None
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InputError(f'{what}: content must be text or parts {{"type": "text", …}}, found {part!r:.80}')
        return content
    text = text_of(content)
    if text is None:
        raise InputError(f"{what}: content must hold text, found {content!r:.80}")
    return text


def _says_otherwise(message: dict[str, Any]) -> bool:
    """Whether an assistant's message without content says something by another key."""
    return message["role"] == "assistant" and any(message.get(key) for key in message if key not in ("role", "content"))
