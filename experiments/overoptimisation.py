"""Does optimising a learnt reward too far lose the true one, and can the peak be forecast?

question   Gold (text/rubric.py) and proxy against d = sqrt(KL) for best-of-n and for GRPO, by
           reward-model size and number of pairs: fits of R = d (a - b d) and R = d (a - b ln d)
           (Gao et al., 2210.10760), which holds better, and the gold peak of a held-out, larger
           reward model forecast from the smaller ones before it is trained.
command    python experiments/overoptimisation.py --sft RUN --trunks SMALL.. LARGE --out DIR
           --pairs 128 1024 --rollouts 30
cost       27 minutes on two cores (four trunks of .1 to 1M parameters)
expected   by reward models of few pairs gold peaks within n = 256, then falls; forecast within .25
result     so it is; best of n: forecast .189 and .285, measured .206 and .306 (128, 1,024 pairs);
           GRPO: .088 and .210, .062 and .119: experiments/results/overoptimisation.json

KL of best-of-n is its bound ln n - (n - 1) / n, of a policy that of its rollouts, exact at each
token. R is gold above the tuned model's mean.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from lr_by_width import arguments, guarded, write_table  # pins the process: before JAX

# isort: split
import jax.numpy as jnp
from scipy import stats

from tinylm import files, machine
from tinylm.config import BadInput
from tinylm.evaluate import pool, suite
from tinylm.evaluate.rates import best_of_n
from tinylm.look import plots, progress
from tinylm.stages import policy as policies
from tinylm.stages.reward import RewardConfig, judge_of, reward
from tinylm.text import rubric, tasks
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
    rollouts: int = 40
    """of each policy that is optimised against a reward model; 0: best-of-n alone"""
    policy_lr: float = 3e-3
    """rate of those policies"""
    policy_beta: float = 0.01
    """reward that a nat of KL costs them: little, so that they go too far"""
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
    ways = ("best_of_n", "grpo") if args.rollouts else ("best_of_n",)
    rows: dict[str, list[tuple]] = {way: [] for way in ways}

    def measure(place: Path) -> None:
        for pairs, seed in itertools.product(args.pairs, range(args.seeds)):
            rows["best_of_n"] += selected(args, place, pairs, seed, rankings, many)
            if args.rollouts:
                rows["grpo"] += optimised(args, place, pairs, seed, train, float(
                    rankings.gold.mean()))

    for place in args.trunks[:-1]:
        measure(place)
    largest = size(args.trunks[-1])
    said = {way: forecast(args, rows[way], largest) for way in ways}
    files.write_json(args.out / "forecast.json", said)  # before the largest is trained
    measure(args.trunks[-1])
    summary = {"gold_mean": float(many.gold.mean()), "gold_sd": float(many.gold.std())}
    for way in ways:
        last = [row for row in rows[way] if row[0] == largest]
        told = [{**row, **outcome(last, row["pairs"])} for row in said[way]["peaks"]]
        summary[way] = {"forecast": said[way], "fits": fitted(rows[way]), "outcome": told,
                        "lost": lost(rows[way], way)}
        for one in summary[way]["lost"]:
            progress.say(f"{way}, {one['params']} parameters, {one['pairs']} pairs: gold falls by "
                         f"{one['falls']:.3f} after its best" + (
                             ", over-optimised" if one["over"] else ", no more than chance"))
        for row in told:
            progress.say(f"{way}, {row['pairs']} pairs: best gold forecast {row['gold_peak']:.3f} "
                         f"above the tuned model's mean, measured {row['measured_peak']:.3f}")
    if args.results:
        head = ("params", "pairs", "seed", "accuracy", "ceiling", "turns", "kl_nats", "gold",
                "proxy", "falls", "falls_low95", "way")
        table = [(*row, way) for way in ways for row in rows[way]]
        write_table(args.results / "overoptimisation.csv", head, table)
        figure = plots.overoptimised([dict(zip(head, row, strict=True)) for row in table])
        files.write_text(args.results / "overoptimisation.svg", plots.standalone(figure))
        files.write_json(args.results / "overoptimisation.json", summary)
    return 0


def size(place: Path) -> int:
    """Give a trunk's parameters, body and head."""
    found = folders.finished(place)["params"]
    return found["head"] + found["blocks"]


def optimised(args: Args, place: Path, pairs: int, seed: int, asked: list[tasks.Task],
              gold_mean: float) -> list[tuple]:
    """Optimise the tuned run's policy against one reward model; give a row for each rollout."""
    model, tokens, learnt = models.opened(args.sft, None)
    judge_model, _, _ = models.opened(place, None)
    folder = args.out / f"{place.name}-{pairs}-{seed}"
    kept = files.read_json(folder / "record.json")
    judge = judge_of(judge_model, checkpoint.final_scorer(folder, judge_model))
    asked, prompts = suite.fitting(model, asked, learnt, args.budget)
    config = policies.PolicyConfig(
        optim=OptimConfig(lr=args.policy_lr, decay=1.0), rollouts=args.rollouts, seed=seed,
        budget=args.budget, beta=args.policy_beta, model=model, judge=kept["id"],
        parent=folders.finished(args.sft)["id"], data_id=policies.prompts_id(prompts))
    plan = machine.plan_for(config.prompts, model.T, model.D, model.compute, *machine.survey())
    out = args.out / f"grpo-{folder.name}"
    policies.policy(out, config, args.sft, prompts, judge, tokens, plan, watch=lambda rolled, who: (
        suite.golds([asked[i] for i in who], suite.texts(rolled, learnt), rolled.ended,
                    rubric.gold)))
    sure = kept["preferences"]
    return [(size(place), pairs, seed, sure["accuracy"], kept["config"]["ceiling"], row["step"],
             row["train/kl_nats"], row["train/gold"] - gold_mean, row["train/reward"], 0.0, 0.0)
            for row in files.read_lines(out / "metrics.jsonl")]


def selected(args: Args, place: Path, pairs: int, seed: int, rankings: pool.Pool,
             many: pool.Pool) -> list[tuple]:
    """Train one reward model on so many pairs and select by it; give a row for each n."""
    some, rest = drawn(rankings, pairs, seed)
    train, _ = pool.labelled(some, args.sharpness, seed)
    held, ceiling = pool.labelled(rest, args.sharpness, 1000 + seed)
    model, tokens, _ = models.opened(place, None)
    rows = min(16, 1 << (len(train.tokens).bit_length() - 1))
    config = RewardConfig(model, OptimConfig(lr=1e-3, decay=1.0), folders.finished(place)["id"],
                          f"{train.id}{held.id}", max(1, round(args.epochs * pairs / rows)), rows,
                          ceiling=ceiling, seed=seed)
    plan = machine.plan_for(rows, model.T, model.D, model.compute, *machine.survey())
    folder = args.out / f"{place.name}-{pairs}-{seed}"
    record = reward(folder, config, place, train, held, tokens.tokenizer_id, tokens.folder.parent,
                    plan)
    judge = judge_of(model, checkpoint.final_scorer(folder, model))
    told = judge(many.rollout, np.arange(many.gold.size)).reshape(many.gold.shape)
    proxy = jnp.where(many.ended > 0, told, told.min())  # what does not end is no answer
    gold = jnp.asarray(many.gold)
    ns = [n for n in NS if n <= args.samples]
    golds = np.stack([np.asarray(best_of_n(proxy, gold, n)) for n in ns]) - many.gold.mean()
    drop, low = falls(golds)
    return [(size(place), pairs, seed, record["preferences"]["accuracy"], ceiling, n,
             math.log(n) - (n - 1) / n, float(curve.mean()),
             float(best_of_n(proxy, proxy, n).mean()), drop, low)
            for n, curve in zip(ns, golds, strict=True)]


def drawn(rankings: pool.Pool, pairs: int, seed: int) -> tuple[pool.Pool, pool.Pool]:
    """Draw the prompts that a reward model trains on; give those that judge it, the same for all.
    """
    kept, rest = pool.split(rankings, 0.125)
    chosen = np.random.default_rng(seed).permutation(len(kept.gold))[:pairs]
    return pool.Pool(*(of[chosen] for of in kept)), rest


def falls(golds: np.ndarray) -> tuple[float, float]:
    """Give how far gold [n, prompts] falls from its best n to the last, and the 95% lower bound.

    Over-optimised is what falls by more than its bound explains: low above 0.
    """
    apart = golds[golds.mean(1).argmax()] - golds[-1]
    return float(apart.mean()), float(apart.mean() - 1.96 * apart.std(ddof=1)
                                      / math.sqrt(golds.shape[1]))


def lost(table: list[tuple], way: str) -> list[dict[str, Any]]:
    """Say of each size and number of pairs whether gold falls after its best, beyond chance.

    Of best-of-n most seeds must fall by more than their own bound. Of a policy the best turn is
    that of the other seeds, so that no luck chooses it, and the fall's lower bound is over seeds.
    """
    out = []
    for params, pairs in sorted({row[:2] for row in table}):
        seeds = [[row for row in table if row[:3] == (params, pairs, seed)]
                 for seed in sorted({row[2] for row in table})]
        if way == "best_of_n":
            drops = np.array([one[0][9] for one in seeds])
            over = np.mean([one[0][10] > 0 for one in seeds]) > 0.5
        else:
            turns = min(map(len, seeds))  # a guard may end a policy early
            gold = np.array([[row[7] for row in one[:turns]] for one in seeds])
            wide = min(3, turns)
            curves = np.array([np.convolve(one, np.full(wide, 1 / wide), "valid") for one in gold])
            drops = np.array([
                one[np.delete(curves, n, 0).mean(0).argmax() if len(curves) > 1 else one.argmax()]
                - one[-1] for n, one in enumerate(curves)])
            over = len(drops) > 1 and drops.mean() > stats.t.ppf(0.975, len(drops) - 1) * (
                drops.std(ddof=1) / math.sqrt(len(drops)))
        out.append({"params": params, "pairs": pairs, "falls": float(drops.mean()),
                    "by_seed": drops.tolist(), "over": bool(over)})
    return out


def fitted(table: list[tuple]) -> list[dict[str, Any]]:
    """Fit both laws to each reward model's gold; give a, b and the rms of what is left."""
    out = []
    for key in sorted({row[:3] for row in table}):
        rows = [row for row in table if row[:3] == key and row[5] > 1 and row[6] > 0]
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

    a and b of the law that leaves less are linear in ln params for each number of pairs; within
    reach is every d that the smaller ones came to.
    """
    fits = fitted(table)
    left = {name: float(np.mean([f["rms"] for f in fits if f["law"] == name])) for name in LAWS}
    better = min(left, key=left.get)
    reach = np.sqrt(sorted({row[6] for row in table if row[5] > 1 and row[6] > 0}))
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
    seeds = [[row for row in rows if row[2] == seed] for seed in sorted({r[2] for r in rows})]
    turns = min(map(len, seeds))  # a guard may end a policy early
    curves = np.array([[row[7] for row in one[:turns]] for one in seeds])
    mean = curves.mean(0)
    d = np.sqrt(np.mean([[row[6] for row in one[:turns]] for one in seeds], axis=0))
    return {"measured_peak": float(mean.max()), "measured_at_d": float(d[mean.argmax()]),
            "seeds_sd": float(curves[:, mean.argmax()].std(ddof=1)) if len(curves) > 1 else 0.0}


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
