"""How a command ends as one process of a launcher: the exit code that torchrun, srun or a shell should see."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import NoReturn

from titanlite.cli.main import Command, run_command
from titanlite.errors import EXIT_DONE, EXIT_GUARD, EXIT_RECIPE, StoppedEarly, TitanliteError
from titanlite.plan.launch import end_process, launch_environment_or_default, torchrun_environment_or_none

_AGENT_SECONDS = 3.0
"""Well above the interval at which torchrun's agents look for new ones (`--monitor-interval`, 0.1 s)."""


def end_as_launched(command: Command, argv: list[str]) -> NoReturn:
    """Run `command(argv)`, and end this process with the exit code that its launcher should see."""
    end_process(_launcher_exit_code(*_run_and_capture(argv, command)))


def _run_and_capture(argv: list[str], command: Command) -> tuple[int, Exception | None]:
    """Run the command; its exit code, and what ended it if that was an error."""
    met: list[Exception] = []
    told = os.environ.get("TITANLITE_EXIT_CODE_FILE")
    if told and torchrun_environment_or_none() and launch_environment_or_default().local_rank == 0:
        open(told, "w").close()  # what an earlier start left there is not how the run ended

    def noted(arguments: list[str]) -> int:
        try:
            return command(arguments)
        except (TitanliteError, OSError) as error:
            met.append(error)
            raise

    try:
        code = run_command(noted, argv)
    except Exception as error:  # our mistake: in one piece, for other ranks write here too
        sys.stderr.write(traceback.format_exc())
        return 1, error
    return code, met[0] if met else None


def _launcher_exit_code(code: int, error: Exception | None) -> int:
    """The exit code for whoever started this process; torchrun takes anything but 0 for a failure to restart from."""
    told = os.environ.get("TITANLITE_EXIT_CODE_FILE")
    if told:
        with open(told, "a") as file:  # one short line of each rank, in the order they end: see scripts/train.sh
            file.write(f"{code}\n")
    under = torchrun_environment_or_none()
    if under is None:
        return code
    if isinstance(error, StoppedEarly):
        left_alone = error.signalled and not error.received and under.agents > 1
        if left_alone:
            # An agent that is about to restart its processes signals them; one whose processes end before that takes
            # the job for done.
            time.sleep(_AGENT_SECONDS)
        return code if left_alone and under.elastic else EXIT_DONE
    alike = error is None or (isinstance(error, TitanliteError) and error.on_all_ranks)
    if code in (EXIT_RECIPE, EXIT_GUARD) and alike and (told or under.restarts_left > 0):
        if launch_environment_or_default().is_first and under.restarts_left > 0:
            print(
                f"exit code {code}: a restart would not mend this, so torchrun makes none.",
                file=sys.stderr,
            )
        return EXIT_DONE
    return code
