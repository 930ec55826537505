"""A run's options, from the configuration that fairseq-train logs or keeps in its checkpoints.

It is read as data: nothing in it is evaluated.
"""

import ast
import re
from argparse import Namespace
from typing import Any, Dict, Optional

Options = Dict[str, Any]

ENUM = re.compile(r"<[\w.]+: ([^<>]*)>")  # <ChoiceEnum.relu: 'relu'>
NUMBERS = {"nan": float("nan"), "inf": float("inf")}
# the component a section configures is that section's _name; model's is what --arch chose
SECTION_NAMES = {"model": "arch"}


def starts_configuration(message: str) -> bool:
    """Whether a logged message is a configuration: a dict of sections, or a Namespace before fairseq 0.11."""
    return message.startswith(("{'_name'", "{'common'", "Namespace("))


def read_configuration(text: str) -> Optional[Options]:
    """The options in a logged configuration, by name; None if it is cut off."""
    for readable in (text, ENUM.sub(r"\1", text)):
        try:
            tree = ast.parse(readable.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return flatten(_value(tree, readable.strip()))
    return None


def flatten(configuration: Any) -> Options:
    """Sections of options -> options by name.

    Where two sections disagree the later one's option is called SECTION.NAME. The model comes last, since an
    encoder-decoder model keeps beside its own options a copy of all others.
    """
    sections = _plain(configuration)
    if not isinstance(sections, dict):
        return {}
    if not any(isinstance(options, dict) for options in sections.values()):
        sections = {"model": sections}
    options: Options = {}
    for section in sorted(sections, key=lambda name: name == "model"):
        chosen = sections[section]
        if not isinstance(chosen, dict):
            chosen = {"_name": chosen}
        for name, value in chosen.items():
            if name == "_name":
                if value is not None:
                    options[SECTION_NAMES.get(section, section)] = value
            else:
                disagrees = name in options and options[name] != value
                options[f"{section}.{name}" if disagrees else name] = value
    return options


def _plain(value: Any) -> Any:
    """Namespaces as dicts, tuples as lists: the two ways fairseq writes the same option compare equal."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_value(name, text): _value(item, text) for name, item in pairs if name is not None}
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Namespace":
        return {item.arg: _value(item.value, text) for item in node.keywords if item.arg}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, text) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _value(node.operand, text)
        return -operand if isinstance(operand, (int, float)) else ast.get_source_segment(text, node)
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in NUMBERS:
        return NUMBERS[node.id]
    # fairseq's choices print bare ('activation_fn': relu); whatever else there is stays as it was written
    return ast.get_source_segment(text, node)
