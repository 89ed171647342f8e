"""`python -m titanlite`: the same as the `titanlite` command."""

from titanlite.cli import main
from titanlite.launch import end_process

end_process(main())
