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
# # Stack and scale
#
# One layer corrects the one before it; and more layers, more width and more text correct the whole
# in a way that can be forecast. `TINYLM_STUDY` names a study's folder; without it the one in
# `experiments/results` is read.

# %%
import os
from pathlib import Path

import numpy as np

import tinylm
from tinylm.look import depth, growth, notebook, plots, terminal
from tinylm.look.notebook import show
from tinylm.look.study import Study
from tinylm.model.capture import capture
from tinylm.text.tokenizer import BOS

home = Path(tinylm.__file__).parent.parent / "experiments/results/laptop"
study = Study(Path(os.environ.get("TINYLM_STUDY", home)))
config, params, data, tokenizer = notebook.opened(study, "target")
ids = np.concatenate([[BOS], tokenizer.encode("The cat sat on the")])
words = [terminal.name_of(tokenizer, i) for i in ids]

# %% [markdown]
# ## What the model would say after each layer
#
# Every layer adds to one stream of numbers a token. Read as the last layer is read, the stream says
# what the model would answer if it stopped there. Straight after the embedding that is mostly the
# token itself, because the table that reads is the table that wrote.

# %% tags=["computed"]
inside = capture(config, params, ids)
found = depth.depth(config, params, inside)
names = [[terminal.name_of(tokenizer, i) for i in row] for row in found.ids[:, :, 0]]
notebook.draw(plots.depths(found, words, names))
for level, (agree, nats) in enumerate(zip(found.agree, found.nats, strict=True)):
    print(f"after {level or 'the embedding'}: {agree:.0%} of the answers are the final ones, "
          f"{nats:.3f} nats from the final prediction")
print("depth from which on the answer stays:", dict(zip(words, depth.settled(found).tolist(),
                                                        strict=True)))

# %% [markdown]
# ## The same over held-out text

# %% tags=["computed"]
held = np.asarray(data.heldout[: 8 * config.T]).reshape(8, config.T)
each = [depth.depth(config, params, capture(config, params, row), 1) for row in held]
for level in range(config.L + 1):
    print(f"after {level or 'the embedding'}: "
          f"{np.mean([d.agree[level] for d in each]):.1%} agree, "
          f"{np.mean([d.nats[level] for d in each]):.3f} nats")

# %% [markdown]
# ## Many small models, equal compute
#
# Too small a model stops learning; too large a one has seen too little. At each budget a size is
# best, and the best sizes grow with the budget.

# %%
show(study, plots.isoflops)

# %% [markdown]
# ## What comes with compute
#
# The best run of every budget, then the held-out run. On random pieces said twice: what the
# strongest head of each kind does (03_attention), and by how many nats a token the repeat is
# easier. On held-out text: the loss by how many tokens are read, and by how often the token occurs
# in training.

# %%
rows = study.optional("growth.json", {"rows": []})["rows"]
if rows:
    for row in rows:
        print(f"{row['FLOPs']:.2e} FLOPs, width {row['width']:3}: {row['bits_per_byte']:.3f} bits "
              f"a byte, induction {row['induction']:.3f}, "
              f"a repeat easier by {row['gain']:+.3f} nats")
    notebook.draw(plots.growth(rows))
    tables = study.part("baselines.json")["tables"]
    for name, flops in growth.passed(rows, tables).items():
        print(f"the {name} table is beaten",
              "by no run" if flops is None else f"from {flops:.2e} FLOPs on")
else:
    print("this study was not looked into: it has no growth.json")

# %% [markdown]
# ## A forecast, and what came
#
# Laws fitted to the sweep were followed to a budget far beyond it and written down. Then the model
# was trained.

# %%
show(study, plots.frontier)
score = study.part("score.json")
print(f"forecast {score['predicted']:.4f}, measured {score['measured']:.4f} nats: "
      f"{score['error_percent']:+.2f}%")
