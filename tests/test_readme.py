"""What the README shows is what runs."""

import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_example_runs(tmp_path, monkeypatch):
    """The README's Python block, with a small model, text and budgets in place of the reader's, ends in a checkpoint."""
    from evoprune_nb.data import documents

    rows = [json.dumps({"text": text}) for text in documents("wikipedia-sample")]
    (tmp_path / "your-text.jsonl").write_text("\n".join(rows))
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    replacements = {
        "your/model": "tiny", '"bfloat16"': '"float32"', '"auto"': '"cpu"', "seq_len=512": "seq_len=64, calibration_tokens=2048",
        "runs/mine/database\")": 'runs/mine/database", {"calibration": 2048, "tuning": 16384, "scoring": 8192, "heldout": 1024})',
        "generations=20": "generations=1, offspring=4", "n_tokens=1_000_000": "n_tokens=1024"}
    for shown, used in replacements.items():
        assert shown in block
        block = block.replace(shown, used)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert (tmp_path / "my-smaller-model" / "model.safetensors").exists() and (tmp_path / "runs/mine/events.jsonl").exists()


def test_shell_example_runs(tmp_path, monkeypatch):
    """The README's commands, one after the other, with a small model, text and budgets in place of the reader's."""
    from evoprune_nb.ui.cli import main
    from evoprune_nb.data import documents

    (tmp_path / "your-text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents("wikipedia-sample")))
    block = next(block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "evoprune" in block).replace("\\\n", " ")
    replacements = {
        "your/model": "tiny", "fastest": "float32", "100000000": "8192", " --tasks arc_easy piqa": "", "nbs/experiments": str(ROOT / "nbs/experiments"),
        "-p generations 20 --text": "-p generations 1 -p offspring 4 --seq-len 64 --calibration-tokens 2048 --text-tokens 2048 -p stages '[[2, 0, 64], [1, 128, 128]]' --dtype float32 --text",
        "-p run_dir": "-p seq_len 64 -p calibration_tokens 2048 -p generations 1 -p offspring 4 -p survivors '[2, 1]' -p tuning_tokens '[0, 128]' -p scoring_tokens '[64, 128]' -p post_tokens 1024 -p heldout_tokens 1024 -p run_dir"}
    for shown, used in replacements.items():
        assert shown in block
        block = block.replace(shown, used)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("$evoprune ")]
    assert [command[0] for command in commands] == ["plan", "search", "run", "post-train", "export", "eval", "index"]
    for command in commands:
        assert main(command) == 0, command
    assert list(Path("mine-gguf").glob("*.gguf")) and Path("reports/mine/report.html").exists()


def test_files_and_commands_exist():
    """Notebooks, reports and make targets that the README names exist."""
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:nbs/)?(?:experiments/)?\w+\.ipynb)`", README):
        assert (ROOT / "nbs" / path.removeprefix("nbs/")).exists(), path
    modules = {re.sub(r"^\d\d[a-z]?_", "", path.stem) for path in (ROOT / "nbs").rglob("*.ipynb")}
    parts = {f"{path.name}/" for path in (ROOT / "nbs").iterdir() if path.is_dir() and not path.name.startswith(".")}
    rows = README.partition("## Map of")[2].partition("##")[0]
    named = set(re.findall(r"`(\w+/?)`", rows.partition("| part")[2]))
    assert named <= modules | parts and parts <= named
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", README)) <= set(targets)
