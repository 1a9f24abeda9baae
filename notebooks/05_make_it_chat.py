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
# # Make it chat
#
# A base model continues text. Tuned on conversations, the same network answers, and mostly stops.
# Nothing was added to it: the ids that say who speaks, and where a turn ends, were in its table
# from the start, and no text that it read had held them. `TINYLM_STUDY` names a study's folder;
# without it the one in `experiments/results` is read.

# %%
import os
from pathlib import Path

import numpy as np

import tinylm
from tinylm.look import alignment, heads, notebook, terminal
from tinylm.look.study import Study
from tinylm.model import generate
from tinylm.text.chat import read, render
from tinylm.text.tokenizer import BOS, END

home = Path(tinylm.__file__).parent.parent / "experiments/results/laptop"
study = Study(Path(os.environ.get("TINYLM_STUDY", home)))
config, base, data, tokenizer = notebook.opened(study, "target")
tuned = {"chat": notebook.opened(study, "chat").params}
if (study.folder / "policy/checkpoints").exists():
    tuned["optimised"] = notebook.opened(study, "policy").params

# %% [markdown]
# ## What a conversation is, to the model
#
# The marks of the roles are ids of their own, which no text can produce. Only what the assistant
# says, and the end of its turn, is learnt from.

# %%
talk = [("system", "Answer in upper case."), ("user", "Hello! How are you?"),
        ("assistant", "I AM FINE.")]
ids, learnt_from = render(talk, tokenizer)
for n in range(0, len(ids), 12):
    print(" ".join(terminal.name_of(tokenizer, i) for i in ids[n : n + 12]))
print(f"{int(np.sum(learnt_from))} of {len(ids)} ids are learnt from")

# %% [markdown]
# ## The same words to all
#
# The likeliest token each time, so the answers are the models' own and no luck of a draw. *(ends)*
# says that the model ended its turn by itself. The base model is given the prompt as a line of
# text, for it has not learnt the marks. "lemon" stood in no task that the others were tuned on.
# *optimised*, where the study has it, went on from *chat*: a reward model paid it for its answers.


# %% tags=["computed"]
def answer(params, prompt, system=""):
    asked = [*([("system", system)] if system else []), ("user", prompt)]
    ids = render(asked, tokenizer, prompt=True)[0]
    made = generate.sample(config, params, [ids], 24, 0, 0.0)[0]
    return read(made, tokenizer) + ("  (ends)" if END in made else "  ...")


for prompt in ("Hello! How are you?", "Say: lemon", "What is Python?"):
    plain = np.concatenate([[BOS], tokenizer.encode(prompt + "\n")])
    told = tokenizer.decode(generate.sample(config, base, [plain], 24, 0, 0.0)[0])
    print(f"{prompt}\n  base: {told!r}")
    for name, params in tuned.items():
        print(f"  {name}: {answer(params, prompt)!r}")

# %% [markdown]
# ## With a system prompt, and without
#
# Rules like these were in training, with other words and names. How often they are obeyed is in the
# table below; single answers show it and also miss it.

# %% tags=["computed"]
for system in ("", "Answer in upper case.", "You are Olga. Begin with your name.",
               "End every answer with the word done."):
    print(system or "(none)")
    for name, params in tuned.items():
        print(f"  {name}: {answer(params, 'Say: lemon', system)!r}")

# %% [markdown]
# ## What tuning changed inside
#
# Many of the tasks ask to say again what was said. On random pieces said twice (03_attention): the
# head that most reads what followed the same piece before, and by how many nats a token the repeat
# is easier.

# %% tags=["computed"]
for name, params in {"base": base, **tuned}.items():
    found = heads.habits(config, params)
    layer, head = np.unravel_index(found.induction.argmax(), found.induction.shape)
    print(f"{name:9}  induction {found.induction.max():.3f} (layer {layer + 1}, head {head + 1}), "
          f"a repeat easier by {found.nats[0] - found.nats[1]:.3f} nats")

# %% [markdown]
# ## The whole table
#
# All models answer the same tasks about words that no training task holds (the glossary's terms
# were in training, asked in other phrases). What is right is decided by a program. Rates have 95%
# intervals; what tuning forgets is in *bits a byte*. Here the base model is asked in the marks of a
# conversation too, which it has never seen: its column says where tuning began, not what it could
# do if it were asked as it likes.

# %%
found = study.optional("alignment.json", {"runs": {}})["runs"]
print(alignment.table({Path(name).name: row for name, row in found.items()}) if found
      else "this study asked its models no tasks")
