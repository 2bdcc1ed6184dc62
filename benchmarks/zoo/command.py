"""Does anyprec take every timm model? Convert all of them, and try every promise on each.

    python -m benchmarks.zoo run                  # all of timm.list_models(); resumable; hours on two cores
    python -m benchmarks.zoo run 'resnet*' --again all
    python -m benchmarks.zoo beyond               # a few networks of torchvision and Hugging Face
    python -m benchmarks.zoo render               # docs/zoo.md from the results

Each model is looked at twice, in a process of its own with a time and memory limit:

- *Structure*, on the meta device, at the input size and depth that `timm.create_model(name)` gives: does `convert`
  take it, what is covered, do our MACs equal those of torch's counter; and as a feature extractor, where it is one.
- *Numbers*, with random weights, at the smallest input that the model takes: the checks of `anyprec.testing`. A model of
  more than `--largest` parameters has fewer blocks there, through timm's own arguments, and is marked so, as is one
  that was tried on another device (`--device cuda`), because it needs more memory than a small machine has.

A result is one line of JSON in `--results`. A model that failed, ran out of time or died is a result too.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import multiprocessing
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import Progress
from torch import Tensor, nn

import anyprec
from anyprec.testing import Report, check_promises, check_structure
from benchmarks.common.records import ROOT, commit

GIB = 2**30

SIZES = (56, 64, 84, 96, 112, 128, 160, 192, 224, 256, 384)
"""Image sizes to try, smallest first; some divide by 14, some by 16 and 32."""

RATES = ({"drop_rate": 0.1, "drop_path_rate": 0.1, "patch_drop_rate": 0.25}, {"drop_rate": 0.1, "drop_path_rate": 0.1},
         {"drop_path_rate": 0.1}, {"drop_rate": 0.1}, {})  # fmt: skip
"""Arguments that make train mode differ from eval mode; a model takes the first that it knows."""

SHALLOW = (
    {"depth": 2},
    {"depth": 2, "num_kv_heads": (8, 4)},
    {"depths": (1, 1, 2, 1)},
    {"layers": (1, 1, 2, 1)},
    {"stages": (1, 1, 2, 1)},
)
"""Arguments that give a model fewer blocks."""


# --- One model ----------------------------------------------------------------------------------------------------


def look_at(
    name: str, largest: int, *, device: str = "cpu", structure_only: bool = False
) -> dict[str, Any]:
    """Everything about one model, as JSON can hold it."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model = create_on_meta(name)
    record: dict[str, Any] = {
        "name": name,
        "family": type(model).__module__.rpartition(".")[2],
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    structure = check_structure(model)
    if isinstance(model, anyprec.ConvertedModel):
        facts = model.anyprec_record.facts
        record |= {"input": facts.example_shape[1:], "untraceable": facts.untraceable}
        record["uncounted"] = {
            entry.name: entry.macs for entry in anyprec.cost_model(model).uncounted
        }
    record["structure"] = as_json(structure)
    arguments = smaller_depth(name) if record["parameters"] > largest else {}
    record["features"] = look_at_features(name, arguments)
    record["structure_seconds"] = round(time.perf_counter() - start, 2)
    del model
    if structure_only:
        return {**record, "numbers": None, "arguments": {}}
    start = time.perf_counter()
    report, used = examine_at_smallest(name, arguments, device)
    record |= {"numbers": as_json(report), "arguments": used}
    if device != "cpu":
        record["device"] = torch.cuda.get_device_name(device)
    record["numbers_seconds"] = round(time.perf_counter() - start, 2)
    return record


def look_beyond(name: str) -> dict[str, Any]:
    """Everything about one network that is not timm's, at full depth."""
    torch.manual_seed(0)
    create, size = BEYOND[name]
    start = time.perf_counter()
    with torch.device("meta"):
        model = create()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    structure = check_structure(model, torch.zeros(1, 3, size, size, device="meta"))
    numbers = check_promises(create(), lambda: torch.randn(2, 3, size, size))
    return {
        "name": name,
        "class": type(model).original_class.__name__
        if isinstance(model, anyprec.ConvertedModel)
        else "",
        "parameters": parameters,
        "structure": as_json(structure),
        "features": {"none": "not timm's"},
        "numbers": as_json(numbers),
        "arguments": {"size": size},
        "numbers_seconds": round(time.perf_counter() - start, 2),
    }


def _torchvision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        import torchvision  # noqa: PLC0415 (only the networks that are not timm's need it)

        model: nn.Module = getattr(torchvision.models, name)(**arguments)
        return model

    return create


def _hugging_face(kind: str, **arguments: Any) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        import transformers  # noqa: PLC0415 (an optional extra)

        config = getattr(transformers, f"{kind}Config")(**arguments)
        model: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(config)
        return model

    return create


BEYOND: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision/resnet18": (_torchvision("resnet18"), 64),
    "torchvision/mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), 64),
    "torchvision/convnext_tiny": (_torchvision("convnext_tiny"), 64),
    "torchvision/swin_v2_t": (_torchvision("swin_v2_t"), 64),
    "torchvision/vit_b_16": (_torchvision("vit_b_16", image_size=64), 64),
    "transformers/ViT": (_hugging_face("ViT", image_size=64), 64),
    "transformers/ResNet": (_hugging_face("ResNet"), 64),
}
"""Networks that are not timm's: how to create them, and the size of their images."""


def as_json(report: Report) -> dict[str, Any]:
    """A report with the checks that held counted, not named."""
    return {**dataclasses.asdict(report), "held": len(report.held)}


def create_on_meta(name: str, **arguments: Any) -> nn.Module:
    """A model without values."""
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def look_at_features(name: str, arguments: dict[str, Any]) -> dict[str, str]:
    """What broke in the model as a feature extractor; "none" where timm has no such form.

    With `arguments`, where the values must be there: a network may look at them.
    """
    try:
        model = create_on_meta(name, features_only=True)
    except Exception as error:  # noqa: BLE001 (models refuse in their own ways)
        return {"none": f"{type(error).__name__}: {error}"[:200]}
    broken = check_structure(model).broken
    if "convert" in broken:
        broken = check_structure(timm.create_model(name, features_only=True, **arguments)).broken
    return broken


def smaller_depth(name: str) -> dict[str, Any]:
    """Arguments that give the model fewer blocks, or none."""
    full = sum(parameter.numel() for parameter in create_on_meta(name).parameters())
    for arguments in SHALLOW:
        if creates(name, arguments) and next(fitting_sizes(name, arguments), None) is not None:
            model = create_on_meta(name, **arguments)
            if sum(parameter.numel() for parameter in model.parameters()) < full / 2:
                return arguments
    return {}


def examine_at_smallest(
    name: str, arguments: dict[str, Any], device: str
) -> tuple[Report, dict[str, Any]]:
    """Try all promises at the smallest input at which they hold; else at the last that the model takes.

    At the smallest sizes a deep stage may see a single position, in which attention has nothing to choose and no
    gradient: then a larger one is tried.
    """
    report, used = Report(broken={"input": "no size of input fits"}), dict(arguments)
    missed = 0
    for size, created in fitting_sizes(name, arguments):
        model = timm.create_model(name, **created).to(device)
        used = {**created, "size": size}
        channels = in_channels(model)

        def make_images(shape: tuple[int, ...] = (2, channels, size, size)) -> Tensor:
            return torch.randn(shape).to(device)

        report = Report()
        with report.check(FLOAT_RUNS):
            report = check_promises(model, make_images)
        del model
        lacking = bool(report.unreached) or any(
            check.startswith("gradients") for check in report.broken
        )
        missed += lacking
        others = [check for check in report.broken if not check.startswith("gradients")]
        if FLOAT_RUNS not in report.broken and (others or not lacking or missed == 3):
            break
    return report, used


FLOAT_RUNS = "the float network runs"


def fitting_sizes(name: str, arguments: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Sizes that the model takes, smallest first, with the arguments that create it for them."""
    known = [{**arguments, **rates} for rates in RATES if creates(name, {**arguments, **rates})]
    native = create_on_meta(name, **known[0]).pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    for size in sorted({*(size for size in SIZES if size < native), native}):
        sized = [{**rates, "img_size": size} for rates in known]
        fitting = next((created for created in (*sized, *known) if runs(name, created, size)), None)
        if fitting is not None:
            yield size, fitting


def creates(name: str, arguments: dict[str, Any]) -> bool:
    """Whether the model knows these arguments."""
    try:
        create_on_meta(name, **arguments)
    except Exception:  # noqa: BLE001 (models refuse in their own ways)
        return False
    return True


def runs(name: str, arguments: dict[str, Any], size: int) -> bool:
    """Whether the model takes images of this size, in both modes."""
    try:
        model = create_on_meta(name, **arguments)
        for train in (False, True):
            with torch.no_grad():
                model.train(train)(torch.zeros(2, in_channels(model), size, size, device="meta"))
    except NotImplementedError:
        return True  # an operator without a meta form: the real run will tell
    except Exception:  # noqa: BLE001 (models refuse in their own ways)
        return False
    return True


def in_channels(model: nn.Module) -> int:
    """Channels of an image."""
    return int(model.pretrained_cfg.get("input_size", (3,))[0])


# --- All models ---------------------------------------------------------------------------------------------------


def _work(name: str, options: argparse.Namespace, sender: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory * GIB),) * 2)
    if name in BEYOND:
        sender.send(look_beyond(name))
    else:
        sender.send(
            look_at(name, options.largest, device=options.device, structure_only=options.structure)
        )


def supervised(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """`look_at` in a process of its own, which is ended when its time is over."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, options, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        if not receiver.poll(options.seconds):
            return {"name": name, "died": f"not done after {options.seconds} s"}
        record: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        return {
            "name": name,
            "died": f"ended with exit code {process.exitcode} after {time.perf_counter() - start:.0f} s",
        }
    else:
        return record
    finally:
        process.kill()
        process.join()
        receiver.close()


def run(options: argparse.Namespace) -> None:
    """Look at every model that has no result yet."""
    known = {} if options.again else read(options.results)
    names = [
        name
        for name in timm.list_models()
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.patterns)
    ]
    waiting = [name for name in names if name not in known or _is_open(known[name], options)]
    random.Random(0).shuffle(waiting)  # so that the first results tell of every family
    if options.again == "failed":
        broken = {name for name, record in read(options.results).items() if shortfalls(record)}
        waiting = [name for name in names if name in broken]
    look_at_all(waiting, options)


def run_beyond(options: argparse.Namespace) -> None:
    """Look at the networks that are not timm's."""
    look_at_all(list(BEYOND), options)


def look_at_all(waiting: list[str], options: argparse.Namespace) -> None:
    """Look at models side by side, and append their results."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"commit": commit(), "timm": timm.__version__, "torch": torch.__version__}
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["timm", "torch", "anyprec.testing"]
    )
    with (
        Progress(disable=not sys.stdout.isatty()) as progress,
        ThreadPoolExecutor(options.workers) as pool,
        options.results.open("a") as file,
    ):
        task = progress.add_task("models", total=len(waiting))
        for record in pool.map(lambda name: supervised(name, options), waiting):
            file.write(json.dumps({**record, **stamp}, default=str) + "\n")
            file.flush()
            progress.advance(task)
            for shortfall in shortfalls(record):
                print(f"{record['name']}: {shortfall}", flush=True)


def _is_open(record: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a result holds the structure alone, and more is asked for."""
    return not options.structure and "died" not in record and record["numbers"] is None


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of every model."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["name"]: record for record in records}


def shortfalls(record: dict[str, Any]) -> list[str]:
    """Everything in which a model falls short, in words."""
    if "died" in record:
        return [record["died"]]
    found = [f"{check}: {what}" for check, what in record["structure"]["broken"].items()]
    found += [
        f"as feature extractor: {check}: {what}"
        for check, what in record["features"].items()
        if check != "none"
    ]
    if record["numbers"] is None:
        return found
    found += [
        f"at size {record['arguments'].get('size')}: {check}: {what}"
        for check, what in record["numbers"]["broken"].items()
    ]
    return found


# --- The page -----------------------------------------------------------------------------------------------------


def render(options: argparse.Namespace) -> None:
    """Write docs/zoo.md."""
    records = read(options.results)
    names = timm.list_models()
    found = [records[name] for name in names if name in records]
    missing = [name for name in names if name not in records]
    lines = [_HEAD.format(counts=_totals(names, found), versions=_versions(found))]
    lines += ["## By family", "", *_family_table(found), ""]
    lines += ["## What falls short", "", *_shortfall_table(found, missing), ""]
    lines += ["## Beyond timm", "", *_beyond_table(records), ""]
    lines += ["## Layers that are not quantized", "", *_reason_table(found), ""]
    lines += ["## Tried with fewer blocks", "", *_reduced(found), ""]
    lines += ["## Tried on an accelerator", "", *_on_accelerators(found)]
    options.page.write_text("\n".join(lines).rstrip() + "\n")


_HEAD = """# Every timm model

{counts}

Each model is converted twice. *Structure*: without values, at the input size and depth of `timm.create_model(name)`;
nothing may be skipped, and our MACs must equal those of torch's counter; so too as a feature extractor, where timm has
one. *Numbers*: with random weights, at the smallest input that the model takes: bits None bit-identical to the float
network in eval and train mode (dropout, drop path and patch drop under one seed); finite output at 2 and at 8 bits; a
gradient on both step sizes of every layer; A -> B -> A exact; deepcopy; state dict into a fresh network; float state
dict; `forward_features`; `reset_classifier`; the same after `reparameterize_model`, where it merges branches.

With random weights and 2 bits, whole inputs can round to zero and pass no gradient on. Layers without a gradient in such
a pass are tried again with all others at 8 bits, and then in floating point: where the float network passes no gradient
to the weight either, none can be expected. How many networks needed that is counted above.

{versions}

```sh
python -m benchmarks.zoo run      # hours on two cores; resumable
python -m benchmarks.zoo render   # this page
```
"""


def _totals(names: list[str], found: list[dict[str, Any]]) -> str:
    alive = [record for record in found if "died" not in record]
    tried = [record for record in alive if record["numbers"] is not None]
    clean = [record for record in found if _keeps_all(record)]
    sound = [record for record in alive if not record["structure"]["broken"]]
    whole = [record for record in clean if not _is_reduced(record)]
    coverage = {
        kind: sum(record["structure"]["coverage"].get(kind, 0) for record in alive)
        for kind in _KINDS
    }
    functional = {
        kind: sum(record["structure"]["functional"].get(kind, 0) for record in alive)
        for kind in _USES
    }
    equal = sum(
        record["structure"]["macs"][0] == record["structure"]["macs"][1] for record in alive
    )
    features = [record for record in alive if "none" not in record["features"]]
    alone = [record for record in tried if any(record["numbers"]["alone"].values())]
    unreached = [record for record in tried if record["numbers"].get("unreached")]
    return "\n".join(
        [
            f"- **{len(sound)} of {len(names)}** models of timm convert as they are created, with nothing skipped.",
            f"- **{len(clean)} of {len(names)}** keep every promise; the numbers of {len(tried)} were tried so far.",
            f"- {len(whole)} of these were tried whole; {len(clean) - len(whole)} with fewer blocks (their structure whole).",
            f"- Layers: {coverage['quantized']:,} quantized, {coverage['exempt']:,} exempt by rule, "
            f"{coverage['skipped']:,} skipped. Of the quantized, {functional['used without a call']:,} have a weight that "
            f"is used without calling the layer, and {functional['bare parameters']:,} are bare parameters of a module.",
            f"- MACs equal those of torch's counter, to the last one, in {equal} of {len(alive)} models.",
            f"- {sum(not record['features'] for record in features)} of {len(features)} feature extractors convert.",
            f"- {len(alone)} networks have layers whose gradient at 2 bits took the others at 8 bits; {len(unreached)} have "
            "layers to which the float network passes no gradient either.",
        ]
    )


_KINDS = ("quantized", "exempt", "skipped")
_USES = ("used without a call", "bare parameters")


def _versions(found: list[dict[str, Any]]) -> str:
    used = {key: sorted({record[key] for record in found}) for key in ("timm", "torch", "commit")}
    return "; ".join(f"{key} {', '.join(values)}" for key, values in used.items()) + "."


def _family_table(found: list[dict[str, Any]]) -> list[str]:
    families: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        families.setdefault(record.get("family", "unknown"), []).append(record)
    lines = [
        "| family | models | keep every promise | quantized | exempt | skipped |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for family, members in sorted(families.items()):
        alive = [record for record in members if "died" not in record]
        counts = [
            sum(record["structure"]["coverage"].get(kind, 0) for record in alive) for kind in _KINDS
        ]
        clean = sum(map(_keeps_all, members))
        lines.append(
            f"| {family} | {len(members)} | {clean} | {' | '.join(f'{count:,}' for count in counts)} |"
        )
    return lines


def _shortfall_table(found: list[dict[str, Any]], missing: list[str]) -> list[str]:
    short = {record["name"]: shortfalls(record) for record in found if shortfalls(record)}
    untried = [
        record["name"] for record in found if "died" not in record and record["numbers"] is None
    ]
    lines = ["None of those tried."]
    if short:
        lines = ["| model | what |", "| --- | --- |"]
        lines += [
            f"| `{name}` | {'<br>'.join(_cell(text) for text in texts)} |"
            for name, texts in sorted(short.items())
        ]
    if untried:
        lines += [
            "",
            f"Numbers not tried yet ({len(untried)}): {', '.join(f'`{name}`' for name in untried)}.",
        ]
    if missing:
        lines += [
            "",
            f"Not looked at yet ({len(missing)}): {', '.join(f'`{name}`' for name in missing)}.",
        ]
    return lines


def _beyond_table(records: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "The same checks at full depth, with random weights (`python -m benchmarks.zoo beyond`).",
        "",
    ]
    lines += [
        "| network | parameters | layers quantized | what falls short |",
        "| --- | ---: | ---: | --- |",
    ]
    for name in BEYOND:
        record = records.get(name, {"died": "not looked at yet"})
        what = "<br>".join(map(_cell, shortfalls(record))) or "nothing"
        quantized = record.get("structure", {}).get("coverage", {}).get("quantized", "")
        size = f"{record['parameters'] / 1e6:.1f} M" if "parameters" in record else ""
        lines.append(f"| `{name}` | {size} | {quantized} | {what} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:240]


def _reason_table(found: list[dict[str, Any]]) -> list[str]:
    reasons: dict[str, dict[str, int]] = {}
    for record in found:
        for reason, count in record.get("structure", {}).get("reasons", {}).items():
            reasons.setdefault(reason, {})[record["family"]] = (
                reasons.get(reason, {}).get(record["family"], 0) + count
            )
    lines = ["| reason | layers | families |", "| --- | ---: | --- |"]
    for reason, families in sorted(reasons.items()):
        lines.append(f"| {reason} | {sum(families.values()):,} | {', '.join(sorted(families))} |")
    return lines if reasons else ["There are none."]


def _keeps_all(record: dict[str, Any]) -> bool:
    return not shortfalls(record) and record["numbers"] is not None


def _is_reduced(record: dict[str, Any]) -> bool:
    return any(name in record["arguments"] for arguments in SHALLOW for name in arguments)


def _reduced(found: list[dict[str, Any]]) -> list[str]:
    reduced = [record for record in found if "died" not in record and _is_reduced(record)]
    entries = [f"`{record['name']}` ({record['parameters'] / 1e6:.0f} M)" for record in reduced]
    return [", ".join(entries) + "." if entries else "None."]


def _on_accelerators(found: list[dict[str, Any]]) -> list[str]:
    """Those whose numbers need more memory than a small machine has."""
    entries = [f"`{record['name']}` ({record['device']})" for record in found if "device" in record]
    return [", ".join(entries) + "." if entries else "None."]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "zoo.jsonl"
    )
    commands = parser.add_subparsers(required=True)
    limits = argparse.ArgumentParser(add_help=False)
    limits.add_argument("--workers", type=int, default=2)
    limits.add_argument("--device", default="cpu", help="where numbers are tried")
    limits.add_argument("--seconds", type=float, default=600, help="for one model")
    limits.add_argument("--memory", type=float, default=10, help="GiB for one model; 0 is no limit")
    runner = commands.add_parser("run", help="look at models", parents=[limits])
    runner.add_argument(
        "patterns", nargs="*", default=["*"], help="names of models, with wildcards"
    )
    runner.add_argument("--again", choices=("all", "failed"), help="also models that have a result")
    runner.add_argument(
        "--structure", action="store_true", help="the structure alone: minutes instead of hours"
    )
    runner.add_argument(
        "--largest",
        type=int,
        default=100_000_000,
        help="parameters of the largest model to try whole",
    )
    runner.set_defaults(command=run)
    beyond = commands.add_parser(
        "beyond", help="look at a few networks that are not timm's", parents=[limits]
    )
    beyond.set_defaults(command=run_beyond)
    renderer = commands.add_parser("render", help="write the page")
    renderer.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo.md")
    renderer.set_defaults(command=render)
    options = parser.parse_args()
    options.command(options)
