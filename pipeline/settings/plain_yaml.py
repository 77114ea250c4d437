"""YAML whose scalars are kept as they were written: what a value means is decided by the field that takes it.

To YAML ``2024-11-05``, ``0123``, ``1.10`` and ``yes`` are dates, numbers and truths; to a field of text they are text.
So YAML decides here where mappings and lists are, and what is null (an empty value, ``~``, ``null``); all else is
text, which pydantic parses by the field's type.
"""

from typing import Any

import yaml
from yaml.constructor import ConstructorError

NULL, MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without its guesses, and without its silence about keys that are given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (NULL, MERGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # which the constructor refuses
            if key.value in lines:
                problem = f"{key.value} is given twice, first in line {lines[key.value]}"
                raise ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


_Loader.add_constructor(MERGE, lambda _, node: node.value)  # << is text where it is a value


def load(text: str) -> Any:
    """Dictionaries, lists, texts and ``None``, as they stand in a YAML document.

    Raises:
        ValueError: it is no YAML, or a mapping holds a key twice; the message begins with the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}{error.problem}") from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ValueError(f"not YAML: {error}") from error
