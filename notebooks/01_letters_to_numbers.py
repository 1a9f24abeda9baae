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
# # Letters to numbers
#
# A language model reads no letters. A tokenizer cuts text into pieces that were frequent in some
# training text, and the model sees the number of each piece. This notebook opens the tokenizer of a
# study; `TINYLM_STUDY` names the study's folder, without it the one in `experiments/results` is
# read.

# %%
import csv
import os
from pathlib import Path

import tinylm
from tinylm.look import notebook, plots, terminal, tokens
from tinylm.look.study import Study

results = Path(tinylm.__file__).parent.parent / "experiments/results"
study = Study(Path(os.environ.get("TINYLM_STUDY", results / "laptop")))
_, _, data, tokenizer = notebook.opened(study, "target")

# %% [markdown]
# ## A text as the model sees it
#
# A space belongs to the piece behind it and is drawn as a dot. Common words are one piece, rare
# ones several, and digits stand alone, so that numbers of equal length have equally many pieces.

# %%
for text in ("The cat sat on the mat in 1984.", "Understanding misunderstandings takes time."):
    cut = tokens.pieces(tokenizer, tokenizer.encode(text))
    print(" | ".join(piece.text for piece in cut))
    print(" ".join(str(piece.id) for piece in cut))
    print(f"{len(text)} characters, {len(cut)} tokens\n")

# %% [markdown]
# ## How a word came to be its pieces
#
# The tokenizer learnt its pieces by joining, again and again, the two neighbours that stood
# together most often (byte-pair encoding). A word is built the same way: of all neighbours, those
# that were joined first in training are joined first here. Whether two related words end in the
# same pieces is up to those joins: an early one may cut across what a reader sees as one stem.

# %%
for word in (" understanding", " misunderstanding"):
    for step in tokenizer.merges(word):
        print(" | ".join(step).replace(" ", "·").replace("·|·", " | "))
    print()

# %% [markdown]
# ## Nothing is unknown, nothing is forged
#
# A character that no piece covers is spelt in half-bytes, sixteen ids that keep every text
# encodable. The ids that mark who speaks can be produced by no text at all: typed, they are
# letters.

# %%
for text in ("naïve", "日本", "<|user|>"):
    ids = tokenizer.encode(text)
    print(text, [tokenizer.piece(int(i)) for i in ids], tokenizer.decode(ids) == text)

# %% [markdown]
# ## Frequent and rare
#
# Few ids do most of the work. The line a power law would give is straight on these axes.

# %%
found = tokens.frequencies(data)
total = found.counts.sum()
for rank in (1, 10, 100, 1000):
    print(f"the {rank} most frequent ids are {found.counts[:rank].sum() / total:.1%} of the tokens")
print("the ten most frequent:", [terminal.name_of(tokenizer, i) for i in found.ids[:10]])
print(tokens.unused(found), "pieces and half-bytes never occur in the training tokens")
notebook.draw(plots.frequencies(found))

# %% [markdown]
# ## Bytes a token
#
# The more bytes a token covers, the more text a window of the model holds, and the fewer steps a
# text takes. Text unlike the training text is cut finer.

# %%
for split, parts in tokens.bytes_per_token(data).items():
    print(split, {part: round(each, 3) for part, each in parts.items()})
for text in ("The king said to the people", "Der König sprach zum Volk", "for i in range(9):"):
    print(f"{text!r}: {len(text.encode()) / len(tokenizer.encode(text)):.3f}")

# %% [markdown]
# ## How many ids?
#
# A larger vocabulary covers more bytes a token and costs a larger table. Losses of different
# tokenizers compare in bits a byte. Each row is the best of a few widths at the same compute, from
# `experiments/vocab_size.py`.

# %%
best: dict[int, dict] = {}
for row in csv.DictReader((results / "vocab_size.csv").read_text().splitlines()):
    if float(row["bits_per_byte"]) < float(best.get(int(row["V"]), row)["bits_per_byte"]) + 1e-12:
        best[int(row["V"])] = row
for V, row in sorted(best.items()):
    print(f"V={V:5}  {row['bytes_per_token']} bytes a token  {row['bits_per_byte']} bits a byte "
          f"at width {row['width']}")
