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
# # Attention
#
# Each token asks a question (its query), offers a label (its key) and holds something to give (its
# value). How well a question fits a label decides how much of the value is taken. Two things are
# done to them first: queries and keys are turned by their place in the text, so that a fit depends
# on the distance, and, in a model with smeared keys, a share of the key of the token before is
# added to each, so that a label says what stands before it too. All numbers below are read from the
# held-out run of a study; `TINYLM_STUDY` names the study's folder, without it the one in
# `experiments/results` is read.

# %%
import math
import os
from pathlib import Path

import numpy as np

import tinylm
from tinylm.look import heads, notebook, plots, terminal
from tinylm.look.study import Study
from tinylm.model.capture import capture
from tinylm.text.tokenizer import BOS

home = Path(tinylm.__file__).parent.parent / "experiments/results/laptop"
study = Study(Path(os.environ.get("TINYLM_STUDY", home)))
config, params, data, tokenizer = notebook.opened(study, "target")
TEXT = "The king said to the people that the king was good"
ids = np.concatenate([[BOS], tokenizer.encode(TEXT)])
words = [terminal.name_of(tokenizer, i) for i in ids]
inside = capture(config, params, ids)
print(f"{config.L} layers of {config.H} heads, each {config.head_width} channels wide, keys "
      + ("smeared" if config.smear else "as they are"))

# %% [markdown]
# ## Who reads whom
#
# A row is a token reading; the darker a cell, the more it takes from there. Nothing lies above the
# diagonal: no token sees what comes after it. Every row adds up to one.

# %% tags=["computed"]
for layer in range(config.L):
    for head in range(config.H):
        notebook.draw(plots.attention(np.asarray(inside.weights[layer, head]), words,
                                      f"layer {layer + 1}, head {head + 1}"))
rows = np.asarray(inside.weights).sum(-1)
print(f"rows add up to {rows.min():.4f} ... {rows.max():.4f}; above the diagonal "
      f"{np.triu(np.asarray(inside.weights), 1).max():.1f}")

# %% [markdown]
# ## One weight, worked out
#
# The head that looks back most sharply and its largest weight: the query of one token times the key
# of another, channel by channel, summed, divided by the square root of the number of channels,
# exponentiated, and divided by the same for every token that may be read.

# %% tags=["computed"]
layer, head, t, s = heads.sharpest(inside)
one = heads.worked(inside, layer, head, t, s)
print(f"layer {layer + 1}, head {head + 1}: “{words[t]}” reads “{words[s]}”")
for name, vector in (("query", one.q), ("key", one.k), ("product", one.q * one.k),
                     ("value", one.v)):
    print(f"{name:8}", " ".join(f"{x:+.2f}" for x in vector[:8]), "...")
print(f"sum of the products {one.dot:.3f}, over the square root of {len(one.q)}: {one.score:.3f}")
print(f"exp({one.score:.3f}) = {math.exp(one.score):.3f}, over the sum {one.total:.3f}: "
      f"{math.exp(one.score) / one.total:.3f}; the model has {one.weight:.3f}")

# %% [markdown]
# ## What heads are in the habit of
#
# Random pieces are said twice. A head that mostly reads the token before, or the first, shows
# itself; an *induction* head reads, in the repeat, what followed the same token the first time, and
# with it a model can go on with a sequence it has never seen. A head that reads the token before
# half of the time, and a smeared key, are ways to find what followed. Beside each score stands what
# a head would have that spreads its weight evenly over all it may read: no head has a habit whose
# score is no more than that.

# %% tags=["computed"]
found = heads.habits(config, params)
print(f"first time {found.nats[0]:.3f} nats a token, in the repeat {found.nats[1]:.3f}")
half = config.T // 2
for name, first in (("previous", 1), ("first", 1), ("induction", half)):
    scores = getattr(found, name)
    layer, head = np.unravel_index(scores.argmax(), scores.shape)
    evenly = np.mean([1 / (t + 1) for t in range(first, 2 * half - (name == "induction"))])
    print(f"strongest on {name:10} layer {layer + 1}, head {head + 1}: {scores.max():.3f} "
          f"(evenly {evenly:.3f})")
notebook.draw(plots.habits(found))
