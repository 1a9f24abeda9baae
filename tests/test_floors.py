"""The architecture, asserted from the imports themselves."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "tinylm"
FLOOR = {"config": 0, "files": 0, "leases": 0, "machine": 0, "native": 0, "laws": 1, "text": 1,
         "model": 2, "train": 3, "evaluate": 4, "stages": 5, "sweep": 6, "look": 7, "bench": 7,
         "serve": 8, "verbs": 9, "__main__": 10, "__init__": 11}


def imports() -> list[tuple[Path, str, str]]:
    """(file, its room, the room it imports from) for every import of our own."""
    out = []
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if node.module == "tinylm":
                    names = [f"tinylm.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            out += [(path, room, n.split(".")[1]) for n in names if n.startswith("tinylm.")]
    return out


def test_every_room_has_a_floor():
    rooms = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in ROOT.rglob("*.py")}
    assert rooms <= set(FLOOR), f"give a floor to {rooms - set(FLOOR)}"


def test_modules_import_from_their_own_room_and_lower_floors_only():
    wrong = [f"{path.relative_to(ROOT)} imports {target}" for path, room, target in imports()
             if target != room and FLOOR[target] >= FLOOR[room] and FLOOR[room] > 0]
    wrong += [f"{path.name} imports {target}" for path, room, target in imports()
              if FLOOR[room] == 0 and target not in ("config", "native", room)]
    assert not wrong, wrong


def test_stages_never_import_each_other():
    for path in (ROOT / "stages").glob("*.py"):
        assert "tinylm.stages" not in path.read_text(), path


def test_text_and_laws_do_without_jax():
    for room in ("text", "laws"):
        for path in (ROOT / room).glob("*.py"):
            tree = ast.walk(ast.parse(path.read_text()))
            heads = {n.module for n in tree if isinstance(n, ast.ImportFrom)}
            assert not {"jax", "flax"} & {str(h).split(".")[0] for h in heads}, path


def test_only_files_opens_a_file_for_writing():
    for path in ROOT.rglob("*.py"):
        if path.name == "files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            assert name not in ("write_text", "write_bytes") or _is_files(node), path
            if name == "open" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                assert not set("wax+") & set(str(node.args[1].value)), path


def _is_files(node: ast.Call) -> bool:
    return getattr(getattr(node.func, "value", None), "id", "") in ("files",)
