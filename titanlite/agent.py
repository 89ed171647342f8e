"""torchrun as the scripts start it: what ends it by no fault of the run is a sentence and an exit code, no traceback.

`python -m titanlite.agent [OPTIONS OF TORCHRUN] -m titanlite.train RECIPE`
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from titanlite.errors import EXIT_STOPPED_EARLY, TitanliteError

_AGAIN = "Start the run again: it goes on from its last checkpoint."


def main(argv: Sequence[str]) -> int:
    """Run torchrun; the exit code where machines cannot meet (any more) or a signal ended it, else as torchrun ends."""
    # C++ stacks of each try to reach a store that has gone; torch reads this when it is imported, processes need not.
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError, RendezvousTimeoutError

    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    code = TitanliteError.exit_code
    try:
        run.main(list(argv))
        return 0
    except RendezvousConnectionError as error:  # the host of the rendezvous, or only the way there
        endpoint = run.parse_args(list(argv)).rdzv_endpoint  # type: ignore[no-untyped-call]
        text = f"{endpoint}, where the machines of this run meet, "
        if any(frame.name == "create_backend" for frame in traceback.extract_tb(error.__traceback__)):
            text += "cannot be reached."
        else:
            code, text = EXIT_STOPPED_EARLY, f"{text}has gone. {_AGAIN}"
    except RendezvousTimeoutError:
        code, text = EXIT_STOPPED_EARLY, f"too few machines came in time (PET_NNODES, PET_RDZV_CONF). {_AGAIN}"
    except RendezvousError as error:
        text = f"the machines of this run cannot meet: {type(error).__name__}: {error}"
    except ChildFailedError as error:  # each process has printed why it ended, unless a signal killed it
        ends = (
            f"rank {rank} ({f'exit code {failed.exitcode}' if failed.exitcode >= 0 else failed.signal_name()})"
            for rank, failed in sorted(error.failures.items())
        )
        text = f"torchrun ends, for of this machine's processes failed {', '.join(ends)}."
    except SignalException as stop:
        code, text = 128 + stop.sigval, f"torchrun was stopped by {stop.sigval.name}."
    print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
