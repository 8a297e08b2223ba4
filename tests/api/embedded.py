"""In a process of its own: embeds with encoders, and says what that has changed in the process."""

import os
import sys

before = dict(os.environ)
import d2v_scale  # noqa: E402

assert "torch" not in sys.modules, "import d2v_scale imports torch"

import json  # noqa: E402
from pathlib import Path  # noqa: E402

out, samples = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
found = {}
for path, given in samples:
    encoder = d2v_scale.load_encoder(path)
    found[path] = encoder.embed(given).tolist()
    assert len(encoder.layers(given[:1])[0]) == encoder.depth

import torch.distributed  # noqa: E402

assert not torch.distributed.is_initialized(), "a process group was started"
assert os.environ == before, "the environment is another"
loaded = sorted(name for name in ("deepspeed", "megatron", "mlflow") if name in sys.modules)
assert not loaded, f"{loaded} were imported"
out.write_text(json.dumps(found))
