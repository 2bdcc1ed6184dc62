"""Loads all files of a folder in a process that has not seen the networks; stores the outputs.

Run by `test_new_process.py` as `python load_in_new_process.py FOLDER CONFTEST THREADS`. Files are
named NETWORK.FORM. Next to them stand NETWORK.images and NETWORK.json, the configurations to run
at.
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
    plain_network = runpy.run_path(conftest)["plain_network"]
    outputs = {}
    for requests_file in sorted(folder.glob("*.json")):
        name = requests_file.stem
        requests = json.loads(requests_file.read_text())
        images = load_file(folder / f"{name}.images")["images"]
        for form in ("training", "fixed", "zstd"):
            network = plain_network() if name == "plain" else None
            model = anyprec.load(folder / f"{name}.{form}", network)
            for number, request in enumerate(requests):
                if request is None and model.is_packed:
                    continue
                model.set_bits(anyprec.BitConfig(request) if isinstance(request, dict) else request)
                with torch.no_grad():
                    outputs[f"{name} {form} {number}"] = model(images).contiguous()
        network = plain_network() if name == "plain" else None
        single = anyprec.load(folder / f"{name}.zstd", network, bits="last")
        with torch.no_grad():
            outputs[f"{name} single {len(requests) - 1}"] = single(images).contiguous()
    save_file(outputs, folder / "outputs")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
