"""`scripts/train.sh`, with a stand-in for the environment's Python that says what it was started with."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from support.clone import ROOT, make_clone, write_program

from titanlite.cli.main import HELP


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A clone with a space in its path."""
    return make_clone(tmp_path / "a clone", 'printf "%s\\n" "$@"')


def train(root: Path, *arguments: str, gpus: int = 0, **environment: str) -> tuple[int, list[str]]:
    """Exit code, and the words that the environment's Python got, from another folder and on so many GPUs."""
    write_program(root / "nvidia-smi", "".join(f"echo GPU {number};" for number in range(gpus)) or ":")
    process = subprocess.run(
        [root / "scripts/train.sh", *arguments],
        cwd=root.parent,
        env={**os.environ, "PATH": f"{root}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
    )
    assert process.stderr == ""
    return process.returncode, process.stdout.splitlines()


@pytest.mark.parametrize(
    "words",
    [
        ["my.toml"],
        ["recipe-without-a-suffix", "--run.seed=3"],
        ["--run.seed=3", "my.toml"],
        ["--run.seed", "3", "folder with/my.toml", "--resume"],
        ["--fresh", "--force", "my.toml"],
    ],
)
def test_a_recipe_is_passed_on_wherever_it_stands(root: Path, words: list[str]) -> None:
    (root.parent / "recipe-without-a-suffix").touch()
    assert train(root, *words) == (0, ["-m", "titanlite.train", *words])


@pytest.mark.parametrize("words", [[], ["--fresh"], ["--run.seed", "3"], ["--run.name=x"]])
def test_without_a_recipe_it_is_the_debug_run(root: Path, words: list[str]) -> None:
    assert train(root, *words) == (0, ["-m", "titanlite.train", f"{root}/configs/debug.toml", *words])


@pytest.mark.parametrize("command", [name for name in HELP if name != "train"])
@pytest.mark.parametrize("gpus", [1, 2])
def test_commands_start_as_the_training_does(root: Path, command: str, gpus: int) -> None:
    """By torchrun where there are several GPUs; what does not train is not tried again (issue 14, item 25)."""
    write_program(root / ".venv/bin/python", 'printf "%s\\n" "${PET_MAX_RESTARTS:-}" "$@"')
    module = ["-m", "titanlite", command, "a.toml", "--steps", "1"]
    expected = ["", *module] if gpus == 1 else ["0", "-m", "titanlite.agent", *module]
    assert train(root, *module[2:], gpus=gpus) == (0, expected)


@pytest.mark.parametrize(
    ("given", "backend", "endpoint"),
    [
        pytest.param({}, "static", r"localhost:[12]\d{4}", id="no pickle, a port of its own"),
        pytest.param({"PET_NNODES": "1:1"}, "static", r"localhost:[12]\d{4}", id="one machine in other words"),
        pytest.param({"PET_RDZV_ENDPOINT": "here:0"}, "static", r"localhost:[12]\d{4}", id="0 is no port to meet at"),
        pytest.param({"PET_RDZV_ENDPOINT": "here:29400"}, "static", "here:29400", id="Slurm's, with one machine"),
        pytest.param({"PET_RDZV_BACKEND": "c10d"}, "c10d", r"localhost:[12]\d{4}", id="the user's word counts"),
        pytest.param({"PET_NNODES": "1:2", "PET_RDZV_ENDPOINT": "a:1"}, "c10d", "a:1", id="machines come and go"),
    ],
)
def test_how_the_processes_of_a_job_meet(root: Path, given: dict[str, str], backend: str, endpoint: str) -> None:
    """Issue 14, item 28: what c10d keeps at its port is a pickle, which one machine can do without."""
    told = '"$PET_RDZV_BACKEND" "$PET_RDZV_ENDPOINT" "$PET_MAX_RESTARTS" "${GLOO_SOCKET_IFNAME:-any}"'
    write_program(root / ".venv/bin/python", f'printf "%s\\n" {told}')
    code, (backend_told, endpoint_told, restarts, interface) = train(root, "a.toml", gpus=2, **given)
    assert (code, backend_told, restarts) == (0, backend, "100")
    assert re.fullmatch(endpoint, endpoint_told) and int(endpoint_told.partition(":")[2]) < 32768
    assert interface == ("any" if given.get("PET_NNODES") == "1:2" else "lo")


def test_what_is_installed_is_compiled_once(root: Path) -> None:
    """Where no bytecode may be written, each start would compile it again (issue 14, item 29)."""
    (root / ".venv/installed-").write_text("an older pyproject.toml")
    packages = root / ".venv/lib/python3.12/site-packages"
    packages.mkdir(parents=True)
    calls = root / "calls"
    write_program(root / ".venv/bin/python", f'printf "%s " "$@" >>"{calls}"; echo >>"{calls}"')
    write_program(root / "nvidia-smi", ":")
    for _ in range(2):
        environment = {**os.environ, "PATH": f"{root}:{os.environ['PATH']}"}
        subprocess.run([root / "scripts/train.sh", "a.toml"], env=environment, check=True, stderr=subprocess.DEVNULL)
    _, install, compiling, *trainings = calls.read_text().splitlines()
    assert install.startswith("-m pip install ") and install.endswith(f"--editable {root} ")
    assert compiling.startswith("-m compileall ")
    assert compiling.endswith(f"{root}/titanlite {root}/kernels {packages} ")
    assert trainings == ["-m titanlite.train a.toml "] * 2


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="NOT A CLONE: git does not say what it ignores")
def test_what_the_documents_read_and_write_is_in_no_commit_and_no_image() -> None:
    """Issue 14, item 24."""
    git = ["git", "-C", str(ROOT)]
    tracked = subprocess.run([*git, "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    unanchored = {line.strip("/") for line in lines(".gitignore")}
    in_image = {line.removeprefix("**/") for line in lines(".dockerignore")}
    assert in_image == {".git", *unanchored}
    paths = ["data/web.bin", "corpus/a.jsonl", "tokenizers/mine/tokenizer.json", "exported/config.json", "slurm-7.out"]
    ignored = subprocess.run([*git, "check-ignore", *paths, *tracked], capture_output=True, text=True).stdout.split()
    assert ignored == paths


@pytest.mark.parametrize(
    ("words", "selection"),
    [
        (["-k", "some"], ["-m", "not slow"]),
        (["--quick", "-x"], ["-m", "quick and not slow"]),
        (["--all", "tests/gpu"], []),
        (["--quick"], ["-m", "quick and not slow"]),
    ],
)
def test_which_tests_are_asked_for(root: Path, words: list[str], selection: list[str]) -> None:
    """All of the tests, in two halves that run beside each other, where pytest gets no arguments."""
    calls = root / "calls"
    (root / ".venv/installed-").rename(root / ".venv/installed-test")
    write_program(root / ".venv/bin/python", f'printf "%s\\n" "$*" >>"{calls}"')
    subprocess.run([root / "scripts/test.sh", *words], check=True, capture_output=True)
    lint, layout, *others = calls.read_text().splitlines()
    assert (lint, layout) == ("-m ruff check .", "-m ruff format --check .")
    rest = [word for word in words if word not in ("--quick", "--all")]
    halves = [["tests/parity", "tests/precision", "tests/kernels"]]
    halves.append([f"--ignore={folder}" for folder in halves[0]])
    runs = [" ".join(["-m pytest", *selection, *words]) for words in ([rest] if rest else halves)]
    assert sorted(others) == sorted(["-m mypy", *runs])


def lines(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def test_several_gpus_get_torchrun(root: Path) -> None:
    write_program(root / ".venv/bin/python", 'printf "%s\\n" "$PET_NNODES x $PET_NPROC_PER_NODE" "$@"')
    expected = ["1 x 3", "-m", "titanlite.agent", "-m", "titanlite.train", "a.toml"]
    assert train(root, "a.toml", gpus=3) == (0, expected)
    assert train(root, "a.toml", gpus=1) == (0, [" x ", "-m", "titanlite.train", "a.toml"])


@pytest.mark.parametrize(
    ("told", "ends", "code"),
    [
        ("0 0", 0, 0),
        ("75 75", 0, 75),
        ("2 2", 0, 2),
        ("2", 1, 2),
        ("0 4", 1, 4),
        ("75 3", 1, 3),
        ("", 1, 1),
        pytest.param("1 75", 75, 75, id="the place where machines meet has gone"),
        pytest.param("1 4", 75, 4, id="it has gone, but a new start would not help"),
        pytest.param("75 75", 1, 1, id="they stopped to go on with other machines, and torchrun found none"),
    ],
)
def test_the_exit_code_is_the_workers_own(root: Path, told: str, ends: int, code: int) -> None:
    """torchrun ends with 1 whatever its workers ended with, and with 0 after a planned stop."""
    tell = f'for code in {told}; do echo $code >>"$TITANLITE_EXIT_CODE_FILE"; done; exit {ends}'
    write_program(root / ".venv/bin/python", tell)
    assert train(root, "a.toml", gpus=2)[0] == code


def test_the_gpus_check_takes_of_the_wheels_it_is_given_those_that_fit(root: Path, tmp_path: Path) -> None:
    """pip is asked by name: of two builds of a package, only it knows which one is for this Python."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("pydantic_core-2.41-cp311-x", "pydantic_core-2.41-cp312-x", "typing_extensions-4.15-py3-none-any"):
        (wheels / f"{name}.whl").touch()
    write_program(root / "python", f'printf "%s " "$PYTHONPATH" "$@" >>"{tmp_path}/told"; echo >>"{tmp_path}/told"')
    environment = {**os.environ, "PYTHON": str(root / "python"), "WHEELS": str(wheels)}
    subprocess.run([root / "scripts/gpu_check.sh", "out", "--small"], env=environment, check=True)
    installs, _, checks = (line.strip() for line in (tmp_path / "told").read_text().splitlines())
    assert installs.endswith("pydantic_core typing_extensions") and f"--no-index --find-links {wheels}" in installs
    site = installs.split("--target ")[1].split()[0]
    assert checks.startswith(f"{root}:{root}/kernels:{site}")
    assert checks.endswith(" benchmarks/gpu_check.py out --small")
    assert not Path(site).exists()
