"""Which tensors of two checkpoints, or runs, differ in any bit: `revision_tensors.py A B` prints their names."""

import json
import sys


def main() -> int:
    """Print `{"removed", "changed", "added"}`: lists of `kind/name`."""
    from d2v_scale.checkpoint import open_any

    first, second = (open_any(path) for path in sys.argv[1:3])
    names = [{(kind, name) for kind in one.kinds() for name in one.names(kind)} for one in (first, second)]
    changed = [
        (kind, name)
        for kind, name in sorted(names[0] & names[1])
        if first.tensor(kind, name).numpy().tobytes() != second.tensor(kind, name).numpy().tobytes()
    ]
    found = {"removed": sorted(names[0] - names[1]), "changed": changed, "added": sorted(names[1] - names[0])}
    print(json.dumps({key: ["/".join(one) for one in value] for key, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
