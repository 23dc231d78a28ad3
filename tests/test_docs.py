"""What is written is what is there: README's tables, tree and commands, `__all__`, headers of deployments."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from readme_tables import FIGURES, OPTIONS, README, figures_page, options_page, rendered

import buddymoe_ray
from buddymoe_ray.cli import COMMANDS, build_parser
from buddymoe_ray.models.families import FAMILIES
from buddymoe_ray.models.schemes import METHODS
from buddymoe_ray.serve.args import ServeArgs

ROOT = Path(__file__).parents[1]
TEXT = README.read_text()
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "buddymoe_ray").rglob("*.py")
)


def test_readme_tables_are_generated() -> None:
    assert rendered(TEXT) == TEXT, "README's tables are stale: run python tests/readme_tables.py"
    text = OPTIONS.read_text()
    assert options_page(text) == text, "the options are stale: run python tests/readme_tables.py"
    text = FIGURES.read_text()
    assert figures_page(text) == text, "the figures are stale: run python tests/readme_tables.py"


def test_readme_is_short() -> None:
    assert TEXT.count("\n") <= 160  # 150, and the words of our own


def test_readme_names_the_quantisations_that_are_served() -> None:
    listed = TEXT.split("**Quantised checkpoints**")[1].split("Exact is")[0]
    assert set(re.findall(r"`([\w-]+)`", listed)) == set(METHODS)


def test_readme_counts_the_families() -> None:
    assert f" {len(FAMILIES)} families," in TEXT


def test_readme_lists_exactly_the_commands() -> None:
    listed = dict(re.findall(r"^\| `buddymoe (\w+)` \| (.+?) \|$", TEXT, re.M))
    assert listed == COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_of_a_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser(only=command).parse_args([command, "--help"])
    printed = capsys.readouterr().out
    assert COMMANDS[command] in printed and "--json" in printed
    parser = build_parser(only=command)
    sub = next(action for action in parser._actions if hasattr(action, "choices") and action.choices)
    for action in sub.choices[command]._actions:  # type: ignore[index,union-attr]
        assert action.help, f"{command} {action.option_strings} has no help"


def test_readme_tree_is_the_tree() -> None:
    block = TEXT.split("## The tree")[1].split("```")[1]
    named = {
        word.rstrip("/")
        for line in block.splitlines()
        for word in line.split("   ")[0].split()
        if line.startswith("  ")
    }
    there = {
        path.name
        for path in (ROOT / "buddymoe_ray").iterdir()
        if path.name not in {"__pycache__", "__init__.py", "cli.py"}
    }
    assert named == there, f"README's tree says {sorted(named)}, the package holds {sorted(there)}"


def test_token_path_names_real_modules() -> None:
    block = TEXT.split("## The path of a token")[1].split("```")[1]
    for name in re.findall(r"\b(?:serve|engine|moe|cache|kernels|models|policy|calibrate)/\w+", block):
        assert (ROOT / "buddymoe_ray" / f"{name}.py").exists(), f"README's path of a token names {name}"


@pytest.mark.parametrize("module", MODULES)
def test_all_names_exist_and_are_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", []):
        assert hasattr(loaded, name), f"{module}.__all__ names {name}, which is not there"
        thing = getattr(loaded, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert getattr(thing, "__doc__", None), f"{module}.{name} has no docstring"


def test_importing_the_package_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, buddymoe_ray; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == buddymoe_ray.__version__


def test_the_package_is_found_beside_a_clone_called_like_it(tmp_path: Path) -> None:
    """From the folder that `git clone` was typed in: it is on the path of ray's processes."""
    (tmp_path / "buddymoe_ray").mkdir()
    asked = "import buddymoe_ray; print(buddymoe_ray.__version__)"
    done = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == buddymoe_ray.__version__, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "deployments").glob("*.yaml")), ids=lambda p: p.name)
def test_deployments_resolve_to_typed_arguments(path: Path) -> None:
    (application,) = yaml.safe_load(path.read_text())["applications"]
    assert application["import_path"] == "buddymoe_ray.serve.app:build_app"
    config = ServeArgs(**application["args"]).engine_config()
    assert (config.mode, config.budget) == ("bounded", 0.003), "a deployment says in plain sight what it may cost"
    assert {"mode", "budget"} <= set(application["args"])


def test_readme_code_blocks_parse() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert blocks, "README has no Python example"
    for block in blocks:
        ast.parse(block)


def test_ci_runs_exactly_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    command = re.search(r"^python3 -m venv .*pytest$", TEXT, re.M)
    assert command is not None and "README.md" in script and "pytest" in script


def test_hints_send_to_pages_that_are_there() -> None:
    for path in (ROOT / "buddymoe_ray").rglob("*.py"):
        for page in re.findall(r"hint: see ([\w/]*README[\w.]*)", path.read_text(encoding="utf-8")):
            assert (ROOT / page.rstrip(".")).is_file(), f"{path} sends to {page}"
