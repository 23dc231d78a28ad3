"""The house keeps its shape: imports point one way, rooms stay small, heavy packages stay where they belong."""

from __future__ import annotations

import ast
import statistics
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "buddymoe_ray"
FILES = sorted(PACKAGE.rglob("*.py"))

# a layer may import itself and those below it; `kernels`, `cache`, `links`, `policy` stand side by side
WORDS = {"types", "errors", "config", "observe"}
BELOW = {
    "device": WORDS,
    "policy": WORDS,
    "kernels": WORDS | {"device"},
    "cache": WORDS | {"device"},
    "links": WORDS,
    "moe": WORDS | {"device", "policy", "kernels", "cache"},
    "models": WORDS | {"policy", "kernels", "cache", "moe"},
    "residency": WORDS | {"device", "policy", "kernels", "cache", "links", "moe", "models"},
    "tasks": WORDS,
    "engine": WORDS | {"device", "policy", "kernels", "cache", "moe", "models", "residency", "tasks"},
    "calibrate": WORDS | {"device", "policy", "kernels", "cache", "moe", "models", "residency", "engine"},
    "actors": WORDS | {"policy", "cache", "links", "residency"},
    "serve": WORDS | {"device", "models", "residency", "engine", "actors", "policy"},
    "batch": WORDS | {"serve", "models", "engine", "policy"},
    "client": WORDS | {"serve", "engine", "models"},
    "commands": WORDS | {"serve", "models", "residency", "engine", "calibrate", "policy", "batch", "tasks", "commands"},
    "device_check": WORDS | {"device", "kernels", "models", "residency", "engine", "commands"},
    "cli": WORDS | {"commands"},
    "__init__": WORDS | {"engine"},
    **dict.fromkeys(WORDS, WORDS),
}
ONLY_IN = {
    "ray": {"serve", "actors"},
    "transformers": {"models", "engine"},
    "pynvml": {"residency"},
    "fastapi": {"serve"},
    "torch": {
        *("device", "policy", "kernels", "cache", "links", "moe", "models"),
        *("residency", "engine", "calibrate", "batch", "device_check"),
    },
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
    "triton": {"kernels"},
    "xgrammar": {"engine"},
}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, must be absolute"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "buddymoe_ray"]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(path)
    allowed = BELOW[layer] | {layer}
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "buddymoe_ray" and len(parts) > 1 and (PACKAGE / parts[1]).with_suffix("").exists():
            assert parts[1] in allowed, f"{path} imports {name}: {layer} may import {sorted(allowed)}"
        if parts[0] == "buddymoe_ray" and len(parts) > 1 and (PACKAGE / f"{parts[1]}.py").exists():
            assert parts[1] in allowed, f"{path} imports {name}: {layer} may import {sorted(allowed)}"


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_heavy_packages_stay_in_their_layers(package: str) -> None:
    users = {layer_of(path) for path in FILES if any(name.split(".")[0] == package for name in imports(path))}
    assert users <= ONLY_IN[package], f"{package} is imported in {users}, must be in {ONLY_IN[package]}"


def test_no_import_cycles() -> None:
    """Imports inside functions and for types alone count too: a cycle hidden in a function is a cycle."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    graph = {name: {t for t in imports(path) if t in modules and t != name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_a_placement_starts_without_torch() -> None:
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    reached, to_do = set[str](), ["buddymoe_ray.actors.placement_actor"]
    while to_do:
        name = to_do.pop()
        if name in modules and name not in reached:
            reached.add(name)
            names = imports(modules[name])
            assert "torch" not in {found.split(".")[0] for found in names}, f"{name} imports torch"
            to_do += [name.rpartition(".")[0]] * (name.count(".") > 1) + names
    assert "buddymoe_ray.actors" in reached and "buddymoe_ray.policy" in reached


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, f"{path} has {text.count(chr(10))} lines, must be at most 400"
    tree = parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= 60, f"{path}:{node.lineno} {node.name} has {size} lines, must be at most 60"
            named = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len({*named} - {"self", "cls", "typing"})  # numba gives an intrinsic a typing context
            assert count <= 7, f"{path}:{node.lineno} {node.name} takes {count} parameters, must take at most 7"
    assert ast.get_docstring(tree), f"{path} has no header saying what it does"


def test_the_median_room_is_small() -> None:
    assert statistics.median(path.read_text().count("\n") for path in FILES) <= 120


def test_nothing_is_unpickled_or_trusted() -> None:
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                assert not {"pickle", "marshal", "dill"} & {a.name for a in node.names}, f"{path} imports a pickler"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{path} trusts remote code"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, f"{path}:{node.lineno} calls {node.func.id}"


def test_top_level_is_the_users() -> None:
    fixed = {"buddymoe_ray", "deployments", "cluster", "tests", "pyproject.toml", "README.md", "LICENSE"}
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    seen = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    assert seen <= fixed, f"top level holds {sorted(seen - fixed)}, must be {sorted(fixed)}"
