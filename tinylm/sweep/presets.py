"""The studies that can be run: their budgets and seeds are constants, never read from a clock."""

from dataclasses import dataclass, field

from tinylm.config import require
from tinylm.model.decoder import ModelConfig
from tinylm.stages.policy import Dials
from tinylm.train.optim import OptimConfig


@dataclass(frozen=True)
class RateRule:
    """lr (at width 64) = lr0 (tokens / tokens0)^-horizon.

    Fitted at two widths by two lengths: lr0 6.2e-3 [5.0e-3, 7.0e-3], horizon .07 [-.06, .36]. This
    rule costs less than .01 nats at each of them (experiments/results/rate_rule.json).
    """

    lr0: float = 7e-3
    """peak rate at tokens0"""
    tokens0: float = 7e5
    """tokens of the run that lr0 was tuned on"""
    horizon: float = 0.15
    """exponent by which longer runs want smaller rates"""

    def __post_init__(self):
        require("lr0", self.lr0, 1e-9, 1e3)
        require("tokens0", self.tokens0, 1, 1e30)
        require("horizon", self.horizon, -2, 2)

    def __call__(self, tokens: float) -> float:
        """Give the rate for a run of that many tokens."""
        return self.lr0 * (tokens / self.tokens0) ** -self.horizon


@dataclass(frozen=True)
class Study:
    """One study: text to forecast to chat."""

    name: str
    """of the preset"""
    budgets: tuple[float, ...]
    """FLOPs of the isoFLOP curves"""
    target: float
    """FLOPs of the held-out run"""
    widths: tuple[int, ...]
    """the ladder"""
    base: ModelConfig = field(default_factory=ModelConfig)
    """the model whose width the ladder changes"""
    per_budget: int = 7
    """sizes a budget"""
    spread: float = 4.0
    """sizes lie within this factor of the expected optimum"""
    batch: int = 512
    """tokens a step"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """but for its rate, which the rule sets"""
    rule: RateRule = field(default_factory=RateRule)
    """rate by training tokens"""
    tuning: tuple[float, ...] = ()
    """budgets at whose expected optimum the rate is checked"""
    position_flops: float = 1e11
    """FLOPs of the position-weights baseline"""
    sft: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, decay=1.0))
    """of instruction tuning"""
    sft_steps: int = 400
    """steps of instruction tuning"""
    sft_tasks: int = 0
    """generated instruction tasks among its conversations"""
    replay: float = 0.0
    """share of its rows that are base text"""
    ranked: int = 0
    """tasks whose sampled answers a reward model is trained on"""
    policy: Dials | None = None
    """of policy optimisation against that reward model; none: no alignment"""
    family: str = "sentence"
    """of the tasks that are ranked and optimised"""
    asked: int = 50
    """tasks a family in the table of base, tuned and optimised model"""
    order: int = 5
    """longest n-gram table"""
    rate: float = 1e11
    """FLOP/s to expect of the whole machine, for --dry-run"""


SMOKE = Study(
    name="smoke", budgets=(2e9, 4e9, 8e9), target=4e10, widths=(8, 12, 16, 24),
    base=ModelConfig(V=384, T=64), per_budget=4, spread=6.0, batch=256, position_flops=4e9,
    sft_steps=40, order=4)

# V: bits a byte still fall at 4096 (experiments/results/vocab_size.csv), but there the smallest
# budgets would want widths below 8. One depth and two heads keep the ladder free of kinks.
LAPTOP = Study(
    name="laptop", budgets=(1.5e11, 3.6e11, 8.6e11, 2e12, 4.8e12), target=4e13,
    widths=(8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 56, 64, 72, 80, 96, 112, 128, 144, 160,
            176, 192),
    base=ModelConfig(V=2048, rope_theta=1e3), per_budget=6, spread=3.0,
    tuning=(1.5e11, 4.8e11, 1.5e12), position_flops=1e12,
    sft=OptimConfig(kind="muon", lr=1.7e-2, decay=1.0), sft_steps=1400, sft_tasks=40000,
    replay=0.25, ranked=1500,
    policy=Dials(optim=OptimConfig(lr=1e-3, decay=1.0), rollouts=40, beta=0.15))

# Not yet run whole. Overnight's rate is the laptop's by the square root of the batches' ratio;
# accelerator's stays below what that would give, 5.6e-2.
OVERNIGHT = Study(
    name="overnight", budgets=(4e12, 1.1e13, 3e13, 8e13, 2e14), target=1.2e15,
    widths=tuple(range(16, 800, 16)), base=ModelConfig(V=2048, L=4, H=4, T=256), batch=2048,
    rule=RateRule(lr0=1.4e-2), tuning=(4e12, 1.1e13, 3e13), position_flops=1e12, sft_steps=2000)

ACCELERATOR = Study(
    name="accelerator", budgets=(6e14, 1.9e15, 6e15, 1.9e16, 6e16), target=4e17,
    widths=tuple(range(64, 3072, 32)), base=ModelConfig(V=4096, L=8, H=8, T=512, compute="bf16"),
    batch=32768, rule=RateRule(lr0=2e-2), tuning=(6e14, 1.9e15, 6e15), position_flops=1e14,
    sft_steps=2000, rate=1e14)

PRESETS = {study.name: study for study in (SMOKE, LAPTOP, OVERNIGHT, ACCELERATOR)}
