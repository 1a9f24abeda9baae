"""A finished study's folder, read through the readers of its parts; what is missing says so."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tinylm import files
from tinylm.config import BadInput
from tinylm.laws.forms import Frontier
from tinylm.train import run

Record = dict[str, Any]


class Level(NamedTuple):
    """A baseline on the loss axis and where a frontier comes down to it."""

    name: str
    nats: float
    bits: float
    stderr: float  # of nats, by document
    flops: dict[str, float]  # by law: the budget whose best loss this is; infinity for never


@dataclass(frozen=True)
class Study:
    """Where a study lies; every reader raises BadInput with the reason for what is not there."""

    folder: Path

    def part(self, name: str) -> Any:
        """Read one JSON file of the study."""
        return files.read_json(self.folder / name)

    def optional(self, name: str, absent: Any) -> Any:
        """Read one JSON file, or give `absent` where the study has none."""
        return self.part(name) if (self.folder / name).exists() else absent

    def tuning(self) -> list[dict[str, Any]]:
        """Read the rate check, a verdict a size; empty where the study made none."""
        return self.optional("tuning.json", {"sizes": []})["sizes"]

    def records(self, kind: str) -> list[Record]:
        """Read the records of a list of runs (sweep, tuning, position), least compute first."""
        return run.table(p.parent for p in sorted((self.folder / kind).glob("*/record.json")))

    def record(self, name: str) -> Record:
        """Read the record of one run (target, chat)."""
        found = run.record(self.folder / name)
        if found is None or found["loss"] is None:
            raise BadInput(f"the {name} run has no {'loss' if found else 'record'}")
        return found

    def fitted(self, name: str) -> dict[str, Any]:
        """Read one fit of law.json; a refused one raises its reason."""
        found = self.part("law.json")[name]
        if "refused" in found:
            raise BadInput(f"no fit of {name.replace('_', ' with ')}: {found['refused']}")
        return found

    def frontiers(self) -> dict[str, Frontier]:
        """Give the frontier laws by name; refused ones are left out."""
        laws = self.part("law.json")
        fits = {"power law": laws["frontier"], "law with floor": laws["frontier_floor"]}
        return {k: Frontier(f["E"], f["A"], f["gamma"]) for k, f in fits.items()
                if "refused" not in f}

    @property
    def bits_per_nat(self) -> float:
        """Bits a byte over nats a token on this held-out text."""
        return self.part("law.json")["bits_per_nat"]

    def levels(self) -> list[Level]:
        """Give the n-gram tables, highest loss first, with the budgets that reach them."""
        kept, law = self.part("baselines.json"), self.part("law.json")
        if kept["eval_id"] != law["eval_id"]:
            raise BadInput("the n-gram tables and the runs were evaluated on different sets")
        laws = self.frontiers()
        out = [Level(f"{order}-gram", t["nats_per_token"], t["bits_per_byte"], t["stderr"],
                     {k: f.flops_at(t["nats_per_token"]) for k, f in laws.items()})
               for order, t in kept["tables"].items()]
        return sorted(out, key=lambda level: -level.nats)
