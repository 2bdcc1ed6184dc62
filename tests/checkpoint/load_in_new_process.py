"""Loads every file of a folder in a process that knows nothing of the networks, and writes down their outputs.

Run by `test_new_process.py` as `python load_in_new_process.py FOLDER CONFTEST THREADS`.
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
    requests = json.loads((folder / "requests.json").read_text())
    outputs = {}
    for file in sorted(folder.glob("*.net")):
        network = runpy.run_path(conftest)["plain_network"]() if file.stem == "plain" else None
        model = anyprec.load(file, network)
        images = load_file(file.with_suffix(".images"))["images"]
        for request in requests:
            model.set_bits(tuple(request) if isinstance(request, list) else request)
            with torch.no_grad():
                outputs[f"{file.stem} {request}"] = model(images).contiguous()
    save_file(outputs, folder / "outputs")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
