"""Writes the reference of all keys, of a run file and of a suite file, into ds_configs/README.md from the schemas.

A key's meaning is the comment beside its field; type, limits and default are what the schema checks. A test fails while
the committed file differs from what this program would write.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from launch.run_config import REPO_ROOT, RunSection
from launch.suite import GateConfig, LegConfig, SuiteConfig
from model import config
from model.config import Section

README = REPO_ROOT / "ds_configs" / "README.md"
RUN_KEYS = "<!-- keys: written by python -m tools.describe_keys -->"
SUITE_KEYS = "<!-- suite keys: written by python -m tools.describe_keys -->"
END = "<!-- end of keys -->"
LIMITS = {"Ge": "ge", "Gt": "gt", "Le": "le", "Lt": "lt"}
SIGNS = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}


def describe_keys() -> dict[str, str]:
    """The reference as Markdown, a table for every section, by the mark after which it belongs."""
    of_run = [table(path, section) for path, section in sections("run", RunSection)]
    of_suite = [table("suite", SuiteConfig), table("suite.legs.NAME", LegConfig), table("suite.gates.N", GateConfig)]
    return {RUN_KEYS: "\n\n".join(of_run), SUITE_KEYS: "\n\n".join(of_suite)}


def sections(path: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """Every section below `section` that has keys of its own, with its path, outermost first."""
    inner = {f"{path}.{name}": section_in(field.annotation) for name, field in section.model_fields.items()}
    if not all(inner.values()):
        yield path, section
    for name, below in inner.items():
        if below is not None:
            yield from sections(name, below)


def section_in(annotation: Any) -> type[Section] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def table(path: str, section: type[Section]) -> str:
    types, comments = annotations_and_comments(section)
    rows = [f"### `{path}`", "", inspect.getdoc(section) or "", "", "| key | type | default | |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if name not in comments:
            raise SystemExit(f"{section.__name__}.{name} has no comment beside it that says what it means")
        kind = " ".join([types[name], limits_of(field)]).strip().replace("|", "or")
        rows.append(f"| `{name}` | {kind} | {default_of(field)} | {comments[name]} |")
    return "\n".join(rows)


def annotations_and_comments(section: type[Section]) -> tuple[dict[str, str], dict[str, str]]:
    """What stands in the source as type of each field, and as comment at the end of its line."""
    source = textwrap.dedent(inspect.getsource(section))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comment_at = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    types, comments = {}, {}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            types[node.target.id] = readable_type(node.annotation)
            if node.end_lineno in comment_at:
                comments[node.target.id] = comment_at[node.end_lineno].removeprefix("#").strip()
    return types, comments


CHOICES = {name: get_args(kind) for name, kind in vars(config).items() if get_origin(kind) is Literal}
NAMED_TYPES = {
    **{name: " | ".join(map(repr, choices)) for name, choices in CHOICES.items()},
    "TrainNames": "str | list",
    "ValNames": "str | object | list | None",
    "MoEConfig": "object",
    "dict[str, Any]": "object",
    "dict[str, LegConfig]": "object",
    "list[GateConfig]": "list",
}


def readable_type(annotation: ast.expr) -> str:
    """`int | Literal['auto']` as int | 'auto'; names of ours by what they stand for; None as null."""
    if isinstance(annotation, ast.BinOp):
        return f"{readable_type(annotation.left)} | {readable_type(annotation.right)}"
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        choices = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return " | ".join(ast.unparse(choice) for choice in choices)
    name = ast.unparse(annotation)
    return NAMED_TYPES.get(name, name).replace("None", "null")


def limits_of(field: FieldInfo) -> str:
    """Bounds of a number, as in "≥ 1"."""
    found = []
    for limit in field.metadata:
        kind = type(limit).__name__
        if kind in LIMITS:
            found.append(f"{SIGNS[kind]} {getattr(limit, LIMITS[kind]):g}")
    return ", ".join(found)


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    assert default is not PydanticUndefined
    return "" if default is None else f"`{json.dumps(default)}`"


def with_keys(readme: str) -> str:
    """The README with what stands between each mark and the next end written anew."""
    for begin, tables in describe_keys().items():
        before, mark, rest = readme.partition(begin)
        _, end, after = rest.partition(END)
        if not mark or not end:
            raise SystemExit(f"{README.name} has no {begin} with {END} after it. Put both where the tables belong.")
        readme = f"{before}{begin}\n\n{tables}\n\n{END}{after}"
    return readme


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.describe_keys", description="Write the reference of all keys into ds_configs/README.md."
    )
    parser.parse_args(argv)
    README.write_text(with_keys(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
