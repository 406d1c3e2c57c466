"""Every key of a run section and of a suite file is read by code that acts on it; one only declared fails here.

mypy knows the type of every expression in the product, so `config.seed` is known to be TrainConfig.seed whatever the
variable is called, and code that this machine cannot run counts too. A read counts where it happens outside the
sections, or in a method or property of a section that is itself used outside. What happens in a section's validators,
in without_effect() and in refuse_...() does not count: to check a key is not to use it.
"""

from __future__ import annotations

import ast
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mypy import build
from mypy.modulefinder import BuildSource
from mypy.options import Options
from mypy.plugin import AttributeContext, MethodContext, Plugin
from mypy.types import Type

from launch.run_config import REPO_ROOT, RunSection
from launch.suite import SuiteConfig
from model.config import Section

PRODUCT = ("train.py", "launch/*.py", "model/*.py", "tools/*.py", "tools/*/*.py")


def keys_of(annotation: typing.Any) -> Iterator[str]:
    """Full names of all keys of a section and of the sections in it, also inside a union or a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            yield f"{annotation.__module__}.{annotation.__qualname__}.{name}"
            yield from keys_of(field.annotation)
    for inner in typing.get_args(annotation):
        yield from keys_of(inner)


@dataclass(frozen=True)
class Use:
    """An attribute read or a method called: its full name, and where."""

    member: str  # "launch.run_config.TrainConfig.seed"
    path: str
    line: int


class Recorder(Plugin):
    """A mypy plugin that notes every use of a member of a class in `modules`."""

    def __init__(self, options: Options, modules: list[str]) -> None:
        super().__init__(options)
        self.prefixes = tuple(f"{module}." for module in modules)
        self.uses: list[Use] = []

    def note(self, fullname: str) -> Callable[[typing.Any], Type] | None:
        if not fullname.startswith(self.prefixes):
            return None

        def hook(context: AttributeContext | MethodContext) -> Type:
            self.uses.append(Use(fullname, context.api.path, context.context.line))
            return context.default_attr_type if isinstance(context, AttributeContext) else context.default_return_type

        return hook

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return self.note(fullname)

    def get_method_hook(self, fullname: str) -> Callable[[MethodContext], Type] | None:
        return self.note(fullname)


def uses_in(files: dict[str, Path]) -> list[Use]:
    """All uses of the files' own classes in the given files, which are named by their modules."""
    options = Options()
    options.incremental = False  # a file in mypy's cache would not be looked at
    options.follow_imports = "skip"
    options.ignore_missing_imports = True
    recorder = Recorder(options, list(files))
    sources = [BuildSource(str(path), module, None) for module, path in files.items()]
    build.build(sources, options, extra_plugins=[recorder])
    return recorder.uses


def scopes(path: Path, module: str) -> dict[int, tuple[str, ...]]:
    """For every line inside a class or function the full names of those around it, the outermost first."""
    found: dict[int, tuple[str, ...]] = {}

    def walk(node: ast.AST, around: tuple[str, ...], name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                inner = (*around, f"{name}.{child.name}")
                found.update(dict.fromkeys(range(child.lineno, (child.end_lineno or 0) + 1), inner))
                walk(child, inner, inner[-1])
            else:
                walk(child, around, name)

    walk(ast.parse(path.read_text()), (), module)
    return found


def acted_on(files: dict[str, Path], sections: set[str]) -> set[str]:
    """Members of the given sections (full names of classes) that code acts on."""
    around = {str(path): scopes(path, module) for module, path in files.items()}
    outside: set[str] = set()
    inside: dict[str, set[str]] = defaultdict(set)  # what each member of a section uses
    for use in uses_in(files):
        if use.member.rpartition(".")[0] not in sections:
            continue
        scope = around[use.path].get(use.line, ())
        if scope and scope[0] in sections:
            inside[scope[min(1, len(scope) - 1)]].add(use.member)
        elif not any(name.rpartition(".")[2].startswith("refuse_") for name in scope):
            outside.add(use.member)
    found: set[str] = set()
    new = outside
    while new:
        found |= new
        used = [member for member in new if not member.endswith(".without_effect")]
        new = set().union(*(inside[member] for member in used)) - found
    return found


def product() -> dict[str, Path]:
    paths = [path for pattern in PRODUCT for path in REPO_ROOT.glob(pattern) if path.name != "__init__.py"]
    return {".".join(path.relative_to(REPO_ROOT).with_suffix("").parts): path for path in paths}


def test_every_key_is_read_by_code_that_acts_on_it() -> None:
    keys = [*keys_of(RunSection), *keys_of(SuiteConfig)]
    found = acted_on(product(), {key.rpartition(".")[0] for key in keys})
    unread = [key for key in keys if key not in found]
    assert not unread, f"use these keys, or remove them from the schema: {', '.join(unread)}"


SCHEMA = """
from typing import Any
validator: Any

class Section:
    by_name: int
    by_chain: int
    by_property: int
    by_dead_property: int
    only_checked: int
    only_refused: int
    of_another_class: int
    assigned: int
    in_fstring: int

    @validator
    def _check(self) -> None:
        print(self.only_checked, self.dead)

    @property
    def live(self) -> int:
        return self.deeper()

    def deeper(self) -> int:
        return self.by_property

    @property
    def dead(self) -> int:
        return self.by_dead_property

    def without_effect(self) -> int:
        return self.only_checked

class Other:
    of_another_class: int
    section: Section | None
"""
CODE = """
from schema import Other, Section

def refuse_it(section: Section) -> None:
    print(section.only_refused)

def act(x: Section, other: Other) -> str:
    print(x.by_name, other.of_another_class, x.live, x.without_effect())
    if other.section is not None:
        print([each for each in [other.section.by_chain]])
    return f"{x.in_fstring}"
"""


def test_a_key_counts_as_read_only_where_code_acts_on_it(tmp_path: Path) -> None:
    files = {"schema": tmp_path / "schema.py", "code": tmp_path / "code.py"}
    files["schema"].write_text(SCHEMA)
    files["code"].write_text(CODE)
    found = {member.removeprefix("schema.Section.") for member in acted_on(files, {"schema.Section"})}
    assert found == {"by_name", "by_chain", "by_property", "in_fstring", "live", "deeper", "without_effect"}
