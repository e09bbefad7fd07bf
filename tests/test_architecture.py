"""Imports go one way (docs/design.md), and the installed packages are just the two."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = {"modeldir", "loading", "directories", "tensor_file"}
MAY_IMPORT = {
    "nn": {"nn"},
    "peft": {"nn", "peft"} | TOP,
    "infer": {"nn", "peft", "infer"} | TOP,
    "evaluate": {"evaluate"},
    "train": {"nn", "peft", "infer", "evaluate", "train"} | TOP,
    "study": {"evaluate", "study"},
    "convert": {"nn", "convert"} | TOP,
    "top": {"nn", "convert"} | TOP,  # loading grows kernels by UpKern
}


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("mednext_jax"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path):
    parts = path.relative_to(ROOT / "mednext_jax").parts
    room = parts[0] if len(parts) > 1 else "top"
    for name in imported(path):
        assert not name.startswith("data_pipeline"), f"{path} imports {name}"
        if name.startswith("mednext_jax."):
            assert name.split(".")[1] in MAY_IMPORT[room], f"{path} imports {name}"


def test_flax_is_imported_in_nn_alone():
    for path in files("mednext_jax"):
        if "nn" not in path.relative_to(ROOT).parts:
            assert not any(name.split(".")[0] == "flax" for name in imported(path)), path


def test_the_data_pipeline_knows_neither_jax_nor_the_network():
    for path in files("data_pipeline"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"jax", "flax", "optax", "mednext_jax"}, path


def test_configs_import_ml_collections_only():
    for path in files("configs"):
        assert {name.split(".")[0] for name in imported(path)} <= {"ml_collections", "configs"}, path


def test_every_file_is_one_idea_long():
    for folder in ("mednext_jax", "data_pipeline", "configs", "launch"):
        for path in files(folder):
            assert len(path.read_text().splitlines()) <= 300, f"{path} is too long for one idea"
