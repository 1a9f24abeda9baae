"""The report: what it says of a study with known numbers, and what it says of missing ones."""

import concurrent.futures
import html.parser
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_stages_pretrain import story

from tinylm import files
from tinylm.config import to_json
from tinylm.evaluate.heldout import eval_id
from tinylm.laws import forecast, intervals, isoflop
from tinylm.look import notebook, report
from tinylm.look.study import Study
from tinylm.model.decoder import ModelConfig, init
from tinylm.sweep import law
from tinylm.text import corpora, prepare
from tinylm.train import checkpoint, loop
from tinylm.train.step import State

A, GAMMA, GROWTH = 20.0, 0.07, 0.45
HOSTILE = "<script>alert('x')</script> & \"quoted\" \\1 $"


def planted(params: float, flops: float) -> float:
    """A power law along the best sizes, and a parabola across them."""
    off = np.log(params) - GROWTH * np.log(flops / 1e9) - np.log(3e3)
    return float(A * flops**-GAMMA + 0.1 * off**2)


def record(name: str, params: float, flops: float, model: ModelConfig, test: str, **changes):
    """A finished run's record with a planted loss."""
    loss = planted(params, flops)
    scored = {"nats_per_token": loss, "bits_per_byte": 0.7 * loss, "stderr": 0.01,
              "parts": {"all": 0.7 * loss}, "tokens": 1000}
    return {"schema": 1, "id": name, "kind": "pretrain", "status": "ok", "code_id": "code",
            "config": {"model": to_json(model), "optim": {"lr": 1e-3}, "forecast_sha256": ""},
            "versions": {"python": "3"}, "plan": {"devices": 1}, "data_id": "d",
            "tokenizer_id": "t", "eval_id": test, "params": {"embedding": 0, "head": 100,
            "blocks": round(params) - 100}, "tokens": round(flops / 6 / params), "epochs": 0.5,
            "loss": scored, "flops": {"exact": flops, "six_nd": flops}, **changes}


def fake(folder) -> None:
    """Write a whole study whose law is known and whose target is an untrained model."""
    for n in range(24):
        files.write_text(folder / f"raw/{n:02d}.txt", story(n, 12))
    corpus = corpora.load(sorted(map(str, (folder / "raw").glob("*.txt"))))
    data, _ = prepare.prepare(folder / "text", corpus, 96)
    model = ModelConfig(V=96, D=16, L=2, H=2, T=32)
    test, sizes = eval_id(data, model.T), (0.4, 0.7, 1.0, 1.5, 2.5)
    records = [record(f"run{b}{s}", 3e3 * (b**GROWTH) * size, b * 1e9, model, test)
               for b in (1, 2, 4) for s, size in enumerate(sizes)]
    for r in records:
        files.write_json(folder / f"sweep/{r['id']}/record.json", r)
    runs, ids, _ = law.runs_of(records)
    found, power = isoflop.minima(runs), {"E": 0.0, "A": A, "gamma": GAMMA}
    certificate = {"starts": 8, "agree_share": 0.87, "moved": 0.1, "gradient_norm": 1e-11,
                   "condition": 5.0, "at_bound": []}
    files.write_json(folder / "law.json", {
        "eval_id": test, "bits_per_nat": 0.7, "minima": [m._asdict() for m in found],
        "exponents": isoflop.exponents(found)._asdict(), "frontier": power,
        "conventions": {"blocks 6nd": {"a": 0.61, "a_se": 0.02, "b": 0.39, "b_se": 0.01}},
        "comparison": {"laws": [
            {"form": "kaplan", "cuts": 2, "forecasts": 3, "mean_percent": 0.5,
             "worst_percent": 1.25, "bias_percent": -0.3},
            {"form": "coupled", "refused": "below 1e9 FLOPs: too few runs"}]},
        "frontier_floor": {**power, "certificate": certificate},
        "surface": {"refused": "no surface here"}})
    tables = {str(n): {"nats_per_token": x, "bits_per_byte": 0.7 * x, "stderr": 0.02}
              for n, x in enumerate((5.5, 4.6, 4.2, 3.9), 1)}
    files.write_json(folder / "baselines.json", {"eval_id": test, "tables": tables})
    sha = forecast.write(folder / "forecast.json", forecast.Forecast(
        2, "tiny", 2e10, 3e3 * 20**GROWTH, 1e6, 3.8, 3.7, 3.9, {"a law": 3.8}, {"a law": 1.0},
        "a rule", {}, "such intervals held 7 of 9", "no rates < compared", 3.7,
        tuple(zip(ids, map(float, runs.loss), strict=True)), test))
    target = record("target", 3e3 * 20**GROWTH, 2e10, model, test)
    target["config"]["forecast_sha256"] = sha
    files.write_json(folder / "target/record.json", target)
    with loop.Clock(folder / "target") as clock, clock.doing("input"):
        pass
    params = init(model, jax.random.key(0))
    checkpoint.save(folder / "target/checkpoints", State(params, {}, {}, np.int32(1)))
    files.write_json(folder / "score.json",
                     forecast.check(folder / "forecast.json", target)._asdict())
    files.write_json(folder / "chat/record.json", {
        **record("chat", 3e3, 1e8, model, test, kind="sft"),
        "answers_nats_per_token": {"before": 5.0, "after": 4.0}})
    files.write_json(folder / "growth.json", {"rows": [
        {"run": f"r{n}", "FLOPs": 10.0 ** (9 + n), "bits_per_byte": 3.0 - n, "previous": 0.3,
         "first": 0.2, "induction": 0.1 + n / 8, "gain": 0.42 * n,
         **{key: [{"at_most": at, "tokens": 8, "nats": 4.0 - n} for at in (1, 2, 4)]
            for key in ("by_position", "by_frequency")}} for n in (0, 1)]})
    files.write_json(folder / "samples.json", {"samples": [
        {"model": m, "prompt": "Hello", "text": HOSTILE, "tokens": 3, "ended": m == "chat"}
        for m in ("base", "chat")]})


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look") / "study"
    fake(folder)
    return folder


@pytest.fixture()
def study(whole, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(whole, tmp_path / "study")


@pytest.fixture(scope="session")
def page(whole):
    return report.write(whole).read_text()


def change(path, **values):
    files.write_json(path, {**files.read_json(path), **values})


class Reader(html.parser.HTMLParser):
    """Collect tags, attributes and text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_names_no_address_on_the_web_and_needs_no_script(page):
    read = Reader(page)
    assert not re.search(r"https?:|//www|@import|url\((?!#)", page)
    assert all(link.startswith(("#", "data:image/png")) for link in read.links)
    assert not {"script", "link", "iframe", "object"} & set(read.tags)


def test_the_report_says_forecast_outcome_and_interval(page, whole):
    s = files.read_json(whole / "score.json")
    top = re.search('<p class="big">(.*?)</p>', page)[1]
    for words in (f"Forecast {s['predicted']:.4f} nats", f"measured {s['measured']:.4f}",
                  f"by {s['error_percent']:+.2f}%", "inside its interval, 3.7000 to 3.9000"):
        assert words in top
    assert "such intervals held 7 of 9" in page and "Warning: no rates &lt; compared." in page
    assert s["forecast_sha256"] in page and f"FLOPs^{GROWTH:.3f}" in page
    assert "No warnings" not in page and "Not shown" not in page


def test_hostile_sample_text_is_escaped(page):
    assert "<script" not in page
    assert sum(HOSTILE in text for text in Reader(page).words) == 2


def test_every_figure_has_a_label_that_states_its_finding(page):
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert len(labels) == 6
    assert any("beats the 4-gram table" in label for label in labels)
    assert "Gain on a repeat: +0.42 nats at most" in labels
    assert any(f"Best size grows as FLOPs^{GROWTH:.2f}" in label for label in labels)


def test_crossings_are_placed_inside_and_beyond_the_sweep(page):
    assert re.search(r"<td>2-gram</td>.*?\(inside the sweep\)", page)
    assert re.search(rf"<td>4-gram</td>.*?\(beyond it, {(A / 3.9) ** (1 / GAMMA) / 2e10:.3g}×\)",
                     page)


def test_what_ten_times_the_compute_buys_is_the_law_s(page):
    gain = planted(3e3 * 20**GROWTH, 2e10) * (1 - 10**-GAMMA)
    assert f"<td>{gain:.4f}</td><td>{0.7 * gain:.4f}</td><td>{1 - 10**-GAMMA:.2%}</td>" in page


def test_a_worked_attention_weight_is_the_model_s_own(page):
    found = re.search(r"is the weight ([\d.]+) \(the model computed ([\d.]+)\)", page)
    assert found[1] == found[2]


def test_a_refused_law_is_said_not_raised(study):
    refused = {"refused": "2 budgets are too few"}
    change(study / "law.json", frontier=refused, frontier_floor=refused, exponents=refused,
           surface=refused)
    page = report.write(study).read_text()
    assert "no fit of exponents: 2 budgets are too few" in page.lower()
    assert "Forecast and outcome" in page and "How this was measured" in page


def test_the_laws_are_compared_and_how_far_to_believe_them_is_shown(page):
    assert "<td>a law</td><td>100.0%</td><td>3.8000</td><td>" in page
    assert "<td>kaplan</td><td>0.50%</td><td>1.25%</td><td>-0.30%</td><td>3 from 2</td>" in page
    assert "<td>coupled</td><td>below 1e9 FLOPs: too few runs</td>" in page
    assert "<td>blocks 6nd</td><td>0.610</td><td>0.020</td>" in page
    assert "<td>frontier with floor</td><td>87% of 8</td>" in page
    assert f"{intervals.shipped()['coverage']:.0%} held on average" in page


def test_the_table_of_stages_is_shown_where_a_study_made_one(study):
    assert "made no table of instruction tasks" in report.write(study).read_text()
    share = {"rate": 0.5, "low95": 0.4, "high95": 0.6}
    rates = ("micro", "stops", "leaks", "truncated", "repeats", "obeyed", "rules_and_answers",
             "wins")
    row = {"exact": {"copy": share}, "macro": 0.25, "bits_per_byte": 1.5, "kl_nats": 2.0,
           "entropy_nats": 3.0, "length_tokens": 4.0, "grade": 2.5,
           **dict.fromkeys(rates, share)}
    files.write_json(study / "alignment.json", {"runs": {"a/chat": row, "a/policy": row}})
    page = report.write(study).read_text()
    assert "<th>chat</th><th>policy</th>" in page
    assert "<td>exact: copy</td><td>50.0% [40%, 60%]</td>" in page and "<td>25.0%</td>" in page


def test_a_law_with_a_floor_above_a_table_never_crosses_it(study):
    change(study / "law.json", frontier_floor={"E": 4.0, "A": 5.0, "gamma": 0.1})
    assert re.search(r"<td>4-gram</td>.*?<td>not crossed</td>", report.write(study).read_text())


@pytest.mark.parametrize("name", ["score.json", "law.json", "text", "target", "sweep"])
def test_a_missing_part_is_said_without_the_folder_s_path(study, name):
    place = study / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    page = report.write(study).read_text()
    assert "Not shown" in page and str(study) not in page


def test_an_empty_folder_gives_a_report_of_what_is_missing(tmp_path):
    page = report.write(tmp_path).read_text()
    for part in ("score.json", "law.json", "samples.json", "the target run has no record"):
        assert part in page
    assert str(tmp_path) not in page


def test_warnings_come_first_and_name_what_is_wrong(study):
    found = files.read_json(study / "law.json")
    found["minima"][0].update(bracketed=False, reason="add smaller models")
    files.write_json(study / "law.json", found)
    change(study / "sweep/run10/record.json", status="diverged", loss=None)
    change(study / "sweep/run11/record.json", code_id="other", epochs=2.5)
    files.write_json(study / "sweep/lost/failure.json", {"reason": "out of memory"})
    files.write_json(study / "tuning.json", {"sizes": [
        {"width": 8, "steps": 9, "rates": [1e-3, 2e-3, 4e-3], "losses": [4.2, 4.1, None],
         "best": 4e-3, "at_edge": True}]})
    page = report.write(study).read_text()
    warned = page[: page.index("Forecast 3.")]
    for words in ("at width 8", "add smaller models", "run10 ended as diverged", "2.50 times",
                  "2 versions of the code", "lost failed: out of memory"):
        assert words in warned
    assert "1 of 1 sizes, 1 by more than a seed" in page and "refused minima: 1 (hollow)" in page


def test_an_edge_that_the_forecast_warns_of_is_said_once(study):
    edge = {"width": 8, "rates": [1e-3, 2e-3], "losses": [4.2, 4.1], "best": 2e-3, "at_edge": True}
    files.write_json(study / "tuning.json", {"sizes": [edge]})
    change(study / "forecast.json", warning=law.tuning_gate([edge]))
    said = report.warnings(Study(study))
    assert said.count("edge") == 1 and "at width 8" in said


def test_the_report_says_where_the_time_went(study):
    row = {"first_step": 0, "last_step": 9, "compile_seconds": 2.0, "start_seconds": 1.0,
           "input_seconds": 0.5, "compute_seconds": 3.5, "sample_seconds": 1.0, "save_seconds": 1.5,
           "evaluate_seconds": 0.5, "wall_seconds": 10.0}
    for name in ("run10.4", "run10.7"):
        files.append_row(study / f"sweep/{name}/timing.jsonl", row)
    files.append_row(study / "sweep/workers.jsonl", {"workers": 2, "wall_seconds": 12.5})
    found = re.findall(r"<td[^>]*>([^<]*)</td>", report.times(Study(study)))
    assert found[found.index("sweep"):][:10] == [
        "sweep", "25", "28.0%", "8.0%", "16.0%", "20.0%", "8.0%", "4.0%", "12.0%", "4.0%"]


def test_a_bound_is_shown_and_no_minimum_is_spoken_of_where_none_was_used(study):
    change(study / "forecast.json", warning="", laws={"best_runs": 3.8}, weights={"best_runs": 1.0})
    change(study / "law.json", surface={"E": 1.5, "objective": 1.0, "certificate": {
        "starts": 8, "agree_share": 1.0, "moved": 0.1, "gradient_norm": 0.0, "condition": 9.0,
        "at_bound": ["E"]}})
    page = report.write(study).read_text()
    assert "No warnings in 17 records." in page and "E = 1.5, AT ITS LIMIT: E" in page
    assert "through the best runs of the last two budgets" in page


def test_a_signal_while_a_notebook_runs_ends_its_kernel_and_is_told_as_one(monkeypatch):
    def interrupted(future):
        raise KeyboardInterrupt

    async def waited(env):
        kernel.wait()

    monkeypatch.setattr(concurrent.futures.Future, "result", interrupted)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as kernel:
        client = SimpleNamespace(async_execute=waited, _cleanup_kernel=print)
        with pytest.raises(KeyboardInterrupt):
            notebook._run(client, SimpleNamespace(provisioner=kernel), {})
        assert kernel.poll() == -signal.SIGKILL
