"""List the benchmarks, or run one: `python3 -m tests.benchmarks [NAME ...]`.

With a NAME it is the same as `python3 -m tests.benchmarks.NAME ...`.
"""

import difflib
import runpy
import sys

from tests.benchmarks import descriptions


def main() -> int:
    """Print the list or run the named benchmark; exit code 2 if there is none of that name."""
    benchmarks = descriptions()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in benchmarks:
        sys.argv[1:] = arguments
        runpy.run_module(f"tests.benchmarks.{name}", run_name="__main__", alter_sys=True)
        return 0
    if name in ("-h", "--help"):
        print("usage: python3 -m tests.benchmarks.NAME [OPTIONS]; with --help its options. The benchmarks by NAME:\n")
        for name, description in benchmarks.items():
            print(f"  {name:12s} {description}")
        return 0
    nearest = difflib.get_close_matches(name, benchmarks, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"they are {', '.join(benchmarks)}."
    print(f"tests.benchmarks: there is no benchmark {name!r}: {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":  # child processes of a benchmark import this file again
    sys.exit(main())
