"""The command line as a user meets it: results, one-line refusals, exit codes."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from command import ROOT, tinylm
from test_stages_pretrain import story

from tinylm import __main__, files, verbs
from tinylm.config import BadInput
from tinylm.look.tuned import load as load_lens


def process(*args: object, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tinylm", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200,
                          env={**os.environ, **env})


def last(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    for n in range(30):
        (folder / f"{n:02d}.txt").write_text(story(n))
    corpus = sorted(map(str, folder.glob("*.txt")))
    command = ("train", "--out", folder / "run", "--corpus", *corpus, "--model.V", 128,
               "--model.D", 16, "--model.T", 32, "--batch", 128, "--steps", 40, "--seed", 0)
    return folder, command, last(process(*command, "--json"))


def test_train_repeated_shows_the_same_record(trained):
    folder, command, record = trained
    before = {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*") if p.is_file()
              and p.name != ".lease"}
    assert last(tinylm(*command, "--json")) == record
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())


@pytest.fixture(scope="module")
def tuned(trained):
    folder, _, _ = trained
    talks = folder / "talks.jsonl"
    turns = [[{"role": "user", "content": f"say {x}{y}"}, {"role": "assistant", "content": x + y}]
             for x in "bdgklmnr" for y in "aeiou"]
    talks.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return last(tinylm("sft", folder / "run", "--out", folder / "chat", "--data", talks,
                       "--steps", 30, "--rows", 4, "--json"))


def test_a_tuned_run_names_its_parent_and_answers_the_same_again(trained, tuned):
    folder, _, record = trained
    assert tuned["parent"]["id"] == record["id"]
    one, again = (tinylm("chat", folder / "chat", "--prompt", "say ba", "--seed", 1)
                  for _ in range(2))
    assert one.returncode == 0 and one.stdout == again.stdout and one.stdout.strip()


def test_base_and_tuned_answers_are_shown_in_their_tokens_system_prompt_on_and_off(tuned, trained):
    folder, _, _ = trained
    done = tinylm("look", "chat", folder / "run", "--beside", folder / "chat", "--text", "say ba",
                  "--system", "be brief")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("answers") == 3 and done.stdout.count("told “be·brief”") == 1
    plain = tinylm("chat", folder / "chat", "--prompt", "say ba", "--temperature", 0).stdout.strip()
    shown = done.stdout.split("answers")[2].splitlines()[1]
    assert plain[:4] and plain[0] in shown
    grown = tinylm("look", "growth", folder / "chat")  # tuned on talks, scored on the base's text
    assert grown.returncode == 0 and tuned["id"] in grown.stdout, grown.stderr
    wrong = tinylm("look", "heads", folder / "run", "--system", "x")
    assert wrong.returncode == 2 and "it is for chat" in wrong.stderr
    _, command, _ = trained
    small = [120 if was == 128 and at == "--model.V" else was
             for at, was in itertools.pairwise(command[2:-4])]
    last(tinylm("train", "--out", folder / "foreign", *small, "--steps", 1, "--json"))
    for view in ("chat", "next"):
        beside = tinylm("look", view, folder / "run", "--beside", folder / "foreign")
        assert beside.returncode == 2 and "was trained with tokenizer" in beside.stderr
    dropped = tinylm("look", "chat", folder / "run", "--system", "x")
    assert dropped.returncode == 2 and "a base model knows no system prompt" in dropped.stderr


def test_a_slim_copy_speaks_is_verified_and_tuned_from_as_the_run_is(trained, tmp_path):
    folder, _, record = trained
    copy = tmp_path / "copies/slim"
    assert tinylm("slim", folder / "run", "--out", copy).returncode == 0
    size = {place: sum(p.stat().st_size for p in place.rglob("*") if p.is_file()
                       and "checkpoints" in p.parts) for place in (folder / "run", copy)}
    assert size[copy] < 0.6 * size[folder / "run"]
    said = [tinylm("sample", place, "--prompt", "the") for place in (folder / "run", copy)]
    assert said[0].stdout == said[1].stdout and said[1].returncode == 0
    found = [last(tinylm("verify", place, "--json"))["runs"][str(place)]
             for place in (folder / "run", copy)]
    assert found[0] == found[1]
    again = tinylm("slim", folder / "run", "--out", copy)
    assert again.returncode == 2 and "holds a run already" in again.stderr
    assert tinylm("slim", tmp_path, "--out", tmp_path / "no").returncode == 2
    harmed = next((copy / "checkpoints").rglob("d/*"))
    harmed.write_bytes(harmed.read_bytes()[:-1])
    assert tinylm("sample", copy).returncode == 2


@pytest.mark.parametrize("view, says", [
    ("tokens", "bytes a token"), ("next", "bigram, by counts"), ("attention", "q·k ="),
    ("heads", "induction"), ("layers", "settled"), ("growth", "bits per byte")])
def test_every_view_of_a_run_is_shown(trained, tmp_path, view, says):
    folder, _, record = trained
    picture = ("--out", tmp_path / "view.svg")
    text = () if view in ("heads", "growth") else ("--text", "the boat")
    done = tinylm("look", view, folder / "run", *text, *picture)
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "view.svg").read_text()
    assert says in done.stdout and "<svg" in drawn and "url(http" not in drawn.replace('"', "")
    assert view not in ("tokens", "next") or says.replace(" ", "&#160;") in drawn
    if view == "growth":
        assert record["id"] in done.stdout


@pytest.mark.parametrize("view, says", [
    ("isoflops", "best size ~ C^0.5"), ("frontier", "inside the interval")])
def test_the_laws_of_a_study_are_looked_at(tmp_path, view, says):
    study = ROOT / "experiments/results/laptop"
    for out in ("view.svg", "view.html", "view.png"):
        done = tinylm("look", view, study, "--out", tmp_path / out)
        assert done.returncode == 0 and says in done.stdout, done.stderr
    assert "FLOPs" in (tmp_path / "view.svg").read_text()
    assert says.split()[0] in (tmp_path / "view.html").read_text()
    wrong = tinylm("look", view, tmp_path)
    assert wrong.returncode == 2 and "holds no law.json; give the folder" in wrong.stderr
    cut = shutil.copytree(study, tmp_path / "cut", ignore=shutil.ignore_patterns(
        "checkpoints", "score.json"))
    assert tinylm("look", view, cut).returncode == (0 if view == "isoflops" else 2)


def test_a_view_is_written_as_a_page_that_fetches_nothing(trained, tmp_path):
    folder, _, _ = trained
    for view in ("tokens", "layers"):
        page = tmp_path / f"{view}.html"
        done = tinylm("look", view, folder / "run", "--text", "the <b>boat", "--out", page)
        assert done.returncode == 0, done.stderr
        text = page.read_text()
        assert "&lt;" in text and "<b>" not in text and ("<svg" in text) == (view == "layers")
        assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert tinylm("look", "heads", folder / "run").returncode == 0  # nothing is recorded any more


def test_a_run_that_kept_checkpoints_is_looked_at_as_it_was(trained, tmp_path):
    folder, _, _ = trained
    run = tmp_path / "run"
    command = ("train", "--out", run, "--text", folder / "run/text", "--model.V", 128, "--model.D",
               8, "--model.T", 32, "--batch", 64, "--steps", 40, "--keep", 5, 20)
    assert tinylm(*command).returncode == 0
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        f"step-{n:08d}" for n in (5, 20, 40)]
    grown = tinylm("look", "growth", run)
    steps = re.findall(r"^│ +(\d+) │ +(\d+) │", grown.stdout, re.MULTILINE)
    assert steps == [("5", "320"), ("20", "1280"), ("40", "2560")], grown.stdout
    then, now, plain = (tinylm("look", "layers", run, "--text", "the boat", *at).stdout
                        for at in (("--at", 5), ("--at", 40), ()))
    said = f"after step 40 of {run}"
    assert now.split() == [*plain.split(), *said.split()]
    assert then.split()[:-5] != plain.split()
    assert tinylm("verify", run).returncode == 0
    for wrong, words in ((("--at", 6), "[5, 20, 40], not 6"), (("--at", -1), "at=-1")):
        done = tinylm("look", "layers", run, *wrong)
        assert done.returncode == 2 and words in done.stderr
    assert "keep=41" in tinylm(*command[:-2], 41).stderr
    other = tinylm(*command[:-2], 7)
    assert other.returncode == 2 and "(5, 20), not (7,)" in other.stderr


def test_a_tuned_lens_is_fitted_once_read_by_look_and_only_with_its_own_run(trained, tmp_path):
    folder, _, record = trained
    command = ("lens", folder / "run", "--out", tmp_path / "lens", "--steps", 3)
    first, again = tinylm(*command), tinylm(*command)
    assert first.returncode == again.returncode == 0 and first.stdout == again.stdout
    assert "by the tuned one" in first.stdout
    look = ("look", "layers", folder / "run", "--text", "the boat", "--lens", tmp_path / "lens")
    assert tinylm(*look).returncode == 0
    other = tinylm("lens", folder / "run", "--out", tmp_path / "lens", "--steps", 4)
    assert other.returncode == 2 and "holds something else" in other.stderr
    taken = tinylm("lens", folder / "run", "--out", folder / "run")
    assert taken.returncode == 2 and "holds no tuned lens" in taken.stderr
    gone = tinylm("look", "growth", tmp_path / "gone")
    assert gone.returncode == 2 and "gone is no folder; give" in gone.stderr
    facts = files.verified(tmp_path / "lens")
    assert facts["of"] == record["id"]
    with pytest.raises(BadInput, match="no tuned lens of run x"):
        load_lens(tmp_path / "lens", "x")
    maps = tmp_path / "lens/maps.npz"
    maps.write_bytes(maps.read_bytes()[:-1] + b"x")
    broken = tinylm(*look)
    assert broken.returncode == 2 and "maps.npz" in broken.stderr


@pytest.mark.parametrize("args, words", [
    (("tokens", "--out", "t.png"), "tokens cannot be written so"),
    (("heads", "--out", "t.gif"), "give .html or .svg, or .png"),
    (("heads", "--lens", "l"), "it is for layers"),
    (("tokens", "--pair", 0, 0), "--pair with tokens: it is for attention"),
    (("layers", "--at", 5, "--lens", "l"), "a lens is of the last step"),
    (("growth", "--text", "x"), "--text with growth: it is for tokens, next"),
    (("next", "--prepared", "gone"), "give the run's prepared folder with --text (look and lens"),
    (("next", "--out", ""), "--out is empty"),
    (("attention", "--layer", 9, "--head", 1), "layer=9"),
    (("attention", "--layer", 1), "give both from 1, or neither"),
    (("attention", "--pair", 0, 1), "is not two token numbers"),
    (("layers", "--text", "long " * 99), "give a transformer 1 to 32 tokens"),
    (("next", "--text", "long " * 99), "give 1 to 32"), (("next", "--k", 0), "k=0")])
def test_a_view_that_cannot_be_is_refused_in_a_line(trained, args, words):
    folder, _, _ = trained
    done = tinylm("look", args[0], folder / "run", *args[1:])
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_server_without_a_place_for_rankings_does_not_start(trained):
    folder, _, _ = trained
    done = tinylm("serve", folder / "run", "--port", 0, "--rankings", folder)
    assert done.returncode == 2 and "is no file" in done.stderr


def test_no_text_is_looked_at_as_any_other(trained):
    folder, _, _ = trained
    for view, said in (("tokens", "0 characters, 0 bytes, 0 tokens"), ("next", "after “”"),
                       ("attention", "<|bos|>")):
        done = tinylm("look", view, folder / "run", "--text", "")
        assert done.returncode == 0 and said in done.stdout, done.stderr


def test_a_message_that_does_not_fit_is_refused_and_the_talk_goes_on(trained):
    folder, _, _ = trained
    talk = tinylm("chat", folder / "run", said="long " * 99 + "\nhello\n\n")
    assert talk.returncode == 0 and len(talk.stdout.strip()) > 4
    assert "error: " in talk.stderr and "fit the context T=32" in talk.stderr


def test_a_finished_run_can_be_sampled_and_measured_again(trained):
    folder, _, record = trained
    assert tinylm("sample", folder / "run", "--prompt", "Ba", "--count", 9).returncode == 0
    loss = last(tinylm("eval", folder / "run", "--json"))
    assert loss["nats_per_token"] == record["loss"]["nats_per_token"]


def test_a_sweep_that_cannot_be_fed_is_refused_before_anything_is_written(trained):
    folder, _, _ = trained
    common = ("sweep", "--out", folder / "sweep", "--text", folder / "run/text", "--widths", 8, 12,
              16, 20, 24, "--model.V", 128, "--model.T", 32, "--batch", 128, "--spread", 30)
    for flags, words in ((("--budgets", 1e12), "epochs"), (("--budgets",), "budgets"),
                         (("--budgets", 1e8, "--rule.lr0", -1), "lr0=-1")):
        done = tinylm(*common, *flags)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert not (folder / "sweep/runs").exists()


def test_an_impossible_place_is_bad_input(trained):
    folder, command, _ = trained
    for place in (folder / "run/config.json", folder / ("x" * 300)):
        done = tinylm(command[0], "--out", place, *command[3:])
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: [Errno "), done.stderr


@pytest.mark.parametrize(("flags", "words"), [
    (("--model.D", "100", "--model.H", "8"), "D=100 is not a multiple of H=8"),
    (("--batch", "100"), "batch=100 tokens is not a multiple of the context"),
    (("--model.depth", "3"), "--model.depth"),
    (("--steps", "many"), "steps"),
    (("--corpus", "nowhere.txt"), "nowhere.txt"),
    (("--text",), "--text"),
])
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(tmp_path, flags, words):
    done = tinylm("train", "--out", tmp_path / "run", *flags)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not (tmp_path / "run/config.json").exists()


def test_a_mistake_and_help_answer_before_jax_is_imported():
    began = time.monotonic()
    helped, wrong = process("--help"), process("trian", "--out", "here")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "sft" in wrong.stderr
    assert helped.returncode == 0 and time.monotonic() - began < 20
    for name, place in verbs.VERBS.items():
        tree = ast.parse((ROOT / f"tinylm/verbs/{place.split('.')[0]}.py").read_text())
        found = {n.name: ast.get_docstring(n) for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert found[place.split(".")[1]].split()[:3] == helped.stdout.split(f"• {name} ")[1].split(
            )[:3]
    code = ("import sys; from tinylm.verbs import load; "
            "print([load(name) and 'jax' in sys.modules for name in sys.argv[1:]])")
    done = subprocess.run([sys.executable, "-c", code, "fit", "check", "verify", "bench", "train"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[False, False, False, False, True]\n", done.stderr


def test_a_mistake_is_named_whatever_the_terminal_can_draw():
    for encoding in ("ascii", "utf-8"):
        done = process("--widths", PYTHONIOENCODING=encoding)
        assert done.returncode == 2 and "--widths" in done.stderr, encoding
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")


def test_a_run_goes_on_with_the_devices_that_it_was_begun_with(trained):
    _, command, record = trained
    done = tinylm(*command, "--devices", record["plan"]["devices"] + 1)
    assert done.returncode == 2 and "go on without --devices" in done.stderr
    assert tinylm(*command, "--devices", record["plan"]["devices"]).returncode == 0


def test_no_text_ends_a_program_for_its_encoding():
    code = ("from tinylm.__main__ import guarded\n"
            "guarded(lambda: print('\u65e5', ascii(input('\u00e9'))))")
    done = subprocess.run([sys.executable, "-c", code], input=b"a\xff\n", capture_output=True,
                          cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.stdout.split() == [rb"\xe9\u65e5", rb"'a\ufffd'"] and not done.stderr


def test_a_platform_that_jax_does_not_know_is_named(capsys):
    def start():
        raise RuntimeError("Unable to initialize backend 'bogus': not in the list of known ones")

    assert __main__.guarded(start) == 2
    assert capsys.readouterr().err.startswith("error: JAX does not start here: Unable to init")


def test_another_config_in_the_folder_of_a_run_is_refused_with_the_difference(trained):
    _, command, _ = trained
    done = tinylm(*command[:-1], 5)
    assert done.returncode == 2
    assert "config.seed=0, this is config.seed=5" in done.stderr


def test_verify_gives_the_hashes_of_what_runs_came_to(trained, tuned):
    folder, _, record = trained
    found = last(tinylm("verify", folder, "--json"))["runs"]
    base, chat = (found[str(folder / name)] for name in ("run", "chat"))
    assert base["metrics_sha256"] == record["files"]["metrics.jsonl"]
    assert len(base["params_sha256"]) == 64 and base["params_sha256"] != chat["params_sha256"]
    assert last(tinylm("verify", folder / "run", "--json"))["runs"] == {str(folder / "run"): base}


def test_a_recorded_loss_is_made_again_or_the_difference_is_named(trained, tuned):
    folder, _, record = trained
    for name in ("run", "chat"):
        again = tinylm("replay", folder / name)
        assert again.returncode == 0 and "equal" in again.stdout, again.stdout + again.stderr
    from tinylm import files
    copy = folder / "other"
    shutil.copytree(folder / "run", copy, ignore=shutil.ignore_patterns("text"))
    loss = {**record["loss"], "nats_per_token": 1.5}
    files.write_json(copy / "record.json", {**record, "code_id": "old", "loss": loss})
    wrong = tinylm("replay", copy, "--text", folder / "run/text", "--json")
    said = json.loads(wrong.stdout.splitlines()[-1])
    assert wrong.returncode == 1 and list(said["differs"]) == ["nats_per_token"]
    assert said["facts"]["code_id"][0] == "old"
    shutil.rmtree(copy)
    assert tinylm("replay", folder / "none").returncode == 2
    odd = tinylm("replay", folder / "run/config.json")
    assert odd.returncode == 2 and "cannot be made again" in odd.stderr


def test_verify_names_a_flipped_bit_and_an_edited_record(trained, tuned):
    folder, _, _ = trained
    assert last(tinylm("verify", folder, "--json"))["bad"] == []
    array = max((folder / "run/checkpoints").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)
    found = tinylm("verify", folder)
    assert found.returncode == 1 and array.name in found.stdout
    refused = tinylm("sample", folder / "run", "--prompt", "Ba")
    assert refused.returncode == 2 and array.name in refused.stderr
    note = folder / "chat/record.json"
    note.write_text(note.read_text().replace('"status": "ok"', '"status": "OK"'))
    assert str(note) in tinylm("verify", folder).stdout


def test_a_csv_is_fitted_from_the_command_line_or_refused_with_exit_code_2(tmp_path):
    rows = [(n, d, 1.8 + 480 * n**-0.35 + 2100 * d**-0.37)
            for n in (1e7, 3e7, 1e8) for d in (1e9, 4e9, 2e10)]
    (tmp_path / "runs.csv").write_text("n,d,l\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    flags = ("fit", tmp_path / "runs.csv", "--params-col", "n", "--tokens-col", "d", "--json")
    out = last(tinylm(*flags, "--loss-col", "l", "--objective", "ls"))
    assert out["law"]["alpha"] == pytest.approx(0.35, abs=1e-4)
    done = tinylm(*flags, "--loss-col", "nll")
    assert done.returncode == 2 and done.stdout == ""
    assert "runs.csv has no column 'nll'; it has n, d, l" in done.stderr


def test_a_plan_names_its_runs_their_precision_and_cost():
    made = last(tinylm("plan", "--flops", "1e15", "--device", "H100", "--dollars-per-hour", 2,
                       "--json"))
    assert len(made["cells"]) == 35 and made["expected"]["form_risk"] > made["expected"]["stderr"]
    assert made["run"]["dollars"] == 2 * made["run"]["device_hours"] > 0
    refused = tinylm("plan", "--flops", "1e15", "--device", "abacus")
    assert refused.returncode == 2 and "choose one of V100, A100" in refused.stderr


@pytest.mark.parametrize("fault", [
    MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")])
def test_memory_that_runs_out_is_one_line(fault, capsys):
    def runs_out():
        raise fault

    assert __main__.guarded(runs_out) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "emory" in said and "needs less" in said
