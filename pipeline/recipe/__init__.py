"""The recipe: what a run's YAML file may hold, and reading it. A file a section; other folders import from here."""

from pipeline.recipe.base import Count, Fraction, NonNegative, Positive, Section
from pipeline.recipe.benchmark import BenchmarkConfig, RandomModelConfig, ScenesConfig, TextSize, VisionSize
from pipeline.recipe.cluster import ClusterConfig
from pipeline.recipe.curriculum import CurriculumConfig, HardnessConfig
from pipeline.recipe.data import DataConfig
from pipeline.recipe.distill import AdaptiveConfig, DistillConfig, FeatureConfig
from pipeline.recipe.evaluation import EvaluationConfig, EvaluationRow
from pipeline.recipe.jobs import BatchConfig, CheckpointConfig, JobConfig, OptimizerConfig, PerformanceConfig
from pipeline.recipe.loading import Arguments, load_recipe, merge, parse_args
from pipeline.recipe.models import ModelConfig, UpcycleConfig
from pipeline.recipe.moe import MoeConfig, NativeMoeConfig
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.references import Reference, folder_of
from pipeline.recipe.run import RunConfig
from pipeline.recipe.targets import AnswersConfig, SketchConfig, TargetsConfig

__all__ = [
    "AdaptiveConfig",
    "AnswersConfig",
    "Arguments",
    "BatchConfig",
    "BenchmarkConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Count",
    "CurriculumConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluationConfig",
    "EvaluationRow",
    "FeatureConfig",
    "Fraction",
    "HardnessConfig",
    "JobConfig",
    "ModelConfig",
    "MoeConfig",
    "NativeMoeConfig",
    "NonNegative",
    "OptimizerConfig",
    "PerformanceConfig",
    "Positive",
    "RandomModelConfig",
    "Recipe",
    "Reference",
    "RunConfig",
    "ScenesConfig",
    "Section",
    "SketchConfig",
    "TargetsConfig",
    "TextSize",
    "UpcycleConfig",
    "VisionSize",
    "folder_of",
    "load_recipe",
    "merge",
    "parse_args",
]
