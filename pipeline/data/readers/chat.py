"""Chat JSONL: a conversation about one or several images on each line."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.readers.source import Source, SplitMissingError, parse_object
from pipeline.data.sample import SLICES, TASKS, Sample
from pipeline.errors import DataError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def chat_files(root: Path, split: str) -> list[Path]:
    """`<root>/<split>.jsonl`. SplitMissingError without it."""
    path = root / f"{split}.jsonl"
    if not path.is_file():
        raise SplitMissingError(f"{path}: no such file. Correct data.root or the split's name.")
    return [path]


def chat_splits(root: Path) -> list[str]:
    """Every `<split>.jsonl` of the root."""
    return sorted(path.stem for path in root.glob("*.jsonl") if path.is_file())


def read_chat(source: Source) -> Iterator[Sample]:
    """Chat JSONL: `{id, image|images, conversations|messages}` a line makes one sample.

    The last turn, the assistant's, is the answer; all earlier turns, joined by line breaks, are the prompt.
    """
    for path in source.files:
        for where, line in source.lines(path):
            with source.problems.at(where):
                yield from _samples(source, where, parse_object(line, where))


def _samples(source: Source, where: str, record: Mapping[str, Any]) -> Iterator[Sample]:
    """The record's sample; none, and a problem for each part that is broken."""
    before, at = len(source.problems), source.problems.at
    with at(where, "conversations"):
        prompt, answer = _conversation(record, where)
    with at(where, "image"):
        images = tuple(source.image(name, where) for name in _image_names(record, where))
    with at(where, "task"):
        task = _one_of(record, "task", TASKS, "chat", where)
    with at(where, "slice"):
        slice_name = _one_of(record, "slice", SLICES, "unknown", where)
    if len(source.problems) == before:
        meta = {"record": where, "id": str(record.get("id", ""))}
        yield Sample("", images, prompt, answer, task, slice_name, None, meta)


def _conversation(record: Mapping[str, Any], where: str) -> tuple[str, str]:
    turns = record.get("conversations") or record.get("messages")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: needs `conversations` or `messages`, a list of turns")
    return _exchange([_turn(turn, where) for turn in turns], where)


def _image_names(record: Mapping[str, Any], where: str) -> list[str]:
    listed = record.get("images") or record.get("image")
    names = [listed] if isinstance(listed, str) else listed
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
        raise DataError(f"{where}: needs `image` (a path) or `images` (a list of paths), got {listed!r}")
    return names


def _exchange(spoken: Sequence[tuple[str, str]], where: str) -> tuple[str, str]:
    """(prompt, answer) of a conversation's (role, text) turns."""
    *earlier, (role, answer) = spoken
    if role != "assistant":
        raise DataError(f"{where}: the last turn must be the assistant's answer, it is the {role}'s")
    if not any(role == "user" and text for role, text in earlier):
        raise DataError(f"{where}: needs a user's turn with text before the assistant's answer")
    return "\n".join(text for _, text in earlier if text), answer


def _one_of(record: Mapping[str, Any], key: str, known: tuple[str, ...], default: str, where: str) -> str:
    value = record.get(key, default)
    if value not in known:
        raise DataError(f"{where}: {key} must be one of {known}, got {value!r}")
    return str(value)


def _turn(turn: Any, where: str) -> tuple[str, str]:
    """(role, text) of one turn, image placeholders removed."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: a turn is an object, got {turn!r}")
    role = _ROLES.get(str(turn.get("from", turn.get("role"))))
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if role is None or not isinstance(content, str):
        raise DataError(f"{where}: a turn needs from/role (user, assistant, system) and value/content, got {turn!r}")
    return role, content.replace("<image>", "").strip()


def _part(part: Any, where: str) -> str:
    """Text of one content part; empty for an image, which the record's `images` names."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
        return ""
    raise DataError(f"{where}: a content part must be text or an image, got {part!r}")
