"""Chat templates of models that think before they answer, as Qwen3-VL's Thinking models.

Their generation prompt ends in an open `<think>`, but an answer in a data set has no thoughts: appended to it, the
answer would be the thoughts, and the model never done with them. Where the template itself writes an answer without
thoughts behind a closed pair, the generation prompt gets the same closing, in training, evaluation and export alike.
"""

import json
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError

OPEN, CLOSE = "<think>", "</think>"
_MARK = "\ufdd0answer\ufdd1"
_USER: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "Hello."}]}


def close_thinking(tokenizer: PreTrainedTokenizerBase, origin: str) -> bool:
    """Have the chat template close a `<think>` that its generation prompt opens; whether there was one.

    Args:
        origin: the tokenizer's folder, for messages.

    Raises:
        UserError: the template opens one, and does not show how an answer without thoughts closes it.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or OPEN not in template:
        return False
    try:
        asked = str(tokenizer.apply_chat_template([_USER], tokenize=False, add_generation_prompt=True))
        answer: dict[str, Any] = {"role": "assistant", "content": _MARK}
        written = str(tokenizer.apply_chat_template([_USER, answer], tokenize=False)).partition(_MARK)[0]
    except TemplateError as error:
        raise UserError(f"{origin}: its chat template refuses a question and an answer: {error}") from error
    if asked.count(OPEN) == asked.count(CLOSE):
        return False
    closing = written.removeprefix(asked)
    if closing == written or CLOSE not in closing:
        raise UserError(
            f"{origin}: its chat template ends a question in {asked[-40:]!r}, with an open {OPEN}, and writes an "
            f"answer without thoughts as {written[-40:]!r}: they do not fit. Take the template of the model's Instruct "
            "variant, or one that closes it. Nothing was started."
        )
    tokenizer.chat_template = (
        template + "{%- if add_generation_prompt -%}{{- " + json.dumps(closing) + " -}}{%- endif -%}"
    )
    return True
