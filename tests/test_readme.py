"""What the README shows is what runs."""

import json
import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_example_runs(tmp_path, monkeypatch):
    """The README's Python block, with a small model, text and budgets in place of the reader's, ends in a checkpoint."""
    from evoprune_nb.data import documents

    rows = [json.dumps({"text": text}) for text in documents("wikipedia-sample")]
    (tmp_path / "your-text.jsonl").write_text("\n".join(rows))
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    replacements = {
        "your/model": "tiny", '"bfloat16"': '"float32"', 'device="auto"': 'device="cpu"', "seq_len=512": 'seq_len=64, tokens={"calibration": 2048, "tuning": 16384, "scoring": 8192, "heldout": 1024}',
        "generations=20": "generations=1, offspring=4", "n_tokens=1_000_000": "n_tokens=1024"}
    for shown, used in replacements.items():
        assert shown in block
        block = block.replace(shown, used)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert (tmp_path / "my-smaller-model" / "model.safetensors").exists() and (tmp_path / "runs/mine/events.jsonl").exists()


def test_command_example_uses_real_parameters():
    """Every parameter in the README's command exists in the demo notebook."""
    from evoprune_nb.experiments import notebook_parameters

    command = re.search(r"evoprune run nbs/experiments/demo.ipynb -p.*?```", README, re.DOTALL)[0]
    names = re.findall(r"-p (\w+)", command)
    assert len(names) >= 4 and set(names) <= set(notebook_parameters(Path(__file__).parent.parent / "nbs/experiments/demo.ipynb"))


def test_files_and_commands_exist():
    """Notebooks, reports and make targets that the README names exist."""
    root = Path(__file__).parent.parent
    for path in re.findall(r"\((reports/[^)]+)\)", README):
        assert (root / path).exists(), path
    for name in set(re.findall(r"`(\d\d[a-z]?_\w+)`", README)):
        assert (root / "nbs" / f"{name}.ipynb").exists(), name
    targets = re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make (\w+)", README)) <= set(targets)
