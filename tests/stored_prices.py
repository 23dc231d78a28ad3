"""What stand-ins cost in models that are quantised already: `fast` beside `exact` of the same stored weights.

    python tests/stored_prices.py CALIBRATION [SCHEME ...]

`builtin:tiny` is stored in each scheme (coded_checkpoints.py), calibrated on CALIBRATION (text, or .npy of ids) and
scored on its held-out text, decoded step by step. Half of the stored bytes is half of 8 or 4 bits a weight. Minutes a
scheme; prints the rows of the table, which go to golden/measured/stored.jsonl.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from coded_checkpoints import SCHEMES, store_coded

from buddymoe_ray.models.resolve import resolve_model

TOKENS, MEMORY = 16384, "75%,50%,25%"
COMMAND = (sys.executable, "-m", "buddymoe_ray.cli")


def main() -> None:
    """Store, calibrate, score."""
    calibration, *schemes = sys.argv[1:]
    tiny = resolve_model("builtin:tiny")
    for scheme in schemes or ("fp8", "ct-int8", "ct-int4", "modelopt-nvfp4"):
        if scheme not in SCHEMES:
            raise SystemExit(f"scheme {scheme!r} is unknown, must be one of {', '.join(SCHEMES)}")
        with TemporaryDirectory() as folder:
            model = Path(folder) / "coded"
            store_coded(tiny, scheme, model)
            shutil.copytree(tiny / "heldout", model / "heldout")
            told = [*COMMAND, "profile", "--model", str(model), "--corpus", calibration]
            subprocess.run(told, check=True, stdout=subprocess.DEVNULL)
            asked = [*COMMAND, "eval", "--json", "--model", str(model), "--corpus", str(model / "heldout")]
            asked += ["--tokens", str(TOKENS), "--mode", "fast", "--standin", "auto", "--memory", MEMORY]
            for line in subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines():
                print(json.dumps({**json.loads(line), "model": f"builtin:tiny, {scheme}"}), flush=True)


if __name__ == "__main__":
    main()
