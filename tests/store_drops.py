"""The shared store's steps, each dropped in its turn: checks, locks, writes, generation steps and orders.

`dropped` names every text of a function that lacks one: a check that always or never holds, an operand of `and`, `or`,
`&`, `|`, a mask, a condition of a comprehension, a lock, a suppression, a statement that writes or calls, or has two
of these the other way round. Knows no store.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import Any

__all__ = ["dropped", "taken_apart"]


def dropped(source: str) -> Iterator[tuple[str, str]]:
    """What a function lacks and its source without that, for each step in it. What is there twice has a number."""
    whole, seen = ast.parse(taken_apart(source)), dict[str, int]()
    for at, node in enumerate(ast.walk(whole)):
        for name, value in list(ast.iter_fields(node)):
            for index, new, what in _changes(node, name, value):
                tree = copy.deepcopy(whole)
                parent = next(n for i, n in enumerate(ast.walk(tree)) if i == at)
                if index is None:
                    setattr(parent, name, new)
                else:
                    getattr(parent, name)[index] = new
                count = seen[what] = seen.get(what, 0) + 1
                yield (what if count == 1 else f"{what} #{count}"), ast.unparse(ast.fix_missing_locations(tree))


def taken_apart(source: str) -> str:
    """A function's source as `dropped` has it, and lacking nothing."""
    return ast.unparse(ast.fix_missing_locations(_Apart().visit(ast.parse(source))))


def _changes(node: ast.AST, name: str, value: Any) -> Iterator[tuple[int | slice | None, Any, str]]:
    """Where in a field of `node` something else comes to be, what, and how that is called."""
    if isinstance(node, ast.If | ast.While | ast.IfExp) and name == "test":
        for answer in (True, False)[isinstance(node, ast.While) :]:
            yield None, ast.Constant(answer), f"{answer} for {ast.unparse(value)}"
    if (type(node), name) in ((ast.BoolOp, "values"), (ast.comprehension, "ifs")):
        for index, part in enumerate(value):
            yield slice(index, index + 1), [], f"not {ast.unparse(part)}"
    for index, part in enumerate(value if isinstance(value, list) else [value]):
        place = index if isinstance(value, list) else None
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitAnd | ast.BitOr):
            yield place, part.left, f"not {ast.unparse(part.right)}"
            yield place, part.right, f"not {ast.unparse(part.left)}"
        if isinstance(part, ast.Subscript) and isinstance(part.slice, ast.UnaryOp | ast.Compare):
            yield place, part.value, f"not [{ast.unparse(part.slice)}]"
        if isinstance(part, ast.withitem) and ("locked" in (text := ast.unparse(part)) or "suppress" in text):
            yield place, ast.withitem(ast.Call(ast.Name("nullcontext", ast.Load()), [], [])), f"not {text}"
        if _step(part):
            yield place, ast.Pass(), f"not {ast.unparse(part)}"
            if index + 1 < len(value) and _step(value[index + 1]):
                both = [value[index + 1], part]
                yield slice(index, index + 2), both, f"{ast.unparse(part)} after {ast.unparse(value[index + 1])}"


def _step(part: Any) -> bool:
    """Whether it is a statement that others may see."""
    if isinstance(part, ast.Expr):
        return isinstance(part.value, ast.Call)
    targets = part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AugAssign) else []
    return any(isinstance(target, ast.Subscript | ast.Attribute) for target in targets)


class _Apart(ast.NodeTransformer):
    """Assignments of several things come one by one (not of what is made once), and nothing has a type."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> Any:
        return ast.arg(node.arg)

    def visit_Assign(self, node: ast.Assign) -> Any:
        if len(node.targets) > 1 and not isinstance(node.value, ast.Constant | ast.UnaryOp):
            return node
        pairs = [
            pair
            for target in node.targets
            for pair in (
                zip(target.elts, node.value.elts, strict=True)
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                else [(target, node.value)]
            )
        ]
        return [ast.Assign([target], value) for target, value in pairs]
