"""Verbs of laws: fit, check. They do without JAX."""

from pathlib import Path

from tyro.conf import Positional

from tinylm.config import BadInput, require
from tinylm.laws import forecast as forecasts
from tinylm.laws import table
from tinylm.laws.fit import Estimator
from tinylm.laws.runs import read_csv
from tinylm.look import progress
from tinylm.sweep import law
from tinylm.verbs import folders


def fit(runs: Positional[Path], form: table.Form | None = None,
        objective: Estimator = "huber", delta: float = 1e-3, ceiling: float = 0.0,
        params_col: str = "", tokens_col: str = "", flops_col: str = "", loss_col: str = "",
        unique_col: str = "", where: tuple[str, ...] = (), drop_worst: int = 0,
        bootstrap: int = 0, compare: bool = False, json: bool = False) -> None:
    """Fit every law to a sweep's folder, or one law to any CSV of runs; or rank the laws.

    Args:
        runs: folder whose subfolders are runs, or a CSV with loss and two of params, tokens, flops
        form: the law to fit; none: every law to a folder, chinchilla to a CSV
        objective: huber or lad of log loss, or ls of the loss
        delta: log loss at which huber turns from square to absolute
        ceiling: nats at which the saturating law levels off, such as ln V
        params_col: the CSV's name for parameters
        tokens_col: the CSV's name for training tokens
        flops_col: the CSV's name for training FLOPs
        loss_col: the CSV's name for the loss
        where: COLUMN=VALUE: of a CSV, keep these rows only
        unique_col: the CSV's name for different tokens, for data-constrained
        drop_worst: leave out this many of the largest losses
        bootstrap: refits to resampled runs, for standard deviations
        compare: rank the laws by their forecasts from below to above a cut of compute
        json: print the fit on the last line
    """
    columns = folders.columns(runs, params=params_col, tokens=tokens_col, flops=flops_col,
                              loss=loss_col, unique=unique_col)
    only = folders.chosen(runs, where)
    if runs.is_dir():
        records = folders.records(runs)
        if not (form or compare):
            for flag, given in (("objective", objective != "huber"), ("delta", delta != 1e-3),
                                ("ceiling", ceiling), ("drop-worst", drop_worst),
                                ("bootstrap", bootstrap)):
                if given:
                    raise BadInput(f"--{flag} is for one law; name it with --form")
            fitted = law.fit(records)
            progress.answer(fitted, json, progress.law(fitted))
            return
    for flag, given, reason in (
            ("form", compare and form, "names one law and --compare ranks all;"),
            ("bootstrap", compare and bootstrap, "is for one law and --compare ranks all;"),
            ("ceiling", not compare and form != "saturating" and ceiling,
             "is the saturating law's; add --form saturating, or"),
            ("delta", delta != 1e-3 and (objective != "huber" or form in table.FRONTIERS) and delta,
             "is where huber turns; with another objective or a frontier it does nothing:"),
            ("unique-col", not compare and form != "data-constrained" and unique_col,
             "is the data-constrained law's; add --form data-constrained, or"),
            ("objective", form in table.FRONTIERS and objective != "huber" and objective,
             f"is for surfaces; {form} is fitted to minima by least squares;")):
        if given:
            raise BadInput(f"--{flag} {given} {reason} leave it out")
    require("ceiling", ceiling, 0, 1e6)
    said: list[str] = []
    everything = (law.runs_of(records)[0] if runs.is_dir()
                  else read_csv(runs, only, columns, said))
    found, dropped = table.cleaned(everything, drop_worst)
    first = {"read": said, "dropped": dropped}
    if compare:
        ranked = table.compare(found, objective, delta, ceiling)
        progress.answer({**first, "ranked": ranked}, json,
                        progress.ranked(ranked, said + dropped))
        return
    form, curves = form or "chinchilla", {} if form else {"curves": table.curves(found)}
    told = table.told(table.fit_form(found, form, objective, delta, ceiling), bootstrap) | curves
    estimator = "ls" if form in table.FRONTIERS else objective
    progress.answer({"form": form, "estimator": estimator, **first, **told}, json,
                    progress.fitted(told, said + dropped))


def check(forecast: Positional[Path], target: Positional[Path], runs: Path | None = None,
          ledger: Path | None = None, json: bool = False) -> None:
    """Score a forecast against the run that names it.

    Args:
        forecast: the forecast file
        target: folder of the run that was trained with --forecast
        runs: folder of the runs it was made from, which must not have changed; none: `sweep` beside
            the forecast, where there is one
        ledger: the CSV to append the score to, once; none: forecasts.csv beside the forecast
        json: print the score on the last line
    """
    score = forecasts.check(forecast, folders.finished(target))
    beside = forecast.parent / "sweep"
    if place := runs or (beside if beside.is_dir() else None):
        table, ids, _ = law.runs_of(folders.records(place))
        forecasts.unchanged(forecast, ids, table.loss, place)
    forecasts.append_to_ledger(ledger or forecast.with_name("forecasts.csv"), score)
    progress.answer(score._asdict(), json, progress.score(score))
