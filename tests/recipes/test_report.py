"""The page stands alone, says what was measured, and survives whatever prompts hold."""

import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from recipes.accuracy import Judged
from recipes.evaluate import accuracy_tables
from recipes.plan import Plan
from recipes.report import chosen_prompts, render_report
from recipes.tune import Trial
from sampling.generated_image import GeneratedImage
from sampling.settings import SamplingSettings
from tessera.data.scenes import Prompt, sample_prompts


def drawn(prompt: Prompt, candidates: int) -> list[GeneratedImage]:
    return [
        GeneratedImage(
            image=np.full((8, 8, 3), 15 * index, np.uint8),
            codes=np.zeros((1, 1), np.int64),
            prompt=prompt.text,
            seed=0,
            image_index=index,
            rank=index,
            candidates=candidates,
            scorer="clip",
            scores={"clip": 1.0 - index},
            settings=SamplingSettings(),
            model_sha256="0" * 64,
            precision="fp32",
        )
        for index in range(candidates)
    ]


@pytest.fixture
def judged() -> list[Judged]:
    seen = [
        Prompt('<script>alert("x")</script> & more', sample_prompts(1, seed=9)[0].spec),
        *sample_prompts(24, seed=2),
    ]
    prompts = [("seen", prompt) for prompt in seen]
    prompts += [("unseen", prompt) for prompt in sample_prompts(24, seed=2, pairs="unseen")]
    verdict = np.array([True] + 15 * [False])
    return [Judged(prompt, pairs, drawn(prompt, 16), verdict) for pairs, prompt in prompts]  # type: ignore[arg-type]


@pytest.fixture
def page(judged: list[Judged], tmp_path: Path) -> str:
    logged = tmp_path / "dvae" / "metrics" / "from-step-000000000"
    logged.mkdir(parents=True)
    (logged / "metrics.csv").write_text("step,psnr,val_psnr\n10,12.5,\n20,15.0,14.0\n30,17,\n")
    figures = {
        "corpus": "scenes",
        "dvae": {"psnr": 27.123, "ssim": 0.95, "codebook_usage": 0.912, "perplexity": 3000.0},
        "accuracy": {"renders": 1.0, "reconstructions": 0.973, **accuracy_tables(judged, 16)},
        "sampling": asdict(SamplingSettings(temperature=0.5, guidance=1.5)),
        "hardware": {"cpu": "Fast & Loose", "cores": 2, "gpu": None},
        "versions": {"tessera": "0.1.0", "torch": "2.15.0"},
    }
    images = np.zeros((3, 8, 8, 3), np.uint8)
    return render_report(
        title="Tessera demo",
        model="out/demo/model",
        plan=Plan(minutes=10.0),
        run_dir=tmp_path,
        figures=figures,
        seconds={"total": 590.0, "dvae": 140.0},
        steps={"dvae": 1234},
        tuning="by trial",
        trials=[Trial(0.5, 1.5, 0.8, 96)],
        judged=judged,
        originals=images,
        reconstructions=images,
        codes=np.zeros((3, 2, 2), np.int64),
    )


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    sources = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']([^"']*)""", page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<script", page)


def test_the_page_is_balanced_html(page: str) -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag in ("line", "circle", "polyline")

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    balance = Balance()
    balance.feed(page)
    assert balance.open == []


def test_the_page_shows_figures_prompts_and_verdicts(page: str, judged: list[Judged]) -> None:
    for text in ("27.1 dB", "91.2%", "97.3%", "9:50", "1,234", "Fast &amp; Loose", "2.15.0", "by trial", "80.0%"):
        assert text in page, text
    for result in chosen_prompts(judged):
        assert result.prompt.text.replace("&", "&amp;").split("<")[0] in page
    assert "&lt;script&gt;" in page
    assert page.count("✓") > len(chosen_prompts(judged)) and "✗" in page
    assert "<polyline" in page


def test_prompts_of_every_class_and_split_are_shown_good_or_bad(judged: list[Judged]) -> None:
    shown = chosen_prompts(judged)
    assert len(shown) == 24
    assert sum(result.pairs == "unseen" for result in shown) == 12
