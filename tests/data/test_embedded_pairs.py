"""Tests of the code-to-summary pairs that Python itself carries."""

import ast
import textwrap

import pytest

from modeling_stablemoe.data.embedded_corpus import split_of
from modeling_stablemoe.data.embedded_pairs import EMBEDDED_PAIR, EmbeddedPair, embedded_pairs, pair_split_of


# Packages by the split that their names hash to.
TRAIN, VALIDATION, TEST = "argparse", "json", "typing"


@pytest.fixture(scope="module")
def pairs():
    return list(embedded_pairs())


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


def test_pairs_are_enough_to_learn_from_and_to_score(pairs):
    sizes = {split: sum(pair.split == split for pair in pairs) for split in ("train", "validation", "test")}
    assert sum(sizes.values()) == len(pairs)
    assert sizes["train"] > 3000
    assert min(sizes["validation"], sizes["test"]) > 100
    assert max(sizes["validation"], sizes["test"]) < 0.15 * sizes["train"]
    assert EMBEDDED_PAIR.partition("-")[1:] == ("-", "summary")


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
    assert max(len(pair.target) for pair in pairs) > 190


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


def test_a_python_without_sources_is_told_to_name_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no readable standard-library sources"):
        list(embedded_pairs(tmp_path))
