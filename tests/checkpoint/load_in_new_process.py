"""Loads every file of a folder in a process that knows nothing of the networks, and writes down their outputs.

Run by `test_new_process.py` as `python load_in_new_process.py FOLDER CONFTEST THREADS`. Files are named KIND.FORM; next to
them stand KIND.images and KIND.json, the configurations to run at.
"""

import json
import runpy
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import anyprec


def main(folder: Path, conftest: str, threads: int) -> None:
    torch.set_num_threads(threads)
    outputs = {}
    for requests_file in sorted(folder.glob("*.json")):
        kind = requests_file.stem
        requests = json.loads(requests_file.read_text())
        images = load_file(folder / f"{kind}.images")["images"]
        for form in ("training", "fixed", "zstd"):
            network = runpy.run_path(conftest)["plain_network"]() if kind == "plain" else None
            model = anyprec.load(folder / f"{kind}.{form}", network)
            for number, request in enumerate(requests):
                if request is None and model.is_packed:
                    continue
                model.set_bits(anyprec.BitConfig(request) if isinstance(request, dict) else request)
                with torch.no_grad():
                    outputs[f"{kind} {form} {number}"] = model(images).contiguous()
        single = anyprec.load(
            folder / f"{kind}.zstd",
            network and runpy.run_path(conftest)["plain_network"](),
            bits="last",
        )
        with torch.no_grad():
            outputs[f"{kind} single {len(requests) - 1}"] = single(images).contiguous()
    save_file(outputs, folder / "outputs")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
