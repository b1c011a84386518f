"""The recipe: one typed, frozen description of a whole run. Every public default of the pipeline lives in this folder.

`load_recipe(path, overrides)` reads a recipe, `load_student` a student of the zoo (`students/zoo/*.yaml`); a fault is
one `RecipeError` line naming file and field. `whole` has the sections, the other files one or two of them each.
"""

from distill.recipe.config import BatchSize, Config, Mark, marked_fields
from distill.recipe.curation import (
    BestOfN,
    CodeLimits,
    CurateConfig,
    Difficulty,
    JudgeConfig,
    Mix,
    NearDuplicates,
    VerifyConfig,
)
from distill.recipe.instruction import UNINSTRUCTED, Instruction, Reasoning
from distill.recipe.limits import DEFAULT_LIMITS, ReadLimits
from distill.recipe.problems import (
    BenchmarkSource,
    DatasetSource,
    GivenSource,
    Grader,
    LocalSource,
    Mode,
    ProblemSource,
    ReasoningGymSource,
    SynthesisedSource,
)
from distill.recipe.reading import apply_override, load_recipe, load_settings, load_student, parse
from distill.recipe.results import LM_EVAL, OWN_SUITES, ContestDates, Engine, EvalConfig, LmEvalConfig, PushConfig
from distill.recipe.students import DistillConfig, Method, PublishedScore, SFTConfig, StudentConfig
from distill.recipe.teachers import (
    SERVER_KEY_ENV,
    AdaptiveSampling,
    EndpointEngine,
    FlagValue,
    GenerateConfig,
    Hints,
    NativeTeacher,
    OpenAITeacher,
    RayTeacher,
    ServedEngine,
    ServedTeacher,
    TeacherConfig,
    VllmEngine,
    VllmServing,
    VllmTeacher,
)
from distill.recipe.whole import Recipe

__all__ = [
    "DEFAULT_LIMITS",
    "LM_EVAL",
    "OWN_SUITES",
    "SERVER_KEY_ENV",
    "UNINSTRUCTED",
    "AdaptiveSampling",
    "BatchSize",
    "BenchmarkSource",
    "BestOfN",
    "CodeLimits",
    "Config",
    "ContestDates",
    "CurateConfig",
    "DatasetSource",
    "Difficulty",
    "DistillConfig",
    "EndpointEngine",
    "Engine",
    "EvalConfig",
    "FlagValue",
    "GenerateConfig",
    "GivenSource",
    "Grader",
    "Hints",
    "Instruction",
    "JudgeConfig",
    "LmEvalConfig",
    "LocalSource",
    "Mark",
    "Method",
    "Mix",
    "Mode",
    "NativeTeacher",
    "NearDuplicates",
    "OpenAITeacher",
    "ProblemSource",
    "PublishedScore",
    "PushConfig",
    "RayTeacher",
    "ReadLimits",
    "Reasoning",
    "ReasoningGymSource",
    "Recipe",
    "SFTConfig",
    "ServedEngine",
    "ServedTeacher",
    "StudentConfig",
    "SynthesisedSource",
    "TeacherConfig",
    "VerifyConfig",
    "VllmEngine",
    "VllmServing",
    "VllmTeacher",
    "apply_override",
    "load_recipe",
    "load_settings",
    "load_student",
    "marked_fields",
    "parse",
]
