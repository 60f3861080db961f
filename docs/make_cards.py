"""Writes docs/cards.md, the command for each model, method and card, and its picture, from `plan`'s own search.

`python docs/make_cards.py --search` searches (minutes a model, on one core) and keeps what it finds in cards.json;
without it the page and the picture are written anew from that file, which a test holds them to.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

DATA = Path(__file__).with_name("cards.json")
PAGE = Path(__file__).with_name("cards.md")
PICTURE = Path(__file__).parent / "images/memory.svg"
CARDS = {6: 32, 8: 32, 12: 32, 16: 64, 24: 64, 48: 128, 80: 128}  # GiB of the card: of a machine that it is found in
MEMBERS = ("CogVideoX-5b", "CogVideoX-2b", "CogVideoX1.5-5B", "CogVideoX-5b-I2V", "CogVideoX1.5-5B-I2V")
METHODS = {"lora": "LoRA of rank 64", "sft": "full fine-tuning"}
PARTS = {
    "weights": ("weights", "#4c78a8"),
    "adapter": ("LoRA", "#f58518"),
    "gradients": ("gradients", "#e45756"),
    "optimizer": ("optimizer", "#72b7b2"),
    "activations": ("what comes and goes", "#b8b0ac"),
}
SHOWN = ("CogVideoX-5b", "lora")
INTRODUCTION = """\
# One command for your card

What `cogvideox-factory plan --fit --gpu_memory CARD --host_memory MACHINE` chooses for each model at its native
size (49×480×720; 81×768×1360 for CogVideoX 1.5), batch 1: the fastest settings with which preparing, training,
validation and testing all fit, exact ones before approximations. Smaller or fewer frames need less. The machine is
taken to have 32 GiB of memory beside a card of up to 12 GiB, 64 beside one of up to 24, else 128.

**Planned, not measured**: by tracing the steps on fake tensors (see [planning.md](planning.md)). *Card* is the highest
phase and 1.2 GiB for the CUDA context, *machine* the most that waits in its memory and 2 GiB for the program. The
options go behind `cogvideox-factory train --pretrained_model_name_or_path …` with your `--data_root` and
`--output_dir`; `train --fit` finds them by itself.

![Where the bytes go: the parts of the highest moment of each phase, card by card](images/memory.svg)
"""


def search(member: str, method: str) -> dict[str, Any]:
    """What fits each card, or the most sparing settings where nothing does."""
    from cogvideox_factory.command_line import parse_command
    from cogvideox_factory.config import Plan, with_values
    from cogvideox_factory.planning import open_configs, resolve
    from cogvideox_factory.planning.search import search
    from cogvideox_factory.planning.texts import as_json, budget_of, flags_of
    from cogvideox_factory.planning.traces import Traces

    found: dict[str, Any] = {}
    flags = ("--pretrained_model_name_or_path", f"THUDM/{member}", "--training_type", method)
    options = parse_command(Plan, "plan", flags)
    with open_configs(options) as checkpoint:
        options = resolve(options, checkpoint)
        traces = Traces(checkpoint)
        for card, machine in CARDS.items():
            budgeted = with_values(options, {"gpu_memory": float(card), "host_memory": float(machine)})
            result = search(budgeted, traces, budget_of(budgeted))
            phases = as_json(result.options, result.phases)["phases"]
            found[str(card)] = {"fits": result.fits, "flags": flags_of(result.values), "phases": phases}
            print(member, method, card, result.fits, flags_of(result.values), flush=True)
    return found


def page(found: dict[str, Any]) -> str:
    """The page, from what was found."""
    lines = [INTRODUCTION]
    missing = [
        f"{METHODS[method]} of {member}"
        for method in METHODS
        for member in MEMBERS
        if f"{member} {method}" not in found
    ]
    if missing:
        lines.append(f"Not looked for yet, ask `plan --fit`: {', '.join(missing)}.\n")
    for method, title in METHODS.items():
        members = [member for member in MEMBERS if f"{member} {method}" in found]
        if members:
            lines.append(f"## {title[0].upper()}{title[1:]}\n")
        for member in members:
            lines += [f"### {member}\n", "| GiB | card | machine | options |", "|---|---|---|---|"]
            for card, result in found[f"{member} {method}"].items():
                gpu = max(phase["peak_gib"] for phase in result["phases"]) + 1.2
                host = max(phase["host_gib"] for phase in result["phases"]) + 2
                flags = f"--training_type sft {result['flags']}".strip() if method == "sft" else result["flags"]
                if result["fits"]:
                    lines.append(f"| {card} | {gpu:.1f} | {host:.1f} | `{flags or '(none)'}` |")
                else:
                    lines.append(f"| {card} | – | – | nothing known fits: {gpu:.1f} GiB and {host:.1f} are needed |")
            lines.append("")
    return "\n".join(lines)


def picture(found: dict[str, Any]) -> str:
    """Bars of the phases of one model and method, a row a card, as SVG."""
    rows = [(card, phase) for card, result in found[" ".join(SHOWN)].items() for phase in result["phases"]]
    largest = max(phase["peak_gib"] for _, phase in rows)
    left, width, height, top = 190, 620, 17, 62
    shapes, y, last = [], top, None
    for card, phase in rows:
        y += 12 if card != last and last is not None else 0
        if card != last:
            shapes.append(f'<text x="8" y="{y + 13}" font-weight="bold">{card} GiB card</text>')
        last, x = card, float(left)
        shapes.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(phase["name"])}</text>')
        for part, (_, colour) in PARTS.items():
            length = phase["parts"][part] / largest * width
            shapes.append(f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{height - 3}" fill="{colour}"/>')
            x += length
        shapes.append(f'<text x="{x + 6:.1f}" y="{y + 12}">{phase["peak_gib"]:.1f}</text>')
        y += height
    legend, x = [], 8
    for name, colour in PARTS.values():
        legend.append(
            f'<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/><text x="{x + 17}" y="45">{name}</text>'
        )
        x += 40 + 7 * len(name)
    title = f"{SHOWN[0]}, {METHODS[SHOWN[1]]}: planned GiB of tensors on the GPU at the highest moment of each phase"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 {y + 10}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n<text x="8" y="20" font-size="14">{title}</text>\n'
        + "\n".join([*legend, *shapes])
        + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--search", nargs="*", metavar="MEMBER", help="search anew, for these members or all")
    members = parser.parse_args().search
    found = json.loads(DATA.read_text()) if DATA.is_file() else {}
    for member in MEMBERS if members == [] else members or []:
        for method in METHODS:
            found[f"{member} {method}"] = search(member, method)
            DATA.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))
    PICTURE.write_text(picture(found))


if __name__ == "__main__":
    main()
