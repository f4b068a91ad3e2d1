"""Experiments run headless: wrong parameters stop them at once, and what they leave opens anywhere and says where it comes from."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from evoprune_nb.data import load_pools
from evoprune_nb.judge.evaluation import evaluate
from evoprune_nb.ui.cli import main
from evoprune_nb.paper.experiments import ParameterError, Report, check_parameters, file_hash, notebook_parameters, text_table
from evoprune_nb.models import load_model
from evoprune_nb.history import History

EXPERIMENTS = sorted((Path(__file__).parent.parent / "nbs" / "experiments").glob("*.ipynb"))
DEMO = next(path for path in EXPERIMENTS if path.stem == "demo")
FIGURES = {"fitness", "stages", "genome", "sparsity", "comparison"}
SEARCH = dict(
    seq_len="64", calibration_tokens="1024", generations="2", offspring="3", survivors="[1, 1]", tuning_tokens="[0, 128]", scoring_tokens="[128, 256]",
    post_tokens="1024", heldout_tokens="1024")
BUDGETS = {  # every experiment → parameters with which it runs in seconds; "{}" is a new directory
    "demo": SEARCH | dict(run_dir="{}/runs/demo", generations="8"),  # long enough to be interrupted
    "benchmarks": dict(
        model_name="tiny", seq_len="64", calibration_tokens="1024", offspring="4", survivors="[2, 1]", tuning_tokens="[0, 128]", scoring_tokens="[64, 128]", layer_shapes="[[16, 48]]", widths="[32, 64]", lambdas="[4]",
        repeats="1", selection_seeds="[0]", selection_generations="1", selection_heldout_tokens="1024", selection_post_tokens="1024", run_dir="{}/runs/benchmarks"),
    "proxy": dict(
        seq_len="64", calibration_tokens="1024", post_tokens="1024", light_tokens="[128]", elastic_tokens="1024", scoring_tokens="512", profile_tokens="128",
        heldout_tokens="1024", run_dir="{}/runs/proxy"),
    "search": dict(
        seq_len="64", calibration_tokens="1024", seeds="[3]", darwinlm_generations="1", darwinlm_offspring="3", darwinlm_stages="[[1, 0, 128], [1, 128, 128]]",
        elastic_tokens="1024", elastic_generations="3", elastic_offspring="3", scan_tokens="128", elastic_scoring="128", race="[[1, 256, 128]]", entrants="2",
        post_tokens="[1024, 2048]", sparsities="[0.5, 0.3]", arms="[uniform, elastic, darwinlm, 'elastic, shared weights', distilled]", ours="elastic, shared weights", variants="{half: {elastic_tokens: 512}, distilled: {genome_of: 'elastic, shared weights', distillation: 0.5}}", anytime="{distilled: [1, 2]}", questions="['{}/sums.jsonl']", question_limit="2", heldout_tokens="1024", latency_turns="1",
        run_dir="{}/runs/search"),
    "serving": dict(
        seq_len="64", calibration_tokens="1024", post_tokens="1024", heldout_tokens="1024", types="[float16, q4_k_m]", prompt_tokens="16", new_tokens="4", repeats="1",
        run_dir="{}/runs/serving"),
    "train_tiny": dict(kind="qwen3", kv_heads="6", tokens="2048", vocab_size="4096", seq_len="64", batch_size="4", out="{}/tiny"),
}


def run(notebook, directory, report: str, corpus=None, more=(), **changes) -> int:
    "`evoprune run` in this process, with small budgets; the exit status."
    values = BUDGETS[Path(notebook).stem] | ({"text": str(corpus)} if corpus else {}) | changes
    options = [word for name, value in values.items() for word in ("-p", name, value.replace("{}", str(directory)))]
    return main(["run", str(notebook), "--name", report, "--reports", str(directory / "reports"), *options, *more])


@pytest.fixture(scope="module")
def demo(tmp_path_factory, corpus):
    "The demo, run end to end through its kernel: the directory that holds runs/demo and reports/demo."
    directory = tmp_path_factory.mktemp("demo")
    assert run(DEMO, directory, "demo", corpus) == 0
    return directory


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in results.json"))


def test_demo_compares_equals(demo, corpus, tokenizer):
    "Uniform and evolved model have equal size within the tolerance, and the numbers of the report are those of the genomes it names."
    found = results(demo / "reports" / "demo")["results"]
    history, models = History(demo / "runs" / "demo"), found["models"]
    assert history.finished and (found["winner"], found["uniform"]) == (history.winner.code, history.start.code)
    uniform, evolved = models["uniform"]["parameters"], models["evolved"]["parameters"]
    assert 0.99 * uniform <= evolved <= uniform == history.space.n_params(history.start) and evolved == history.space.n_params(history.winner)
    assert found["dense"]["n_params"] == history.space.dense_params > uniform
    measured = [found["dense"], *(row[when] for row in models.values() for when in ("before", "after"))]
    assert all(math.isfinite(value) and value > 0 for row in measured for name, value in row.items() if name not in ("begin", "block_nats"))
    assert all(row["perplexity"] == pytest.approx(math.exp(row["nats"])) and row["n_tokens"] == 1024 - 16 for row in measured)
    assert found["search_tokens"] == history.tokens == {"tuning": 8 * 2 * 128, "scoring": 8 * (3 * 128 + 2 * 256)}
    pool = load_pools(corpus, tokenizer, 64, {"heldout": 1024})["heldout"]
    assert evaluate(load_model("tiny")[0], pool, tokenizer).nats == pytest.approx(found["dense"]["nats"], rel=1e-6)


def test_demo_says_where_it_comes_from(demo, corpus):
    "results.json has revision, versions, machine, model and data fingerprints, seeds, all parameters, wall time and tokens used."
    row = results(demo / "reports" / "demo")
    assert {"git_revision", "python", "packages", "machine", "device", "torch_threads"} <= set(row["provenance"]) and row["provenance"]["packages"]["torch"]
    assert set(notebook_parameters(DEMO)) - {"run_dir", "report_dir", "database_dir"} == set(row["parameters"])
    assert (row["parameters"]["generations"], row["parameters"]["text"], row["parameters"]["survivors"], row["parameters"]["seed"]) == (8, str(corpus), [1, 1], 0)
    assert set(row["results"]["data_fingerprints"]) == {"calibration", "tuning", "scoring", "heldout"} and row["results"]["text_sha256"] == file_hash(corpus)
    assert re.fullmatch(r"[0-9a-f]{16}", row["results"]["model_fingerprint"]) and row["wall_seconds"] > 0 and row["results"]["post_tokens"] == 1024
    assert "uniform" in row["summary"] and "evolved" in row["summary"]


class Resources(HTMLParser):
    "What a page loads: (tag, attribute, address), and its tags and text."

    def __init__(self, page: str):
        super().__init__()
        self.loads, self.tags, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [(tag, name, value or "") for name, value in attributes if name in ("src", "srcset", "data", "poster") or (name == "href" and tag in ("link", "use", "image", "base"))]

    def handle_data(self, data):
        self.text += data


def check_page(path: Path, n_images: int) -> Resources:
    "A page that is whole without network and scripts: pictures inside, no progress bars."
    page = path.read_text(encoding="utf-8")
    found = Resources(page)
    assert all(address.startswith(("data:", "#")) for _, _, address in found.loads), found.loads
    assert not re.search(r"(?i)@import|url\(\s*['\"]?\s*(https?:)?//", page)
    assert "script" not in found.tags and "iframe" not in found.tags and "object" not in found.tags
    assert sum(tag == "img" and address.startswith("data:image/png;base64,") for tag, _, address in found.loads) == n_images
    assert not re.search(r"\d%\||it/s|tok/s|widget-view|<Figure|Traceback", found.text)
    return found


def test_demo_with_an_elastic_search(tmp_path, corpus):
    "The other method, in two rounds: the race has the stages, the report shows the measurements, and says whose weights were trained on."
    changes = dict(method="elastic", weights="elastic", generations="5", rounds="[0, 2]", survivors="[1]", tuning_tokens="[256]", scoring_tokens="[128]", elastic_tokens="1024", scan_tokens="128", elastic_scoring="128", entrants="2")
    assert run(DEMO, tmp_path, "demo", corpus, **changes) == 0
    check_page(tmp_path / "reports" / "demo" / "report.html", len(FIGURES) + 1)
    history = History(tmp_path / "runs" / "demo")
    assert [generation for generation, _ in history.position.centers] == [0, 2] and history.rules.training.schedule == "cosine"
    found = results(tmp_path / "reports" / "demo")["results"]
    assert found["models"]["evolved"]["before"]["perplexity"] > 0 and "began with weights that its search had trained on 1,024 tokens" in (tmp_path / "reports" / "demo" / "report.html").read_text()


def test_demo_report_leads_with_its_result(demo):
    "Title with model and verdict, sentences, one table with standard errors, text and token count; then five pictures; it loads and runs nothing, and shows no code."
    page = check_page(demo / "reports" / "demo" / "report.html", len(FIGURES))
    row = results(demo / "reports" / "demo")
    after = row["results"]["models"]["evolved"]["after"]
    assert row["title"].startswith("tiny at 50 %: ") and page.text.index(row["title"]) < page.text.index(row["sentences"][0]) < page.text.index("post-trained") < page.text.index("The way there")
    assert f"{after['perplexity']:,.1f} ± {after['perplexity'] * after['stderr']:,.1f}" in page.text and "1,008 held-out tokens" in page.text and "over 16 blocks" in page.text
    assert "import pandas" not in page.text and not re.search(r"\[\d|\{'|<evoprune|False|None", page.text)
    assert "50 % of heads and channels" in page.text and "62 % are left" in page.text


def test_demo_leaves_what_it_promises(demo):
    "The report holds the executed notebook, the page, the results and every figure as SVG, PDF and PNG, and nothing half-done."
    report = demo / "reports" / "demo"
    assert {path.name for path in report.iterdir()} == {"figures", "notebook.ipynb", "report.html", "results.json", "run.json", "tables"}
    assert {path.name for path in (report / "tables").iterdir()} == {f"{name}.{kind}" for name in ("comparison", "text") for kind in ("csv", "md", "tex")}
    table = pd.read_csv(report / "tables" / "comparison.csv")
    after = results(report)["results"]["models"]["evolved"]["after"]
    assert table.query("model == 'evolved' and state == 'after'").perplexity.item() == pytest.approx(after["perplexity"], rel=1e-12)
    assert r"\toprule" in (report / "tables" / "comparison.tex").read_text() and "| ---: |" in (report / "tables" / "comparison.md").read_text()
    assert {path.name for path in (report / "figures").iterdir()} == {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "pdf", "png")}
    for path in (report / "figures").iterdir():
        assert path.read_bytes().startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[path.suffix])
    notebook = nbformat.read(report / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    outputs = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "image/png" in outputs and "widget-view" not in outputs and not re.search(r"\d%\|", outputs)
    assert "papermill" not in notebook.metadata and "widgets" not in notebook.metadata


def test_demo_checkpoint_is_the_evolved_model(demo, corpus, tmp_path, monkeypatch):
    "The exported checkpoint loads and has the size and held-out loss that the report gives for the evolved model."
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    model, tokenizer = load_model(str(demo / "runs" / "demo" / "checkpoint"), trust_remote_code=True)
    pool = load_pools(corpus, tokenizer, 64, {"heldout": 1024})["heldout"]
    found, expected = evaluate(model, pool, tokenizer), results(demo / "reports" / "demo")["results"]["models"]["evolved"]["after"]
    assert found.n_params == expected["n_params"] and found.nats == pytest.approx(expected["nats"], rel=1e-5)


def test_demo_run_is_exported_by_one_command(demo, tmp_path):
    "The run directory says all that export needs; its card and the demo's own say where the model comes from."
    assert main(["export", str(demo / "runs" / "demo"), str(tmp_path / "out"), "--format", "hf"]) == 0
    winner = History(demo / "runs" / "demo").winner
    for directory in (tmp_path / "out", demo / "runs" / "demo" / "checkpoint"):
        card = (directory / "README.md").read_text()
        assert "license: apache-2.0" in card and winner.code in card and "| search | finished |" in card and (directory / "genome.png").exists()


def test_run_again_it_continues(demo, corpus):
    "The same command evaluates nothing again and reports the same numbers."
    before, log = results(demo / "reports" / "demo"), (demo / "runs" / "demo" / "events.jsonl").read_bytes()
    report, whole = demo / "reports" / "demo", lambda: {path: path.stat().st_mtime_ns for path in (demo / "reports").rglob("*")}
    files = whole()
    assert run(DEMO, demo, "demo", corpus) == 0 and whole() == files  # the report is there: nothing is done
    assert run(DEMO, demo, "demo", corpus, ["--again"]) == 0 and whole() != files
    after = results(report)
    assert (demo / "runs" / "demo" / "events.jsonl").read_bytes() == log
    assert after["results"] == before["results"] and after["parameters"] == before["parameters"]


@pytest.mark.parametrize("notebook", [path for path in EXPERIMENTS if path != DEMO], ids=lambda path: path.stem)
def test_every_other_experiment_runs(notebook, tmp_path, corpus):
    "Each notebook in nbs/experiments runs on the budgets above and leaves a page that opens offline."
    has_report = "report_dir" in notebook_parameters(notebook)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"query": f"{n} + 1 =", "choices": [str(n + 1), "no"], "gold": 0}) + "\n" for n in range(3)))
    assert run(notebook, tmp_path, "it", corpus if "text" in notebook_parameters(notebook) else None) == 0
    report = tmp_path / "reports" / "it"
    check_page(report / "report.html", len(list((report / "figures").glob("*.png"))) if has_report else 0)
    assert (report / "results.json").exists() == has_report
    if notebook.stem == "search":
        found, page = results(report)["results"], (report / "report.html").read_text()
        assert "begins with weights that its search has trained on 1,024 tokens" in page and "after 2,048 tokens of post-training, as many as ours in all" in page
        cells = sorted(tmp_path.rglob("trained/*.json"))
        assert (tmp_path / "runs" / "search" / "seed-3" / "0.5" / "elastic").is_dir() and not (tmp_path / "runs" / "search" / "seed-3" / "0.5" / "distilled").exists()  # no search of its own
        shutil.rmtree(tmp_path / "runs")  # the report is made of the cells alone
        assert run(notebook, tmp_path, "it", corpus, compute="False", arms="[]") == 0 and results(report)["results"] == found and sorted(tmp_path.rglob("trained/*.json")) == cells
        assert len(found["anytime"]) == 3 and sorted(row["work"] for row in found["anytime"]) == [row["work"] for row in found["anytime"]] and "by millions of tokens of search" in page
        by_arm = {row["arm"]: row for row in found["cells"] if row["sparsity"] == 0.5 and row["post_tokens"] == 1024}
        both = [by_arm["elastic, shared weights"], by_arm["distilled"]]
        assert len({row["genome"] for row in both}) == len({row["loss_before"] for row in both}) == 1 and len({row["loss"] for row in both}) == 2
        path = json.loads(next(tmp_path.rglob("genomes/distilled-3-0.5.*.json")).read_text())["value"]["path"]
        cells = [json.loads(file.read_text()) for file in tmp_path.rglob("anytime/*.json")]
        assert {cell["key"]["generations"]: cell["value"]["genome"] for cell in cells} == {1: path[0], 2: path[1]} and path[0] != path[2]
        assert "2 of sums); guessing gives 50.0 %" in page
        assert {"anytime.png", "moves.png", "genome.png", "sensitivities.png"} <= {path.name for path in (report / "figures").iterdir()}
    if notebook.stem == "train_tiny":
        model, tokenizer = load_model(str(tmp_path / "tiny"))
        assert model.config.model_type == "qwen3" and model.config.num_key_value_heads == 6 and model.config.num_hidden_layers == 8 and tokenizer.decode(tokenizer("A café.")["input_ids"]) == "A café."


def small_experiment(path: Path, parameters: str, *cells: str) -> Path:
    "A notebook with a parameters cell and others."
    first, kernel = new_code_cell(parameters, metadata={"tags": ["parameters"]}), {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(new_notebook(cells=[new_markdown_cell("# An experiment"), first, *map(new_code_cell, cells)], metadata={"kernelspec": kernel}), path)
    return path


def test_a_failed_run_leaves_the_last_report_whole(tmp_path, capsys):
    "When a later run of the same report fails, page, notebook, results and figures are still those of the run before, and the error names the cause."
    notebook = small_experiment(
        tmp_path / "fails.ipynb", 'size: int = 1  # of the bar\nfail: bool = False  # whether to\nreport_dir: str = ""  # where',
        "from evoprune_nb.paper.experiments import Report\nfrom evoprune_nb.paper.figures import comparison_figure\nreport = Report(report_dir, {'size': size})\n"
        "report.figure('bar', comparison_figure([{'name': 'a', 'before': [size], 'after': [size]}]))",
        "if fail: raise ValueError('made to fail')\nreport.finish({'size': size}, f'size {size}')")
    command = ["run", str(notebook), "--reports", str(tmp_path / "reports"), "--name", "it"]
    assert main(command) == 0
    assert "size 1" in capsys.readouterr().out
    report = tmp_path / "reports" / "it"
    before = {path: path.read_bytes() for path in report.rglob("*.*")}
    assert len(before) == 7
    assert main([*command, "-p", "size", "2", "-p", "fail", "true"]) == 1
    error = capsys.readouterr().err
    assert "made to fail" in error and "ValueError" in error
    assert {path.name for path in before if path.read_bytes() != before[path]} == set()
    assert {path.name for path in report.rglob("*.*")} - {path.name for path in before} == {"failed.ipynb", "failed.json"}
    assert json.loads((report / "failed.json").read_text())["error"] == "ValueError: made to fail" and "made to fail" in (report / "failed.ipynb").read_text()
    assert main(["index", "--reports", str(tmp_path / "reports")]) == 0
    assert "ValueError: made to fail" in (tmp_path / "reports" / "index.html").read_text()
    assert main([*command, "-p", "size", "3"]) == 0 and not list(report.glob("failed.*"))


@pytest.mark.parametrize("options, message", [
    (["-p", "generation", "3"], "no parameter 'generation'; did you mean 'generations'"), (["-p", "generations", "many"], "generations must be of type int; got 'many'"),
    (["-p", "generations", "2.5"], "generations must be of type int; got 2.5"), (["-p", "generations", "true"], "generations must be of type int"),
    (["-p", "survivors", "4"], "survivors must be of type list; got 4"), (["-p", "survivors", "[4, 2"], "survivors must be of type list"),
    (["-p", "sparsity", "half"], "sparsity must be of type float; got 'half'"), (["-p", "sparsity", ""], "sparsity must be of type float"),
    (["-f", "wrong.yaml"], "generations must be of type int; got 'x'"), (["-f", "unknown.yaml"], "no parameter 'colour'"), (["-f", "missing.yaml"], "no parameter file 'missing.yaml'"),
    (["-f", "broken.yaml"], "broken.yaml"), (["-f", "list.yaml"], "list.yaml"), (["--reports", "file"], "file")])
def test_wrong_parameters_stop_before_anything_runs(tmp_path, monkeypatch, capsys, options, message):
    "A wrong name, type, file or report directory is one line that says what would be right, exit status 2, and nothing is made."
    monkeypatch.chdir(tmp_path)
    files = {"wrong.yaml": "generations: x", "unknown.yaml": "colour: red", "broken.yaml": "a: [1,\nb: }", "list.yaml": "- 1\n- 2", "file": ""}
    for name, text in files.items():
        Path(name).write_text(text)
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("the notebook was run"))
    assert main(["run", str(DEMO), "--name", "it", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("evoprune: ") and len(error.strip().splitlines()) <= 4
    assert {path.name for path in tmp_path.rglob("*")} == set(files)


def test_a_missing_notebook_and_an_untyped_parameter(tmp_path, capsys):
    "A notebook that is not there, and one whose parameter has no type, are named."
    assert main(["run", str(tmp_path / "none.ipynb")]) == 2
    assert "none.ipynb" in capsys.readouterr().err
    notebook = small_experiment(tmp_path / "untyped.ipynb", "depth: int = 1  # layers\nwidth = 3  # no type", "pass")
    with pytest.raises(ParameterError, match="'width' needs a declared type"):
        notebook_parameters(notebook)
    assert main(["run", str(notebook), "--reports", str(tmp_path / "reports")]) == 2 and not (tmp_path / "reports").exists()


def test_values_get_their_declared_types(tmp_path):
    "Words of the command line become what is declared, scientific notation included; text stays text."
    notebook = small_experiment(tmp_path / "typed.ipynb", 'n: int = 1\nx: float = 0.1\nname: str = "a"\nflag: bool = False\nrows: list = []\noptions: dict = {}', "pass")
    given = dict(n="3", x="1e-4", name="12", flag="true", rows="[1, 2]", options="{a: 1}")
    assert check_parameters(notebook, given) == dict(n=3, x=1e-4, name="12", flag=True, rows=[1, 2], options={"a": 1})
    whole = check_parameters(notebook, {"x": 2})["x"]
    assert whole == 2.0 and isinstance(whole, float)
    for name, value in dict(n=None, x=True, name=3, flag=1, rows=(1,), options=[]).items():
        with pytest.raises(ParameterError, match=f"parameter {name} must be of type"):
            check_parameters(notebook, {name: value})


@pytest.mark.parametrize("notebook", EXPERIMENTS, ids=lambda path: path.stem)
def test_list_shows_every_parameter(notebook, capsys):
    "`--list` prints name, type, default and meaning of each parameter; every one has a meaning."
    assert main(["run", str(notebook), "--list"]) == 0
    printed, known = capsys.readouterr().out, notebook_parameters(notebook)
    for name, row in known.items():
        assert row["help"], name
        assert f"{name}: {row['type']} = {row['default']}\n    {row['help']}" in printed


def test_parameter_files_fit_their_notebook(tmp_path):
    "Every YAML file beside the experiments is accepted by the notebook it is named for."
    import yaml

    for path in EXPERIMENTS[0].parent.glob("*.yaml"):
        assert check_parameters(path.parent / f"{path.name.partition('.')[0]}.ipynb", yaml.safe_load(path.read_text()))


def test_command_line_values_win_over_the_file(tmp_path, monkeypatch):
    "-p overrides -f, and both reach the notebook with their types."
    seen = {}
    monkeypatch.setattr("evoprune_nb.ui.cli.run_experiment", lambda notebook, given, *more, **options: seen.update(given) or tmp_path)
    (tmp_path / "some.yaml").write_text("generations: 5\noffspring: 4")
    assert main(["run", str(DEMO), "-f", str(tmp_path / "some.yaml"), "-p", "generations", "7"]) == 0
    assert check_parameters(DEMO, seen) == {"generations": 7, "offspring": 4}


def test_what_is_not_embedded_cannot_be_fetched(capsys):
    "An unknown name is refused with those that there are."
    assert main(["fetch", "gpt-5"]) == 2
    assert "'gpt-5'; there are tiny, smollm2-135m, wikipedia-sample" in capsys.readouterr().err


def test_results_are_json_or_nothing(tmp_path):
    "A result that is not finite is an error, and the results of before stay."
    report = Report(tmp_path / "report", {"a": 1})
    report.finish({"loss": 1.5}, "good")
    with pytest.raises(ValueError):
        report.finish({"loss": math.nan}, "bad")
    assert results(tmp_path / "report")["summary"] == "good"


def test_text_table():
    "Columns are aligned, numbers to the right with thousands separated."
    table = text_table([{"model": "dense", "parameters": 3939264, "perplexity": 36.127}, {"model": "a", "parameters": 12, "perplexity": 1000.0}])
    assert table.splitlines() == ["model  parameters  perplexity", "dense   3,939,264       36.13", "a              12    1,000.00"]


def test_interrupted_command_continues(demo, corpus, tmp_path):
    "Ctrl-C in a terminal: one line, exit status 130, no kernel left behind; the same command then ends with the winner of the undisturbed run."
    values = BUDGETS["demo"] | {"text": str(corpus), "report_dir": "{}/reports/demo"}
    options = [word for name, value in values.items() for word in ("-p", name, value.replace("{}", str(tmp_path)))]
    command = [sys.executable, "-c", "import sys; from evoprune_nb.ui.cli import main; sys.exit(main())", "run", str(DEMO), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # background jobs ignore it
    log = tmp_path / "runs" / "demo" / "events.jsonl"
    while process.poll() is None and (not log.exists() or b'"evaluation"' not in log.read_bytes()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in error.splitlines()[-1]
    assert not History(log.parent).finished
    assert run(DEMO, tmp_path, "demo", corpus) == 0
    assert History(log.parent).winner == History(demo / "runs" / "demo").winner


GRID = 'seed: int = 0  # of it\nsize: int = 1  # of it\nrun_dir: str = "runs/it"  # where\ndatabase_dir: str = ""  # where\nreport_dir: str = "reports/it"  # where'
GRID_BODY = "from evoprune_nb.paper.experiments import Report, declared\nreport = Report(report_dir, declared(globals()))\nif seed == 1 and size == 1: raise ValueError('no luck')\nreport.finish({'places': [run_dir, database_dir]}, f'seed {seed}')"


def test_a_grid_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    "One report for each combination; a failed one is kept with its error, the others are made, the status is 1; run again, only what failed runs; seeds share a level database."
    monkeypatch.chdir(tmp_path)
    notebook = small_experiment(tmp_path / "it.ipynb", GRID, GRID_BODY)
    command = ["run", str(notebook), "--seeds", "0,1", "--grid", "size", "1,2"]
    assert main(command) == 1
    assert "1 of 4 failed: it-size1-seed1" in capsys.readouterr().err
    reports = {path.name: path for path in (tmp_path / "reports").iterdir()}
    assert set(reports) == {f"it-size{size}-seed{seed}" for size in (1, 2) for seed in (0, 1)}
    assert [name for name, path in reports.items() if (path / "failed.json").exists()] == ["it-size1-seed1"]
    assert results(reports["it-size2-seed1"])["results"]["places"] == ["runs/it-size2/seed1", "runs/it-size2/database"]
    ran = []
    monkeypatch.setattr("evoprune_nb.paper.experiments._execute", lambda notebook, running, values, quiet: ran.append((values["seed"], values["size"])) or (_ for _ in ()).throw(RuntimeError("stop")))
    assert main(command) == 2 and ran == [(1, 1)]


@pytest.mark.parametrize("options, message", [
    (["--seeds", "0,x"], "seed must be of type int; got 'x'"), (["--grid", "sise", "1,2"], "no parameter 'sise'; did you mean 'size'"), (["--grid", "size", "[1, 2"], "values of size must be a list"),
    (["--seeds", ""], None)])
def test_wrong_grids_stop_before_anything_runs(tmp_path, monkeypatch, capsys, options, message):
    "All runs of a grid are checked first."
    monkeypatch.chdir(tmp_path)
    notebook, ran = small_experiment(tmp_path / "it.ipynb", GRID, GRID_BODY), []
    monkeypatch.setattr("evoprune_nb.ui.cli.run_experiment", lambda *_, **__: ran.append(1) or tmp_path)
    assert main(["run", str(notebook), *options]) == (2 if message else 0) and len(ran) == (0 if message else 1)
    assert message is None or message in capsys.readouterr().err


def test_plain_papermill(tmp_path, monkeypatch):
    "Without this package's runner: parameters are checked in the first cell, the page is written, nothing else is left."
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    monkeypatch.chdir(tmp_path)
    notebook = small_experiment(tmp_path / "it.ipynb", GRID, GRID_BODY)
    with pytest.raises(PapermillExecutionError, match="parameter size must be of type int; got 'many'"):
        execute_notebook(str(notebook), str(tmp_path / "out.ipynb"), {"size": "many"}, progress_bar=False)
    assert not (tmp_path / "reports").exists()
    execute_notebook(str(notebook), str(tmp_path / "out.ipynb"), {"size": 2}, progress_bar=False)
    assert {path.name for path in (tmp_path / "reports" / "it").iterdir()} == {"report.html", "results.json"}
    assert "seed 0" in (tmp_path / "reports" / "it" / "report.html").read_text()
