"""The experiment: one frozen, typed tree, read from TOML.

There is no second list of flags: an override on the command line is `section.key=value` against
the same tree, and every key is documented by the string below its field.
"""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, NonNegativeInt, ValidationError, model_validator

from llkd_ray.config.cascade import CascadeSection
from llkd_ray.config.compare import CompareSection
from llkd_ray.config.endpoint import BenchSection, RaySection, ServeSection
from llkd_ray.config.guide import GuideSection
from llkd_ray.config.section import Name, PlainLocation, Section, Text
from llkd_ray.config.selection import RULES, LLKDRule, SelectionSection
from llkd_ray.config.student import (
    EncoderStudent,
    EvaluateSection,
    ExportSection,
    StaticStudent,
    StudentBase,
    StudentSection,
    TrainSection,
)
from llkd_ray.config.task import CorpusSection, TaskSection
from llkd_ray.config.teacher import (
    ON_GOLD,
    CalibrationSection,
    HTTPTeacher,
    ScriptedTeacher,
    TeacherBase,
    TeacherSection,
    VLLMTeacher,
)
from llkd_ray.errors import ConfigError


class _Kinds(NamedTuple):
    """A section of which there are several kinds."""

    chooser: str
    """The key that chooses."""
    shared: type[BaseModel]
    """What every kind has."""
    kinds: dict[str, type[BaseModel]]
    default: str
    """What is chosen where the file says nothing."""


_KINDS = {
    "selection": _Kinds("rule", Section, dict(RULES), "llkd"),
    "student": _Kinds(
        "kind", StudentBase, {"encoder": EncoderStudent, "static": StaticStudent}, "encoder"
    ),
    "teacher": _Kinds(
        "kind",
        TeacherBase,
        {"vllm": VLLMTeacher, "http": HTTPTeacher, "scripted": ScriptedTeacher},
        "vllm",
    ),
}


class Experiment(Section):
    """Everything that decides a run."""

    name: Name
    """The run: its artifacts stand in `runs/NAME`."""
    runs: PlainLocation = "runs"
    """Folder of all runs: local, shared by all nodes, or the URI of one in an object store, e.g.
    s3://BUCKET/runs; endpoint and credentials of a store come from the environment, on every node:
    AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY."""
    cache: Text = "~/.cache/llkd_ray"
    """Folder for converted models and for what is fetched from a store: each node's own, at the
    same path on all."""
    seed: NonNegativeInt = 0
    task: TaskSection
    corpus: CorpusSection
    teacher: TeacherSection = VLLMTeacher()
    calibration: CalibrationSection = CalibrationSection()
    selection: SelectionSection = LLKDRule()
    student: StudentSection = EncoderStudent()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()
    evaluate: EvaluateSection = EvaluateSection()
    compare: CompareSection = CompareSection()
    guide: GuideSection = GuideSection()
    serve: ServeSection = ServeSection()
    cascade: CascadeSection = CascadeSection()
    bench: BenchSection = BenchSection()
    ray: RaySection = RaySection()

    @property
    def own_student(self) -> str:
        """Name of the student that is served and reported: its rule, or `guided`."""
        return "guided" if self.serve.student == "guided" else self.selection.rule

    @property
    def asks_for_cascade(self) -> bool:
        """Whether a cascade is served or measured."""
        return self.serve.target == "cascade" or "cascade" in self.bench.targets

    @model_validator(mode="after")
    def _gold_is_labelled(self) -> "Experiment":
        kind = self.calibration.kind
        if kind in ON_GOLD and not {"unlabeled", "validation"} <= set(self.teacher.splits):
            raise ValueError(
                f'calibration.kind = "{kind}" is fitted on the teacher\'s answers about validation '
                'rows: set teacher.splits = ["unlabeled", "validation", "test"]'
            )
        return self

    @model_validator(mode="after")
    def _cascade_can_be_measured(self) -> "Experiment":
        wanted = self.asks_for_cascade or self.cascade != CascadeSection()
        if wanted and "validation" not in self.teacher.splits:
            raise ValueError(
                "the cascade's threshold is measured on the teacher's answers about validation "
                'rows: set teacher.splits = ["unlabeled", "validation", "test"]'
            )
        return self


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and apply overrides.

    Args:
        path: The TOML file.
        overrides: `section.key=value`, the value in TOML syntax; a value that is not TOML is
            taken as a string, so that `name=trial` needs no quotes.

    Raises:
        ConfigError: The file is missing or not TOML, a key is unknown, a value does not fit. The
            sentence names the dotted path and, for a key, the nearest one there is.
    """
    file = Path(path)
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such experiment file; try jobs/configs/quickstart.toml"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: this is a folder, not an experiment file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    return _experiment(str(file), tree, overrides)


def with_overrides(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Return the experiment with overrides applied, as `load_experiment` does.

    Raises:
        ConfigError: A key is unknown, a value does not fit.
    """
    return _experiment(experiment.name, experiment.model_dump(mode="json"), overrides)


def _experiment(where: str, tree: dict[str, Any], overrides: Sequence[str]) -> Experiment:
    settings = [_setting(override) for override in overrides]
    # The first kind named of a section is that of what stands before it, too.
    kinds = {key: value for key, value in reversed(settings) if _chooses(key)}
    for key, value in (*kinds.items(), *settings):
        _apply(tree, key, value)
    for section, of in _KINDS.items():
        if isinstance(tree.get(section), dict):
            tree[section].setdefault(of.chooser, of.default)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from None


def _setting(override: str) -> tuple[str, Any]:
    """Return key and value of an override."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write section.key=value, e.g. train.epochs=2")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text


def _chooses(key: str) -> bool:
    section, _, leaf = key.partition(".")
    return section in _KINDS and leaf == _KINDS[section].chooser


def _apply(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {key}: {parent} is not a section")
    if _chooses(key):
        of = _KINDS[parents[0]]
        if node.get(of.chooser, of.default) != value:
            # What all kinds share stands; the other keys of one mean nothing to another.
            for name in set(node) - set(of.shared.model_fields):
                del node[name]
    node[leaf] = value


def _explain(error: ValidationError) -> str:
    """Turn the first problem pydantic found into a sentence with a dotted path."""
    problem = error.errors()[0]
    # A discriminated union puts the chosen tag into the path; it is no key of the file.
    path = [part for part in problem["loc"] if not _is_tag(part, problem["loc"])]
    dotted = ".".join(map(str, path))
    rest = len(error.errors()) - 1
    more = f" (and {rest} more)" if rest else ""
    match problem["type"]:
        case "extra_forbidden":
            known = _keys_at(problem["loc"][:-1])
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            hint = (
                f"did you mean {'.'.join([*map(str, path[:-1]), near[0]])}?"
                if near
                else f"known keys here: {', '.join(known)}"
            )
            return f"{dotted}: unknown key; {hint}{more}"
        case "missing":
            return f"{dotted}: this key must be set{more}"
        case "union_tag_invalid":
            of = _KINDS[str(problem["loc"][0])]
            chosen = str(problem["ctx"]["tag"])
            near = difflib.get_close_matches(chosen, of.kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(of.kinds)}"
            return f"{dotted}.{of.chooser} = {chosen!r}: no such {of.chooser}; {hint}{more}"
        case "value_error":
            where = f"{dotted}: " if dotted else ""
            return f"{where}{problem['msg'].removeprefix('Value error, ')}{more}"
        case "tuple_type":
            return (
                f"{dotted} = {problem['input']!r}: a list belongs here; in a shell put quotes "
                f"around it, as in 'evaluate.compare_rules=[\"all\"]'{more}"
            )
        case "model_type" | "model_attributes_type" if dotted in _KINDS:
            chosen = f"{dotted}.{_KINDS[dotted].chooser}={problem['input']}"
            return (
                f"{dotted} = {problem['input']!r}: this is a section; did you mean {chosen}?{more}"
            )
        case "model_type" | "model_attributes_type":
            return (
                f"{dotted} = {problem['input']!r}: a table belongs here, for instance "
                f'{{ name = "refund" }} where a label does{more}'
            )
        case _:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{dotted} = {problem['input']!r}: {message}{more}"


def _is_tag(part: str | int, path: tuple[str | int, ...]) -> bool:
    return len(path) > 1 and path[0] in _KINDS and path.index(part) == 1


def _keys_at(path: tuple[str | int, ...]) -> list[str]:
    """List the keys known at a path of the experiment, in which a chosen kind follows a section."""
    current: type[BaseModel] = Experiment
    for position, part in enumerate(path):
        if position == 1 and path[0] in _KINDS:
            current = _KINDS[str(path[0])].kinds[str(part)]
        elif isinstance(part, str):
            current = _section_of(current.model_fields[part].annotation) or current
    return sorted(current.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _section_of(inner)
        if found is not None:
            return found
    return None
