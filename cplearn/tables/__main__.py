"""What `child.Children` starts, by the path of this file: PARENT ENDS SCRIPT FLAGS...

By its path, so that no `cplearn` of the working folder is imported, while relative paths keep their meaning.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # the checkout
    from cplearn.tables.child import run

    parent, ends, script, *flags = sys.argv[1:]
    run(int(parent), ends, script, flags)
