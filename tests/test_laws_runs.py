"""Tables of runs: any column names, what is dropped, and bad rows named by file and line."""

import os

import numpy as np
import pytest
from test_laws_fit import refused

from tinylm.config import BadInput
from tinylm.laws.runs import Runs, distinct, drop_worst, read_csv


def write(tmp_path, text):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


def test_two_of_three_sizes_suffice_and_exact_flops_are_kept(tmp_path):
    runs = read_csv(write(tmp_path, "params,flops,loss\n10,1200,3\n20,1200,2.9\n"))
    assert runs.tokens.tolist() == [20, 10] and runs.sigma is None
    runs = read_csv(write(tmp_path, "N,tokens,loss,sigma\n10,20,3,.1\n"))
    assert runs.flops.tolist() == [1200] and runs.sigma.tolist() == [0.1]
    path = write(tmp_path, "tag,N,tokens,C,loss\na,10,20,1500,3\nb,1,1,1,1\n")
    runs = read_csv(path, {"tag": "a"})
    assert runs.flops.tolist() == [1500] and len(runs.loss) == 1


@pytest.mark.parametrize("text, words", [
    ("params,tokens,loss\n1,2,3\n1,x,3\n", ("runs.csv:3", "tokens='x'", "number")),
    ("params,tokens,loss\n1,2,3e200\n", ("runs.csv:2", "loss=3e200", "below 1e100")),
    ("params,tokens,loss\n1,2,-3\n", ("runs.csv:2", "loss=-3", "above 0")),
    ("params,tokens,loss\n1,2\n", ("runs.csv:2", "loss=None")),
    ("params,tokens,loss\n1,2,nan\n", ("runs.csv:2", "loss=nan", "above 0")),
    ("params,tokens,loss\n1,2,3\n1,2,\n", ("runs.csv:3", "loss=''", "number")),
    ("params,loss\n1,2\n", ("params, loss", "two of")),
    ("params,tokens,loss\n", ("no runs",)),
    ("", ("needs loss", "--loss-col")),
    ("params;tokens;loss\n1;2;2,85\n", ("runs.csv:2", "loss='2,85'", "number")),
    ("params,tokens,loss\n3e8,6e9,2,85\n", ("runs.csv:2", "4 fields", "header 3")),
    ("params,tokens,loss\n6,795,600,349,2e10,3\n", ("runs.csv:2", "6 fields", "without commas")),
    ("params,tokens,Loss,loss\n1,2,3,3\n", ("two columns 'Loss'",)),
    ("params,flops,loss\n70,1e18,3\n", ("tokens a parameter", "from 'params'", "counts")),
    ("params,D,flops,loss\n1e6,512,1.2e15,3\n", ("tokens from 'D'", "0.001", "counts")),
])
def test_bad_tables_are_refused_by_file_and_line(tmp_path, text, words):
    refused(lambda: read_csv(write(tmp_path, text)), *words)


@pytest.mark.parametrize("text", [
    "\ufeffparams,tokens,flops,loss\n10,20,1500,3\n",
    "Params; Tokens; FLOPs; Loss\n10;20;1500;3\n",
    "params\ttokens\tflops\tloss\n10\t20\t1500\t3\n",
    "params,tokens,flops,loss,\n10,20,1500,3,,\n"])
def test_marks_delimiters_case_and_empty_ends_are_read_as_meant(tmp_path, text):
    runs = read_csv(write(tmp_path, text))
    assert [c.tolist() for c in runs[:4]] == [[10], [20], [1500], [3]]


def test_what_was_read_and_what_was_not_told_apart_is_said(tmp_path):
    said = []
    path = write(tmp_path, "corpus,run,N,C,loss\nc4,1,1e3,1.2e7,3\npile,2,2e3,1.2e7,2.9\n")
    read_csv(path, said=said)
    assert said == ["read params from 'N', flops from 'C', loss from 'loss', "
                    "tokens as FLOPs / 6 params",
                    "not told apart: corpus c4, pile (--where corpus=... keeps one)"]
    said.clear()
    read_csv(path, {"corpus": "c4"}, said=said)
    assert len(said) == 1 and said[0].endswith(", only where corpus is c4")
    small = []
    read_csv(write(tmp_path, "N,D,loss\n70,1400,3\n"), said=small)
    assert "if these are millions" in small[1]


def test_of_two_columns_the_named_one_is_read_and_a_pipe_is_a_table(tmp_path):
    text = "params,tokens,Loss,loss\n10,20,9,3\n"
    assert read_csv(write(tmp_path, text), columns={"loss": "loss"}).loss.tolist() == [3]
    ends = os.pipe()
    os.write(ends[1], b"params,tokens,loss\n10,20,3\n")
    os.close(ends[1])
    assert read_csv(f"/dev/fd/{ends[0]}").loss.tolist() == [3]
    os.close(ends[0])


def test_a_missing_table_or_column_is_refused(tmp_path):
    refused(lambda: read_csv(tmp_path / "none.csv"), "none.csv", "cannot be read")
    path = write(tmp_path, "params,tokens,loss\n1,2,3\n")
    refused(lambda: read_csv(path, {"tag": "x"}), "no column 'tag'")


def test_columns_may_have_any_names(tmp_path):
    path = write(tmp_path, "size,data,C,err,u\n10,20,1500,3,5\n\n10,40,2400,2.5,5\n")
    names = {"params": "size", "tokens": "data", "flops": "C", "loss": "err", "unique": "u"}
    runs = read_csv(path, columns=names)
    assert [column.tolist() for column in runs if column is not None] == [
        [10, 10], [20, 40], [1500, 2400], [3, 2.5], [5, 5]]
    refused(lambda: read_csv(path, columns={"loss": "perplexity"}), "no column 'perplexity'")


def test_two_names_of_sizes_make_the_third_by_6nd(tmp_path):
    path = write(tmp_path, "size,C,loss\n10,1200,3\n")
    assert read_csv(path, columns={"params": "size"}).tokens.tolist() == [20]


def test_rows_that_repeat_are_dropped_and_seeds_are_kept():
    runs = Runs(*np.array([[1, 1, 1, 2], [5, 5, 5, 6], [30, 30, 30, 72], [3, 3.1, 3, 2]], float))
    assert distinct(runs).loss.tolist() == [3, 3.1, 2]


def test_the_worst_runs_are_dropped_in_place():
    runs = Runs(*np.array([[1, 2, 3, 4]] * 3 + [[3, 5, 2, 4]], float))
    assert drop_worst(runs, 2).loss.tolist() == [3, 2]
    assert drop_worst(runs, 0).loss.tolist() == [3, 5, 2, 4]
    with pytest.raises(BadInput, match="4 of 4 runs cannot be dropped"):
        drop_worst(runs, 4)
