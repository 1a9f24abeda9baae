"""What alignment came to, in lines and tables: reward models, policies, the table of all stages."""

import math
from typing import Any

COLUMNS = (("exact (macro)", lambda r: f"{r['macro']:.1%}"),
           ("exact", lambda r: rate(r["micro"])), ("stops", lambda r: rate(r["stops"])),
           ("leaks a role", lambda r: rate(r["leaks"])),
           ("truncated", lambda r: rate(r["truncated"])),
           ("repeats", lambda r: rate(r["repeats"])),
           ("obeys the system", lambda r: rate(r["obeyed"])),
           ("obeys and is right", lambda r: rate(r["rules_and_answers"])),
           ("grade of sentences", lambda r: f"{r['grade']:.3f}"),
           ("sentences that win", lambda r: rate(r["wins"])),
           ("bits a byte", lambda r: f"{r['bits_per_byte']:.4f}"),
           ("KL, nats", lambda r: "at most " * (r.get("best_of", 1) > 1) + f"{r['kl_nats']:.3f}"),
           ("entropy, nats", lambda r: "-" if r["entropy_nats"] is None
            else f"{r['entropy_nats']:.3f}"),
           ("tokens", lambda r: f"{r['length_tokens']:.1f}"))


def table(rows: dict[str, dict[str, Any]], judge: dict[str, Any] | None = None) -> str:
    """Lay the suite's rows out, a column a run; wins and KL are against the first.

    `judge` is what the reward model behind the scores is known to be (see `of_judge`).
    """
    names, wide = list(rows), 24
    lines = [" " * 22 + "".join(name[-wide + 2:].rjust(wide) for name in names)]
    lines += [title.ljust(22) + "".join(show(rows[name]).rjust(wide) for name in names)
              for title, show in COLUMNS]
    if "proxy" in rows[names[0]]:
        lines.append("reward model's score".ljust(22) + "".join(
            ("none ends" if (told := rows[name]["proxy"]) is None else f"{told:.3f}").rjust(wide)
            for name in names))
    families = rows[names[0]]["exact"]
    lines += [f"  {family}".ljust(22) + "".join(
        rate(rows[name]["exact"][family]).rjust(wide) for name in names) for family in families]
    lines.append("rates with 95% intervals; wins and KL against the first column")
    if any(row.get("best_of", 1) > 1 for row in rows.values()):
        lines.append("answers are the likeliest tokens, of best-of-n samples at temperature 1")
    if judge:
        lines.append(f"the reward model is right on {judge['accuracy']:.1%} [{judge['low95']:.1%}, "
                     f"{judge['high95']:.1%}] of {judge['pairs']} held-out pairs"
                     + (f", a perfect judge on {judge['ceiling']:.1%}" * bool(judge["ceiling"])))
    return "\n".join(lines)


def paradigms(found: dict[str, Any]) -> str:
    """Lay out how often the good sentence of a minimal pair won."""
    lines = [f"{name:>44} {rate(row)}" for name, row in found["paradigms"].items()]
    return "\n".join([*lines, f"mean over {len(lines)} paradigms {found['mean']:.1%}, of all pairs "
                      f"{rate(found['all'])} (chance 50%); {found['too_long']} pairs too long"])


def judged(record: dict[str, Any]) -> str:
    """Say how good a reward model is, beside what a perfect judge of these labels would be."""
    if not (p := record["preferences"]):
        return f"{record['id']}: {record['status']}"
    ceiling = record["config"]["ceiling"]
    lines = [f"{record['id']}: right on {p['accuracy']:.1%} [{p['low95']:.1%}, {p['high95']:.1%}] "
             f"of {p['pairs']} held-out pairs, mean over their {p['prompts']} prompts"
             + (f" (a perfect judge: {ceiling:.1%})" if ceiling else "")
             + f", {p['nats_per_pair']:.4f} nats a pair ({math.log(2):.4f} knows nothing)"]
    lines += [f"  where it is {b['thought']:.0%} sure it is right on {b['right']:.0%} "
              f"({b['pairs']} pairs)" for b in p["calibration"]]
    return "\n".join(lines)


def of_judge(record: dict[str, Any]) -> dict[str, Any]:
    """Give what a table says of the reward model behind its scores."""
    held = {k: record["preferences"][k] for k in ("accuracy", "low95", "high95", "pairs")}
    return {"id": record["id"], **held, "ceiling": record["config"]["ceiling"]}


def preferred(record: dict[str, Any]) -> str:
    """Say what preference optimisation did to held-out pairs."""
    if not (p := record["preferences"]):
        return f"{record['id']}: {record['status']}"
    return (f"{record['id']}: {p['nats_per_pair']:.4f} nats a held-out pair ({math.log(2):.4f} at "
            f"the reference), right on {p['accuracy']:.1%} of {p['pairs']}; log-probability of "
            f"chosen {p['chosen_moved_nats']:+.2f}, of rejected {p['rejected_moved_nats']:+.2f} "
            f"nats; base text {record['loss']['bits_per_byte']:.4f} bits a byte")


def optimised(record: dict[str, Any], seconds: dict[str, float]) -> str:
    """Say what policy optimisation did, from its first rollout to its last, and how its time went
    (sweep/times.spent).
    """
    first, last = record["policy"]["first"], record["policy"]["last"]
    lines = [f"{record['id']}: {record['status']}" + (f", ended by its guard ({record['ended']})"
                                                     if record["ended"] else "")]
    for name, unit in (("reward", ""), ("kl_nats", " nats from the reference"),
                       ("entropy_nats", " nats a token"), ("ended_share", ""),
                       ("length_tokens", " tokens")):
        a, b = (row[f"train/{name}"] for row in (first, last))
        lines.append(f"  {name.split('_')[0]}: {_or_none(a)} -> {_or_none(b)}{unit}")
    if record["loss"]:
        lines.append(f"  base text: {record['loss']['bits_per_byte']:.4f} bits a byte")
    rest = seconds["wall"] - seconds["sample"] - seconds["compute"]
    lines.append(f"  sampling took {seconds['sample']:.1f} s, learning {seconds['compute']:.1f}, "
                 f"the rest {rest:.1f}")
    return "\n".join(lines)


def _or_none(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def rate(found: dict[str, float] | None) -> str:
    """Write a share with its 95% interval; a dash for none of none."""
    if found is None:
        return "-"
    return f"{found['rate']:.1%} [{found['low95']:.0%}, {found['high95']:.0%}]"
