"""The experiment file: every setting, typed and documented, one module per stage."""

from llkd_ray.config.endpoint import BenchSection, RaySection, ServeSection
from llkd_ray.config.experiment import Experiment, load_experiment
from llkd_ray.config.section import as_tree
from llkd_ray.config.student import (
    AllRule,
    EvaluateSection,
    LLKDRule,
    SelectionSection,
    StudentSection,
    TrainSection,
    rule_named,
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
    "CorpusSection",
    "EngineSection",
    "EvaluateSection",
    "Example",
    "Experiment",
    "HTTPTeacher",
    "LLKDRule",
    "Label",
    "PromptSection",
    "RaySection",
    "ScriptedTeacher",
    "SelectionSection",
    "ServeSection",
    "ShotsSection",
    "StudentSection",
    "TaskSection",
    "TeacherSection",
    "TrainSection",
    "VLLMTeacher",
    "as_tree",
    "load_experiment",
    "rule_named",
]
