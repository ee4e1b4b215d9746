"""YAML and JSON input whose every complaint names the file and the line.

A `Block` is one mapping of the document. Values are asked for by name and type; `done` then refuses
every field that nobody asked for, so that a misspelt one is never ignored.

>>> block = parse("nodes: 4\\nnods: 5\\n", "c.yaml")
>>> block.integer("nodes")
4
>>> block.done()
Traceback (most recent call last):
ValueError: c.yaml:2: unknown field 'nods'; did you mean 'nodes'?
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MISSING: Any = object()


class Block:
    """One mapping: its fields' values, the lines they stand on, and which were asked for."""

    def __init__(self, node: Any, source: str) -> None:
        import yaml

        self.source, self.line = source, node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{source}:{self.line}: expected fields (name: value)")
        self._nodes: dict[str, tuple[Any, int]] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in self._nodes:
                first = self._nodes[name][1]
                raise ValueError(f"{source}:{line}: {name!r} stands on line {first} already")
            self._nodes[name] = (value, line)
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def where(self, name: str) -> str:
        """File and line of a field (of the block, when the field is missing)."""
        return f"{self.source}:{self._nodes[name][1] if name in self._nodes else self.line}"

    def wrong(self, name: str, expected: str, got: object) -> ValueError:
        """The complaint about a field."""
        return ValueError(f"{self.where(name)}: {name} must be {expected}, got {got!r}")

    def _scalar(self, name: str, default: Any, expected: str) -> Any:
        import yaml

        self._asked.add(name)
        if name not in self._nodes:
            if default is MISSING:
                raise ValueError(f"{self.source}:{self.line}: {name} is missing ({expected})")
            return default
        node = self._nodes[name][0]
        if not isinstance(node, yaml.ScalarNode):
            raise self.wrong(name, expected, "a list or fields")
        if node.tag.endswith(":null"):
            if default is MISSING:
                raise self.wrong(name, expected, None)
            return None
        return node.value

    def number(
        self, name: str, default: Any = MISSING, *, low: float = 0.0, high: float = math.inf,
        above: bool = False,
    ) -> Any:  # fmt: skip
        """A finite number in [low, high], or in (low, high] when `above`."""
        bracket = "(" if above else "["
        expected = f"a number in {bracket}{low:g}, {high:g}]"
        text = self._scalar(name, default, expected)
        if text is None or text is default:
            return text
        try:
            value = float(text)
        except ValueError:
            raise self.wrong(name, expected, text) from None
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise self.wrong(name, expected, text)
        return value

    def integer(
        self, name: str, default: Any = MISSING, *, low: int = 1, high: int = 1 << 40
    ) -> Any:
        """A whole number in [low, high]."""
        expected = f"a whole number in [{low}, {high}]"
        text = self._scalar(name, default, expected)
        if text is None or text is default:
            return text
        try:
            value = int(text)
        except ValueError:
            raise self.wrong(name, expected, text) from None
        if not low <= value <= high:
            raise self.wrong(name, expected, value)
        return value

    def text(self, name: str, default: Any = MISSING, *, among: Sequence[str] = ()) -> Any:
        """A string, of `among` when given."""
        expected = f"one of {', '.join(among)}" if among else "a text"
        value = self._scalar(name, default, expected)
        if value is not None and value is not default and among and value not in among:
            raise self.wrong(name, expected, value)
        return value

    def boolean(self, name: str, default: Any = MISSING) -> Any:
        """true or false."""
        value = self._scalar(name, default, "true or false")
        if value is None or value is default:
            return value
        if str(value).lower() not in ("true", "false"):
            raise self.wrong(name, "true or false", value)
        return str(value).lower() == "true"

    def integers(self, name: str, default: Any = MISSING, *, low: int = 1) -> Any:
        """A list of whole numbers of at least `low`."""
        import yaml

        self._asked.add(name)
        expected = f"a list of whole numbers of at least {low}"
        if name not in self._nodes:
            if default is MISSING:
                raise ValueError(f"{self.source}:{self.line}: {name} is missing ({expected})")
            return default
        node = self._nodes[name][0]
        try:
            if not isinstance(node, yaml.SequenceNode):
                raise ValueError
            values = tuple(int(item.value) for item in node.value)
            if not values or min(values) < low:
                raise ValueError
        except (ValueError, TypeError):
            raise self.wrong(name, expected, _plain(node)) from None
        return values

    def texts(self, name: str, default: Any = MISSING, *, among: Sequence[str] = ()) -> Any:
        """A list of strings, each of `among` when given."""
        import yaml

        self._asked.add(name)
        expected = f"a list out of {', '.join(among)}" if among else "a list of texts"
        if name not in self._nodes:
            if default is MISSING:
                raise ValueError(f"{self.source}:{self.line}: {name} is missing ({expected})")
            return default
        node = self._nodes[name][0]
        plain = _plain(node)
        if not isinstance(node, yaml.SequenceNode) or not plain:
            raise self.wrong(name, expected, plain)
        for value in plain:
            if among and value not in among:
                raise self.wrong(name, expected, value)
        return tuple(str(value) for value in plain)

    def block(self, name: str, *, required: bool = False) -> Block | None:
        """A mapping inside this one; None where there is none."""
        self._asked.add(name)
        if name not in self._nodes:
            if required:
                raise ValueError(f"{self.source}:{self.line}: {name} is missing (fields)")
            return None
        return Block(self._nodes[name][0], self.source)

    def blocks(self, name: str) -> list[Block]:
        """A list of mappings; empty where there is none."""
        import yaml

        self._asked.add(name)
        if name not in self._nodes:
            return []
        node = self._nodes[name][0]
        if not isinstance(node, yaml.SequenceNode):
            raise self.wrong(name, "a list", _plain(node))
        return [Block(item, self.source) for item in node.value]

    def is_list(self, name: str) -> bool:
        """Whether a field that is there holds a list."""
        import yaml

        return isinstance(self._nodes[name][0], yaml.SequenceNode)

    def length(self, name: str) -> int:
        """How many items a list has."""
        return len(self._nodes[name][0].value)

    def names(self) -> Iterator[str]:
        """The fields that are there."""
        return iter(self._nodes)

    def done(self) -> None:
        """Refuse the first field that was not asked for.

        Raises:
            ValueError: there is one; says its line and the likely meaning.
        """
        for name, (_, line) in self._nodes.items():
            if name not in self._asked:
                near = difflib.get_close_matches(name, self._asked, 1)
                hint = (
                    f"did you mean {near[0]!r}?"
                    if near
                    else f"known here: {', '.join(sorted(self._asked))}"
                )
                raise ValueError(f"{self.source}:{line}: unknown field {name!r}; {hint}")


def _plain(node: Any) -> Any:
    """A node's value as text, list or dict, for messages."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return {key.value: _plain(value) for key, value in node.value}


def parse(text: str, source: str) -> Block:
    """The top mapping of a YAML (or JSON) text.

    Raises:
        ValueError: not such a text; names the line.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{source}:{line}: not YAML: {problem}") from error
    if node is None:
        raise ValueError(f"{source}:1: the file is empty")
    return Block(node, source)


def read(path: str | os.PathLike[str]) -> Block:
    """The top mapping of a file.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: not YAML or JSON; names the line.
    """
    try:
        return parse(Path(path).read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:1: not UTF-8 text") from error
