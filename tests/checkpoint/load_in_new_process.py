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

folder, conftest, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
outputs = {}
for file in sorted(Path(folder).glob("*.net")):
    network = runpy.run_path(conftest)["plain_network"]() if file.stem == "plain" else None
    model = anyprec.load(file, network)
    images = load_file(file.with_suffix(".images"))["images"]
    for request in json.loads((Path(folder) / "requests.json").read_text()):
        model.set_bits(tuple(request) if isinstance(request, list) else request)
        with torch.no_grad():
            outputs[f"{file.stem} {request}"] = model(images).contiguous()
save_file(outputs, Path(folder) / "outputs")
