"""Instruction tuning: only the assistant is learnt, from the right parent, resumably."""

import numpy as np
import pytest
from test_stages_pretrain import PLAN, config, data  # noqa: F401  (fixtures)

from tinylm import files
from tinylm.config import BadInput
from tinylm.stages.pretrain import pretrain
from tinylm.stages.sft import SftConfig, answers_nll, conversations_id, sft
from tinylm.text import prepare
from tinylm.text.chat import pack, render
from tinylm.train import checkpoint

PROBE = "heldout/answers_nats_per_token"


@pytest.fixture(scope="session")
def parent(tmp_path_factory, data, config):  # noqa: F811
    folder = tmp_path_factory.mktemp("parent") / "run"
    pretrain(folder, config, data, PLAN)
    return folder


@pytest.fixture(scope="session")
def packed(data, config):  # noqa: F811
    learnt = prepare.open_tokenizer(data.folder.parent)
    talks = [[("user", f"say {w}"), ("assistant", w)] for w in ("ba", "ko", "ni", "du") * 8]
    rows = [render(t, learnt) for t in talks]
    return pack(rows[:24], config.model.T), pack(rows[24:], config.model.T)


def test_tuning_lowers_the_loss_on_held_out_answers(
        tmp_path, parent, packed, data, config):  # noqa: F811
    wanted = SftConfig(config.model, parent="p", data_id=conversations_id(*packed), steps=40,
                       rows=4, probe_every=16)
    record = sft(tmp_path / "chat", wanted, parent, *packed, data, PLAN)
    answers = record["answers_nats_per_token"]
    assert answers["after"] < 0.5 * answers["before"]
    tuned = checkpoint.final_params(tmp_path / "chat", config.model)
    np.testing.assert_allclose(answers_nll(config.model, tuned, packed[1]), answers["after"],
                               rtol=1e-6)
    rows = files.read_lines(tmp_path / "chat/metrics.jsonl")
    seen = [row[PROBE] for row in rows if PROBE in row]
    assert [row["step"] for row in rows if PROBE in row] == [16, 32] and seen[1] < seen[0]
    assert sft(tmp_path / "chat", wanted, parent, *packed, data, PLAN) == record


def test_only_the_assistants_tokens_and_its_end_have_weight(packed, data):  # noqa: F811
    learnt = prepare.open_tokenizer(data.folder.parent)
    rows = packed[0]
    said = rows.tokens[:, 1:][rows.mask > 0]
    text = learnt.decode(said, control=True)
    assert set(text.split("<|end|>")) == {" ba", " ko", " ni", " du", ""}


def test_conversations_that_are_not_those_of_the_config_are_refused(
        tmp_path, parent, packed, data, config):  # noqa: F811
    wanted = SftConfig(config.model, data_id="another", rows=4)
    with pytest.raises(BadInput, match="for conversations 'another'"):
        sft(tmp_path / "chat", wanted, parent, *packed, data, PLAN)


def test_a_parent_that_is_not_finished_is_refused(tmp_path, packed, data, config):  # noqa: F811
    wanted = SftConfig(config.model, data_id=conversations_id(*packed), rows=4)
    with pytest.raises(BadInput, match="is no finished run"):
        sft(tmp_path / "chat", wanted, tmp_path / "nothing", *packed, data, PLAN)
