"""torchrun as the scripts start it: what ends it by no fault of the run is a sentence and an exit code, no traceback.

`python -m titanlite.agent [OPTIONS OF TORCHRUN] -m titanlite.train RECIPE`
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from titanlite.errors import EXIT_STOPPED_EARLY, TitanliteError


def main(argv: Sequence[str]) -> int:
    """Run torchrun; the exit code where machines cannot meet (any more) or a signal ended it, else as torchrun ends."""
    # C++ stacks of each try to reach a store that has gone; torch reads this when it is imported, processes need not.
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError, RendezvousTimeoutError

    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    again = "Start the run again: it goes on from its last checkpoint."
    try:
        run.main(list(argv))
    except RendezvousConnectionError as error:
        # The host of the rendezvous, or only the way there.
        began = all(frame.name != "create_backend" for frame in traceback.extract_tb(error.__traceback__))
        place = run.parse_args(list(argv)).rdzv_endpoint
        if not began:
            return _end(TitanliteError.exit_code, f"{place}, where the machines of this run meet, cannot be reached.")
        return _end(EXIT_STOPPED_EARLY, f"{place}, where the machines of this run meet, has gone. {again}")
    except RendezvousTimeoutError:
        return _end(EXIT_STOPPED_EARLY, f"too few machines came in time (PET_NNODES, PET_RDZV_CONF). {again}")
    except RendezvousError as error:
        return _end(TitanliteError.exit_code, f"the machines of this run cannot meet: {type(error).__name__}: {error}")
    except ChildFailedError as error:  # each process has printed why it ended, unless a signal killed it
        ends = (
            f"rank {rank} ({f'exit code {failed.exitcode}' if failed.exitcode >= 0 else failed.signal_name()})"
            for rank, failed in sorted(error.failures.items())
        )
        return _end(
            TitanliteError.exit_code, f"torchrun ends, for of this machine's processes failed {', '.join(ends)}."
        )
    except SignalException as stop:
        return _end(128 + stop.sigval, f"torchrun was stopped by {stop.sigval.name}.")
    return 0


def _end(code: int, said: str) -> int:
    print(said, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
