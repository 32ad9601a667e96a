"""Data flows one way: a module imports only modules listed before it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = (
    "errors config command_line topology data scene_world scene_brush scene_sprites scene_art scene_text scenes "
    "scoring tokenizer processor vision targets packing codecs storage shards records target_store sketches "
    "store_export store losses fused_head features activations footprint flops families models hf_folder leases "
    "compatibility teacher_forward teacher pooling table_loops hardness_table curriculum release schedules plan "
    "native_moe moe upcycling student engine engine_state checkpoint model_card export metrics shipping batches step "
    "step_metrics validation_gap distillation operators runtime train experts generate likelihood latency results "
    "evaluate report_plots report_data hardness_scores hardness_page hardness_view hardness report demo"
).split()


def imported(node: ast.AST) -> list[str]:
    """Names of our modules that an import statement brings in."""
    if isinstance(node, ast.Import):
        return [a.name.split(".")[1] for a in node.names if a.name.startswith("pipeline.")]
    if isinstance(node, ast.ImportFrom) and node.module == "pipeline":
        return [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline."):
        return [str(node.module).split(".")[1]]
    return []


def test_imports_point_upstream():
    files = sorted((ROOT / "pipeline").glob("*.py"))
    assert len(files) > 30
    for path in files:
        if path.stem == "__init__":
            continue
        assert path.stem in ORDER, f"{path}: add it to ORDER, where its inputs are already listed"
        for node in ast.walk(ast.parse(path.read_text())):
            for name in imported(node):
                assert ORDER.index(name) < ORDER.index(path.stem), f"{path}: {path.stem} may not import {name}"


def test_the_order_names_every_module_once_and_nothing_else():
    assert sorted(ORDER) == sorted(p.stem for p in (ROOT / "pipeline").glob("*.py") if p.stem != "__init__")


def test_imports_say_pipeline_by_name():
    """What the test of the order reads are absolute imports of modules."""
    for path in (ROOT / "pipeline").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
            assert not (isinstance(node, ast.Import) and any(a.name == "pipeline" for a in node.names)), path
    assert not (ROOT / "pipeline" / "__init__.py").read_text()


def test_only_the_training_side_sees_deepspeed():
    allowed = {"engine", "runtime", "engine_state", "moe", "native_moe"}
    for path in (ROOT / "pipeline").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        if any(name.split(".")[0] == "deepspeed" for name in names):
            assert path.stem in allowed, f"{path}: DeepSpeed belongs to {sorted(allowed)}"
