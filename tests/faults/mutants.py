"""Break the storage and resume code on purpose, one line at a time: does a test see each?

    python tests/faults/mutants.py TABLE.csv     # about 20 minutes on two cores

Each mutant is a copy of the tree with one line changed; the tests of SUITE run on it until one
fails. A mutant that none sees is named, and the exit code is 1 where more than two are.
"""

import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tinylm import files

ROOT = Path(__file__).parents[2]
SUITE = ("test_files.py", "test_leases.py", "test_train_loop.py", "test_train_batch.py",
         "test_stages_pretrain.py", "faults/test_writes.py", "faults/test_adopt.py",
         "faults/test_flips.py", "faults/test_swaps.py")
MUTANTS = (  # file, its line or part of one, what that becomes
    ("files.py", "            os.fsync(f.fileno())\n        os.replace", "        os.replace"),
    ("files.py", "os.replace(draft, path)\n", "shutil.copy(draft, path)\n"),
    ("files.py", "        draft.unlink(missing_ok=True)\n        raise", "        raise"),
    ("files.py", "    _sync_folder(path.parent)\n\n\ndef write_text", "\n\ndef write_text"),
    ("files.py", "if end == sha256_of(body.encode()) + '\"\\n}\\n':", "if True:"),
    ("files.py", "        f.flush()\n        os.fsync(f.fileno())\n        return f.tell()",
     "        return f.tell()"),
    ("files.py", "f.truncate(len(_untorn(path, f.read())))", "pass"),
    ("files.py", "return row if _sealed_row(row).encode() == line else None", "return row"),
    ("files.py", "    if _row(whole[len(kept):-1]) is not None:", "    if False:"),
    ("files.py", "        f.truncate(size)\n", "        pass\n"),
    ("files.py", "path.stat().st_size < size:", "False:"),
    ("files.py", "        if sha and sha256_of(f.read(size)) != sha:", "        if False:"),
    ("files.py", "        seal(draft, **facts)\n", "        seal(draft)\n"),
    ("files.py", "if shas[path] != want]", "if False]"),
    ("files.py", "elif path.stat().st_size != size:", "elif False:"),
    ("files.py", "        if path.is_symlink():\n            out.append", "        if False:\n"
     "            out.append"),
    ("files.py", "is missing\" for name in listed if name not in found]",
     "is missing\" for name in listed if False]"),
    ("files.py", "    except BaseException:\n        shutil.rmtree(draft, ignore_errors=True)\n",
     "    except BaseException:\n"),
    ("files.py", "        fault.filename = fault.filename or str(path)\n", ""),
    ("leases.py", "        raise _owned(folder, _read(handle)) from None", "        return True"),
    ("leases.py", "            _sweep_out(folder)\n", ""),
    ("leases.py", "        if (now := _read(handle)) != before and now:", "        if False:"),
    ("train/checkpoint.py", "    facts = files.verified(place)\n    rest",
     "    facts = files.read_json(place / files.MANIFEST)\n    rest"),
    ("train/checkpoint.py", "        except files.Damaged as damage:\n            warn",
     "        except files.Damaged as damage:\n            raise\n            warn"),
    ("train/checkpoint.py", "for place in reversed(steps(folder)):", "for place in steps(folder):"),
    ("train/loop.py", "        files.truncate(member.log, size, sha)\n", "        pass\n"),
    ("train/loop.py", "            if stop() and left() > 0:\n                settle()\n",
     "            if stop() and left() > 0:\n"),
    ("train/loop.py", "batch_at(done + i) for i", "batch_at(i) for i"),
    ("train/checkpoint.py", "keep_last(self.folder, 2, self.kept)",
     "keep_last(self.folder, 1, self.kept)"),
    ("train/checkpoint.py", "    if owner and facts.get(\"run\", owner) != owner:",
     "    if False:"),
    ("leases.py", "if DRAFT.fullmatch(path.name):", "if path.suffix in (\".tmp\", \".old\"):"),
    ("train/checkpoint.py", "self._copy = jax.tree.map(np.array, state)",
     "self._copy = jax.tree.map(np.asarray, state)"),
    ("train/loop.py", "            saver.check()\n", ""),
    ("train/loop.py", "            saver.wait()\n            checkpoint.keep_last(saves, 1, kept)",
     "            checkpoint.keep_last(saves, 1, kept)"),
    ("train/loop.py", "    for member, size, sha in zip(members, sizes, shas, strict=True):\n",
     "    for member, size, sha in zip(members, sizes, [\"\"] * len(shas), strict=True):\n"),
    ("train/run.py", "_same(place, begun, mine, (\"kind\",))\n", "pass\n"),
    ("train/run.py", "              (\"kind\", \"config\", \"versions\", \"code_id\"))",
     "              (\"kind\", \"config\"))"),
    ("train/run.py", "tuple(k for k in machine.BITS if k in kept))", "())"),
    ("train/run.py", "        elif bad := files.changed(folder, finished.get(\"files\", {})):",
     "        elif bad := []:"),
    ("train/run.py", "    if (folder / \"checkpoints\").exists():", "    if False:"),
)


def main(table: str) -> int:
    """Try every mutant; write the table; tell how many were seen."""
    rows, missed = [], 0
    for number, (name, old, new) in enumerate(MUTANTS, 1):
        failed = tried(name, old, new)
        missed += not failed
        rows.append((number, name, old.strip(), new.strip(), failed or "nobody"))
        print(f"{number:2} {name}: {old.strip().splitlines()[0][:60]!r}: {rows[-1][-1]}",
              flush=True)
    text = io.StringIO()
    csv.writer(text).writerows([("mutant", "file", "was", "became", "seen by"), *rows])
    files.write_text(Path(table), text.getvalue())
    print(f"{len(rows) - missed} of {len(rows)} seen")
    return int(missed > 2)


def tried(name: str, old: str, new: str) -> str:
    """Run the suite on a mutant; name the first test that fails, or nothing."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        source = copy / "tinylm" / name
        text = source.read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        source.write_text(text.replace(old, new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
             *(f"tests/{test}" for test in SUITE)], cwd=copy, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(copy)})
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        assert bool(lines) == bool(done.returncode), done.stdout + done.stderr
        return lines[0].split()[1].removeprefix("tests/") if lines else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
