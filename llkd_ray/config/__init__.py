"""The experiment file: every setting, typed and documented, one module per stage."""

from llkd_ray.config.compare import CompareSection
from llkd_ray.config.endpoint import BenchSection, RaySection, ServeSection
from llkd_ray.config.experiment import Experiment, load_experiment, with_overrides
from llkd_ray.config.section import as_tree
from llkd_ray.config.selection import (
    AllRule,
    ConfidentLearningRule,
    FixedRule,
    FlexMatchRule,
    FreeMatchRule,
    GoldRule,
    JointRule,
    LLKDRule,
    RandomRule,
    Rule,
    StudentOnlyRule,
    TeacherOnlyRule,
    TopFractionRule,
    rule_named,
)
from llkd_ray.config.student import (
    EvaluateSection,
    StoppingSection,
    StudentSection,
    TrainSection,
)
from llkd_ray.config.task import CorpusSection, Example, Label, TaskSection
from llkd_ray.config.teacher import (
    ActorsSection,
    CalibrationSection,
    EngineSection,
    HTTPTeacher,
    PromptSection,
    ScriptedTeacher,
    ShotsSection,
    TeacherSection,
    VLLMTeacher,
)

__all__ = [
    "ActorsSection",
    "AllRule",
    "BenchSection",
    "CalibrationSection",
    "CompareSection",
    "ConfidentLearningRule",
    "CorpusSection",
    "EngineSection",
    "EvaluateSection",
    "Example",
    "Experiment",
    "FixedRule",
    "FlexMatchRule",
    "FreeMatchRule",
    "GoldRule",
    "HTTPTeacher",
    "JointRule",
    "LLKDRule",
    "Label",
    "PromptSection",
    "RandomRule",
    "RaySection",
    "Rule",
    "ScriptedTeacher",
    "ServeSection",
    "ShotsSection",
    "StoppingSection",
    "StudentOnlyRule",
    "StudentSection",
    "TaskSection",
    "TeacherOnlyRule",
    "TeacherSection",
    "TopFractionRule",
    "TrainSection",
    "VLLMTeacher",
    "as_tree",
    "load_experiment",
    "rule_named",
    "with_overrides",
]
