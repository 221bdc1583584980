from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tessera.config import from_plain, load, read_yaml, to_plain, write_yaml
from tessera.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model."""

    width: int = 32
    """channels,
    an even number"""
    kind: Literal["gumbel", "fsq"] = "gumbel"
    levels: tuple[int, ...] = (8, 8)
    betas: tuple[float, float] = (0.9, 0.95)
    steps: Literal["auto"] | int = "auto"

    def __post_init__(self) -> None:
        if self.width % 2:
            raise UserError(f"model.width must be even; got {self.width}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Trains something.

    A second paragraph that help leaves out.
    """

    data: str
    """folder or corpus"""
    model: ModelConfig = ModelConfig(width=64)
    caption: str | None = None
    out: Path = Path("runs/stage")
    lr: float = 1e-3
    """learning rate per step"""
    limit: int | None = None
    attention: tuple[Literal["row", "column"], ...] = ("row", "column")
    compile: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    teacher: ModelConfig | None = None


def stage(*argv: str) -> StageConfig:
    return load(StageConfig, ["data=scenes", *argv], prog="tessera train-stage")


def modules_of(value: Any) -> set[str]:
    if is_dataclass(value):
        return {type(value).__module__}.union(*(modules_of(getattr(value, item.name)) for item in fields(value)))
    if isinstance(value, (tuple, list)):
        return {type(value).__module__}.union(*map(modules_of, value))
    return {type(value).__module__}


def test_defaults_then_files_in_order_then_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 0.1\nlimit: 1\nmodel:\n  width: 8\n  kind: fsq\n")
    (tmp_path / "b.yml").write_text("limit: 2\nmodel: {width: 10}\n")
    config = stage(f"{tmp_path}/a.yaml", "limit=3", f"{tmp_path}/b.yml")
    assert (config.lr, config.limit, config.model.width, config.model.kind) == (0.1, 3, 10, "fsq")
    assert config.model.levels == (8, 8)
    assert config.attention == ("row", "column")


def test_the_default_of_a_section_is_the_one_of_the_stage():
    assert stage().model == ModelConfig(width=64)
    assert stage("model.kind=fsq").model == ModelConfig(width=64, kind="fsq")


def test_no_type_of_omegaconf_is_left():
    config = stage("model.levels=[1,2,3]", "weights.a=2", "attention=[row]", "teacher.width=4")
    assert isinstance(config, StageConfig)
    assert config.model.levels == (1, 2, 3) and isinstance(config.model.levels, tuple)
    assert config.teacher == ModelConfig(width=4)
    assert config.weights == {"a": 2.0} and type(config.weights) is dict
    assert not {module for module in modules_of(config) if module.startswith("omegaconf")}


def test_values_are_converted_to_the_declared_types():
    config = stage("lr=1e-4", "limit=20_000", "compile=true", "model.steps=12", "out=/tmp/x", "model.betas=[0.5,1]")
    assert (config.lr, config.limit, config.compile, config.model.steps) == (1e-4, 20000, True, 12)
    assert config.out == Path("/tmp/x")
    assert config.model.betas == (0.5, 1.0)
    assert stage("limit=5", "limit=null").limit is None


@pytest.mark.parametrize("text", ["0012", "a: b", "{x}", "a=b", "[row", "", "no", "# not a comment", "3", "日本"])
def test_overrides_of_text_are_taken_as_they_are(text):
    assert stage(f"caption={text}").caption == text


def test_null_unsets_optional_text():
    assert stage("caption=a", "caption=null").caption is None


def test_an_empty_section_changes_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("model:\n  # width: 8\nlr: 0.5\n")
    assert stage(f"{tmp_path}/a.yaml").model == ModelConfig(width=64)


def test_another_key_can_be_named():
    assert stage("caption=of ${data}").caption == "of scenes"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=3", "model.widht=3: unknown key 'model.widht', did you mean 'model.width'?"),
        ("width=3", "width=3: unknown key 'width', did you mean 'model.width'?"),
        ("heads=8", "heads=8: unknown key 'heads', expected one of data, model, caption, out, lr, limit, "),
        ("model.xyz=2", "expected one of model.width, model.kind, model.levels, model.betas, model.steps"),
        ("model.kind=vq", "model.kind=vq: expected gumbel | fsq, got 'vq'"),
        ("model.steps=many", "model.steps=many: expected auto | int, got 'many'"),
        ("model.betas=[1,2,3]", "model.betas=[1,2,3]: expected [float, float], got [1, 2, 3]"),
        ("attention=row", "attention=row: expected [row | column, ...], got 'row'"),
        ("attention=[row,diagonal]", "expected [row | column, ...], got ['row', 'diagonal']"),
        ("limit=1.5", "limit=1.5: expected int | null, got 1.5"),
        ("lr=fast", "lr=fast: expected float, got 'fast'"),
        ("lr=null", "lr=null: expected float, got null"),
        ("lr=[1", "lr=[1: expected float (line 1: not plain YAML"),
        ("model=3", "model=3: expected the keys width, kind, levels, betas, steps, got 3"),
        ("lr.x=3", "lr.x=3: lr is float and has no key 'x'"),
        ("weights.a=b", "weights.a=b: expected float, got 'b'"),
        ("model.width=3", "model.width must be even; got 3"),
        ("--lr=3", "--lr=3: settings have no dashes, write lr=3"),
        ("lr", "'lr' is neither a YAML file nor key=value; see `tessera train-stage --help`"),
        ("absent.yaml", "absent.yaml: no such file"),
        ("caption=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("caption=${oc.env:HOME}", "${...} can name another key and nothing else"),
        ("weights={'${oc.env:HOME}': 1}", "${...} can name another key and nothing else"),
    ],
)
def test_mistakes_are_one_line_that_says_what_would_be_right(override, message):
    with pytest.raises(UserError) as caught:
        stage(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["model: {widht: 3}", "lr: fast", "1: 2"])
def test_mistakes_in_a_file_name_it(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml: "):
        stage(f"{tmp_path}/a.yaml")


def test_a_required_key_must_be_given():
    with pytest.raises(UserError, match=r"^tessera train-stage: data has no default, give it: data=\.\.\.$"):
        load(StageConfig, [], prog="tessera train-stage")


def test_help_shows_every_key_with_type_default_and_documentation(capsys):
    with pytest.raises(SystemExit) as caught:
        stage("lr=3", "--help")
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: tessera train-stage [CONFIG.yaml ...] [key=value ...]")
    assert "Trains something." in lines
    assert "A second paragraph" not in "\n".join(lines)
    for line in (
        "  data: text (required)",
        "  caption: text | null = null",
        "  out: path = runs/stage",
        "  lr: float = 0.001",
        "  limit: int | null = null",
        "  attention: [row | column, ...] = [row, column]",
        "  compile: true | false = false",
        "  weights: {text: float, ...} = {}",
        "model: Sizes of the model.",
        "  model.width: int = 64",
        "  model.kind: gumbel | fsq = gumbel",
        "  model.betas: [float, float] = [0.9, 0.95]",
        "  model.steps: auto | int = auto",
        "  teacher.width: int = 32",
    ):
        assert line in lines
    assert lines[lines.index("  lr: float = 0.001") + 1] == "      learning rate per step"
    assert lines[lines.index("  model.width: int = 64") + 1] == "      channels, an even number"


def test_print_config_prints_yaml_that_gives_the_same_config(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        stage("lr=1e-7", "model.levels=[3]", "caption=null # no", "--print-config")
    assert caught.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    again = load(StageConfig, [f"{tmp_path}/printed.yaml"], prog="tessera train-stage")
    assert again == stage("lr=1e-7", "model.levels=[3]", "caption=null # no")


def test_plain_values_and_back(tmp_path):
    config = stage("model.levels=[1,2]", "weights.a=1.5", "caption=x", "out=a/b")
    plain = to_plain(config)
    assert plain["model"]["levels"] == [1, 2]
    assert plain["out"] == "a/b"
    write_yaml(tmp_path / "config.yaml", plain)
    assert read_yaml(tmp_path / "config.yaml") == plain
    assert from_plain(StageConfig, read_yaml(tmp_path / "config.yaml"), source="config.yaml") == config


def test_what_is_not_plain_is_a_bug_of_ours():
    with pytest.raises(TypeError, match="plain values only, got object"):
        to_plain({"a": [object()]})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"data": "${oc.env:HOME}"}, "m/config.yaml: data: ${...} is not allowed here"),
        ({"data": "x", "caption": "${data}"}, "m/config.yaml: caption: ${...} is not allowed here"),
        ({"data": "x", "weights": {"${data}": 1.0}}, "m/config.yaml: weights: ${...} is not allowed here"),
        ({"data": "x", "_target_": "os.system"}, "m/config.yaml: unknown key '_target_'"),
        ({"data": "x", "model": {"width": "wide"}}, "m/config.yaml: model.width: expected int, got 'wide'"),
        ({"data": "x", "model": {"width": 3}}, "model.width must be even; got 3"),
        ({"model": {"width": 2}}, "m/config.yaml: data has no default"),
    ],
)
def test_foreign_mappings_are_checked_and_never_resolved(mapping, message):
    with pytest.raises(UserError) as caught:
        from_plain(StageConfig, mapping, source="m/config.yaml")
    assert message in str(caught.value)
