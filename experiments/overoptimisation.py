"""Does optimising a learnt reward too far lose the true one, and can the peak be forecast?

question   Gold (text/rubric.py) and proxy against d = sqrt(KL) for best-of-n, by reward-model size
           and number of pairs: fits of R = d (a - b d) and R = d (a - b ln d) (Gao et al.,
           2210.10760), which holds better, and the gold peak of a held-out, larger reward model
           forecast from the smaller ones before it is trained.
command    python experiments/overoptimisation.py --sft RUN --trunks SMALL.. LARGE --out DIR
cost       about 20 minutes on two cores for the default study's models
expected   proxies of few pairs peak within n = 256, then lose gold; the forecast within .25
result     not recorded yet

KL of best-of-n is its bound ln n - (n - 1) / n. R is gold above the tuned model's mean.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro
from lr_by_width import arguments, guarded, write_table

from tinylm import files, machine
from tinylm.config import BadInput
from tinylm.evaluate import pool
from tinylm.evaluate.rates import best_of_n
from tinylm.look import progress
from tinylm.stages.reward import RewardConfig, reward, scored
from tinylm.text import rubric, tasks
from tinylm.text.preferences import Ranked
from tinylm.train import checkpoint
from tinylm.train.optim import OptimConfig
from tinylm.verbs import folders, models

NS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LAWS = {"d (a - b d)": lambda d: np.stack([d, -d * d], 1),
        "d (a - b ln d)": lambda d: np.stack([d, -d * np.log(d)], 1)}


@dataclass
class Args:
    """Train reward models of several sizes on noisy rankings; select by each; fit and forecast."""

    sft: Path
    """the tuned run that is sampled"""
    trunks: tuple[Path, ...]
    """runs of its tokenizer that become reward models, smallest first; the last is held out"""
    out: Path
    """folder of the reward models"""
    pairs: tuple[int, ...] = (128, 512, 2048)
    """ranked pairs that each is trained on"""
    seeds: int = 3
    """of labels, head and order"""
    prompts: int = 64
    """test prompts that best-of-n is measured on"""
    samples: int = 256
    """responses to each"""
    sharpness: float = 2.0
    """a pair is labelled right with p = sigmoid(sharpness x gap of gold)"""
    budget: int = 24
    """tokens of a response at most"""
    epochs: float = 2.0
    """over the pairs"""
    results: Path | None = None
    """folder for the table and the summary"""


def main(args: Args) -> int:
    """Measure all but the largest, forecast the largest, measure it, score the forecast."""
    if len(args.trunks) < 3:
        raise BadInput(f"{len(args.trunks)} trunks: two sizes are fitted and a third is forecast; "
                       "name 3 or more, smallest first")
    model, _, learnt = models.opened(args.sft, None)
    policy = checkpoint.final_params(args.sft, model)
    train, test = (tasks.draw("sentence", "plain", split, 0, count) for split, count in
                   (("train", 2 * max(args.pairs)), ("test", args.prompts)))
    rankings = pool.sampled(model, policy, learnt, train, 2, args.budget, rubric.gold, 0)
    many = pool.sampled(model, policy, learnt, test, args.samples, args.budget, rubric.gold, 1)
    table, curves = [], {}
    for place in args.trunks[:-1]:
        curves[place] = [row for pairs in args.pairs for seed in range(args.seeds)
                         for row in measured(args, place, pairs, seed, rankings, many)]
        table += curves[place]
    said = forecast(args, [row for rows in curves.values() for row in rows], size(args.trunks[-1]))
    files.write_json(args.out / "forecast.json", said)  # before the largest is trained
    last = [row for pairs in args.pairs for seed in range(args.seeds)
            for row in measured(args, args.trunks[-1], pairs, seed, rankings, many)]
    table += last
    summary = {"gold_mean": float(many.gold.mean()), "gold_sd": float(many.gold.std()),
               "forecast": said, "fits": fitted(table),
               "outcome": [{**row, **outcome(last, row["pairs"])} for row in said["peaks"]]}
    for row in summary["outcome"]:
        progress.say(f"{row['pairs']} pairs: best gold forecast {row['gold_peak']:.3f} above the "
                     f"tuned model's mean, measured {row['measured_peak']:.3f}")
    if args.results:
        head = ("params", "pairs", "seed", "accuracy", "ceiling", "n", "kl_nats", "gold", "proxy",
                "falls", "falls_low95")
        write_table(args.results / "overoptimisation.csv", head, table)
        files.write_json(args.results / "overoptimisation.json", summary)
    return 0


def size(place: Path) -> int:
    """Give a trunk's parameters, body and head."""
    found = folders.finished(place)["params"]
    return found["head"] + found["blocks"]


def measured(args: Args, place: Path, pairs: int, seed: int, rankings: pool.Pool,
             many: pool.Pool) -> list[tuple]:
    """Train one reward model on so many pairs and select by it; give a row for each n."""
    some = pool.Pool(*(of[seed::args.seeds][:pairs] for of in rankings))
    train, _ = pool.labelled(some, args.sharpness, seed)
    rest = pool.Pool(*(of[-len(rankings.gold) // 8:] for of in rankings))
    held, ceiling = pool.labelled(rest, args.sharpness, 1000 + seed)
    model, tokens, _ = models.opened(place, None)
    rows = min(16, 1 << (len(train.tokens).bit_length() - 1))
    config = RewardConfig(model, OptimConfig(lr=1e-3, decay=1.0), folders.finished(place)["id"],
                          f"{train.id}{held.id}", max(1, round(args.epochs * pairs / rows)), rows,
                          ceiling=ceiling, seed=seed)
    plan = machine.plan_for(rows, model.T, model.D, *machine.survey())
    folder = args.out / f"{place.name}-{pairs}-{seed}"
    record = reward(folder, config, place, train, held, tokens.tokenizer_id, tokens.folder.parent,
                    plan)
    flat = Ranked(many.rollout.tokens[:, None], many.rollout.mask[:, None],
                  np.zeros((many.gold.size, 1, 1), np.float32))
    told = scored(model, checkpoint.final_scorer(folder, model), flat)[:, 0]
    proxy = jnp.where(many.ended > 0, told.reshape(many.gold.shape), -1e3)
    gold, shown = jnp.asarray(many.gold), jnp.where(many.ended > 0, proxy, proxy.min())
    ns = [n for n in NS if n <= args.samples]
    golds = np.stack([np.asarray(best_of_n(proxy, gold, n)) for n in ns]) - many.gold.mean()
    drop, low = falls(golds)
    return [(size(place), pairs, seed, record["preferences"]["accuracy"], ceiling, n,
             math.log(n) - (n - 1) / n, float(curve.mean()),
             float(best_of_n(proxy, shown, n).mean()), drop, low)
            for n, curve in zip(ns, golds, strict=True)]


def falls(golds: np.ndarray) -> tuple[float, float]:
    """Give how far gold [n, prompts] falls from its best n to the last, and the 95% lower bound.

    Over-optimised is what falls by more than its bound explains: low above 0.
    """
    apart = golds[golds.mean(1).argmax()] - golds[-1]
    return float(apart.mean()), float(apart.mean() - 1.96 * apart.std(ddof=1)
                                      / math.sqrt(golds.shape[1]))


def fitted(table: list[tuple]) -> list[dict[str, Any]]:
    """Fit both laws to each reward model's gold; give a, b and the rms of what is left."""
    out = []
    for key in sorted({row[:3] for row in table}):
        rows = [row for row in table if row[:3] == key and row[5] > 1]
        d, gold = (np.array([f(row) for row in rows]) for f in (lambda r: math.sqrt(r[6]),
                                                                lambda r: r[7]))
        for name, columns in LAWS.items():
            (a, b), *_ = np.linalg.lstsq(columns(d), gold, rcond=None)
            left = gold - columns(d) @ (a, b)
            out.append({"params": key[0], "pairs": key[1], "seed": key[2], "law": name,
                        "a": float(a), "b": float(b), "rms": float(np.sqrt(np.mean(left**2)))})
    return out


def forecast(args: Args, table: list[tuple], params: int) -> dict[str, Any]:
    """Forecast the best gold within reach of the largest reward model, from straight lines.

    a and b of the law that leaves less are linear in ln params for each number of pairs.
    """
    fits = fitted(table)
    left = {name: float(np.mean([f["rms"] for f in fits if f["law"] == name])) for name in LAWS}
    better, reach = min(left, key=left.get), np.sqrt([math.log(n) - (n - 1) / n for n in NS[1:]])
    peaks = []
    for pairs in args.pairs:
        some = [f for f in fits if f["law"] == better and f["pairs"] == pairs]
        x = np.log([f["params"] for f in some])
        a, b = (np.polyval(np.polyfit(x, [f[k] for f in some], 1), math.log(params))
                for k in ("a", "b"))
        curve = LAWS[better](reach) @ (a, b)
        peaks.append({"pairs": pairs, "a": float(a), "b": float(b),
                      "gold_peak": float(curve.max()), "at_d": float(reach[curve.argmax()])})
    return {"params": params, "law": better, "rms_by_law": left, "peaks": peaks}


def outcome(table: list[tuple], pairs: int) -> dict[str, float]:
    """Give the best gold of the mean curve over seeds, where it lies, and the spread of seeds."""
    rows = [row for row in table if row[1] == pairs and row[5] > 1]
    curves = np.array([[row[7] for row in rows if row[2] == seed]
                       for seed in sorted({row[2] for row in rows})])
    mean = curves.mean(0)
    d = np.sqrt([row[6] for row in rows if row[2] == rows[0][2]])
    return {"measured_peak": float(mean.max()), "measured_at_d": float(d[mean.argmax()]),
            "seeds_sd": float(curves[:, mean.argmax()].std(ddof=1)) if len(curves) > 1 else 0.0}


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
