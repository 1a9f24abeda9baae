"""The first k samples of a fixed list of prompts, base and chat side by side: nobody picks."""

from pathlib import Path
from typing import Any

import numpy as np

from tinylm import files
from tinylm.model.decoder import ModelConfig, Params
from tinylm.model.generate import sample
from tinylm.text.chat import read, render
from tinylm.text.tokenizer import BOS, END, Tokenizer

PROMPTS = (
    "Hello! How are you?",
    "What is Python?",
    "What did you do today?",
    "Do you like music?",
    "And God said",
    "The cat sat on the",
)
EACH = 2
LONGEST = 60


def write(path: Path, model: ModelConfig, base: Params, chat: Params,
          tokenizer: Tokenizer) -> None:
    """Write EACH answers of both to every prompt as JSON, seed 0, temperature 0.8.

    The base model continues the prompt as plain text; the chat model gets the template.
    """
    plain = [np.concatenate([[BOS], tokenizer.encode(p)]) for p in PROMPTS]
    asked = [render([("user", p)], tokenizer, prompt=True)[0] for p in PROMPTS]
    out: list[dict[str, Any]] = []
    for name, params, prompts, told in (("base", base, plain, tokenizer.decode),
                                        ("chat", chat, asked, lambda ids: read(ids, tokenizer))):
        found = sample(model, params, prompts * EACH, LONGEST, seed=0, temperature=0.8)
        for n, ids in enumerate(found):
            out.append({"model": name, "prompt": PROMPTS[n % len(PROMPTS)],
                        "text": told(ids), "tokens": len(ids),
                        "ended": bool(len(ids) and ids[-1] == END)})
    files.write_json(path, {"samples": out})
