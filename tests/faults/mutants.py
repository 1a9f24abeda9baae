"""Break code on purpose, one line at a time: does a test see each?

    python tests/faults/mutants.py TABLE.csv             # storage: about 20 minutes on two cores
    python tests/faults/mutants.py TABLE.csv alignment   # post-training: about 15

Each mutant is a copy of the tree with one line changed; the area's tests run on it until one
fails. A mutant that none sees is named, and the exit code is 1 where more than two are, or where a
test fails for a line that is written otherwise and does the same.
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
SUITES = {
    "storage": ("test_files.py", "test_leases.py", "test_train_loop.py", "test_train_batch.py",
                "test_stages_pretrain.py", "faults/test_writes.py", "faults/test_adopt.py",
                "faults/test_flips.py", "faults/test_swaps.py"),
    "alignment": ("test_train_losses.py", "test_train_rewards.py", "test_train_policy.py",
                  "test_text_chat.py", "test_text_preferences.py", "test_evaluate_rates.py",
                  "test_model_generate.py", "test_model_heads.py", "test_train_rollout.py",
                  "test_stages_sft.py", "test_stages_align.py")}
STORAGE = (  # file, its line or part of one, what that becomes
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
    ("train/run.py", "same(place, begun, mine, (\"kind\",))\n", "pass\n"),
    ("train/run.py", "             (\"kind\", \"config\", \"versions\", \"code_id\"))",
     "             (\"kind\", \"config\"))"),
    ("train/run.py", "for k in machine.BITS if k in kept", "for k in () if k in kept"),
    ("train/run.py", "        elif bad := files.changed(folder, finished.get(\"files\", {})):",
     "        elif bad := []:"),
    ("train/run.py", "    if (folder / \"checkpoints\").exists():", "    if False:"),
)
ALIGNMENT = (
    # the mask is dropped; targets are shifted; what pads ends a turn
    ("train/losses.py", "model, w = rebuild(config, params, plan), batch.weights\n",
     "model, w = rebuild(config, params, plan), jnp.ones_like(batch.weights)\n"),
    ("train/losses.py", "tokens, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]",
     "tokens, targets = batch.tokens[:, :-1], batch.tokens[:, :-1]"),
    ("train/losses.py", "in_two(model, tokens, batch.segments[:, :-1])",
     "in_two(model, tokens, None)"),
    ("train/losses.py", "here = jnp.argsort(~counts, stable=True)",
     "here = jnp.argsort(counts, stable=True)"),
    ("text/tokenizer.py", "PAD, BOS, SYSTEM, USER, ASSISTANT, END = range(6)",
     "BOS, SYSTEM, USER, ASSISTANT, END, PAD = 1, 2, 3, 4, 5, 5"),
    ("train/rollout.py", "said = row[: stops[0] + 1] if", "said = row[: stops[0]] if"),
    ("train/rollout.py", "mask[b, len(prompt) - 1: len(prompt) - 1 + len(said)] = 1",
     "mask[b, len(prompt): len(prompt) + len(said)] = 1"),
    # the sign of the KL; what it is taken over; a reward one slot early or late
    ("train/rewards.py", "- beta * jnp.where(real, logp - ref, 0.0)",
     "+ beta * jnp.where(real, logp - ref, 0.0)"),
    ("train/losses.py", "return policy + beta * penalty,", "return policy - beta * penalty,"),
    ("train/rewards.py", "return apart**2 / 2", "return apart**2"),
    ("train/rewards.py", "return jnp.expm1(-apart) + apart", "return jnp.expm1(apart) - apart"),
    ("train/losses.py", "((0, 0), (0, 0), (1, 0))", "((0, 0), (0, 0), (0, 1))"),
    ("train/rewards.py", "axis=1)[:, ::-1] == 1)", "axis=1)[:, ::-1] == 2)"),
    # a mean for a sum in DPO; its reference, its labels, its smoothing
    ("train/losses.py", "return jnp.sum(_kept(each, mask), axis=-1).reshape(B, R)",
     "return (jnp.sum(_kept(each, mask), axis=-1) / mask.sum(-1)).reshape(B, R)"),
    ("train/losses.py", "reward_rejected = beta * (wide(rejected) - ref_rejected)",
     "reward_rejected = beta * (wide(rejected) - ref_chosen)"),
    ("train/losses.py", "- smoothing * jax.nn.log_sigmoid(-gap)",
     "- smoothing * jax.nn.log_sigmoid(gap)"),
    ("train/losses.py", "share = wins / jnp.where(pairs > 0, pairs, 1.0)[:, None, None]",
     "share = wins / jnp.sum(pairs)"),
    # sampled in one way and scored in another
    ("model/generate.py", "    return _inverted(jax.nn.softmax(logits, axis=-1), ",
     "    logits = jnp.where(logits < jax.lax.top_k(logits, 8)[0][:, -1:], -1e9, logits)\n"
     "    return _inverted(jax.nn.softmax(logits, axis=-1), "),
    ("train/rollout.py", "jnp.float32(temperature))\n    return laid_out",
     "jnp.float32(1.0))\n    return laid_out"),
    ("stages/policy.py", "token_logp(logits(x), t, config.temperature)",
     "token_logp(logits(x), t, 1.0)"),
    ("stages/policy.py", "ref, rolled, config.temperature)", "ref, rolled)"),
    # PPO's and GRPO's parts
    ("train/losses.py", "_kept(jnp.minimum(free, held), weights)",
     "_kept(jnp.maximum(free, held), weights)"),
    ("train/losses.py", "_kept(jnp.maximum(free, held), mask)",
     "_kept(jnp.minimum(free, held), mask)"),
    ("train/rewards.py", "gamma * lam * following", "gamma * following"),
    ("train/rewards.py", "(jnp.where(real, a, following), jnp.where(real, v, value))", "(a, v)"),
    ("train/rewards.py", "jnp.maximum(count - 1, 1) + 1e-8)", "jnp.maximum(count, 1) + 1e-8)"),
    ("train/rewards.py", "return apart * count / jnp.maximum(count - 1, 1) if", "return apart if"),
    ("stages/policy.py", "np.minimum(scores, config.truncated))", "np.minimum(scores, 0.0))"),
    ("stages/policy.py", "            guard.unlink()", "            pass"),
    ("evaluate/rates.py", "side=\"right\")", "side=\"left\") + 1"),
)
SAME = (  # written otherwise, and the same
    ("train/losses.py", "    return logz - chosen(logits, targets), logz",
     "    return -(chosen(logits, targets) - logz), logz"),
    ("train/rewards.py", "- beta * jnp.where(real, logp - ref, 0.0)",
     "+ beta * jnp.where(real, ref - logp, 0.0)"),
    ("train/losses.py", "    gap = reward_chosen - reward_rejected\n",
     "    gap = -(reward_rejected - reward_chosen)\n"),
)
MUTANTS = {"storage": (STORAGE, ()), "alignment": (ALIGNMENT, SAME)}


def main(table: str, area: str = "storage") -> int:
    """Try every mutant of an area; write the table; tell how many were seen."""
    (broken, same), rows, missed, wrong = MUTANTS[area], [], 0, 0
    for number, (name, old, new) in enumerate((*broken, *same), 1):
        failed = tried(name, old, new, SUITES[area])
        missed += number <= len(broken) and not failed
        wrong += number > len(broken) and bool(failed)
        rows.append((number, name, old.strip(), new.strip(), failed or "nobody"))
        print(f"{number:2} {name}: {old.strip().splitlines()[0][:60]!r}: {rows[-1][-1]}",
              flush=True)
    text = io.StringIO()
    csv.writer(text).writerows([("mutant", "file", "was", "became", "seen by"), *rows])
    files.write_text(Path(table), text.getvalue())
    print(f"{len(broken) - missed} of {len(broken)} seen; of {len(same)} that change nothing, "
          f"{wrong}")
    return int(missed > 2 or wrong > 0)


def tried(name: str, old: str, new: str, suite: tuple[str, ...]) -> str:
    """Run a suite on a mutant; name the first test that fails, or nothing."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        source = copy / "tinylm" / name
        text = source.read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        source.write_text(text.replace(old, new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
             *(f"tests/{test}" for test in suite)], cwd=copy, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(copy)})
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        assert bool(lines) == bool(done.returncode), done.stdout + done.stderr
        return lines[0].split()[1].removeprefix("tests/") if lines else ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
