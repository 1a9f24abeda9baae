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
# # The prediction game
#
# Given the text so far, what comes next? Every model here plays the same game and is scored by the
# same number: how many bits it needs, on average, for a byte of text it has not seen. A model that
# gave the right token all its belief would need none. `TINYLM_STUDY` names a study's folder;
# without it the one in `experiments/results` is read.

# %%
import os
from pathlib import Path

import numpy as np

import tinylm
from tinylm.look import growth, next_word, notebook, plots, terminal
from tinylm.look.notebook import show
from tinylm.look.study import Study
from tinylm.model.baselines import NGram
from tinylm.text.tokenizer import BOS

home = Path(tinylm.__file__).parent.parent / "experiments/results/laptop"
study = Study(Path(os.environ.get("TINYLM_STUDY", home)))
config, params, data, tokenizer = notebook.opened(study, "target")
TEXT = "The cat sat on the"
ids = np.concatenate([[BOS], tokenizer.encode(TEXT)])


def told(found):
    for one in found:
        print(f"{one.p:7.2%}  {terminal.name_of(tokenizer, one.id):12}"
              + (f"{one.count:6,} times" if one.count else ""))


# %% [markdown]
# ## Counting: what followed this token before?
#
# The bigram table knows one token of the past. It is made by counting pairs; what it gives is the
# count over the total, less a discount that pays for pairs it has never seen.

# %%
bigram = NGram.fit(data.train, 2, data.V)
print(f"after “{terminal.name_of(tokenizer, ids[-1])}” alone:")
told(next_word.counted(bigram, ids, 8))

# %% [markdown]
# ## Position weights: which token stands where
#
# The next model adds up one table for each distance: the last token votes, the one before it votes,
# and so on. It knows what stands where, and nothing about what stands together.

# %% tags=["computed"]
place = next((p.parent.name for p in sorted((study.folder / "position").glob("*/record.json"))), "")
if place:
    weights = notebook.opened(study, f"position/{place}")
    print(f"after “{TEXT}”, by a table for each of the last {weights.config.L} tokens:")
    told(next_word.predicted(weights.config, weights.params, ids, 8))

# %% [markdown]
# ## A transformer
#
# Attention lets every token choose what it reads. This is the study's held-out run.

# %% tags=["computed"]
print(f"after “{TEXT}”, by a transformer of width {config.D} with {config.L} layers:")
told(next_word.predicted(config, params, ids, 8))

# %% [markdown]
# ## One axis for all
#
# The score on held-out text, bits a byte, lower is better.

# %%
for order, table in sorted(study.part("baselines.json")["tables"].items()):
    print(f"{order}-gram table          {table['bits_per_byte']:.3f}")
for name, record in (("position weights", study.records("position")), ("transformer", [
        study.record("target")])):
    for each in record:
        if each["loss"]:
            print(f"{name:20}{each['loss']['bits_per_byte']:.3f}  "
                  f"({each['flops']['exact']:.2e} FLOPs)")
show(study, plots.loss_axis)

# %% [markdown]
# ## Where the transformer gains
#
# The more of the text it has read, the easier the next token is for it, up to the noise of some
# hundred windows; a table of pairs looks back by one token wherever it stands. And a token that is
# frequent in training is easier than a rare one.

# %% tags=["computed"]
nats = notebook.scored(study, "target")
for row in growth.by_position(nats, config.T):
    print(f"reading up to {row['at_most']:3} tokens: {row['nats']:.3f} nats")
for row in growth.by_frequency(nats, data):
    print(f"tokens seen up to {row['at_most']:7,} times in training: {row['nats']:.3f} nats")
