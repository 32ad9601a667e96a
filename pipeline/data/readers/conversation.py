"""A record's conversation, in the forms that LLaVA, ms-swift, LLaMA-Factory, Qwen and OpenAI write.

Roles, earlier answers and the places of images stay as they are: the chat template makes one text of them later.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.data.sample import ASSISTANT, IMAGE, SYSTEM, USER, Turn
from pipeline.errors import DataError

PLACEHOLDER = "<image>"
_ROLES = {"human": USER, "user": USER, "system": SYSTEM}
_ROLES |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), ASSISTANT)
_PAIRS = (("query", "response"), ("question", "answer"), ("instruction", "output"))
"""Keys of records that hold a question and its answer without turns."""
_VIDEOS = ("video", "videos", "audio", "audios")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record's turns and images."""

    turns: tuple[Turn, ...]
    """Up to the answer."""
    answer: str
    """Empty: the record ends with the user's turn."""
    images: tuple[str, ...]
    """Names of the images, in the order of their places in `turns`."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an image stands, and its name if it is written there."""

    name: str | None


def read_conversation(record: Mapping[str, Any]) -> Conversation:
    """Turns, answer and images of a record.

    Raises:
        DataError: no conversation, an unknown role, or a number of places that is neither 0 nor that of the images.
    """
    spoken = [_turn(number, turn) for number, turn in enumerate(_turns(record), 1)]
    listed = _listed(record)
    _check_order(spoken)
    names = _names(spoken, listed)
    places = any(isinstance(part, _Place) for _, parts in spoken for part in parts)
    turns = [Turn(role, tuple(IMAGE if isinstance(p, _Place) else p for p in parts)) for role, parts in spoken]
    if names and not places:  # none says where: before the first question
        first = next(i for i, turn in enumerate(turns) if turn.role == USER)
        turns[first] = Turn(USER, (*[IMAGE] * len(names), *turns[first].parts))
    answer = turns.pop().text if turns[-1].role == ASSISTANT else ""
    return Conversation(tuple(turns), answer, tuple(names))


# -- turns -------------------------------------------------------------------------------------------------------------


def _turns(record: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(role, content) of every turn as it is written, the record's own `system` first."""
    if record.get("system") not in (None, ""):
        yield SYSTEM, record["system"]
    turns = record.get("messages") or record.get("conversations")
    if turns is None:
        yield from _pair(record)
        return
    if not isinstance(turns, list):
        raise DataError(f"`messages` or `conversations` must be a list of turns, got {turns!r}")
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise DataError(f"a turn is an object with role and content, or from and value, got {turn!r}")
        yield turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))


def _pair(record: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    keys = next((keys for keys in _PAIRS if record.get(keys[0]) is not None), None)
    if keys is None:
        raise DataError(
            "needs `messages` or `conversations`, a list of turns, or `query` and `response`; it has "
            f"{sorted(map(str, record))}"
        )
    for exchange in record.get("history") or []:
        if not isinstance(exchange, Sequence) or isinstance(exchange, str) or len(exchange) != 2:
            raise DataError(f"`history` must be a list of [question, answer], got {exchange!r}")
        yield from zip((USER, ASSISTANT), exchange, strict=True)
    asked, more = record[keys[0]], record.get("input")
    yield USER, f"{asked}\n{more}" if keys[0] == "instruction" and more else asked
    if record.get(keys[1]) is not None:
        yield ASSISTANT, record[keys[1]]


def _turn(number: int, turn: tuple[Any, Any]) -> tuple[str, list[str | _Place]]:
    """(role, parts), outer blanks off; DataError for what is no turn."""
    said, content = turn
    role = _ROLES.get(str(said))
    if role is None:
        raise DataError(f"turn {number}: its role must be user, assistant or system, got {said!r}")
    given = () if content is None and role == ASSISTANT else _contents(content, number)
    parts = [part for text in given for part in _split(text, role)]
    if role != USER and any(isinstance(part, _Place) for part in parts):
        raise DataError(f"turn {number}: an image in the {role}'s turn; only a user's turn can show one")
    return role, _trimmed(parts)


def _contents(content: Any, number: int) -> Iterator[str | _Place]:
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, (int, float)) and not isinstance(text, bool):
            text = str(text)
        if isinstance(text, str):
            yield text
        elif isinstance(part, Mapping) and str(part.get("type")) in ("image", "image_url", "input_image"):
            yield _Place(_image_name({key: value for key, value in part.items() if key != "type"}))
        else:
            raise DataError(
                f"turn {number}: its content must be text, a number, or a list of texts and images, got {part!r}"
            )


def _split(part: str | _Place, role: str) -> Iterator[str | _Place]:
    """A text cut where it has a placeholder. An answer is never edited."""
    if role == ASSISTANT or isinstance(part, _Place):
        yield part
        return
    first, *others = part.split(PLACEHOLDER)
    yield first
    for text in others:
        yield _Place(None)
        yield text


def _trimmed(parts: list[str | _Place]) -> list[str | _Place]:
    """Without blanks at the outer ends, and neighbouring texts as one; between two texts all stays as it is.

    Images at an end count as outside: LLaVA's `<image>\\n` before a question is the image alone.
    """
    for order, trim in ((1, str.lstrip), (-1, str.rstrip)):
        for place in range(len(parts))[::order]:
            part = parts[place]
            if isinstance(part, str):
                parts[place] = text = trim(part)
                if text:
                    break
    joined: list[str | _Place] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def _check_order(spoken: Sequence[tuple[str, list[str | _Place]]]) -> None:
    """DataError unless a user asks before each answer, and no answer but the last is empty."""
    if not spoken or spoken[-1][0] == SYSTEM:
        raise DataError("the last turn must be the assistant's answer, or a user's question without one")
    asked = False
    for number, (role, parts) in enumerate(spoken, 1):
        asked |= role == USER and any(isinstance(part, str) and part.strip() for part in parts)
        if role == ASSISTANT and not asked:
            raise DataError(f"turn {number}: needs a user's turn with text before the assistant's answer")
        if role == ASSISTANT and not parts and number < len(spoken):
            raise DataError(f"turn {number}: the assistant says nothing; only the last answer may be missing")
    if not asked:
        raise DataError("needs a user's turn with text")


# -- images ------------------------------------------------------------------------------------------------------------


def _listed(record: Mapping[str, Any]) -> list[str]:
    """Images that the record names beside its turns; nulls among them are none."""
    if kinds := [key for key in _VIDEOS if record.get(key)]:
        raise DataError(f"`{kinds[0]}`: only images are read. Give a video's frames as `images`.")
    listed = record.get("images") if record.get("images") is not None else record.get("image")
    entries = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return [name for entry in entries if (name := _image_name(entry)) is not None]


def _image_name(entry: Any) -> str | None:
    """The path that an entry names; None: it names none."""
    if isinstance(entry, Mapping):
        if entry.get("bytes") is not None:
            raise DataError("an image inside the record: write it to a file and give its path")
        keys = ("path", "image", "image_url", "url", "file_name")
        return next((_image_name(entry[key]) for key in keys if entry.get(key) is not None), None)
    if entry is None:
        return None
    if not isinstance(entry, str) or not entry:
        raise DataError(f"an image must be a path, got {entry!r}")
    scheme = urlsplit(entry).scheme if "://" in entry or entry.startswith("data:") else ""
    if scheme == "file":
        return unquote(urlsplit(entry).path)
    if scheme:
        raise DataError(f"image {entry[:60]!r}: only files are read. Write it into a folder and give its path.")
    return entry


def _names(spoken: Sequence[tuple[str, list[str | _Place]]], listed: list[str]) -> list[str]:
    """Every image's name in the order of the places; those without a name of their own take the next listed one."""
    places = [part for _, parts in spoken for part in parts if isinstance(part, _Place)]
    named = [place.name for place in places if place.name is not None]
    if not places or (named == listed and len(named) == len(places)):  # or both ways at once, and alike
        return listed
    if len(places) - len(named) != len(listed):
        raise DataError(
            f"{len(places) - len(named)} place(s) for images ({PLACEHOLDER}), but {len(listed)} image(s). Give as "
            "many, or no place at all: the images then come before the first question."
        )
    left = iter(listed)
    return [next(left) if place.name is None else place.name for place in places]
