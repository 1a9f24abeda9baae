# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Laws of published studies
#
# What do tables of other people's runs say, and how far may one believe it? Every figure here is
# of runs that others trained. `python notebooks/published_laws.py --published DIR` (or the
# environment variable `TINYLM_PUBLISHED`) names the folder of their CSVs; a table that is not
# there is skipped in words. As a script it writes the figures to `--out`.

# %%
import argparse
import math
import os
from pathlib import Path

from IPython import get_ipython
from IPython.display import Image, display

from tinylm.config import BadInput
from tinylm.laws import forecast, intervals, isoflop
from tinylm.laws.runs import drop_worst, read_csv
from tinylm.laws.table import compare, fit_form, told
from tinylm.look import plots

flags = argparse.ArgumentParser()
flags.add_argument("--published", type=Path, default=os.environ.get("TINYLM_PUBLISHED"))
flags.add_argument("--out", type=Path, default=Path("published_laws"))
given, _ = flags.parse_known_args()  # a notebook's kernel has flags of its own


def show(name, make, *args):
    """Show a figure, or write it; say what is missing."""
    try:
        picture = plots.png(make(*args))
    except BadInput as why:
        print(f"{name} is not drawn: {why}")
        return
    if get_ipython():
        display(Image(picture))
    else:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"{name}.png").write_bytes(picture)
        print(given.out / f"{name}.png")


def table(file, **only):
    """Read a published table, or say that it is skipped."""
    place = given.published and Path(given.published) / file
    if not place or not place.exists():
        print(f"skipped: {file} is not in {given.published or 'a folder named by --published'}")
        return None
    return read_csv(place, only)


# %% [markdown]
# ## Chinchilla's surface
#
# 245 runs read off a figure of Hoffmann et al. by Besiroglu et al. (arXiv 2404.10102). The five
# with the largest losses are outliers of the early budgets. The published constants are those of
# least absolute errors; Huber's minimum is another point, its exponents near: the certificate
# says that both are minima, the spread over resamples how far apart one should expect such points.

# %% tags=["computed"]
chinchilla = table("chinchilla_epoch.csv")
if chinchilla:
    chinchilla = drop_worst(chinchilla, 5)
    for objective in ("lad", "huber"):
        fit = fit_form(chinchilla, "chinchilla", objective)
        found = told(fit, 400 if objective == "huber" else 0)
        print(objective, {k: round(v, 4) for k, v in found["law"].items()})
        # which start comes out ahead, and how near it ends, is decided by rounding: not printed
        print("   certificate:", {k: v if isinstance(v, list) else float(f"{v:.3g}")
                                  for k, v in found["certificate"].items()
                                  if k not in ("moved", "gradient_norm")})
    print("huber, standard deviations over 400 resamples:",
          {k: float(f"{v['sd']:.3g}") for k, v in found["bootstrap"]["constants"].items()})
    show("chinchilla_residuals", plots.residuals, chinchilla, fit,
         "What Huber's surface leaves of the 240 Chinchilla runs")

# %% [markdown]
# ## Which law forecasts best?
#
# Each law is fitted to the runs below a cut of compute and asked for those above. The order is
# that of what matters when a larger run is planned, and not that of the fit.

# %% tags=["computed"]
if chinchilla:
    for row in compare(chinchilla):
        print({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})

# %% [markdown]
# ## Curves at equal compute, and forecasts from below
#
# Llama 3's runs, and Marin's on three corpora. From the first four budgets with a minimum, the
# blend of five laws forecasts every later minimum; its interval is calibrated on other studies,
# these among them, so this shows what the interval looks like and not that it holds: for that see
# the last figure, where every study is left out of its own calibration.

# %%
KEPT = 4
STUDIES = {"llama3": ("llama3_isoflop.csv", {"condition": "raw_loss"}),
           "marin-comma": ("marin_isoflop.csv", {"dataset": "comma"}),
           "marin-dclm": ("marin_isoflop.csv", {"dataset": "dclm"}),
           "marin-nemotron": ("marin_isoflop.csv", {"dataset": "nemotron"})}


def from_below(runs):
    """Forecast every minimum after the first KEPT from the runs below it."""
    found = [m for m in isoflop.minima(runs) if m.bracketed]
    if len(found) <= KEPT:
        raise BadInput(f"{len(found)} budgets have a minimum and {KEPT + 1} are needed")
    part = runs.keep(runs.flops < math.sqrt(found[KEPT - 1].flops * found[KEPT].flops))
    ids = [str(n) for n in range(len(part.loss))]
    return found, [forecast.make(part, ids, m.flops, m.params, m.tokens, "published")
                   for m in found[KEPT:]]


for name, (file, only) in STUDIES.items():
    if runs := table(file, **only):
        minima = isoflop.minima(runs)
        e = isoflop.exponents(minima)
        show(f"{name}_isoflops", plots.isoflop_curves, runs, [m._asdict() for m in minima],
             f"{name}: best size grows as FLOPs^{e.a:.3f} (standard error {e.a_se:.3f})")
        try:
            show(f"{name}_ahead", plots.ahead, *from_below(runs))
        except BadInput as why:
            print(f"{name}: {why}")

# %% [markdown]
# ## How far to believe an interval
#
# The shipped calibration: of every study's forecasts the share whose 90% interval held, set
# without that study. One study is one piece of evidence, however many forecasts it gives.

# %%
show("coverage", plots.coverage, intervals.shipped())
