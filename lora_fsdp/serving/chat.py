"""One answer in the form of OpenAI's chat completions.

Source: https://platform.openai.com/docs/api-reference/chat. The user's message is the row's text;
the instruction is the adapter's own. An answer that is scored counts as one token.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_fsdp.evaluation.answering.columns import Confidence
from lora_fsdp.serving.batches import Columns
from lora_fsdp.serving.bodies import Asked, examples_of, text_column
from lora_fsdp.serving.limits import Limits, RequestError
from lora_fsdp.serving.served import Served
from lora_fsdp.tasks import Example

_MOST_TOP = 20
_LIMITS_OF_LENGTH = ("max_tokens", "max_completion_tokens")
#: What may be said, since it asks for what is done anyway.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "temperature": (0,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "stop": ([],),
    "tools": ([],),
    "logit_bias": ({},),
    "store": (False,),
    "response_format": ({"type": "text"},),
}
#: What changes nothing, whatever it is: there is nothing random, and nobody is told who asked.
_WITHOUT_EFFECT = ("seed", "user")


@dataclass(frozen=True)
class ChatRequest:
    """What was asked.

    Attributes:
        asked: the row.
        logprobs: give log-probabilities.
        top: how many answers' besides.
    """

    asked: Asked
    logprobs: bool
    top: int


def parse_chat(body: Mapping[str, Any], served: Served, limits: Limits) -> ChatRequest:
    """What `POST /v1/chat/completions` asks.

    Raises:
        RequestError: 400 with the field's name where it cannot be honoured; 404 another model.
    """
    _refuse_what_is_not_done(body)
    model = body.get("model", served.name)
    if model != served.name:
        raise RequestError(
            404,
            f"There is no model {str(model)[:80]!r}; {served.name!r} is served.",
            param="model",
        )
    logprobs, top = _logprobs(body)
    kind, task = served.task.answer_kind, served.task
    if logprobs and kind.generates_text:
        raise RequestError(
            400,
            f'"logprobs" are not given for task {task.name!r}: its answers are generated texts.',
            param="logprobs",
        )
    [example] = examples_of([{text_column(task): _text(body.get("messages"))}], task, limits)
    if not example.prompt.text.strip():
        raise RequestError(400, "The user's message has no text.", param="messages")
    for name in _LIMITS_OF_LENGTH:
        _check_length(body.get(name), served, example, name=name)
    return ChatRequest(Asked([example], Confidence()), logprobs, top)


def completion(request: ChatRequest, columns: Columns, served: Served) -> dict[str, Any]:
    """The answer, as JSON has it."""
    kind = served.task.answer_kind
    answer = columns[kind.answer_column][0]
    content = "" if answer is None else str(answer)
    probability = columns.get("probability", [None])[0]
    logprobs = None
    if request.logprobs:
        if probability is None:
            raise RequestError(
                400,
                f'"logprobs" are not given for task {served.task.name!r}: its answers have no '
                "probability.",
                param="logprobs",
            )
        others = _others(columns, request.top)
        logprobs = {"content": [{**_token(content, probability), "top_logprobs": others}],
                    "refusal": None}  # fmt: skip
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": "stop",
    }
    [example] = request.asked.examples
    prompt, answered = served.prompt_tokens(example), served.answer_tokens(content)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": served.name,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": answered,
            "total_tokens": prompt + answered,
        },
    }


def models(served: str) -> dict[str, Any]:
    """The answer to `GET /v1/models`."""
    one = {"id": served, "object": "model", "created": 0, "owned_by": "lora-fsdp"}
    return {"object": "list", "data": [one]}


def _refuse_what_is_not_done(body: Mapping[str, Any]) -> None:
    known = ("messages", "model", "logprobs", "top_logprobs", *_LIMITS_OF_LENGTH)
    for name, value in body.items():
        if name in known or name in _WITHOUT_EFFECT or value is None:
            continue
        neutral = _NEUTRAL.get(name, ())
        # To Python, 1 is True.
        if any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
        ):
            continue
        only = (
            f": only {neutral[0]!r} or nothing" if neutral and not isinstance(value, bool) else ""
        )
        raise RequestError(
            400, f'"{name[:80]}" cannot be honoured here{only.replace("False", "false")}.',
            param=name[:80],
        )  # fmt: skip


def _logprobs(body: Mapping[str, Any]) -> tuple[bool, int]:
    logprobs, top = body.get("logprobs"), body.get("top_logprobs")
    if logprobs is not None and not isinstance(logprobs, bool):
        raise RequestError(400, '"logprobs" must be true or false.', param="logprobs")
    if top is None:
        return bool(logprobs), 0
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= _MOST_TOP:
        raise RequestError(
            400, f'"top_logprobs" must be a whole number from 0 to {_MOST_TOP}.',
            param="top_logprobs",
        )  # fmt: skip
    if not logprobs:
        raise RequestError(400, '"top_logprobs" needs "logprobs": true.', param="top_logprobs")
    return True, top


def _text(messages: Any) -> str:
    """The user's message, the only one."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, '"messages" must be a list of one message.', param="messages")
    if not all(isinstance(one, dict) for one in messages):
        raise RequestError(400, "A message must be an object.", param="messages")
    roles = [one.get("role") for one in messages]
    if roles != ["user"]:
        named = ", ".join(str(role)[:20] for role in roles[:5])
        raise RequestError(
            400,
            f'"messages" must be one message of the role user, not {named}: the adapter was '
            "trained to answer one text, with an instruction of its own.",
            param="messages",
        )
    content = messages[0].get("content")
    if isinstance(content, list):
        parts = [one if isinstance(one, dict) else {} for one in content]
        if not parts or any(one.get("type") != "text" for one in parts):
            raise RequestError(400, "Only parts of type text can be read.", param="messages")
        content = "".join(str(one.get("text")) for one in parts)
    if not isinstance(content, str):
        raise RequestError(400, "A message's content must be a text.", param="messages")
    return content


def _check_length(value: Any, served: Served, example: Example, *, name: str) -> None:
    """An answer is whole or not given: a limit that it may exceed is refused."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(400, f'"{name}" must be a whole number from 1.', param=name)
    kind = served.task.answer_kind
    needed = served.longest_text
    if not kind.generates_text:
        needed = max(map(served.answer_tokens, kind.candidates(example)), default=1)
    if value < needed:
        raise RequestError(
            400,
            f'"{name}" {value} is less than an answer may take ({needed} tokens), and answers are '
            "not cut: leave it out.",
            param=name,
        )


def _others(columns: Columns, count: int) -> list[dict[str, Any]]:
    """The likeliest answers with their log-probabilities."""
    named = {
        name.removeprefix("probability/"): values[0]
        for name, values in columns.items()
        if name.startswith("probability/")
    }
    order = sorted(named, key=lambda name: -named[name])
    return [_token(name, named[name]) for name in order[:count]]


def _token(text: str, probability: float) -> dict[str, Any]:
    # JSON has no infinity; OpenAI's own servers give -9999 for what is next to impossible.
    logprob = math.log(probability) if probability > 0 else -9999.0
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
