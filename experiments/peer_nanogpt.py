"""Serve a checkout of nanoGPT to peers.py: one JSON line in, one number out. Needs torch alone.

Started by peers.py as `python peer_nanogpt.py CHECKOUT THREADS [CORE]`, by device_checks.py too,
whose requests name a device, "cuda".
"""

import json
import math
import os
import sys
import time

if len(sys.argv) > 3:
    os.sched_setaffinity(0, (int(sys.argv[3]),))
os.environ["OMP_NUM_THREADS"] = sys.argv[2]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads must not slow the other side

import numpy as np  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, sys.argv[1])
from model import GPT, GPTConfig  # noqa: E402

ANSWERS, sys.stdout = sys.stdout, sys.stderr  # nanoGPT prints
torch.set_num_threads(int(sys.argv[2]))
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as its train.py


class Trainer:
    """nanoGPT's step: autocast, gradients summed over micro-batches, clipped at 1, AdamW."""

    def __init__(self, shape, rows, tokens, how, rate=1e-3):
        torch.manual_seed(0)
        self.device = how.get("device", "cpu")
        config = GPTConfig(block_size=shape["T"], vocab_size=shape["V"], bias=False,
                           n_layer=shape["L"], n_head=shape["H"], n_embd=shape["D"])
        self.model = GPT(config).to(self.device)
        made = self.model.configure_optimizers(0.1, rate, (0.9, 0.95), self.device)
        self.optimiser = torch.optim.AdamW(made.param_groups, lr=rate, betas=(0.9, 0.95),
                                           fused=how["fused"])
        self.forward = torch.compile(self.model) if how["compile"] else self.model
        self.batches = torch.from_numpy(np.load(tokens).astype(np.int64)).to(self.device)
        self.micro, self.rows = how["micro"] or rows, rows
        self.dtype = torch.bfloat16 if how["bf16"] else None
        self.tokens = rows * shape["T"]

    def loss(self, part):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype is not None):
            return self.forward(part[:, :-1].contiguous(), part[:, 1:].contiguous())[1]

    def step(self, t):
        batch = self.batches[t % len(self.batches)]
        for part in batch.split(self.micro):
            (self.loss(part) * (len(part) / self.rows)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def rate(self, seconds):
        began, steps = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds or not steps:
            for _ in range(8 if self.device != "cpu" else 1):  # a device must not wait for Python
                self.step(steps)
                steps += 1
            if self.device != "cpu":
                torch.cuda.synchronize()
        return steps * self.tokens / spent


def trained(shape, rows, tokens, heldout, how, rate):
    """Train on every batch once, warmup a tenth, cosine to a tenth; give held-out nats a token."""
    trainer = Trainer(shape, rows, tokens, how, rate)
    steps = len(trainer.batches)
    for t in range(steps):
        warm, along = max(1, steps // 10), t / steps
        scale = min((t + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * along))
        for group in trainer.optimiser.param_groups:
            group["lr"] = rate * scale
        trainer.step(t)
    windows = torch.from_numpy(np.load(heldout).astype(np.int64))
    with torch.no_grad():
        return float(np.average([trainer.loss(part).item() for part in windows.split(rows)],
                                weights=[len(part) for part in windows.split(rows)]))


def generated(shape, rows, seconds):
    """Draw T - 1 tokens after one, `rows` at once; give tokens a second."""
    model = GPT(GPTConfig(block_size=shape["T"], vocab_size=shape["V"], bias=False,
                          n_layer=shape["L"], n_head=shape["H"], n_embd=shape["D"])).eval()
    start, count = torch.zeros((rows, 1), dtype=torch.long), shape["T"] - 1
    return rows * count * times(lambda: model.generate(start, count), seconds)


def multiplied(m, k, n, bf16, seconds):
    """Multiply [m, k] by [k, n] again and again; give GFLOP/s."""
    a, b = (torch.randn(shape, dtype=torch.bfloat16 if bf16 else torch.float32)
            for shape in ((m, k), (k, n)))
    a @ b
    return 2 * m * k * n * times(lambda: a @ b, seconds) / 1e9


def times(work, seconds):
    """Do it again and again for about that long, once at least; give how often a second."""
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not count:
        work()
        count += 1
    return count / spent


HELD = {}
for line in sys.stdin:
    what, *request = json.loads(line)
    if what == "rate":
        *asked, seconds = request
        if (key := json.dumps(asked)) not in HELD:
            HELD[key] = Trainer(*asked)
        answer = HELD[key].rate(seconds)
    else:
        answer = {"loss": trained, "generate": generated, "product": multiplied}[what](*request)
    print(answer, file=ANSWERS, flush=True)
