"""The verbs of the command line: each a thin call of library functions with the same defaults."""

from tinylm.verbs.care import bench, report, verify
from tinylm.verbs.laws import check, fit, forecast, plan
from tinylm.verbs.runs import evaluate, sft, sweep, tokenizer, train
from tinylm.verbs.talk import chat, sample

VERBS = {"tokenizer": tokenizer, "train": train, "sweep": sweep, "fit": fit, "forecast": forecast,
         "plan": plan, "check": check, "sft": sft, "eval": evaluate, "sample": sample, "chat": chat,
         "bench": bench, "report": report, "verify": verify}
