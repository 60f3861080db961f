"""What a run comes to in a few figures, for the head of its page and for the table that compares it with others."""

from __future__ import annotations

import json
import statistics
from datetime import timedelta
from pathlib import Path
from typing import Any

from cogvideox_factory.redaction import without_secrets
from cogvideox_factory.report.curves import points_of
from cogvideox_factory.report.markup import number
from cogvideox_factory.report.reading import Run, finite

MEMORY_PHASES = {
    "memory_before_training": "Before the first step",
    "memory_before_validation": "Peak of training",
    "memory_after_validation": "Peak with validation",
    "memory_after_testing": "Peak of testing",
}
SECRET_OPTIONS = {"hub_token"}  # a report is made to be handed around


def facts_of(run: Run) -> dict[str, str]:
    """Name → figure, as texts; what is not known yet is left out or says so."""
    step, planned_steps = run.last.get("step", 0), run.config.get("max_train_steps")
    losses = (line.get("loss") for line in reversed(run.metrics))
    loss = next((loss for loss in losses if isinstance(loss, int | float)), None)  # a skipped step has none
    is_full = run.config.get("training_type") == "sft"
    return {
        "Model": _short_name(str(run.config.get("pretrained_model_name_or_path", "unknown"))),
        "Method": "full fine-tuning" if is_full else f"LoRA, rank {run.config.get('rank', 'unknown')}",
        "Steps": f"{step} of {planned_steps}" if planned_steps else str(step),
        "Samples seen": str(run.last.get("samples_seen", 0)),
        "Last loss": "none yet" if loss is None else number(loss),
        **_held_out_facts(run),
        "Training time": str(timedelta(seconds=round(_total(run, "step_seconds")))),
        **_speed_facts(run),
        "Version": str(run.config.get("version", "unknown")),
    }


def shown_options(run: Run) -> dict[str, str]:
    """Options of a run as texts, without tokens and signatures of addresses."""
    return {
        str(name): without_secrets(_spelled(value)) for name, value in run.config.items() if name not in SECRET_OPTIONS
    }


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _short_name(model: str) -> str:
    """A name on the Hub as it is; of a folder on this machine, which is nobody else's business, the last two names."""
    path = Path(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


def _held_out_facts(run: Run) -> dict[str, str]:
    points = points_of(run.held_out, "loss")
    if not points:
        return {}
    (_, last), (step, best) = points[-1], min(points, key=lambda point: point[1])
    return {"Held-out loss": f"{number(last)}, best {number(best)} at step {step:.0f}"}


def _speed_facts(run: Run) -> dict[str, str]:
    seconds = [value for _, value in points_of(run.metrics, "step_seconds")]
    if not seconds:
        return {}
    speed = {"A step, median": f"{number(statistics.median(seconds))} s"}
    total = _total(run, "step_seconds")
    if total > 0 and points_of(run.metrics, "data_seconds"):
        speed["Waiting for data"] = f"{100 * _total(run, 'data_seconds') / total:.1f}% of the time"
    return speed


def _total(run: Run, key: str) -> float:
    return sum(finite(entry.get(key)) or 0 for entry in run.metrics)
