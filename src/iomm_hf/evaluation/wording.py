"""What a judge is asked, in the authors' own words: read at run time out of the files that they publish, never run as code.

WISE words its task in a Python script; its text is taken from the syntax tree, where it stands as literals with the item's fields
between them. A file of one's own (`--wording`) takes its place: JSON, a list of `{"role": ..., "text": ...}` with fields in braces.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


OWN_WORDING = (
    'JSON of [{"role": "system", "text": "..."}, {"role": "user", "text": "... {Prompt} ... {Explanation}"}].'
)


@dataclass(frozen=True)
class Message:
    """One message to a judge: who speaks, the text, and whether pictures follow it."""

    role: str
    text: str
    has_pictures: bool = False


def read_wording(file: Path) -> list[Message]:
    """
    Messages with `{field}` where an item's fields go, from the authors' script or from JSON of one's own.

    Raises:
        ValueError: If there are none to be found, or the file is of another form.
    """
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        rows = json.loads(source)
        told = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        if not told or not all(isinstance(row.get(name), str) for row in rows for name in ("role", "text")):
            raise ValueError(f"{file} must be {OWN_WORDING}")
        messages = [Message(row["role"], row["text"], row["role"] == "user") for row in rows]
    else:
        try:
            messages = messages_of_script(source)
        except SyntaxError as error:
            raise ValueError(
                f"{file} is no Python ({error}), and no .json by its name. A wording of one's own is {OWN_WORDING}"
            ) from None
    if not any(message.has_pictures for message in messages):
        raise ValueError(
            f"{file} holds no message with a picture that could be read. Give the judge's wording with --wording:"
            f" {OWN_WORDING}"
        )
    return messages


def messages_of_script(source: str) -> list[Message]:
    r"""
    The first list of chat messages in a Python script, without running it.

    Raises:
        ValueError: If a text is put together in a way that cannot be read off.

    Example:

    ```python
    >>> messages_of_script("x = [{'role': 'user', 'content': [{'type': 'text', 'text': f'Of {d[\"Prompt\"]}?'}, {'type': 'image_url'}]}]")
    [Message(role='user', text='Of {Prompt}?', has_pictures=True)]
    ```
    """
    tree = ast.parse(source)
    scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for scope in [*scopes, tree]:
        names = {
            target.id: node.value
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(scope):
            if (
                isinstance(node, ast.List)
                and node.elts
                and all(entry_of(item, "role") is not None for item in node.elts)
            ):
                return [read_message(item, names) for item in node.elts]
    return []


def entry_of(node: ast.AST, key: str) -> ast.expr | None:
    """The value under a key of a literal dictionary."""
    if not isinstance(node, ast.Dict):
        return None
    for name, value in zip(node.keys, node.values, strict=True):
        if isinstance(name, ast.Constant) and name.value == key:
            return value
    return None


def read_message(node: ast.expr, names: Mapping[str, ast.expr]) -> Message:
    role, content = entry_of(node, "role"), entry_of(node, "content")
    if not isinstance(role, ast.Constant) or content is None:
        raise ValueError(f"A message has no plain role or no content: {ast.unparse(node)[:200]}")
    content = names.get(content.id, content) if isinstance(content, ast.Name) else content
    parts = content.elts if isinstance(content, ast.List) else [content]
    texts, has_pictures = [], False
    for part in parts:
        kind = entry_of(part, "type")
        if isinstance(kind, ast.Constant) and kind.value == "image_url":
            has_pictures = True
            continue
        text = entry_of(part, "text") if isinstance(part, ast.Dict) else part
        if text is None:
            raise ValueError(f"A part of a message is neither text nor picture: {ast.unparse(part)[:200]}")
        texts.append(read_text(text, names))
    return Message(str(role.value), "\n".join(texts), has_pictures)


def read_text(node: ast.expr, names: Mapping[str, ast.expr]) -> str:
    """A literal text; an item's field, looked up as `item["Field"]`, becomes `{Field}`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("{", "{{").replace("}", "}}")
    if isinstance(node, ast.JoinedStr):
        return "".join(read_text(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return read_text(node.value, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return read_text(node.left, names) + read_text(node.right, names)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return f"{{{node.slice.value!s}}}"
    if isinstance(node, ast.Name) and node.id in names:
        return read_text(names[node.id], {name: value for name, value in names.items() if name != node.id})
    raise ValueError(f"A text is put together in a way that cannot be read off: {ast.unparse(node)[:200]}")


def fill_in(messages: list[Message], item: Mapping[str, Any]) -> list[Message]:
    """
    The messages about one item.

    Raises:
        ValueError: If they name a field that it lacks.

    Example:

    ```python
    >>> fill_in([Message("user", "Is it {Prompt}?")], {"Prompt": "a star"})[0].text
    'Is it a star?'
    ```
    """
    try:
        return [Message(m.role, m.text.format_map(item), m.has_pictures) for m in messages]
    except KeyError as error:
        raise ValueError(
            f"The judge's wording names the field {error}, which the item lacks: {sorted(item)}."
        ) from None
