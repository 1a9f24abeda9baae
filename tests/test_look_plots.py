"""Figures and what they stand on: crossings, captured attention, a notebook run offline."""

import json
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import matplotlib.colors
import numpy as np
import pytest
from test_look_report import GAMMA, A, whole  # noqa: F401
from test_model_decoder import drawn, forward

from tinylm import files
from tinylm.config import BadInput
from tinylm.laws import intervals
from tinylm.laws.runs import Runs
from tinylm.look import notebook, plots
from tinylm.look.study import Study
from tinylm.model.capture import capture
from tinylm.model.decoder import ModelConfig

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "notebooks/study.py"


@pytest.fixture(scope="module")
def study(whole):  # noqa: F811
    return Study(whole)


def labelled(figure, label):
    """The artist that a legend names."""
    return next(a for a in figure.axes[0].get_children() if a.get_label() == label)


def test_a_crossing_s_compute_equals_the_closed_form(study):
    for level in study.levels():
        for flops in level.flops.values():
            assert flops == pytest.approx((A / level.nats) ** (1 / GAMMA), rel=1e-9)


def test_the_loss_axis_marks_each_crossing_at_its_compute(study):
    marks = plots.loss_axis(study).axes[0].collections
    points = [point for mark in marks for point in np.ma.getdata(mark.get_offsets()).tolist()]
    assert any(np.allclose(q, ((A / 4.6) ** (1 / GAMMA), 0.7 * 4.6)) for q in points)


def test_tables_of_another_evaluation_are_kept_off_the_loss_axis(tmp_path):
    files.write_json(tmp_path / "law.json", {"eval_id": "one"})
    files.write_json(tmp_path / "baselines.json", {"eval_id": "other", "tables": {}})
    with pytest.raises(BadInput, match="different sets"):
        Study(tmp_path).levels()


@pytest.mark.parametrize("draw", [plots.loss_axis, plots.isoflops, plots.frontier])
def test_a_figure_is_the_same_text_every_time(study, draw):
    text = plots.svg(draw(study))
    assert text == plots.svg(draw(study))
    assert "http" not in text and "<metadata" not in text


def test_a_refused_minimum_is_drawn_hollow(study, tmp_path):
    found = study.part("law.json")
    found["minima"][0]["bracketed"] = False
    other = Study(tmp_path)
    os.symlink(study.folder / "sweep", tmp_path / "sweep")
    files.write_json(tmp_path / "law.json", found)
    stars = [c for c in plots.isoflops(other).axes[0].collections if len(c.get_offsets()) == 1]
    assert [len(c.get_facecolor()) for c in stars] == [0, 1, 1]


def test_the_parabolas_pass_through_their_minima(study):
    lines = plots.isoflops(study).axes[0].lines
    for line, m in zip(lines, study.part("law.json")["minima"], strict=True):
        assert min(line.get_ydata()) == pytest.approx(m["loss"], abs=1e-3)


def test_a_diverged_rate_is_left_out_of_its_curve(tmp_path):
    files.write_json(tmp_path / "tuning.json", {"sizes": [
        {"width": 8, "steps": 9, "rates": [1e-3, 2e-3, 4e-3], "losses": [4.2, 4.1, None],
         "best": 2e-3, "at_edge": False}]})
    figure = plots.rates(Study(tmp_path))
    np.testing.assert_allclose(labelled(figure, "width 8, 9 steps").get_ydata(), [0.1, 0])
    assert "1 sizes, 0 by more than a seed" in figure.axes[0].get_title("left")


def test_tokens_that_look_like_markup_or_formulas_are_drawn_as_they_are():
    words = ["$x$", "</svg>", "\\1", "字", "a"]
    text = plots.svg(plots.attention(np.eye(5), words, "“$y$” & </svg> \\1"))
    assert text.count("</svg>") == 1 and "&lt;/svg&gt;" in text
    assert "$x$" in text and ">“$y$” " in text


def test_the_palette_is_told_apart_by_lightness_and_hue():
    colours = [plots.BLACK, plots.ORANGE, plots.SKY, plots.GREEN, plots.BLUE, plots.RED,
               plots.PURPLE]
    rgb = np.array([matplotlib.colors.to_rgb(c) for c in colours])
    apart = np.abs(rgb[:, None] - rgb[None]).sum(-1)[np.triu_indices(len(rgb), 1)]
    assert apart.min() > 0.3


@pytest.mark.parametrize("groups", [1, 2])
def test_a_captured_pass_equals_the_plain_one(groups):
    config = ModelConfig(V=50, D=16, L=2, H=2, G=groups, T=24)
    params = drawn(config)
    tokens = np.asarray(jax.random.randint(jax.random.key(3), (20,), 6, config.V))
    inside = capture(config, params, tokens)
    plain = forward(config, params, jnp.asarray(tokens)[None])[0]
    np.testing.assert_allclose(inside.logits, plain, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_captured_queries_and_keys_give_the_captured_weights(groups):
    config = ModelConfig(V=50, D=16, L=2, H=2, G=groups, T=24)
    tokens = np.asarray(jax.random.randint(jax.random.key(3), (20,), 6, config.V))
    inside = capture(config, drawn(config), tokens)
    for head in range(2):
        k = np.asarray(inside.k[:, head * groups // 2], np.float64)
        scores = np.einsum("ltk,lsk->lts", inside.q[:, :, head], k) / np.sqrt(config.head_width)
        scores = np.where(np.tri(20, dtype=bool), scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(inside.weights[:, head], weights, atol=1e-5)


def test_a_text_longer_than_the_context_is_not_captured():
    config = ModelConfig(V=50, D=16, T=8)
    with pytest.raises(BadInput, match="9 tokens .* T=8"):
        capture(config, {}, np.zeros(9, int))


def test_the_notebook_draws_every_figure_of_a_study(study, monkeypatch, capsys):
    pytest.importorskip("IPython")
    monkeypatch.setenv("TINYLM_STUDY", str(study.folder))
    runpy.run_path(str(SOURCE))
    said = capsys.readouterr().out
    assert said.count("Image object") == 3 and "not drawn: tuning.json is missing" in said


def test_the_notebook_of_alignment_shows_its_stages_or_says_what_is_missing(
        tmp_path, monkeypatch, capsys):
    pytest.importorskip("IPython")
    monkeypatch.setenv("TINYLM_STUDY", str(tmp_path))
    runpy.run_path(str(ROOT / "notebooks/alignment.py"))
    said = capsys.readouterr().out
    assert "asked its models no tasks" in said and said.count("not drawn: ") == 2
    monkeypatch.delenv("TINYLM_STUDY")
    runpy.run_path(str(ROOT / "notebooks/alignment.py"))
    said = capsys.readouterr().out
    assert said.count("Image object") == 3 and "sentences that win" in said


def test_the_notebook_of_published_laws_skips_in_words_what_is_not_there(
        tmp_path, monkeypatch, capsys):
    pytest.importorskip("IPython")
    monkeypatch.delenv("TINYLM_PUBLISHED", raising=False)
    script = ROOT / "notebooks/published_laws.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path / "drawn")])
    runpy.run_path(str(script))
    said = capsys.readouterr().out
    for name in ("chinchilla_epoch.csv", "llama3_isoflop.csv", "marin_isoflop.csv"):
        assert f"skipped: {name} is not in a folder named by --published" in said
    assert [p.name for p in (tmp_path / "drawn").iterdir()] == ["coverage.png"]


def test_figures_of_anybodys_runs_show_their_numbers():
    runs = Runs(np.array([1e6, 2e6]), np.array([2e7, 8e7]), np.array([1.2e14, 9.6e14]),
                np.array([3.0, 2.5]))
    left = plots.residuals(runs, SimpleNamespace(residuals=np.log([1.02, 0.99])), "left")
    dots = labelled(left, "2 runs")
    np.testing.assert_allclose(dots.get_offsets(), [(1.2e14, 2.0), (9.6e14, -1.0)])
    np.testing.assert_allclose(dots.get_array(), np.log10([20, 40]))
    found = [SimpleNamespace(flops=f, loss=x) for f, x in ((1e14, 3.0), (1e15, 2.5), (1e16, 2.0))]
    made = [SimpleNamespace(target_flops=f, predicted=p, low=p - 0.1, high=p + 0.1, naive=p)
            for f, p in ((1e15, 2.55), (1e16, 2.2))]
    title = plots.ahead(found, made).axes[0].get_title("left")
    assert title == "1 of 2 later minima lie inside; mean error 6.00%"
    shown = plots.coverage(intervals.shipped()).axes[0]
    widths = [bar.get_width() for bar in shown.patches[:8]]
    assert widths == [s["coverage"] for s in intervals.shipped()["studies"].values()]


def test_over_optimisation_is_drawn_as_means_over_seeds_a_panel_a_way_and_number_of_pairs():
    rows = [{"way": way, "pairs": pairs, "params": 1000 * size, "seed": seed, "turns": turn,
             "kl_nats": float(turn**2), "gold": 10.0 * size + seed, "proxy": 7.0 + turn}
            for way in ("best_of_n", "grpo") for pairs in (8, 16) for size in (1, 2)
            for seed in (0, 2) for turn in (0, 1, 2)]
    panels = plots.overoptimised(rows).axes
    assert [ax.get_title("left") for ax in panels] == [
        "best_of_n, 8 pairs", "best_of_n, 16 pairs", "grpo, 8 pairs", "grpo, 16 pairs"]
    gold, proxy = panels[3].lines[2:]
    np.testing.assert_allclose(gold.get_xydata(), [(0, 21), (1, 21), (2, 21)])
    np.testing.assert_allclose(proxy.get_xydata(), [(0, 0), (1, 1), (2, 2)])


def test_a_notebook_runs_on_this_interpreter_whatever_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("jupytext")
    files.write_json(tmp_path / "share/kernels/python3/kernel.json", {
        "argv": ["false"], "display_name": "not ours", "language": "python"})
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "own"))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, "/dev/null/nowhere")
    source = tmp_path / "small.py"
    files.write_text(source, "# %% [markdown]\n# words\n\n# %%\nimport os, sys\n"
                             "print(sys.executable, os.environ['TINYLM_STUDY'])\n")
    place = notebook.execute(source, tmp_path)
    cells = json.loads(place.read_text())["cells"]
    assert cells[1]["outputs"][0]["text"] == [f"{sys.executable} {tmp_path}\n"]
    assert not (tmp_path / "own").exists(), "the kernel wrote into the user's folder"


def test_without_the_notebooks_extra_the_reason_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jupytext", None)
    assert notebook.execute(SOURCE, tmp_path) is None
    said = capsys.readouterr().err
    assert "jupytext is not installed" in said and "'tinylm[notebooks]'" in said


def test_the_readmes_figure_is_drawn_from_the_records_beside_it():
    place = ROOT / "experiments/results/laptop"
    kept = (place / "loss_axis.svg").read_text()
    assert ElementTree.fromstring(kept).tag == "{http://www.w3.org/2000/svg}svg"
    drawn, number = plots.standalone(plots.loss_axis(Study(place))), re.compile(r"\d+\.\d+")
    assert number.sub("", drawn) == number.sub("", kept)
    np.testing.assert_allclose([float(n) for n in number.findall(drawn)],
                               [float(n) for n in number.findall(kept)], atol=0.5)
