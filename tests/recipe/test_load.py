from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.errors import RecipeError, UsageError
from titanlite.recipe import sections
from titanlite.recipe.explain import SYNONYMS, all_keys
from titanlite.recipe.load import load_recipe, parse_with_overrides, recipe_differences, to_toml
from titanlite.recipe.sections import Recipe

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str | bytes, name: str = "recipe.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


def errors(path: Path, *overrides: str) -> list[str]:
    """The findings of a recipe that must be refused, without the folder."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{path.parent}/", "").split("\n")


def test_an_empty_file_is_the_default_recipe(write: Write) -> None:
    assert load_recipe(write("")).recipe == Recipe()


def test_values_arrive(write: Write) -> None:
    path = write(
        '[training]\ntokens = "2.5M"\n[optimizer]\nlr = 1\nbetas = [0.8, 0.9]\n[model.rope_scaling]\nfactor = 2.0'
    )
    recipe = load_recipe(path).recipe
    assert recipe.training.tokens == 2_500_000
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (1.0, (0.8, 0.9))
    assert recipe.model.rope_scaling == sections.RopeScaling(factor=2.0)


class TestExtends:
    def test_nearer_files_win_and_tables_merge(self, write: Write) -> None:
        write("[training]\nsteps = 1\nglobal_batch = 2\n[data]\ncorpus = ['a', 'b']\n[run]\nseed = 1", "base/far.toml")
        write('extends = "far.toml"\n[training]\nsteps = 3\n[data]\ncorpus = ["c"]', "base/near.toml")
        path = write('extends = "base/near.toml"\n[run]\nname = "x"')
        loaded = load_recipe(path)
        assert (loaded.recipe.training.steps, loaded.recipe.training.global_batch) == (3, 2)
        assert loaded.recipe.data.corpus == ["c"]
        assert (loaded.recipe.run.name, loaded.recipe.run.seed) == ("x", 1)

    def test_steps_and_tokens_replace_each_other(self, write: Write) -> None:
        write('[training]\ntokens = "1M"', "base.toml")
        path = write('extends = "base.toml"\n[training]\nsteps = 7')
        assert load_recipe(path).recipe.training.tokens is None
        training = load_recipe(path, ["--training.tokens=5K"]).recipe.training
        assert (training.steps, training.tokens) == (None, 5000)
        both = load_recipe(path, ["--training.tokens=5K", "--training.steps=2"]).recipe.training
        assert (both.steps, both.tokens) == (2, 5000), "given side by side, both stay for cli/check.py to refuse"

    def test_errors_name_the_file_that_made_them(self, write: Write) -> None:
        write("[training]\nsteps = 0\nglobal_batch = 0", "base.toml")
        path = write('extends = "base.toml"\n\n[training]\nglobal_batch = -1')
        assert [line.split(": ")[:2] for line in errors(path)] == [
            ["recipe.toml:4", "training.global_batch"],
            ["base.toml:2", "training.steps"],
        ]
        assert ["recipe.toml extends this file" in line for line in errors(path)] == [False, True], "issue 14, item 27"

    def test_missing_file(self, write: Write) -> None:
        path = write('# first\nextends = "bse.toml"\n[training]\nsteps = 0')
        write("", "base.toml")
        first, second = errors(path)
        assert first == "recipe.toml:2: extends: there is no recipe 'bse.toml'; did you mean 'base.toml'?"
        assert second.startswith("recipe.toml:4: training.steps: must be")

    def test_cycle(self, write: Write) -> None:
        write('extends = "../recipe.toml"', "base/b.toml")
        path = write('extends = "base/b.toml"')
        (line,) = errors(path)
        assert line.startswith(
            "base/b.toml:1: extends: recipes extend each other in a circle: recipe.toml -> base/b.toml"
        )

    @pytest.mark.parametrize(
        ("value", "place", "problem"),
        [
            *((value, "recipe.toml:1: extends", "path") for value in ("3", '""', "['a.toml']", '"\\u0000"')),
            ('"recipe.toml"', "recipe.toml:1: extends", "circle"),
            ('"loop.toml"', "recipe.toml:1: extends", "'loop.toml' cannot be read"),
            ('"base.toml"', "base.toml:1", "not TOML"),
        ],
    )
    def test_what_cannot_be_extended(self, write: Write, tmp_path: Path, value: str, place: str, problem: str) -> None:
        (tmp_path / "loop.toml").symlink_to("loop.toml")
        write("a b", "base.toml")
        (line,) = errors(write(f"extends = {value}"))
        assert line.startswith(f"{place}: ") and problem in line


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        (tmp_path / "debug.toml").write_text("")
        (line,) = errors(tmp_path / "debgu.toml")
        assert line == "there is no recipe 'debgu.toml'; did you mean 'debug.toml'?"

    def test_folder(self, tmp_path: Path) -> None:
        assert "cannot be read" in errors(tmp_path)[0]


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("[training]\nstep = 1", "2: training.step", "'training.steps'"),
        ("[training]\nlr = 1", "2: training.lr", "'optimizer.lr'"),
        ("[data]\nevery_steps = 1", "2: data.every_steps", "'validation.every_steps' or 'checkpoint.every_steps'"),
        ("steps = 1", "1: steps", "'training.steps'"),
        ("[optimizer]\nlearning_rate = 1", "2: optimizer.learning_rate", "'optimizer.lr'"),
        ("[model]\nrope_scaling = { facto = 1 }", "2: model.rope_scaling.facto", "'model.rope_scaling.factor'"),
        ("[training]\nwarmupsteps = 1", "2: training.warmupsteps", "'schedule.warmup_steps'"),
        ("[traning]\nsteps = 1", "1: traning", "'training'"),
        ("[compile]\nzzz = 1", "2: compile.zzz", "[compile] has: enabled."),
        ("training = 5", "1: training", "[training]"),
        ("[[training]]\nsteps = 1", "1: training", "[training]"),
        ("[training]\nsteps = '10'", "2: training.steps", "steps = 10."),
        ("[training]\nsteps = 10.0", "2: training.steps", "steps = 10."),
        ("[training]\nsteps = 0", "2: training.steps", "at least 1, not 0"),
        ("[training]\nsteps = true", "2: training.steps", "not true"),
        ("[training]\nsteps = {x = 1}", "2: training.steps", "not a table"),
        ("[training]\ntokens = '1.5Q'", "2: training.tokens", "'1.5Q'"),
        ("[training]\ntokens = -3", "2: training.tokens", 'at least 1, or text such as "100B"'),
        ("[model]\ntie_embeddings = 'True'", "2: model.tie_embeddings", "tie_embeddings = true."),
        ("[optimizer]\nlr = nan", "2: optimizer.lr", "above 0, not nan"),
        ("[optimizer]\nlr = inf", "2: optimizer.lr", "above 0, not inf"),
        # Issue 14, item 18: what clocks cannot wait for, and processes that no machine starts.
        ("[parallel]\ntimeout_seconds = 1e10", "2: parallel.timeout_seconds", "at most 1"),
        ("[resilience]\ngrace_seconds = 1e300", "2: resilience.grace_seconds", "number"),
        ("[run]\nstop_after_minutes = 1e300", "2: run.stop_after_minutes", "number"),
        ("[data]\nworkers = 4611686018427387904", "2: data.workers", "number"),
        # Issue 14, item 27: "lr = 1,5" was answered by "write lr = 15".
        ('[optimizer]\nlr = "1,5"', "2: optimizer.lr", "lr = 1.5."),
        ('[optimizer]\nlr = "1,500"', "2: optimizer.lr", "--explain optimizer.lr"),
        ('[training]\nsteps = "1,500"', "2: training.steps", "steps = 1500."),
        ("[optimizer]\nlr = 1,5", "2: not TOML", "1.5 has a point"),
        ("[optimizer]\nbetas = [0.9]", "2: optimizer.betas", "a list of 2, each a number, at least 0 and below 1"),
        ("[optimizer]\nbetas = [0.9, 1.0]", "2: optimizer.betas", "a list of 2"),
        ("[data]\ncorpus = [1]", "2: data.corpus", "text (not empty), or a list of one or more"),
        ("[data]\ncorpus = []", "2: data.corpus", "text (not empty), or a list of one or more"),
        ('[[data.sources]]\nname = "a"\npath = "x"\n\n[[data.sources]]\nname = "b"', "5: data.sources.1", "path"),
        ('[data]\nsources = [\n{name = "a", path = "x"},\n{name = "b"},\n]', "4: data.sources.1", "path"),
        ('[[data.sources]]\nname = "a"\npath = "x"\nwieght = 1', "4: data.sources.0.wieght", "'data.sources.0.weight'"),
        ("[[data.stages]]\nweights = {a = 1}\n[[data.stages]]\nweights = {a = 0}", "4: data.stages.1.weights.a", "0"),
        ("[precision]\ncompute = 'bf16'", "2: precision.compute", "bfloat16"),
        ("[run]\nname = 'a/b'", "2: run.name", "'a/b'"),
        ("[run]\nname = '..'", "2: run.name", "'..'"),
        ("[run]\nname = 5", "2: run.name", 'name = "5".'),
        ("[run]\nseed = 9223372036854775808", "2: run.seed", "number"),
        ('[run]\nname = "a\\u0007"', "2: run.name", "'a\\x07'"),
        ('[run]\noutput_dir = "\\u0000"', "2: run.output_dir", "'\\x00'"),
        (f"[training]\nsteps = {2**63}", "2: training.steps", "64 bits"),
        ("[training]\ntokens = '9999999999T'", "2: training.tokens", "64 bits"),
        ("[run]\nname = 1979-05-27", "2: run.name", "not 1979-05-27"),
        ("[training]\nsteps = ten\n", "2: not TOML", "column 9); text needs quotes"),
        ("[training]\nsteps = 1\nsteps = 2\n", "3: not TOML", "twice; keep one"),
        (f"a = {'[' * 5000}{']' * 5000}", "1: not TOML", "nested"),
        (b'[run]\nname = "\xff"', "2", "byte 0xff is not UTF-8"),
        (b"\xef\xbb\xbf[training]\r\nsteps = 0\r\n", "2: training.steps", "at least 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_fix(write: Write, text: str | bytes, place: str, hint: str) -> None:
    (line,) = errors(write(text))
    assert line.startswith(f"recipe.toml:{place}: ") and hint in line


def test_all_errors_at_once_in_the_order_of_the_file(write: Write) -> None:
    path = write('[training]\nsteps = 0\nstep = 1\n[model]\ndim = "x"\n[dta]\n[optimizer]\nlr = 0\nbetas = 1\n')
    found = errors(path, "--run.seed=-1", "--foo.bar=1", "--run.name")
    assert [line.split(": ")[1] for line in found] == [
        *["run.name", "training.steps", "training.step", "model.dim", "dta", "optimizer.lr", "optimizer.betas"],
        *["run.seed", "foo"],
    ]
    assert len([line for line in found if line.startswith("command line: ")]) == 3


class TestOverrides:
    def test_types(self, write: Write) -> None:
        words = ["--training.steps=5", "--run.name=my-run", "--data.corpus=['a', 'b']", "--optimizer.lr=1e-3"]
        words += ["--model.rope_scaling={factor = 2.0}", "--model.rope_scaling.low_freq_factor=3.0", "--run.seed=7"]
        recipe = load_recipe(write("[run]\nseed = 1"), words).recipe
        assert (recipe.training.steps, recipe.run.name, recipe.run.seed) == (5, "my-run", 7)
        assert (recipe.data.corpus, recipe.optimizer.lr) == (["a", "b"], 1e-3)
        assert recipe.model.rope_scaling == sections.RopeScaling(factor=2.0, low_freq_factor=3.0)

    @pytest.mark.parametrize("name", ["2024-11-21", "7", "true", "a b", "a#b", "é'\"", "a=b", "--x", "1\nseed = 2"])
    def test_text_keys_take_any_text(self, write: Write, name: str) -> None:
        assert load_recipe(write(""), [f"--data.text_key={name}"]).recipe.data.text_key == name

    def test_a_name_that_is_not_utf8(self, write: Write) -> None:
        """How Python shows bytes of the command line that are no text."""
        (line,) = errors(write(""), "--data.corpus=\udcff.txt")
        assert line.startswith('command line: data.corpus: "\\udcff.txt" is not UTF-8')

    def test_quoted_text_is_toml(self, write: Write) -> None:
        assert load_recipe(write(""), ['--data.text_key="a\\tb"']).recipe.data.text_key == "a\tb"

    def test_unknown_and_malformed(self, write: Write) -> None:
        found = errors(write(""), "--training.setps=1", "nonsense", "--run..name=x", "--steps=4", "--model.heads=x")
        parts = [("'nonsense'", "=value"), ("'--run..name=x'", "=value"), ("model.heads: ", "--explain model.heads")]
        parts += [("training.setps: ", "'training.steps'"), ("steps: ", "'training.steps'")]
        for line, (what, fix) in zip(found, parts, strict=True):
            assert line.startswith(f"command line: {what}") and fix in line

    def test_a_replaced_table_stands_on_the_command_line(self, write: Write) -> None:
        path = write('[[data.sources]]\nname = "a"\npath = "a"\n')
        (line,) = errors(path, '--data.sources=[{name = "b"}]')
        assert line.startswith("command line: data.sources.0: ")

    def test_extends_belongs_in_files(self, write: Write) -> None:
        assert "extends" in errors(write(""), "--extends=other.toml")[0]

    def test_split_from_the_command_s_own_arguments(self) -> None:
        parser = argparse.ArgumentParser(prog="command")
        parser.add_argument("recipe")
        parser.add_argument("--json", action="store_true")
        words = ["--training.steps", "5", "r.toml", "--run.seed=-1", "--optimizer.lr", "-1", "--debug.x", "--json"]
        arguments, overrides = parse_with_overrides(parser, words)
        assert (arguments.recipe, arguments.json) == ("r.toml", True)
        assert overrides == ["--training.steps=5", "--run.seed=-1", "--optimizer.lr=-1", "--debug.x"]
        with pytest.raises(UsageError, match=r"command does not know '--steps'; did you mean 'training\.steps'\?"):
            parse_with_overrides(parser, ["r.toml", "--steps=5"])


def test_synonyms_name_keys() -> None:
    assert set(SYNONYMS.values()) <= set(all_keys())
    assert not set(SYNONYMS) & {key.rpartition(".")[2] for key in all_keys()}


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1)
PATHS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=60)
FOLDER_NAMES = PATHS.filter(lambda name: name not in (".", "..") and not set(name) & set("/\\"))
COUNTS = st.none() | st.integers(1, 2**63 - 1)
ABOVE_ZERO = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
BELOW_ONE = st.floats(0, 1, exclude_max=True)
RECIPES = st.builds(
    Recipe,
    run=st.builds(sections.Run, name=FOLDER_NAMES, output_dir=PATHS, seed=st.integers(0, 2**63 - 1)),
    model=st.builds(
        sections.Model,
        preset=TEXT,
        dim=COUNTS,
        qk_norm=st.none() | st.booleans(),
        rope_scaling=st.none() | st.builds(sections.RopeScaling, factor=ABOVE_ZERO),
    ),
    data=st.builds(sections.Data, corpus=PATHS | st.lists(PATHS, min_size=1, max_size=3)),
    training=st.builds(sections.Training, steps=COUNTS, tokens=COUNTS),
    optimizer=st.builds(sections.Optimizer, lr=ABOVE_ZERO, betas=st.tuples(BELOW_ONE, BELOW_ONE)),
)


@settings(max_examples=100, deadline=None)
@given(RECIPES)
def test_the_resolved_recipe_reads_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "resolved.toml"
    path.write_text(to_toml(recipe), encoding="utf-8", newline="")
    loaded = load_recipe(path)
    assert loaded.recipe == recipe
    assert loaded.text == to_toml(recipe)
    assert recipe_differences(recipe, loaded.recipe) == {}


_INNER = (("parallel", "pipeline"), ("precision", "float8"))
"""Sections within sections."""


def test_the_resolved_recipe_is_complete(write: Write) -> None:
    text = load_recipe(write('[training]\ntokens = "2M"')).text
    defaults = Recipe().model_dump()
    inner = [(f"{section}.{name}", defaults[section].pop(name)) for section, name in _INNER]
    tables = [*defaults.items(), *inner]
    for section, values in tables:
        assert f"[{section}]" in text
        assert all(f"\n{key} = " in text for key, value in values.items() if value is not None)
    assert "tokens = 2000000" in text


def test_differences() -> None:
    old = Recipe(model=sections.Model(rope_scaling=sections.RopeScaling()), training=sections.Training(steps=5))
    new = Recipe(run=sections.Run(seed=3), training=sections.Training(tokens=5))
    assert recipe_differences(old, new) == {
        "run.seed": (0, 3),
        "model.rope_scaling.factor": (8.0, None),
        "model.rope_scaling.low_freq_factor": (1.0, None),
        "model.rope_scaling.high_freq_factor": (4.0, None),
        "model.rope_scaling.original_context": (8192, None),
        "training.steps": (5, None),
        "training.tokens": (None, 5),
    }
