"""The report: one HTML page that stands alone, with every figure, curve and picture of a fit and its evaluation."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dvae.sheets import code_map
from recipes.accuracy import Judged
from recipes.charts import line_chart
from recipes.plan import Plan, stage_seconds
from recipes.plan_table import clock, planned_sizes, stage_trainers
from recipes.tune import Trial
from tessera.data.scenes import PROMPT_CLASSES
from tessera.training.metrics import read_metrics

TEMPLATE_FILE = "report.html.j2"
_PROMPTS_PER_CELL = 2  # per class and split
_SHOWN_OTHERS = 6

# What a run's metrics.csv is drawn as: title, columns by their shown names, unit.
_CHARTS: dict[str, tuple[tuple[str, dict[str, str], str], ...]] = {
    "dvae": (
        ("dVAE: reconstruction", {"psnr": "training", "val_psnr": "validation"}, "dB"),
        ("dVAE: codebook usage", {"usage": "share of codes used"}, ""),
    ),
    "prior": (("Prior: image tokens", {"image_loss": "training", "val_image_loss": "validation"}, "nats"),),
    "scorer": (("Scorer: loss", {"loss": "training", "val_loss": "validation"}, "nats"),),
}


def render_report(
    *,
    title: str,
    model: str,
    plan: Plan,
    run_dir: Path,
    figures: Mapping[str, Any],
    seconds: Mapping[str, float],
    steps: Mapping[str, int],
    tuning: str,
    trials: Sequence[Trial],
    judged: Sequence[Judged],
    originals: NDArray[np.uint8],
    reconstructions: NDArray[np.uint8],
    codes: NDArray[np.int64],
) -> str:
    """Writes the page.

    Args:
        title: its heading.
        model: the model folder as the user would type it.
        plan: what was planned.
        run_dir: its subfolders dvae, prior and scorer may hold metrics.csv.
        figures: of `recipes.evaluate`.
        seconds: taken, by phase, with "total".
        steps: made, by stage.
        tuning: how the sampling settings were chosen.
        trials: what was tried for that.
        judged: prompts with their candidates; may be empty.
        originals: validation images, uint8 [n, H, W, 3].
        reconstructions: of the same images.
        codes: of the same images, int64 [n, h, w].

    Returns:
        HTML that refers to nothing outside itself.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    shown = chosen_prompts(judged)
    candidates = len(judged[0].images) if judged else 0
    hardware = figures["hardware"]
    device = hardware.get("gpu") or f"{hardware.get('cpu')} ({hardware.get('cores')} cores)"
    example = next((result.prompt.text for result in shown), "")
    return environment.get_template(TEMPLATE_FILE).render(
        title=title,
        subtitle=f"{figures['corpus']}, {clock(seconds['total'])} minutes on {device}",
        tiles=_tiles(figures, seconds),
        command=f'tessera generate {model} "{example}" -n 4 --best-of 16 --out out',
        candidates=candidates,
        prompts=[_prompt(result) for result in shown],
        accuracy=_accuracy(figures.get("accuracy")),
        reconstructions=[
            {
                "original": data_url(before),
                "reconstruction": data_url(after),
                "codes": data_url(code_map(grid, *before.shape[:2])),
            }
            for before, after, grid in zip(originals, reconstructions, codes, strict=True)
        ],
        charts=_charts(run_dir),
        stages=_stages(plan, seconds, steps),
        settings=[
            (name.replace("_", " "), value if isinstance(value, str) else f"{value:g}")
            for name, value in figures["sampling"].items()
        ],
        tuning=tuning,
        trials=[
            {"temperature": f"{trial.temperature:g}", "guidance": f"{trial.guidance:g}", "value": f"{trial.value:.1%}"}
            for trial in trials
        ],
        hardware=[(name.replace("_", " "), value) for name, value in hardware.items() if value is not None],
        versions=list(figures["versions"].items()),
    )


def chosen_prompts(judged: Sequence[Judged]) -> list[Judged]:
    """The first prompts of every class and split, whether they came out well or not."""
    chosen: list[Judged] = []
    for name in PROMPT_CLASSES:
        for pairs in ("seen", "unseen"):
            cell = [result for result in judged if result.pairs == pairs and result.prompt.spec.prompt_class == name]
            chosen.extend(cell[:_PROMPTS_PER_CELL])
    return chosen


def data_url(pixels: NDArray[np.uint8]) -> str:
    """An image uint8 [H, W, 3] as a PNG inside a URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tiles(figures: Mapping[str, Any], seconds: Mapping[str, float]) -> list[dict[str, str]]:
    tiles = []
    accuracy = figures.get("accuracy")
    if accuracy:
        best_of = next(name for name in accuracy if name.startswith("best_of_"))
        for kind, shown in ((best_of, best_of.replace("_", " ")), ("single", "single image")):
            for pairs in ("seen", "unseen"):
                value = accuracy[kind].get(pairs, {}).get("all")
                if value is not None:
                    tiles.append({"value": f"{value:.1%}", "label": f"{shown}, {pairs} pairs"})
        tiles.append(
            {"value": f"{accuracy['reconstructions']:.1%}", "label": "reconstructions that the parser accepts"}
        )
    vae = figures["dvae"]
    tiles.append({"value": f"{vae['psnr']:.1f} dB", "label": "dVAE reconstruction"})
    tiles.append({"value": f"{vae['codebook_usage']:.1%}", "label": "of the codebook in use"})
    tiles.append({"value": f"{clock(seconds['total'])}", "label": "minutes in all"})
    return tiles


def _prompt(result: Judged) -> dict[str, Any]:
    pictures = []
    # the pick, and others spread over the ranks down to the last
    places = np.linspace(1, len(result.images) - 1, min(_SHOWN_OTHERS, len(result.images) - 1)).round().astype(int)
    for place in (0, *places.tolist()):
        image, satisfied = result.images[place], result.satisfied[place]
        score = image.scores.get(image.scorer or "", float("nan"))
        pictures.append({"source": data_url(image.image), "satisfied": bool(satisfied), "score": f"{score:.2f}"})
    return {"text": result.prompt.text, "unseen": result.pairs == "unseen", "pictures": pictures}


def _accuracy(accuracy: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not accuracy:
        return None
    columns = ["all", *PROMPT_CLASSES]
    kinds = [name for name in accuracy if name == "single" or name.startswith(("best_of_", "oracle_of_"))]
    groups = []
    for pairs in ("seen", "unseen"):
        rows = []
        for kind in kinds:
            row = accuracy[kind].get(pairs, {})
            cells = [f"{row[column]:.1%}" if column in row else "" for column in columns]
            rows.append({"name": kind.replace("_", " "), "cells": cells})
        groups.append({"name": f"{pairs} pairs", "rows": rows})
    counts = accuracy["prompts"]
    return {
        "renders": f"{accuracy['renders']:.1%}",
        "reconstructions": f"{accuracy['reconstructions']:.1%}",
        "columns": columns,
        "groups": groups,
        "counts": f"{counts['seen']} prompts of seen and {counts['unseen']} of unseen (shape, color) pairs.",
    }


def _charts(run_dir: Path) -> list[dict[str, str]]:
    charts = []
    for stage, drawings in _CHARTS.items():
        metrics = read_metrics(run_dir / stage)
        for title, columns, unit in drawings:
            series = {shown: metrics[name] for name, shown in columns.items() if name in metrics}
            svg = line_chart(series, label=title, unit=unit)
            if svg:
                charts.append({"title": title, "svg": svg})
    return charts


def _stages(plan: Plan, seconds: Mapping[str, float], steps: Mapping[str, int]) -> list[dict[str, str]]:
    planned = stage_seconds(plan.training_seconds)
    sizes, trainers = planned_sizes(plan), stage_trainers(plan)
    rows = []
    for name in ["planning", "data", *planned, "evaluation", "total"]:
        if name not in seconds and name not in planned:
            continue
        trainer = trainers.get(name)
        rows.append(
            {
                "name": name,
                "planned": clock(planned[name]) if name in planned else "",
                "taken": clock(seconds[name]) if name in seconds else "",
                "steps": f"{steps[name]:,}" if name in steps else "",
                "batch": str(trainer.batch_size) if trainer else "",
                "size": sizes.get(name, ""),
            }
        )
    return rows
