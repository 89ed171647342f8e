"""`python -m titanlite`: the same as the `titanlite` command, and as one of several processes of a launcher."""

import sys

from titanlite.cli.main import dispatch, end_as_launched

end_as_launched(dispatch, sys.argv[1:])
