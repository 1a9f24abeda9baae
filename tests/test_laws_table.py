"""Anybody's CSV: what was dropped is said, laws are ranked by forecasts, nonsense is refused."""

import json
import math

import numpy as np
import pytest
from test_laws_forms import LAWS, planted

from tinylm.config import BadInput
from tinylm.laws.fit import fit_frontier
from tinylm.laws.forms import Coupled, Surface
from tinylm.laws.isoflop import minima
from tinylm.laws.runs import Runs
from tinylm.laws.table import cleaned, compare, fit_form, told
from tinylm.verbs import laws as verbs
from tinylm.verbs import plans

SURFACE, COUPLED = LAWS[0], LAWS[1]


def scattered(law, count: int = 60, noise: float = 0.0) -> Runs:
    """Runs of no two equal budgets."""
    rng = np.random.default_rng(0)
    params = np.exp(rng.uniform(math.log(1e7), math.log(1e9), count))
    tokens = params * np.exp(rng.uniform(math.log(3), math.log(300), count))
    loss = law.loss(params, tokens) * (1 + noise * rng.standard_normal(count))
    return Runs(params, tokens, 6 * params * tokens, loss)


def as_csv(path, runs: Runs, header: str = "size,data,err"):
    np.savetxt(path, np.stack([runs.params, runs.tokens, runs.loss], axis=1), "%.17g", ",",
               header=header, comments="")
    return path


def ranked(rows) -> dict[str, dict]:
    return {row["form"]: row for row in rows}


@pytest.mark.parametrize("runs", [planted(COUPLED), scattered(COUPLED)], ids=["grid", "scatter"])
def test_the_law_that_made_the_runs_ranks_first(runs):
    rows = compare(runs)
    surfaces = [row for row in rows if "frontier" not in row["form"] and "power" not in row["form"]]
    assert surfaces[0]["form"] == "coupled" and surfaces[0]["mean_percent"] < 0.1
    assert [row["mean_percent"] for row in rows] == sorted(row["mean_percent"] for row in rows)
    assert ranked(rows)["chinchilla"]["bias_percent"] > 0.1  # it errs high where they couple
    assert ("frontier" in ranked(rows)) == (len(runs.loss) == 35)
    assert len({row["forecasts"] for row in rows}) == 1


def test_forecasts_are_of_what_lies_above_the_cut_only():
    runs = planted(SURFACE)
    runs.loss[28:] *= 1.1  # the last budget is worse by a tenth than the rest say
    found = ranked(compare(runs))["chinchilla"]
    assert (found["cuts"], found["forecasts"]) == (2, 3)
    assert found["worst_percent"] == pytest.approx(100 - 100 / 1.1, abs=0.2)
    assert found["bias_percent"] == pytest.approx(-2 * found["worst_percent"] / 3, abs=0.2)


def test_laws_that_need_more_are_left_out_or_come_last_with_the_reason():
    runs = planted(SURFACE)
    assert not {"saturating", "data-constrained"} & set(ranked(compare(runs)))
    assert "saturating" in ranked(compare(runs, ceiling=7.0))
    unique = scattered(SURFACE)
    assert "data-constrained" in ranked(compare(unique._replace(unique=unique.tokens)))
    eight = ranked(compare(scattered(SURFACE, 9)))
    assert "fit" in eight["kaplan"].get("refused", "fit")
    last = compare(scattered(SURFACE, 9))[-1]
    assert "different runs cannot give a coupled's 6 numbers" in last["refused"]
    with pytest.raises(BadInput, match="all runs have one budget"):
        compare(runs.keep(slice(7)))


def test_frontiers_go_through_the_minima():
    runs = planted(SURFACE)
    floor, line = fit_form(runs, "frontier").law, fit_form(runs, "power-law").law
    assert line.E == 0 < floor.E
    assert floor.loss(1e21) == pytest.approx(SURFACE.optimum(1e21)[2], rel=0.01)
    assert line.loss(1e21) < floor.loss(1e21)
    last = minima(runs)[-4:]
    four = fit_frontier([m.flops for m in last], [m.loss for m in last], floor=False).law
    assert fit_form(runs, "power-law-last4").law == four != line
    below = runs.params < 1.01 * np.array([m.params for m in minima(runs)]).min()
    with pytest.raises(BadInput, match="have a bracketed minimum and frontier takes 3 or more"):
        fit_form(runs.keep(below), "frontier")


def test_a_fit_is_told_with_its_errors():
    fit = fit_form(scattered(SURFACE, noise=0.01), "chinchilla")
    out = told(fit, resamples=40)
    assert out["law"]["alpha"] == fit.law.alpha and "bootstrap" not in told(fit)
    alpha = out["bootstrap"]["constants"]["alpha"]
    assert alpha["low95"] < fit.law.alpha < alpha["high95"] and 0.001 < alpha["sd"] < 0.1
    assert json.loads(json.dumps(out))["runs"] == 60
    with pytest.raises(BadInput, match="resamples=2000000 is not within 1 to"):
        told(fit, resamples=2_000_000)
    with pytest.raises(BadInput, match="delta=0 is not within"):
        fit_form(scattered(SURFACE), "chinchilla", delta=0)
    with pytest.raises(BadInput, match="ceiling=1 is not within"):
        fit_form(scattered(SURFACE), "saturating", ceiling=1)


def test_what_is_dropped_is_said():
    runs = scattered(SURFACE)
    repeated = runs.keep([*range(60), 3, 3, 7])
    kept, said = cleaned(repeated, worst=2)
    worst = np.sort(runs.loss)[-2:]
    assert len(kept.loss) == 58 and kept.loss.max() < worst.min()
    assert said == ["dropped 3 rows that repeat an earlier row in every number",
                    f"dropped the 2 largest losses, {worst.min():.4g} nats and above"]
    assert cleaned(repeated)[1] == said[:1]
    with pytest.raises(BadInput, match="-1000 of 60 runs cannot be dropped"):
        cleaned(repeated, worst=-1000)


def test_nothing_is_ranked_where_every_law_is_refused():
    with pytest.raises(BadInput, match="no law can be compared here; "):
        compare(scattered(SURFACE, 2))


@pytest.mark.parametrize(("flags", "words"), [
    ({"compare": True, "form": "kaplan"}, "--form kaplan names one law"),
    ({"compare": True, "bootstrap": 9}, "--bootstrap 9 is for one law"),
    ({"form": "kaplan", "ceiling": 7.0}, "--ceiling 7.0 is the saturating law's"),
    ({"form": "frontier", "objective": "lad"}, "--objective lad is for surfaces")])
def test_a_flag_that_would_be_ignored_is_refused(tmp_path, flags, words):
    path = as_csv(tmp_path / "runs.csv", scattered(SURFACE))
    with pytest.raises(BadInput, match=words):
        verbs.fit(path, params_col="size", tokens_col="data", loss_col="err", **flags)


def test_any_csv_is_fitted_and_compared_by_the_verb(tmp_path, capsys):
    path = as_csv(tmp_path / "runs.csv", scattered(COUPLED, noise=1e-3))
    names = {"params_col": "size", "tokens_col": "data", "loss_col": "err"}
    verbs.fit(path, form="coupled", drop_worst=1, bootstrap=20, json=True, **names)
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Coupled(**out["law"]).loss(1e9, 2e10) == pytest.approx(COUPLED.loss(1e9, 2e10), rel=0.01)
    assert out["runs"] == 59 and len(out["dropped"]) == 1 and "sd" in str(out["bootstrap"])
    verbs.fit(path, bootstrap=20, objective="ls", drop_worst=1, **names)
    said = capsys.readouterr().out
    assert said.startswith("read params from 'size', tokens from 'data', loss from 'err'")
    assert said.splitlines()[1].startswith("dropped the 1 largest losses")
    assert "of 60 runs share a budget" in said or "of 59 runs share a budget" in said
    assert "alpha = 0." in said and "(sd 0.0" in said and "of 8 starts agree" in said
    verbs.fit(path, compare=True, drop_worst=1, **names)
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("dropped the 1 largest") and said[2].startswith("coupled: 0.")
    verbs.fit(path, compare=True, json=True, **names)
    assert json.loads(capsys.readouterr().out)["ranked"][0]["form"] == "coupled"


def test_a_table_of_isoflop_runs_gives_its_curves_and_a_forecast(tmp_path, capsys):
    rows = [(n, c / 6 / n) for c in np.geomspace(1e18, 1e20, 4)
            for n in SURFACE.optimum(c)[0] * np.geomspace(0.25, 4, 7)]
    params, tokens = np.array(rows).T
    made = Runs(params, tokens, 6 * params * tokens, SURFACE.loss(params, tokens))
    path = as_csv(tmp_path / "runs.csv", made, "N,D,loss")
    path.write_text("corpus,N,D,loss\n" + "".join(
        f"a,{line}\n" for line in path.read_text().splitlines()[1:]) + "b,1e9,2e10,9\n")
    verbs.fit(path, where=("corpus=a",), json=True)
    out = json.loads(capsys.readouterr().out)["curves"]
    assert out["exponents"]["a"] == pytest.approx(SURFACE.beta / (SURFACE.alpha + SURFACE.beta),
                                                  abs=0.01)
    assert len(out["minima"]) == len(out["bias"]["percent"]) == 4
    verbs.fit(path)
    assert "best tokens ~ C^" in (said := capsys.readouterr().out)
    assert "not told apart: corpus a, b (--where corpus=... keeps one)" in said
    place = tmp_path / "f.json"
    plans.forecast(path, 1e21, place, where=("corpus=a",), json=True)
    out = json.loads(capsys.readouterr().out)
    true = SURFACE.loss(out["params"], out["tokens"])
    assert out["low"] < true < out["high"] and out["predicted"] == pytest.approx(true, rel=0.01)
    assert out["params"] == pytest.approx(SURFACE.optimum(1e21)[0], rel=0.1)
    assert "does not say how its runs were tuned" in out["warning"]
    plans.forecast(path, 1e21, tmp_path / "g.json", params=1e9, where=("corpus=a",))
    assert "1000000000 parameters" in capsys.readouterr().out
    for words, more in (("--batch 512 is for a folder", {"batch": 512}),
                        ("is not above the sweep's largest budget", {"flops": 1e20}),
                        ("no COLUMN=VALUE", {"where": ("corpus",)}),
                        ("has no column 'x'", {"where": ("x=1",)}),
                        ("no runs with", {"where": ("corpus=z",)})):
        with pytest.raises(BadInput, match=words):
            plans.forecast(path, **{"flops": 1e21, "out": tmp_path / "h.json", **more})
    with pytest.raises(BadInput, match="is for a CSV of runs and"):
        plans.forecast(tmp_path, 1e21, place, params=1e9)


def test_a_table_that_speaks_against_its_forecast_says_so_first(tmp_path, capsys):
    rows = [(n, c / 6 / n) for c in np.geomspace(1e18, 1e21, 6)
            for n in SURFACE.optimum(c)[0] * np.geomspace(0.25, 4, 7)]
    params, tokens = np.array(rows).T
    made = Runs(params, tokens, 6 * params * tokens, SURFACE.loss(params, tokens))
    top = made.flops > 0.9 * made.flops.max()
    cases = {"does not fall at the largest budget": made.loss * np.where(top, 1.2, 1.0),
             "the laws miss the largest budget by -": made.loss * np.where(top, 1.05, 1.0)}
    for n, (words, loss) in enumerate(cases.items()):
        path = as_csv(tmp_path / f"{n}.csv", made._replace(loss=loss), "N,D,loss")
        plans.forecast(path, 1e22, tmp_path / f"{n}.json", json=True)
        out = json.loads(capsys.readouterr().out)
        assert words in out["warning"]
        assert math.log(out["high"] / out["predicted"]) > 0.03  # no less than what was missed
    path = as_csv(tmp_path / "sound.csv", made, "N,D,loss")
    plans.forecast(path, 1e22, tmp_path / "sound.json", json=True)
    assert json.loads(capsys.readouterr().out)["warning"] == (
        "the table does not say how its runs were tuned")
    plans.forecast(path, 1e25, tmp_path / "far.json", json=True)
    assert "the budgets span 1e+03 times" in json.loads(capsys.readouterr().out)["warning"]
    with pytest.raises(BadInput, match="is there and is no forecast; name a new file"):
        plans.forecast(path, 1e22, path)
    noise = as_csv(tmp_path / "noise.csv", made._replace(
        loss=3 + 0.1 * np.random.default_rng(0).standard_normal(42)), "N,D,loss")
    verbs.fit(noise, json=True)  # its surface has no best size, and nothing falls over that
    assert json.loads(capsys.readouterr().out)["curves"]["bias"].keys() <= {"refused", "percent"}
    rng = np.random.default_rng(0)
    n = np.geomspace(1e7, 1e9, 20)
    d = 20 * n * np.exp(0.04 * rng.standard_normal(20))
    loss = SURFACE.loss(n, d) * (1 + 0.01 * rng.standard_normal(20))
    verbs.fit(as_csv(tmp_path / "one_way.csv", Runs(n, d, 6 * n * d, loss), "N,D,loss"))
    assert "POORLY KNOWN: alpha" in capsys.readouterr().out
    verbs.fit(path)
    assert "POORLY" not in capsys.readouterr().out
    for words, flags in (("twice, as a and b", {"where": ("x=a", "x=b")}),
                         ("add --form saturating, or leave it out", {"ceiling": 9.0}),
                         ("it does nothing: leave it out", {"objective": "ls", "delta": 0.1}),
                         ("add --form data-constrained, or leave", {"unique_col": "D"})):
        with pytest.raises(BadInput, match=words):
            verbs.fit(path, **flags)


def test_a_hundred_thousand_rows_are_read_fitted_and_compared(tmp_path, capsys):
    path = as_csv(tmp_path / "runs.csv", scattered(SURFACE, 100_000, 0.01), "N,D,loss")
    verbs.fit(path, json=True)
    out = json.loads(capsys.readouterr().out)
    assert out["runs"] == 100_000
    assert Surface(**out["law"]).loss(1e9, 2e10) == pytest.approx(SURFACE.loss(1e9, 2e10), rel=1e-3)


@pytest.mark.parametrize("change, words", [
    (lambda r: r._replace(loss=r.loss - 9), "above 0"),
    (lambda r: r._replace(loss=np.where(r.loss == r.loss[4], np.nan, r.loss)), ":6 has err=nan"),
    (lambda r: r._replace(params=r.params[:1] + 0 * r.params, tokens=r.tokens[:1] + 0 * r.tokens),
     "1 different runs cannot give"),
    (lambda r: r._replace(params=1e17 / r.tokens), "one budget"),
    (lambda r: r.keep([0, 1] * 9), "2 different runs cannot give"),
    (lambda r: r._replace(tokens=20 * r.params), "20 tokens a parameter"),
])
def test_tables_that_say_nothing_give_a_sentence_and_no_number(tmp_path, capsys, change, words):
    path = as_csv(tmp_path / "runs.csv", change(scattered(SURFACE)))
    with pytest.raises(BadInput, match=words) as caught:
        verbs.fit(path, params_col="size", tokens_col="data", loss_col="err")
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""
