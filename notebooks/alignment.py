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
# # From base to chat, stage by stage
#
# A study's held-out model was tuned on conversations and generated tasks. Of several answers of
# the tuned model to one prompt a rubric said which is better, with known noise; a reward model
# learnt from that, and a policy was optimised against the reward model. Everything here is read
# from the study's records. `TINYLM_STUDY` names its folder; without it the records in
# `experiments/results` are read.

# %%
import csv
import os
from pathlib import Path

import tinylm
from tinylm import files
from tinylm.look import alignment, notebook, plots
from tinylm.look.notebook import show
from tinylm.look.study import Study

home = Path(tinylm.__file__).parent.parent / "experiments/results/laptop"
study = Study(Path(os.environ.get("TINYLM_STUDY", home)))

# %% [markdown]
# ## One table
#
# All models answer the same tasks, about words that no training task holds (the glossary's terms
# were in training, asked in other phrases); the answer is the likeliest one and is right or wrong
# without a judge. Rates come with 95% intervals. *bits a byte* is base text: what tuning forgets.
# *KL*, of samples of an eighth of the tasks, is how far a model is from the first column.

# %%
found = study.optional("alignment.json", {"runs": {}})["runs"]
print(alignment.table({Path(name).name: row for name, row in found.items()}) if found
      else "this study asked its models no tasks")

# %% [markdown]
# ## The reward model
#
# Each pair's label is right with a known probability, so the accuracy of a perfect judge is known
# too: a reward model above it would have seen the answers. Points on the line mean that 80% sure
# is right in 80% of such pairs.

# %%
show(study, plots.calibration)

# %% [markdown]
# ## The policy
#
# A policy buys its score with distance from the tuned model. The score is the reward model's: where
# it rises and the table's grade of sentences does not, the policy has learnt what the reward model
# likes and not what it should.

# %%
show(study, plots.policy)

# %% [markdown]
# ## The same prompts, before tuning and after
#
# The first samples of a fixed list of prompts: nobody picked.

# %%
for sample in study.optional("samples.json", {"samples": []})["samples"]:
    print(f"{sample['model']:>5} | {sample['prompt']} | {sample['text'].strip()!r}"
          + ("" if sample["ended"] else " (cut off)"))

# %% [markdown]
# ## The second law
#
# How far can one go before the true reward falls? An experiment of its own
# (`experiments/overoptimisation.py`; its record is read here, whatever study is named above):
# reward models of several sizes, trained on few or many noisy pairs, choose the best of *n*, or a
# policy is optimised against them. *gold* is the rubric, *proxy* the reward model. The peak of
# gold with the largest reward model was forecast from the smaller ones before it was trained.

# %%
told = files.read_json(home.parent / "overoptimisation.json")
for way in ("best_of_n", "grpo"):
    for row in told[way]["outcome"]:
        print(f"{way}, {row['pairs']} pairs: gold's best forecast {row['gold_peak']:.3f}, measured "
              f"{row['measured_peak']:.3f} (a seed's standard deviation {row['seeds_sd']:.3f})")
    for row in told[way]["lost"]:
        print(f"  {row['params']:,} parameters, {row['pairs']} pairs: gold falls by "
              f"{row['falls']:.2f} after its best"
              + (", over-optimised" if row["over"] else ", no more than chance"))
with open(home.parent / "overoptimisation.csv") as file:
    rows = [{k: v if k == "way" else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)]
notebook.draw(plots.overoptimised(rows))
