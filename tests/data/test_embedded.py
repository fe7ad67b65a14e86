"""Tests of the corpora that Python itself carries: its documentation, and pairs of code and summary."""

import ast
import logging
import shutil
import sysconfig
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

from helpers.matrices import one_fast
from modeling_stablemoe.data import text as data
from modeling_stablemoe.data.embedded_corpus import embedded_documents, split_of
from modeling_stablemoe.data.embedded_pairs import EmbeddedPair, embedded_pairs, pair_split_of
from modeling_stablemoe.data.text import DataArguments, load_corpus


# Packages by the split that their names hash to.
TRAIN, VALIDATION, TEST = "argparse", "json", "typing"
STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module", params=one_fast("a part", "all"))
def library(request, tmp_path_factory):
    """The folder of Python's own library, or of some modules of it, which are read in less time."""
    if request.param == "all":
        return STDLIB
    folder = tmp_path_factory.mktemp("stdlib")
    for name in ("argparse.py", "typing.py", "subprocess.py", "tarfile.py", "shutil.py"):
        shutil.copy(STDLIB / name, folder)
    for name in ("json", "collections", "email", "unittest"):
        shutil.copytree(STDLIB / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def pairs(library):
    return list(embedded_pairs(library))


@pytest.fixture(scope="module")
def docs(library):
    return list(embedded_documents("docs", library))


@pytest.fixture
def stdlib(tmp_path):
    """Return a function that writes modules into a folder and reads their pairs."""

    def read(**modules):
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        return list(embedded_pairs(tmp_path))

    return read


def function(name, summary, body="return None"):
    return f'def {name}(x):\n    """{summary}"""\n    {body}\n'


@pytest.mark.slow
def test_both_corpora_are_enough_to_learn_from_and_to_score():
    sizes, lengths = defaultdict(int), defaultdict(int)
    for pair in embedded_pairs():
        sizes[pair.split] += 1
    for document in embedded_documents():
        lengths[document.split] += len(document.text)
    assert sizes["train"] > 3000
    assert min(sizes["validation"], sizes["test"]) > 100
    assert max(sizes["validation"], sizes["test"]) < 0.15 * sizes["train"]
    assert lengths["train"] > 1_500_000
    assert 0.01 < lengths["validation"] / lengths["train"] < 0.2


# Pairs of code and summary


def test_no_docstring_or_comment_is_in_a_source(pairs):
    for pair in pairs:
        (tree,) = ast.parse(pair.source).body
        assert tree.name == pair.name.rpartition(".")[2]
        assert pair.target not in pair.source
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant)
        assert ast.unparse(tree) == pair.source


def test_sources_and_targets_keep_their_limits(pairs):
    for pair in pairs:
        assert len(pair.source) <= 1000
        assert len(pair.target) <= 200
        assert len(pair.target.split()) >= 3
        assert pair.target == " ".join(pair.target.split())
    assert max(len(pair.source) for pair in pairs) > 950


def test_packages_sources_and_targets_are_on_one_side_of_every_split(pairs):
    assert len({(pair.source, pair.target) for pair in pairs}) == len(pairs)
    for of in (lambda pair: pair.name.partition(".")[0], lambda pair: pair.source, lambda pair: pair.target):
        splits_of_key = {}
        for pair in pairs:
            splits_of_key.setdefault(of(pair), set()).add(pair.split)
        assert max(len(splits) for splits in splits_of_key.values()) == 1


def test_split_depends_on_the_package_alone_and_keeps_the_corpus_validation_part():
    assert [pair_split_of(package) for package in (TRAIN, VALIDATION, TEST)] == ["train", "validation", "test"]
    names = [f"name{i}" for i in range(5000)]
    splits = [pair_split_of(name) for name in names]
    assert [split == "validation" for split in splits] == [split_of(name) == "validation" for name in names]
    assert 0.05 < splits.count("test") / 5000 < 0.07


def test_functions_and_methods_become_pairs_in_source_order(stdlib):
    code = '''
        """A module, not a function."""
        if True:
            @decorator
            def first(a, *, b: int=1) -> int:
                """
                Return the sum
                of both.  A second sentence.

                A second paragraph.
                """
                # a comment
                "a string for a comment"
                return  (a +
                         b)
        class A:
            """A class, not a function."""
            async def second(self):
                """Wait for `x.y` e.g. forever\\n  \\nand a second paragraph"""
                def inner():
                    """An inner function."""
                try:
                    "another string"
                finally:
                    "and another"
                    self.wait("kept", lambda: "kept")
    '''
    assert stdlib(**{TRAIN: code}) == [
        EmbeddedPair(
            f"{TRAIN}.first",
            "train",
            "@decorator\ndef first(a, *, b: int=1) -> int:\n    return a + b",
            "Return the sum of both.",
        ),
        EmbeddedPair(
            f"{TRAIN}.A.second",
            "train",
            "async def second(self):\n\n    def inner():\n        pass\n    try:\n        pass\n    finally:\n"
            "        self.wait('kept', lambda: 'kept')",
            "Wait for `x.y` e.g. forever",
        ),
    ]


@pytest.mark.parametrize(
    ("summary", "body"),
    [
        ("", "return None"),
        ("Two words.", "return None"),
        ("1 + 2 = 3", "return None"),
        (">>> a = call_this(one, two)", "return None"),
        ("Long " * 41, "return None"),
        ("Stands in its source.", "return 'Stands in its source.'"),
        ("Do it here.", "pass"),
        ("Do it here.", "..."),
        ("Do it here.", "# nothing"),
        ("Do it here.", f"return {'1 + ' * 250}1"),
    ],
)
def test_functions_without_a_usable_source_or_summary_are_left_out(stdlib, summary, body):
    code = function("f", summary, body) + function("g", "Do it here.", f"return {'1 + ' * 200}1")
    assert [pair.name for pair in stdlib(**{TRAIN: code})] == [f"{TRAIN}.g"]


def test_what_stands_in_several_splits_stays_in_the_first(stdlib):
    pairs = stdlib(
        **{
            TRAIN: function("f", "A shared target.")
            + function("f", "A shared target.")
            + function("g", "A shared target."),
            VALIDATION: function("h", "A shared target.") + function("f", "Another target, the same source."),
            TEST: function("f", "A third target.") + function("f", "A third target.", "return x"),
        }
    )
    assert [(pair.name, pair.split, pair.target) for pair in pairs] == [
        (f"{TRAIN}.f", "train", "A shared target."),
        (f"{TRAIN}.g", "train", "A shared target."),
        (f"{TEST}.f", "test", "A third target."),
    ]
    assert pairs[-1].source == "def f(x):\n    return x"


def test_order_depends_on_names_alone(tmp_path):
    names = ["b", "a", "c"]
    for folder, order in (("one", names), ("two", sorted(names))):
        for name in order:
            package = tmp_path / folder / name
            package.mkdir(parents=True)
            (package / "__init__.py").write_text(function("f", f"Return the {name}.", f"return {name}"))
    one, two = (list(embedded_pairs(tmp_path / folder)) for folder in ("one", "two"))
    assert one == two
    assert [pair.name for pair in one] == ["a.f", "b.f", "c.f"]


# Documentation


def test_packages_topics_and_passages_are_on_one_side_of_the_split(docs):
    sides = {"train": set(), "validation": set()}
    passages = {"train": set(), "validation": set()}
    for document in docs:
        is_topic = document.source == "topic"
        sides[document.split].add((is_topic, document.name if is_topic else document.name.partition(".")[0]))
        passages[document.split].update(p for p in document.text.split("\n\n") if is_topic and len(p) >= 60)
    assert sides["train"]
    assert sides["validation"]
    assert not sides["train"] & sides["validation"]
    assert not passages["train"] & passages["validation"]


def test_documents_carry_signatures_and_docstrings_in_source_order(docs):
    text = next(d.text for d in docs if (d.name, d.source) == ("json", "docstrings"))
    assert text.startswith("json\n\nJSON (JavaScript Object Notation)")
    dump, dumps = text.index("\n\njson.dump(obj, fp, *, "), text.index("\n\njson.dumps(obj, *, ")
    assert dump < dumps < text.index("Serialize ``obj`` to a JSON formatted ``str``.")
    assert not {"test", "idlelib", "site-packages", "encodings"} & {d.name.partition(".")[0] for d in docs}


def test_broken_modules_are_skipped_counted_and_source_is_optional(tmp_path, caplog):
    stdlib = tmp_path / "lib"
    (stdlib / "pkg" / "tests").mkdir(parents=True)
    (stdlib / "pkg" / "tests" / "test_x.py").write_text('"""A test."""')
    (stdlib / "pkg" / "__init__.py").write_text(
        '"""Package."""\nif True:\n    class A(B):\n        async def f(self, x: int = 1) -> str:\n            """Do."""\n'
    )
    (stdlib / "bad_syntax.py").write_text("def (")
    (stdlib / "bad_bytes.py").write_bytes(b'"""\xff"""')
    (stdlib / "null.py").write_bytes(b"a\x00b")
    with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.data.embedded_corpus"):
        documents = [d for d in embedded_documents("docs+source", stdlib) if d.source != "topic"]
    assert "skipped 3 unreadable modules" in caplog.text
    assert [(d.name, d.source) for d in documents] == [("pkg", "docstrings"), ("pkg", "code")]
    assert documents[0].text == "pkg\n\nPackage.\n\n\nasync pkg.A.f(self, x: int=1) -> str\n\nDo.\n"
    assert documents[1].text.startswith('# pkg\n"""Package."""')


def test_the_documentation_is_the_default_corpus_and_keeps_its_order(docs, monkeypatch):
    monkeypatch.setattr(data, "embedded_documents", lambda **options: iter(docs))
    corpus = load_corpus(DataArguments())
    for name, split in corpus.items():
        assert list(split["text"]) == [d.text for d in docs if d.split == name]
        assert split.column_names == ["text"]


@pytest.mark.parametrize("read", [embedded_pairs, lambda folder: embedded_documents("docs", folder)])
def test_a_python_without_sources_is_told_to_name_files(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="no readable standard-library sources .*--train_files"):
        list(read(tmp_path))


def test_a_corpus_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="embedded_corpus must be one of docs, docs\\+source; got 'x'"):
        list(embedded_documents("x"))
