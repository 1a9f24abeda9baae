"""Reward model, DPO, PPO and GRPO as runs: they learn what is asked, stop in words, resume."""

import signal
from dataclasses import replace

import numpy as np
import pytest
from test_stages_pretrain import PLAN, bits, config, data  # noqa: F401  (fixtures)
from test_stages_sft import packed, parent  # noqa: F401  (fixtures)

from tinylm import files, machine
from tinylm.config import BadInput
from tinylm.stages.dpo import DpoConfig, dpo
from tinylm.stages.policy import PolicyConfig, policy, prompts_id
from tinylm.stages.reward import RewardConfig, calibration, reward, scored
from tinylm.stages.sft import SftConfig, conversations_id, sft
from tinylm.text import prepare
from tinylm.text.chat import render
from tinylm.text.preferences import Preference, ranked, split
from tinylm.train import checkpoint
from tinylm.train.optim import OptimConfig
from tinylm.train.run import Stopped

WORDS = ("ba", "ko", "ni", "du", "ge", "fo", "mi", "ra")


@pytest.fixture(scope="session")
def learnt(data):  # noqa: F811
    return prepare.open_tokenizer(data.folder.parent)


@pytest.fixture(scope="session")
def rankings(learnt, config):  # noqa: F811
    """Whoever answers "ba" is preferred to "ko", and that to "ni"."""
    told = [Preference((("user", f"say {a} {b}"),), ("ba", "ko", "ni")[: 2 + n % 2])
            for n, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)]
    return [ranked(side, learnt, config.model.T)[0] for side in split(told, 0.25)]


@pytest.fixture(scope="session")
def judged(tmp_path_factory, rankings, parent, data, config):  # noqa: F811
    train, held = rankings
    wanted = RewardConfig(config.model, OptimConfig(lr=5e-3, decay=1.0), "p",
                          f"{train.id}{held.id}", steps=60, prompts=8)
    folder = tmp_path_factory.mktemp("reward") / "run"
    record = reward(folder, wanted, parent, train, held, data.tokenizer_id, data.folder.parent,
                    PLAN)
    return folder, wanted, record


def test_a_reward_model_ranks_prompts_it_has_not_seen(judged, rankings, config):  # noqa: F811
    folder, _, record = judged
    told = record["preferences"]
    assert told["accuracy"] > 0.95 > told["low95"] and told["nats_per_pair"] < 0.3
    scores = scored(config.model, checkpoint.final_scorer(folder, config.model), rankings[0])
    real = scores[rankings[0].mask.max(axis=2) > 0]
    np.testing.assert_allclose((real.mean(), real.std()), (0, 1), atol=1e-4)
    with pytest.raises(BadInput, match="reward model and says nothing"):
        checkpoint.final_params(folder, config.model)


def test_a_score_depends_on_neither_padding_nor_company(judged, rankings, config):  # noqa: F811
    params = checkpoint.final_scorer(judged[0], config.model)
    held = rankings[1]
    wide = held._replace(tokens=np.pad(held.tokens, ((0, 0), (0, 0), (0, 5)), constant_values=9),
                         mask=np.pad(held.mask, ((0, 0), (0, 0), (0, 5))))
    alone = held._replace(tokens=held.tokens[3:4], mask=held.mask[3:4], wins=held.wins[3:4])
    base = scored(config.model, params, held)
    np.testing.assert_allclose(scored(config.model, params, wide), base, atol=1e-5)
    np.testing.assert_allclose(scored(config.model, params, alone)[0], base[3], atol=1e-5)


def test_calibration_counts_every_pair_once_from_its_surer_side():
    found = calibration(np.array([3.0, -3.0, 0.1, 0.1, 0.0]))
    assert [(b["pairs"], b["right"]) for b in found] == [(3, 2.5 / 3), (2, 0.5)]
    assert found[1]["thought"] == pytest.approx(1 / (1 + np.exp(-3.0)))


def test_another_ranking_than_the_config_s_is_refused(tmp_path, judged, rankings, parent,  # noqa: F811
                                                      data):  # noqa: F811
    with pytest.raises(BadInput, match="the config is for rankings"):
        reward(tmp_path / "run", judged[1], parent, *rankings[::-1], data.tokenizer_id,
               data.folder.parent, PLAN)
    assert not list((tmp_path / "run").glob("*.json"))


def test_dpo_prefers_the_preferred_and_starts_at_ln_two(tmp_path, rankings, parent, data,  # noqa: F811
                                                        config):  # noqa: F811
    train, held = rankings
    wanted = DpoConfig(config.model, OptimConfig(lr=3e-3, decay=1.0), "p", f"{train.id}{held.id}",
                       steps=30, pairs=8)
    record = dpo(tmp_path / "run", wanted, parent, train, held, data, PLAN)
    told, rows = record["preferences"], files.read_lines(tmp_path / "run/metrics.jsonl")
    assert told["accuracy"] > 0.95 and told["nats_per_pair"] < 0.5
    assert told["chosen_moved_nats"] > told["rejected_moved_nats"]
    one = replace(wanted, steps=1, optim=replace(wanted.optim, lr=1e-9))
    still = dpo(tmp_path / "still", one, parent, train, held, data, PLAN)
    assert still["preferences"]["nats_per_pair"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[-1]["train/nats_per_pair"] < rows[0]["train/nats_per_pair"]


PLANS = machine.Plan(devices=2, micro=4, checkpoint_every=4)
ASKED = ("ba", "ko", "ni", "du")


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, parent, packed, data, config):  # noqa: F811
    """A run that answers "say X" with X, or with another of the four words."""
    wanted = SftConfig(config.model, parent="p", data_id=conversations_id(*packed), steps=40,
                       rows=4)
    folder = tmp_path_factory.mktemp("tuned") / "run"
    sft(folder, wanted, parent, *packed, data, PLAN)
    return folder


@pytest.fixture(scope="session")
def prompts(learnt):
    return [render([("user", f"say {a}")], learnt, prompt=True)[0] for a in ASKED]


@pytest.fixture(scope="session")
def wants_ko(learnt):
    """A judge that pays for one word, whatever was asked."""
    return lambda rolled, asked: np.array(
        [learnt.decode(ids) == " ko" for ids in rolled.responses], np.float32)


def wanted_of(method, config, prompts, **dials):  # noqa: F811
    optim = OptimConfig(lr=4e-3, decay=1.0, warmup=0.0)
    some = {"rollouts": 20, "prompts": 4, "responses": 8, "budget": 12, "beta": 0.01,
            "truncated": -0.5} | dials
    return PolicyConfig(optim=optim, method=method, model=config.model, parent="p", judge="ko",
                        data_id=prompts_id(prompts), **some)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dials"), [
    ("grpo", {"kl": "k2"}), ("ppo", {"epochs": 2, "minibatches": 2})])
def test_a_policy_learns_what_its_judge_pays_and_resumes_to_the_same_bits(
        tmp_path, method, dials, tuned, data, config, prompts, wants_ko):  # noqa: F811
    wanted, rows = wanted_of(method, config, prompts, **dials), []
    record = policy(tmp_path / "whole", wanted, tuned, prompts, wants_ko, data, PLANS)
    first, last = record["policy"]["first"], record["policy"]["last"]
    assert last["train/reward"] > first["train/reward"] + 0.3 and not record["ended"]
    assert first["train/kl_nats"] == 0 < last["train/kl_nats"]
    assert first["train/clipped"] == 0 if wanted.updates == 1 else True
    assert last["train/ended_share"] > first["train/ended_share"]

    def stop(step, loss):
        rows.append(step)
        if len(rows) == 7:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        policy(tmp_path / "cut", wanted, tuned, prompts, wants_ko, data, PLANS, stop)
    policy(tmp_path / "cut", wanted, tuned, prompts, wants_ko, data, PLANS)
    assert bits(tmp_path / "cut", config) == bits(tmp_path / "whole", config)


@pytest.mark.parametrize(("dial", "said"), [
    ({"max_kl": 0.01}, "kl_nats"), ({"min_entropy": 9.0}, "entropy_nats"),
    ({"max_truncated": 0.0, "budget": 1}, "truncated_share")])
def test_a_guard_ends_the_run_and_says_which(tmp_path, dial, said, tuned, data,  # noqa: F811
                                             config, prompts, wants_ko):  # noqa: F811
    wanted = wanted_of("grpo", config, prompts, **dial)
    record = policy(tmp_path / "run", wanted, tuned, prompts, wants_ko, data, PLANS)
    assert said in record["ended"] and record["status"] == "ok"
    assert record["policy"]["last"]["step"] < 20
    again = policy(tmp_path / "run", wanted, tuned, prompts, wants_ko, data, PLANS)
    assert again == record


def test_a_guard_whose_process_dies_comes_again(tmp_path, tuned, data, config,  # noqa: F811
                                                prompts, wants_ko, monkeypatch):
    wanted, write = wanted_of("grpo", config, prompts, min_entropy=9.0), files.write_json

    def dying(path, value):
        write(path, value)
        if path.name == "guard.json":
            raise SystemExit

    monkeypatch.setattr(files, "write_json", dying)
    with pytest.raises(SystemExit):
        policy(tmp_path / "cut", wanted, tuned, prompts, wants_ko, data, PLANS)
    monkeypatch.undo()
    cut, whole = (policy(tmp_path / name, wanted, tuned, prompts, wants_ko, data, PLANS)
                  for name in ("cut", "whole"))
    assert cut["ended"] == whole["ended"] and "entropy_nats" in cut["ended"]
    assert cut["policy"] == whole["policy"]


@pytest.mark.parametrize(("score", "cut"), [(1.0, -0.5), (-2.0, -2.0)])
def test_what_is_cut_off_is_paid_the_penalty_at_most_and_the_loss_sees_the_sampler_s_temperature(
        tmp_path, tuned, data, config, prompts, score, cut):  # noqa: F811
    wanted = wanted_of("grpo", config, prompts, rollouts=1, temperature=1.6, budget=3, beta=0.0,
                       kl="k2")
    record = policy(tmp_path / "run", wanted, tuned, prompts,
                    lambda rolled, asked: np.full(len(asked), score, np.float32), data, PLANS)
    first = record["policy"]["first"]
    ended = first["train/ended_share"]
    assert 0 < ended < 1
    assert first["train/reward"] == pytest.approx(score * ended + cut * (1 - ended), abs=1e-5)
    assert first["train/clipped"] == 0
    assert first["train/old_kl_nats"] == pytest.approx(0, abs=1e-4)


def test_impossible_dials_are_refused_in_words(config, prompts):  # noqa: F811
    for dials, words in (({"minibatches": 5}, "do not divide into minibatches=5"),
                         ({"responses": 1}, "no baseline"), ({"budget": 0}, "budget=0")):
        with pytest.raises(BadInput, match=words):
            wanted_of("grpo", config, prompts, **dials)
    with pytest.raises(BadInput, match="PPO's KL is in the reward"):
        wanted_of("ppo", config, prompts, kl="k2")
