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
# # A scaling study, figure by figure
#
# Many small models were trained at a few budgets of compute; a law was fitted to them; the loss
# of a larger model was forecast, and only then was that model trained. This notebook redraws
# every figure from the study's records and says how to read it. `TINYLM_STUDY` names the study's
# folder; without it the records in `experiments/results` are read.

# %%
import os
from pathlib import Path

import tinylm
from tinylm.look import plots
from tinylm.look.notebook import show
from tinylm.look.study import Study

home = Path(tinylm.__file__).parent.parent / "experiments/results/laptop"
study = Study(Path(os.environ.get("TINYLM_STUDY", home)))

# %% [markdown]
# ## One axis for everything
#
# Bits per byte do not depend on the tokenizer, so counting tables and transformers share an axis.
# A dotted line is what a table of n-grams reaches by counting alone; it costs next to nothing to
# make. A model is worth its compute only below those lines. A cross is the compute at which a
# fitted law comes down to a table: to the right of the stars it is an extrapolation.

# %%
show(study, plots.loss_axis)

# %% [markdown]
# ## Loss at equal compute
#
# Every colour is one budget. On the left the model is too small for it, on the right it is too
# large to see enough text. The bottom of the parabola is the size to choose. A hollow star is not
# to be believed: its budget lacks a run on one side, or does not bend beyond its noise.

# %%
show(study, plots.isoflops)

# %% [markdown]
# ## Learning rates
#
# A law through runs with a badly chosen rate measures the rate, not the scale. Each curve should
# have its lowest point inside.

# %%
show(study, plots.rates)

# %% [markdown]
# ## The forecast and the outcome
#
# On two logarithmic axes a power law is a straight line; one with a floor bends upwards. The two
# can agree on every budget that was tried and part company beyond: that disagreement is most of
# the interval. One outcome inside it does not prove the interval, and one outside would disprove
# little; many forecasts on record would.

# %%
show(study, plots.frontier)

# %%
try:
    for name, value in study.part("score.json").items():
        print(f"{name:22}{value}")
except BadInput:
    print("no score yet: the held-out run has not been trained")
