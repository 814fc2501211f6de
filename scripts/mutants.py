"""Mutants of a module: its source with one thing changed."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Methods whose call is left out.
_LEFT_OUT = {"abs", "clamp", "clone", "copy", "detach", "double"}
# Functions that fail at once, or give the same, if their arguments change places.
_UNSWAPPED = {
    "equal",
    "promote_types",
    "exclude",
    "getattr",
    "hasattr",
    "isinstance",
    "max",
    "maximum",
    "min",
    "select",
    "setattr",
}


@dataclass(frozen=True)
class Mutant:
    """A change of one node.

    Attributes:
        file: The module's path.
        line: First line of the changed node.
        last: Its last line.
        where: Names of the classes and functions around it.
        before: Source of the changed node.
        after: Its source after the change.
        number: Counts equal changes in the same function.
        place: Which changeable node of the module it is, and which of its changes.
    """

    file: str
    line: int
    last: int
    where: str
    before: str
    after: str
    number: int
    place: tuple[int, int]

    @property
    def name(self) -> str:
        """What identifies the mutant, also when lines above it change."""
        return f"{self.file} {self.where}: {self.before} -> {self.after} #{self.number}"


def mutants_of(file: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    tree = ast.parse((ROOT / file).read_text())
    mutants: list[Mutant] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for place, (node, where) in enumerate(_changeable(tree, "")):
        for change, after in enumerate(_changes(node)):
            other = after[0] if isinstance(after, list) else after
            before, now = (ast.unparse(part).split("\n")[0] for part in (node, other))
            key = where, before, now
            seen[key] += 1
            lines = node.lineno, node.end_lineno
            mutants.append(Mutant(file, *lines, *key, seen[key], (place, change)))
    return mutants


def source_of(mutant: Mutant, source: str) -> str:
    """The source of the module after the change."""
    tree = ast.parse(source)
    place, change = mutant.place
    target = next(islice(_changeable(tree, ""), place, None))[0]
    after = _changes(target)[change]
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, field, after)
            elif isinstance(value, list):
                for at, item in enumerate(value):
                    if item is target:
                        value[at : at + 1] = after if isinstance(after, list) else [after]
    return ast.unparse(ast.fix_missing_locations(tree))


def _changeable(node: ast.AST, where: str) -> Iterator[tuple[Any, str]]:
    """Nodes that run, with the names around them: no annotations, messages or docstrings."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "exc", "type_params"):
            continue
        # Assertions that the source never breaks.
        if isinstance(node, ast.keyword) and node.arg in ("strict", "frozen"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            # Imports of packages that are installed here.
            if isinstance(child, ast.With) and ast.unparse(child.items[0]) == "named()":
                continue
            inside = where
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                inside = f"{where}.{child.name}".strip(".")
            if hasattr(child, "lineno"):
                yield child, inside
            yield from _changeable(child, inside)


def _changes(node: Any) -> list[Any]:
    """Nodes (or lists of statements) to replace a node by."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            return [_with(node, ops=[_COMPARISONS[type(op)]()])]
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC and not isinstance(
            node.left, ast.JoinedStr
        ):
            return [_with(node, op=_ARITHMETIC[type(op)]())]
        case ast.BoolOp(op=op):
            return [_with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())]
        case ast.Constant(value=bool() as value):
            return [_with(node, value=not value)]
        case ast.Constant(value=int() | float() as value):
            return [_with(node, value=value + 1)]
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            return [operand]
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if not isinstance(
            test, ast.Compare | ast.UnaryOp
        ):
            return [_with(node, test=ast.UnaryOp(ast.Not(), test))]
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            return [ast.Pass()]
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return [ast.Pass()]
        case ast.Call(func=ast.Attribute(attr=name, value=value)) if name in _LEFT_OUT:
            return [value]
        case ast.Call(args=[first, second, *rest]) if _order_matters(node):
            return [_with(node, args=[second, first, *rest])]
        case ast.With(items=items):
            fewer = [[*items[:i], *items[i + 1 :]] for i in range(len(items))]
            return [
                _with(node, items=left) if left else node.body
                for left, item in zip(fewer, items, strict=True)
                if item.optional_vars is None
            ]
        case ast.FunctionDef(decorator_list=[*decorators]):
            left = [d for d in decorators if "no_grad" not in ast.unparse(d)]
            return [_with(node, decorator_list=left)] if left != decorators else []
    return []


def _order_matters(call: ast.Call) -> bool:
    name = ast.unparse(call.func).split(".")[-1]
    return name not in _UNSWAPPED and ast.dump(call.args[0]) != ast.dump(call.args[1])


def _with(node: Any, **fields: Any) -> Any:
    other = type(node)(**{**dict(ast.iter_fields(node)), **fields})
    return ast.copy_location(other, node)
