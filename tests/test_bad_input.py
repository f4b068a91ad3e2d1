"""Wrong inputs, in a table: each is refused at once, in one line that says the value and what would be right, and nothing on disk changes."""
import json
import math
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import by, made_up, random_blocks, short_config, small_pools, unchanged_below, word_tokenizer
from safetensors.torch import load_file, save_file

from evoprune_nb.candidates import materialize
from evoprune_nb.config import SearchConfig
from evoprune_nb.data import TokenPool, documents, load_pools
from evoprune_nb.database import LevelDatabase, build_database, write_manifest
from evoprune_nb.evaluator import Evaluator
from evoprune_nb.genome import Genome, level_grid
from evoprune_nb.history import History
from evoprune_nb.judge.evaluation import evaluate, load_tasks, write_task, zero_shot
from evoprune_nb.judge.latency import kv_cache_bytes, measure_latency, peak_memory, time_each
from evoprune_nb.judge.unit_latency import measure_unit_latency
from evoprune_nb.machine.device import resolve_device, resolve_dtype
from evoprune_nb.machine.files import check_target, read_json
from evoprune_nb.machine.threads import in_order
from evoprune_nb.models import load_model, prunable_units
from evoprune_nb.mutation import make_offspring
from evoprune_nb.paper.experiments import Report, run_experiment
from evoprune_nb.paper.figures import fitness_figure
from evoprune_nb.paper.planning import plan
from evoprune_nb.paper.replays import to_notebook
from evoprune_nb.pruning import prune_unit
from evoprune_nb.replay import replay
from evoprune_nb.search import Search, check_search
from evoprune_nb.selection import Stage, check_stages
from evoprune_nb.ship.export import export_hf, load_exported, load_winner
from evoprune_nb.ship.gguf import export_gguf
from evoprune_nb.ship.padded import export_padded
from evoprune_nb.ship.posttraining import post_train_checkpoint
from evoprune_nb.ship.stream import PostTraining
from evoprune_nb.source import Source
from evoprune_nb.target import Target, plan_budget
from evoprune_nb.training import Training, post_train, train
from evoprune_nb.ui.cli import main
from evoprune_nb.ui.session import prepare_search

NAN, INF = math.nan, math.inf
EXPERIMENTS = Path(__file__).parent.parent / "nbs" / "experiments"
DEMO = EXPERIMENTS / "demo.ipynb"


def complaint(call, folder: Path) -> str:
    "What a call is refused with: one line, from the package itself, and no file below the folder is other than before."
    with unchanged_below(folder), pytest.raises((ValueError, OSError, RuntimeError)) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value).__module__.startswith(("evoprune_nb", "builtins")), f"a foreign {caught.value!r}"
    assert text and "\n" not in text.strip() and len(text) < 700, text
    return text


# Settings: every field of every dataclass of settings, with what no field of its kind can be.

WHOLE, REAL, WORDS, FLAG = (NAN, INF, 2.5, "8", None, True, -1), (NAN, INF, -INF, "fast", None, True, -1.0, 10**400), ("bleu", 3, "", None), ("yes", 1, None)
GOOD = {Training: {}, SearchConfig: {}, PostTraining: {"n_tokens": 10**6}, Stage: {"survivors": 1, "tuning_tokens": 0, "scoring_tokens": 64}, Target: {"sparsity": 0.5}}
SETTINGS = {
    Training: dict(lr=REAL, batch_size=WHOLE, weight_decay=REAL, warmup=(*REAL, 1.0), max_grad_norm=(*REAL, 0), optimizer=("Adamw", "Optimizer", "LBFGS", 3, ""), schedule=WORDS),
    Stage: dict(survivors=(*WHOLE, 0), tuning_tokens=WHOLE, scoring_tokens=(*WHOLE, 0)),
    SearchConfig: dict(
        generations=(*WHOLE, 0), offspring=(*WHOLE, 0, 10**9), max_swaps=(*WHOLE, 0), n_jobs=(*WHOLE, 0), heldout_tokens=WHOLE, seed=(NAN, 2.5, "lucky", None, True), fitness=("perplexty", *WORDS),
        operator=("level_swop", *WORDS), warm_start=FLAG, target=(0.5, None, {"sparsity": 0.5}), training=(1e-4, None, {"lr": 1e-4}), stages=(None, 4, "4", ((4, 0, 64),)),
        method=("elastik", *WORDS), elastic=(3, None, {"entrants": 3})),
    Target: dict(sparsity=(NAN, INF, 1.01, -0.01, "half", True), tolerance=(*REAL, 1.0), limits=(0.5, [0.5], "flops"), caps=(4, "wide")),
    PostTraining: dict(
        n_tokens=(*WHOLE, 0), seq_len=(*WHOLE, 0, 1), batch_size=(*WHOLE, 0), accumulation=(*WHOLE, 0), epochs=(*WHOLE, 0), shuffle_blocks=(*WHOLE, 0), lr=(*REAL, 0.0), warmup=(*REAL, 1.0),
        min_lr=(*REAL, 1.1), weight_decay=REAL, max_grad_norm=(*REAL, 0), distillation=(*REAL, 1.1), temperature=(*REAL, 0), autocast=FLAG, checkpoint_activations=FLAG, seed=(*WHOLE, 2**32)),
}
FIELDS = [(kind, name, value) for kind, rows in SETTINGS.items() for name, values in rows.items() for value in values]


@pytest.mark.parametrize("kind, name, value", FIELDS, ids=[f"{kind.__name__}.{name}={value!r:.12}" for kind, name, value in FIELDS])
def test_settings(kind, name, value, tmp_path):
    "A setting says its own name and the value."
    text = complaint(lambda: kind(**GOOD[kind] | {name: value}), tmp_path)
    assert name in text and repr(value)[:80] in text, text


def test_the_table_knows_every_setting():
    "A field that is added to a dataclass of settings gets its wrong values here."
    assert {kind: {field.name for field in fields(kind)} - {"params"} for kind in SETTINGS} == {kind: set(rows) for kind, rows in SETTINGS.items()}


# Places: models, text and directories that are not what they should be.


def damaged_models(root: Path, model, tokenizer) -> None:
    "Copies of a checkpoint, each with something wrong."
    whole = root / "whole"
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    copy = lambda name: Path(shutil.copytree(whole, root / name))
    weights = load_file(whole / "model.safetensors")
    some = "model.layers.1.mlp.down_proj.weight"
    weights_of = lambda name, tensors: save_file(tensors, copy(name) / "model.safetensors", metadata={"format": "pt"})
    weights_of("nan", weights | {some: torch.full_like(weights[some], NAN)})
    weights_of("lacking", {key: tensor for key, tensor in weights.items() if key != some})
    weights_of("other shapes", weights | {some: weights[some][:, :-2].contiguous()})
    content = (whole / "model.safetensors").read_bytes()
    (copy("cut") / "model.safetensors").write_bytes(content[: len(content) // 2])
    (copy("empty weights") / "model.safetensors").write_bytes(b"")
    (copy("no weights") / "model.safetensors").unlink()
    pickled = copy("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    (copy("no config") / "config.json").unlink()
    (copy("no json") / "config.json").write_text("{'model_type': llama")
    (copy("a list") / "config.json").write_text("[]")
    (copy("no type") / "config.json").write_text('{"hidden_size": 48}')
    (copy("unheard of") / "config.json").write_text('{"model_type": "hovercraft"}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy(f"broken {name}") / name).write_text("{")
    tokenless = copy("no tokenizer")
    for path in tokenless.glob("*token*"):
        path.unlink()


def wrong_texts(root: Path) -> None:
    "Files that hold no text, or not as their names say."
    files = {
        "empty.txt": b"", "blank.txt": b" \n\n \n", "empty.jsonl": b"", "no rows.json": b"[]", "no json.jsonl": b"text: hello\n", "cut.jsonl": b'{"text": "a"}\n{"te', "numbers.jsonl": b'{"text": 3}\n',
        "other column.jsonl": b'{"body": "a"}\n', "nested.jsonl": b'{"text": ["a"]}\n', "table.csv": b"text\nhello\n", "latin.txt": "Gr\u00fc\u00dfe".encode("latin-1"), "no parquet.parquet": b"PAR0",
        "no gzip.txt.gz": b"hello", "short.txt": b"one two three", "noending": b"hello", "f\u00fcr sp\u00e4ter.jsonl": b'{"body": "a"}\n'}
    for name, content in files.items():
        (root / name).write_bytes(content)
    (root / "no text").mkdir()
    (root / "no text" / "picture.png").write_bytes(b"")


QUESTIONS = {
    "empty": "", "no json": "what?", "no gold": '{"query": "a", "choices": ["b", "c"]}', "one choice": '{"query": "a", "choices": ["b"], "gold": 0}', "far": '{"query": "a", "choices": ["b", "c"], "gold": 7}',
    "word": '{"query": "a", "choices": ["b", "c"], "gold": "b"}', "list": "[1]"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, small, tiny, tokenizer, database, pools, corpus):
    "A folder full of things that are wrong, and what is needed to make more of them."
    root = tmp_path_factory.mktemp("wrong inputs")
    model, levels = small
    for name in ("models", "text", "questions", "runs"):
        (root / name).mkdir()
    damaged_models(root / "models", model, word_tokenizer("none"))
    wrong_texts(root / "text")
    for name, line in QUESTIONS.items():
        (root / "questions" / f"{name}.jsonl").write_text(line + "\n")
    shutil.copytree(levels.directory, root / "runs" / "run" / "database")
    levels = LevelDatabase(root / "runs" / "run" / "database", model)
    source = Source(str(root / "models" / "whole"), text=str(corpus), seq_len=16, calibration_tokens=512)
    search = Search(root / "runs" / "run", model, levels, small_pools(), short_config(), by(made_up), source)
    search.run(progress=False)
    copy = lambda name: Path(shutil.copytree(root / "runs" / "run", root / "runs" / name))
    (copy("no json") / "config.json").write_text("{")
    (copy("bad line") / "events.jsonl").write_text("hello\n")
    newer = json.loads((root / "runs" / "run" / "database" / "manifest.json").read_text()) | {"format": 99}
    (copy("newer database") / "database" / "manifest.json").write_text(json.dumps(newer))
    (copy("no database") / "database" / "manifest.json").unlink()
    outside = json.loads((root / "runs" / "run" / "database" / "manifest.json").read_text())
    outside["built"]["mlp.00"]["file"] = "../../run/database/mlp.00.safetensors"
    write_manifest(copy("outside database") / "database", {key: value for key, value in outside.items() if key != "checksum"})
    (copy("damaged database") / "database" / "mlp.00.safetensors").write_bytes(b"x")
    candidate = materialize(model, levels, levels.space.genome([1] * len(levels.units)))
    export_hf(candidate, word_tokenizer("none"), root / "export")
    (root / "file").write_text("something")
    (root / "full").mkdir()
    (root / "full" / "thesis.tex").write_text("something")
    return SimpleNamespace(
        root=root, model=model, levels=levels, pools=small_pools(), tokenizer=word_tokenizer("none"), blocks=random_blocks(), search=search, run=root / "runs" / "run", candidate=candidate, corpus=str(corpus),
        tiny=tiny, tiny_tokenizer=tokenizer, tiny_pools=pools, tiny_database=database, new=root / "new")


def searching(place, where="new", config=None, **changes):
    "A search on the small model."
    more = {name: changes.pop(name) for name in ("model", "levels", "pools") if name in changes}
    made = vars(place) | more
    return Search(place.root / where, made["model"], made["levels"], made["pools"], config or short_config(**changes))


def building(place, **changes):
    "A level database of the small model."
    return build_database(**dict(model=place.model, blocks=place.blocks, directory=place.new, progress=False) | changes)


def offspring(place, n=4, **options):
    budget, start = plan_budget(place.levels.space, Target(0.5, tolerance=0.1))
    return make_offspring(start, place.levels.space, budget, n, random.Random(0), **options)


def sent(place, **command):
    return place.search.send(command)


def set_(place, setting, value, **more):
    return place.search.send({"command": "set", "setting": setting, "value": value} | more)


def in_model(place, name):
    return load_model(str(place.root / "models" / name))


def text_of(place, name, **options):
    return load_pools(**dict(source=str(place.root / "text" / name), tokenizer=place.tokenizer, seq_len=16, tokens={"tuning": 32}, progress=False) | options)


def without(tensor, index):
    tensor = tensor.clone()
    tensor[index] = NAN
    return tensor


FUNCTIONS = [  # call, what the message must say
    # genomes and grids
    (lambda p: Genome((1.5,), (0,)), "whole numbers.*1.5"), (lambda p: Genome("ab", (0,)), "whole numbers.*'ab'"), (lambda p: Genome(None, (0,)), "got None"), (lambda p: Genome((99,), (0,)), "between 0 and 35.*99"),
    (lambda p: Genome.parse("12"), "'12' is no genome.*slash"), (lambda p: Genome.parse("1!/2"), r"'!'"), (lambda p: Genome.parse(None), "code of a genome is text.*None"), (lambda p: Genome.parse(7), "text.*got 7"),
    (lambda p: p.levels.space.check(Genome((1,), (1,))), "1 attention and 1 MLP levels, but the model has 3 and 3"), (lambda p: level_grid(prunable_units(p.model), "grop"), "heads 'grop'.*did you mean 'group'"),
    (lambda p: level_grid(prunable_units(p.model), n_levels=1), "n_levels.*got 1"), (lambda p: level_grid(prunable_units(p.model), n_levels=10**9), "n_levels.*1000000000"),
    (lambda p: level_grid(prunable_units(p.model), n_levels=2.5), "n_levels.*2.5"), (lambda p: level_grid(prunable_units(p.model), custom={"mpl": [0, 8]}), "'mpl'.*did you mean 'mlp'"),
    (lambda p: level_grid(prunable_units(p.model), custom={"mlp": [0, 2.5]}), r"grid for mlp.*2.5"), (lambda p: level_grid(prunable_units(p.model), custom={"mlp": 8}), "grid for mlp.*got 8"),
    (lambda p: level_grid(prunable_units(p.model), custom=[0, 8]), r"grid must be like.*\[0, 8\]"), (lambda p: level_grid(prunable_units(p.model), custom={"mlp": [0, 999]}), "999.*at most 80"),
    (lambda p: level_grid(prunable_units(p.model), custom={"mlp": [0, -8]}), "-8.*start at 0"), (lambda p: level_grid(prunable_units(p.model), custom={"mlp": []}), r"grid for mlp.*\[\]"),
    (lambda p: level_grid(prunable_units(p.model), multiple=7), "80 channels, which is no multiple of 7"), (lambda p: level_grid(prunable_units(p.model), multiple=-1), "multiple.*got -1"),
    # targets and mutation
    (lambda p: Target(), "nothing limits"), (lambda p: Target(0.5, 10), "either.*0.5 and 10"), (lambda p: Target(params=0.5), "params.*0.5"), (lambda p: Target(params=-3), "params.*-3"), (lambda p: Target(params=NAN), "params.*nan"),
    (lambda p: Target(limits={"flop": 0.5}), "'flop'.*did you mean 'flops'"), (lambda p: Target(limits={"flops": 0}), "flops.*got 0"), (lambda p: Target(limits={"flops": NAN}), "flops.*nan"), (lambda p: Target(limits={"flops": "half"}), "'half'"),
    (lambda p: Target(limits={3: 0.5}), "limit on 3 is unknown"), (lambda p: Target(0.5, caps={"max_with": 3}), "did you mean 'max_width'"), (lambda p: Target(0.5, caps={"max_width": 2.5}), "max_width.*2.5"),
    (lambda p: Target(0.5, caps={"min_heads": 4, "max_heads": 2}), "min_heads 4 > max_heads 2"), (lambda p: Target(0.5, limits={"params": 0.5}), "once"), (lambda p: plan_budget(p.levels.space, Target(params=10)), "10 parameters are outside"),
    (lambda p: plan_budget(p.levels.space, Target(limits={"latency": 0.5})), "latency"), (lambda p: plan_budget(p.levels.space, Target(limits={"flops": 1e-9})), "1e-09.*reach"),
    (lambda p: plan_budget(p.levels.space, Target(0.5, caps={"min_width": 70})), "0.5.*reach"), (lambda p: plan_budget(p.levels.space, Target(0.5, caps={"max_width": 79, "min_width": 79})), "79.*keep"),
    (lambda p: offspring(p, 10**6), "of 1000000 distinct.*ask for fewer"), (lambda p: offspring(p, 2.5), "offspring.*2.5"), (lambda p: offspring(p, 0), "offspring.*got 0"), (lambda p: offspring(p, max_swaps=10**9), "max_swaps.*1000000000"),
    (lambda p: offspring(p, max_swaps=1.5), "max_swaps.*1.5"), (lambda p: offspring(p, operator="cost_swop"), "did you mean 'cost_swap'"), (lambda p: offspring(p, frozen=range(6)), "6 of 6 units frozen"),
    (lambda p: check_stages((Stage(2, 0, 16), Stage(3, 0, 16), Stage(1, 0, 16)), 4), r"\[2, 3, 1\]"), (lambda p: check_stages((Stage(2, 0, 16),), 4), r"\[2\]"), (lambda p: check_stages((Stage(1, 0, 16),), NAN), "offspring.*nan"),
    # text
    *[(lambda p, name=name: text_of(p, name), re.escape(name) + more) for name, more in {
        "empty.txt": ".*has 0 .*in that split", "blank.txt": ".*has 0 .*in that split", "empty.jsonl": ".*has 0 .*in that split", "no rows.json": ".*", "no json.jsonl": ".*cannot be read", "cut.jsonl": ".*cannot be read", "numbers.jsonl": ".*'text' holds int", "other column.jsonl": ".*no column 'text'.*body",
        "nested.jsonl": ".*holds list", "table.csv": ".*cannot read .csv.*jsonl", "latin.txt": ".*cannot be read", "no parquet.parquet": ".*cannot be read", "no gzip.txt.gz": ".*cannot be read", "short.txt": ".*one document", "noending": ".*a file without ending",
        "f\u00fcr sp\u00e4ter.jsonl": ".*no column 'text'", "no text": ".*no text", "missing.jsonl": ".*no such file"}.items()],
    (lambda p: text_of(p, "", source=""), "text source.*got ''"), (lambda p: text_of(p, "", source=None), "got None"), (lambda p: text_of(p, "", source="a\0b"), r"text source.*x00"), (lambda p: text_of(p, "", source="wikipedia-samples"), "did you mean 'wikipedia-sample'"),
    (lambda p: text_of(p, "short.txt", seq_len=0), "seq_len=0"), (lambda p: text_of(p, "short.txt", seq_len=2.5), "seq_len.*2.5"), (lambda p: text_of(p, "short.txt", seq_len="16"), "seq_len.*'16'"), (lambda p: text_of(p, "short.txt", tokens=64), "tokens must be like.*64"),
    (lambda p: text_of(p, "short.txt", tokens={"tunning": 64}), "did you mean 'tuning'"), (lambda p: text_of(p, "short.txt", tokens={"tuning": NAN}), "tuning.*nan"), (lambda p: text_of(p, "short.txt", tokens={"tuning": -5}), "tuning.*-5"),
    (lambda p: text_of(p, "short.txt", tokenizer=None), "tokenizer.*None"), (lambda p: text_of(p, "short.txt", at_most=0), "at_most.*got 0"), (lambda p: load_pools(p.corpus, p.tokenizer, 64, {"tuning": 10**9}, progress=False), "1,000,000,000 tuning"),
    (lambda p: load_pools(p.corpus, p.tokenizer, 64, {"tuning": 64}, "txt", progress=False), "no column 'txt'.*text"), (lambda p: p.pools["tuning"].draw(10**9, 0), "1,000,000,000 tuning tokens"), (lambda p: p.pools["tuning"].draw(NAN, 0), "tuning tokens.*nan"),
    (lambda p: p.pools["tuning"].draw(8, 0), "8 tuning tokens do not fill"), (lambda p: p.pools["tuning"].draw(64, 2**70), "seed.*from"), (lambda p: p.pools["tuning"].draw(64, "lucky"), "seed.*'lucky'"), (lambda p: p.pools["tuning"].draw(64, 0, 0), "epochs.*got 0"),
    (lambda p: p.pools["tuning"].cut(0), "not to 0"), (lambda p: p.pools["tuning"].cut(99), "not to 99"), (lambda p: list(documents(p.root / "text" / "other column.jsonl")), "other column.jsonl.*no column 'text'"),
    # models
    *[(lambda p, name=name: in_model(p, name), re.escape(name) + more) for name, more in {
        "nan": ".*NaN or infinite values in model.layers.1.mlp.down_proj.weight", "lacking": ".*lacks tensors.*down_proj", "other shapes": ".*other shapes.*down_proj", "cut": ".*damaged", "empty weights": ".*damaged", "no weights": ".*safetensors", "pickled": ".*safetensors",
        "no config": ".*no config.json", "no json": ".*", "a list": ".*", "no type": ".*", "unheard of": ".*hovercraft", "broken tokenizer.json": ".*", "broken tokenizer_config.json": ".*", "no tokenizer": ".*", "missing": ".*no such directory"}.items()],
    (lambda p: load_model("tinny"), "'tinny'.*did you mean 'tiny'"), (lambda p: load_model(""), "got ''"), (lambda p: load_model(None), "got None"), (lambda p: load_model("tiny", "float23"), "dtype 'float23'"), (lambda p: load_model("tiny", "int8"), "dtype 'int8'.*float32"),
    (lambda p: load_model("tiny", None), "dtype None"), (lambda p: load_model("tiny", device="gpu"), "device 'gpu'.*cpu"), (lambda p: load_model("tiny", device="cuda:99"), "cuda:99.*cpu"), (lambda p: load_model(str(p.root / "file")), "no such directory"),
    (lambda p: resolve_device(None), "device None"), (lambda p: resolve_dtype(3), "dtype 3"), (lambda p: prunable_units(torch.nn.Linear(2, 2)), "Linear.*layers"), (lambda p: load_exported(p.root / "missing"), "missing is no checkpoint"),
    (lambda p: load_exported(p.root / "export", "float23"), "float23"), (lambda p: load_exported(p.root / "models" / "no json"), "no json.*config.json is damaged"),
    # pruning and the level database
    (lambda p: prune_unit(without(torch.ones(4, 6), (0, 0)), torch.eye(6), [0, 2, 6]), "weight has NaN"), (lambda p: prune_unit(torch.ones(4, 6), without(torch.eye(6), (0, 0)), [0, 2, 6]), "Hessian has non-finite"),
    (lambda p: prune_unit(without(torch.ones(4, 6), (0, 0)), torch.eye(6), [0, 1, 3], 2, 3), "weight has NaN"), (lambda p: prune_unit(torch.ones(4, 6), torch.eye(5), [0, 2]), r"\(4, 6\), \(5, 5\)"), (lambda p: prune_unit(torch.ones(4, 6), torch.eye(6), [0, 2], 4), "size 4"),
    (lambda p: prune_unit(torch.ones(4, 6), -torch.eye(6), [0, 2, 6]), "not positive definite.*damping=0.01"), (lambda p: prune_unit(torch.ones(4, 6), torch.ones(6, 6), [0, 2, 6], damping=0.0), "damping=0.0"), (lambda p: prune_unit(torch.ones(4, 6), torch.eye(6), [0, 9]), "6 structures.*9"),
    (lambda p: building(p, damping=-1), "damping.*-1"), (lambda p: building(p, damping=NAN), "damping.*nan"), (lambda p: building(p, batch_size=0), "batch_size.*0"), (lambda p: building(p, batch_size=2.5), "batch_size.*2.5"), (lambda p: building(p, blocks=[[1]]), "list"),
    (lambda p: building(p, blocks=p.blocks.float()), "float32"), (lambda p: building(p, blocks=p.blocks[0]), "integer tensor of shape"), (lambda p: building(p, blocks=p.blocks[:0]), "no tokens"), (lambda p: building(p, blocks=p.blocks + 1000), "the model's own tokenizer"),
    (lambda p: building(p, heads="gruop"), "did you mean 'group'"), (lambda p: building(p, grid={"mpl": [0, 8]}), "'mpl'"), (lambda p: building(p, memory_bytes=10), "memory_bytes=10 is too little"), (lambda p: building(p, memory_bytes=-1), "memory_bytes.*-1"),
    (lambda p: building(p, memory_bytes=INF), "memory_bytes.*inf"), (lambda p: building(p, memory_bytes=10**6, offload_bytes=2.5), "offload_bytes.*2.5"), (lambda p: building(p, directory=p.root / "file"), "file is not empty"), (lambda p: building(p, directory=p.root / "full"), "full is not empty"),
    (lambda p: building(p, directory=p.run / "database", damping=0.5), r"built differently \(damping\)"), (lambda p: LevelDatabase(p.root / "full", p.model), "no level database.*build_database"), (lambda p: LevelDatabase(p.run / "database", p.tiny), "another model"),
    (lambda p: LevelDatabase(p.root / "runs" / "newer database" / "database", p.model), "format 99.*reads 1; update evoprune_nb"), (lambda p: LevelDatabase(p.root / "runs" / "damaged database" / "database", p.model).weight(3, 1), "mlp.00.safetensors is damaged"),
    (lambda p: LevelDatabase(p.root / "runs" / "outside database" / "database", p.model).weight(3, 1), "plain file name.*'../../run/database/mlp.00.safetensors'"),
    (lambda p: materialize(p.model, p.levels, Genome((1,), (1,))), "the model has 3 and 3"), (lambda p: LevelDatabase(p.run / "database", p.model, context_tokens=0), "context_tokens.*got 0"),
    # training and scoring
    (lambda p: train(p.candidate, p.blocks.float()), "float32"), (lambda p: train(p.candidate, p.blocks + 1000), "token ids from"), (lambda p: train(p.candidate, p.blocks, checkpoint_every=0), "checkpoint_every.*0"), (lambda p: train(p.candidate, p.blocks, distillation=0.5), "no teacher and distillation 0.5"), (lambda p: train(p.candidate, p.blocks, teacher=p.model), "a teacher and distillation 0.0"), (lambda p: train(p.candidate, p.blocks, teacher=p.model, distillation=2), "distillation.*2"), (lambda p: train(p.candidate, p.blocks[:0]), "no tokens"),
    (lambda p: train(materialize(p.model, p.levels, p.search.start, trainable=False), p.blocks), "trainable=True"), (lambda p: post_train(p.candidate, p.pools["tuning"], 10**9), "1,000,000,000"), (lambda p: post_train(p.candidate, p.pools["tuning"], 2.5), "2.5"),
    (lambda p: Evaluator(p.model, p.levels, p.pools, (Stage(1, 0, 16),), fitness="bleu"), "fitness 'bleu'"), (lambda p: Evaluator(p.model, p.levels, p.pools, (Stage(1, 0, 16),), n_jobs=0), "n_jobs.*0"), (lambda p: Evaluator(p.model, p.levels, p.pools, (Stage(1, 0, 16),), seed=NAN), "seed.*nan"),
    (lambda p: Evaluator(p.model, p.levels, p.pools, (Stage(1, 0, 16),), batch_size=0), "batch_size.*0"), (lambda p: Evaluator(p.model, p.levels, p.pools, (Stage(1, 10**7, 16),)), "10,000,000 tuning"), (lambda p: list(in_order(print, [1], 0)), "n_jobs.*0"),
    # searches
    (lambda p: searching(p, "file"), "file"), (lambda p: searching(p, "full"), "full is not empty.*thesis.tex"), (lambda p: searching(p, "file/below"), "cannot be written"), (lambda p: searching(p, model=p.tiny), "another model"), (lambda p: searching(p, pools={}), "lacks tuning, scoring"),
    (lambda p: searching(p, heldout_tokens=10**9), "1,000,000,000 heldout"), (lambda p: searching(p, max_swaps=10**9), "max_swaps.*1000000000"), (lambda p: searching(p, offspring=9999), "of 9999 distinct.*fewer offspring"), (lambda p: searching(p, stages=(Stage(1, 0, 10**7),)), "10,000,000 scoring"),
    (lambda p: searching(p, params=10), "10 parameters"), (lambda p: searching(p, limits={"latency": 0.5}), "latency.*measure_unit_latency"), (lambda p: searching(p, "runs/run", seed=7), r"config.seed \(0 there, 7 here\)"),
    (lambda p: searching(p, "runs/run", training=Training(lr=0.5, batch_size=2)), r"config.training.lr \(0.001 there, 0.5 here\)"), (lambda p: searching(p, "runs/no json"), "no json/config.json is damaged"),
    (lambda p: searching(p, "runs/run", stages=(Stage(2, 0, 32), Stage(1, 64, 32))), r"config.stages.1.scoring_tokens \(48 there, 32 here\)"), (lambda p: searching(p, "runs/bad line"), "bad line/events.jsonl is damaged.*cut it off"), (lambda p: check_search(p.tiny, p.tiny_pools, SearchConfig()), "pools lacks scoring"),
    (lambda p: History(p.root / "full"), "full is no run directory"), (lambda p: History(p.root / "runs" / "bad line"), "events.jsonl is damaged"), (lambda p: History(p.root / "missing"), "missing is no run directory"), 
    (lambda p: fitness_figure(History(p.run), "sideways"), "view 'sideways'"), (lambda p: replay(p.root / "missing", p.new, p.model, p.levels, p.pools), "missing is no run"), (lambda p: replay(p.run, p.root / "full", p.model, p.levels, p.pools, progress=False), "full is not empty"),
    (lambda p: replay(p.run, p.new, p.model, p.levels, small_pools(8), progress=False), "another heldout"),
    (lambda p: prepare_search(Source("tinny"), p.new, short_config(), lambda _: None), "did you mean 'tiny'"), (lambda p: prepare_search(Source(text="missing.jsonl"), p.new, short_config(), lambda _: None), "missing.jsonl"),
    (lambda p: prepare_search(Source(str(p.root / "models" / "whole"), text=p.corpus, seq_len=16, heads="gruop"), p.new, short_config(), lambda _: None, {s: 512 for s in ("calibration", "tuning", "scoring")}), "did you mean 'group'"),
    (lambda p: Source(str(p.root / "models" / "whole"), text=p.corpus, seq_len=16, calibration_tokens=NAN).make(p.new, {"calibration": 512}), "calibration tokens.*nan"), (lambda p: to_notebook(p.root / "missing", p.new), "missing is no run"),
    # commands
    (lambda p: p.search.send("pause"), "a command is a dict.*'pause'"), (lambda p: sent(p, command="pawse"), "did you mean 'pause'"), (lambda p: sent(p, command=["pause"]), r"\['pause'\]"), (lambda p: sent(p, command="pause", until=3), "no field 'until'"),
    (lambda p: sent(p, command="set", setting="ofspring", value=3), "did you mean 'offspring'"), (lambda p: set_(p, "offspring", NAN), "offspring.*nan"), (lambda p: set_(p, "offspring", 10**9), "offspring.*1000000000"), (lambda p: set_(p, "max_swaps", 10**9), "max_swaps.*1000000000"),
    (lambda p: set_(p, "lr", INF), "lr.*inf"), (lambda p: set_(p, "lr", "fast"), "'fast'"), (lambda p: set_(p, "lr", -1), "lr.*-1"), (lambda p: set_(p, "generations", 2.5), "2.5"), (lambda p: set_(p, "stages", [[1, 0]]), "three whole numbers"), (lambda p: set_(p, "stages", [[2, 0, 16]]), r"\[2\]"),
    (lambda p: set_(p, "stages", [[1, 0, NAN]]), "nan"), (lambda p: set_(p, "limits", {"flop": 0.5}), "did you mean 'flops'"), (lambda p: set_(p, "sparsity", 7.0), "sparsity.*7.0"), (lambda p: set_(p, "params", 10), "10 parameters"), (lambda p: set_(p, "operator", "swap"), "operator 'swap'"),
    (lambda p: set_(p, "lr", 1e-3, when="later"), "when 'later'"), (lambda p: sent(p, command="freeze", units=["attn.99"]), "attn.99"), (lambda p: sent(p, command="freeze", units=[[1]]), r"\[1\]"), (lambda p: sent(p, command="freeze", units="attn.00"), "names"), (lambda p: sent(p, command="thaw", units=[]), "names"),
    (lambda p: sent(p, command="inject", genome="x"), "'x' is no genome"), (lambda p: sent(p, command="inject", genome=3), "got 3"), (lambda p: sent(p, command="inject", genome="000/000"), "the budget is"), (lambda p: sent(p, command="branch", generation=99), "99 has not begun"),
    (lambda p: sent(p, command="branch", generation=-1), "-1"), (lambda p: sent(p, command="branch", generation=NAN), "nan"), (lambda p: sent(p, command="note", text=""), "needs text.*''"), (lambda p: sent(p, command="note", text="\ud83d"), "UTF-8"), (lambda p: sent(p, command="step", what="day"), "what 'day'"),
    # judging
    (lambda p: evaluate(p.candidate, p.pools["heldout"], p.tokenizer, 0), "0 heldout tokens"), (lambda p: evaluate(p.candidate, p.pools["heldout"], p.tokenizer, 10**9), "1,000,000,000"), (lambda p: evaluate(p.candidate, p.pools["heldout"], p.tokenizer, batch_size=0), "batch_size.*0"),
    (lambda p: evaluate(p.candidate, TokenPool("heldout", p.blocks + 1000), p.tokenizer), "own tokenizer"), (lambda p: load_tasks([]), "no task"), (lambda p: load_tasks("arc_easy"), "a list.*'arc_easy'"), (lambda p: load_tasks(["missing.yaml"]), "missing.yaml"), (lambda p: load_tasks([3]), r"\[3\]"),
    (lambda p: zero_shot(p.candidate, p.tokenizer, ["arc_easy"], limit=0), "limit.*0"), (lambda p: zero_shot(p.candidate, p.tokenizer, ["arc_easy"], limit=NAN), "limit.*nan"), (lambda p: zero_shot(p.candidate, p.tokenizer, ["arc_easy"], batch_size=0), "batch_size.*0"),
    *[(lambda p, name=name: write_task(p.root / "questions" / f"{name}.jsonl", p.new), f"{name}.jsonl.*{more}") for name, more in {"empty": "no questions", "no json": "line 1", "no gold": "gold", "one choice": "two texts", "far": "got 7", "word": "'b'", "list": "object"}.items()],
    (lambda p: write_task(p.root / "missing.jsonl", p.new), "missing.jsonl"), (lambda p: write_task(p.root / "questions" / "empty.jsonl", p.new, name="../up"), "plain file name.*'../up'"),
    (lambda p: measure_latency(p.candidate, repeats=0), "repeats.*0"), (lambda p: measure_latency(p.candidate, prompt_tokens=10**6), "at most 128 tokens.*1,000,064"), (lambda p: measure_latency(p.candidate, batch_size=NAN), "batch_size.*nan"), (lambda p: measure_latency(p.candidate, warmup=True), "warmup.*True"),
    (lambda p: time_each({}, repeats=-1), "repeats.*-1"), (lambda p: kv_cache_bytes(p.candidate, 0), "context_tokens.*0"), (lambda p: peak_memory("tiny", batch_size=0), "batch_size.*0"), (lambda p: measure_unit_latency(p.model, p.levels, prompt_tokens=0), "prompt_tokens.*0"),
    (lambda p: measure_unit_latency(p.model, p.levels, prompt_tokens=8, name="../up"), "plain file name.*'../up'"), (lambda p: measure_unit_latency(p.model, p.levels, prompt_tokens=999), "at most 128.*999"),
    # shipping
    *[(lambda p, export=export, out=out: export(p.candidate, p.tokenizer, p.root / out), f"{out} exists") for export in (export_hf, lambda *a: export_padded(*a, pad_heads=True), lambda *a: export_gguf(*a, pad_heads=True)) for out in ("full", "file")],
    (lambda p: export_gguf(p.candidate, p.tokenizer, p.new, dtype="int3"), "dtype 'int3'"), (lambda p: check_target(p.root / "full"), "full exists"), (lambda p: export_hf(p.candidate, p.tokenizer, p.new, max_shard_size="huge"), "Got 'huge'"),
    (lambda p: load_winner(p.root / "full"), "full is no run"), (lambda p: load_winner(p.run, genome="1/1"), "the model has 3 and 3"), (lambda p: load_winner(p.run, database=p.root / "full"), "full holds no level database"), (lambda p: load_winner(p.run, "tiny"), "another model"),
    (lambda p: load_winner(p.root / "runs" / "newer database"), "format 99"), (lambda p: load_winner(p.root / "runs" / "no database"), "no level database.*--database"),
    (lambda p: post_train_checkpoint(p.root / "full", p.new, PostTraining(64, 16, 2), p.corpus, progress=False), "full is no checkpoint"), (lambda p: post_train_checkpoint(p.root / "export", p.root / "full", PostTraining(64, 16, 2), p.corpus, progress=False), "full exists"),
    (lambda p: post_train_checkpoint(p.root / "export", p.new, PostTraining(8, 16, 2), p.corpus, progress=False), "8 tokens do not fill"), (lambda p: post_train_checkpoint(p.root / "export", p.new, PostTraining(64, 16, 2), str(p.root / "text" / "empty.txt"), progress=False, use_cpu=True), "empty.txt"),
    (lambda p: post_train_checkpoint(p.root / "export", p.new, PostTraining(64, 16, 2), p.corpus, teacher="tiny", progress=False), "teacher 'tiny'"), (lambda p: post_train_checkpoint(p.root / "export", p.new, PostTraining(64, 16, 2), p.corpus, progress=False, checkpoint_tokens=0), "checkpoint_tokens.*0"),
    (lambda p: post_train_checkpoint(p.root / "export", p.new, PostTraining(10**7, 16, 2), p.corpus, progress=False, use_cpu=True), "10,000,000|more epochs"),
    # planning, reports, files
    (lambda p: plan("tinny"), "'tinny'.*did you mean 'tiny'"), (lambda p: plan("tiny", seq_len=0), "seq_len.*0"), (lambda p: plan("tiny", calibration_tokens=NAN), "calibration_tokens.*nan"), (lambda p: plan("tiny", heads="gruop"), "'group'"), (lambda p: plan("tiny", memory_bytes=10), "memory_bytes=10"),
    (lambda p: plan("tiny", seq_len=10**6), "1,000,000|1000000"), (lambda p: plan(str(p.root / "models" / "no json")), "no json"), (lambda p: plan("tiny", batch_size=0), "batch_size.*0"), (lambda p: plan("tiny", dtype="float23"), "float23"), (lambda p: plan("tiny", SearchConfig(Target(params=10))), "10 parameters"),
    (lambda p: read_json(p.root / "models" / "no json" / "config.json"), "no json/config.json is damaged"), (lambda p: read_json(p.root / "models" / "a list" / "config.json"), "a list/config.json is damaged.*list"), (lambda p: run_experiment(p.root / "missing.ipynb"), "missing.ipynb"),
    (lambda p: run_experiment(DEMO, name="../up", reports=p.new), "plain file name.*'../up'"), (lambda p: Report(p.root / "export", {}, device="gpu"), "device 'gpu'"),
]


@pytest.mark.parametrize("call, message", FUNCTIONS, ids=[f"{n}-{message:.30}" for n, (_, message) in enumerate(FUNCTIONS)])
def test_functions(place, call, message):
    "Public functions, one wrong argument each."
    text = complaint(lambda: call(place), place.root)
    assert re.search(message, text, re.DOTALL), text


def test_a_busy_directory(place):
    "Whoever drives a run is named."
    with place.search.driving():
        text = complaint(lambda: in_another_thread(lambda: searching(place, "runs/run").run(progress=False)), place.root / "text")
    assert "is being written by this process since" in text


def in_another_thread(action):
    "What the action raises there, raised here."
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(action).result()


# The command line: {words} stand for places.

POST = ["post-train", "{export}", "{new}", "--tokens", "64", "--seq-len", "16", "--batch-size", "2", "--text", "{corpus}", "--cpu"]
EVAL = ["eval", "{models}/whole", "--text", "{corpus}", "--seq-len", "16"]
COMMANDS = [  # arguments, what the message must say
    *[(["plan", "tiny", "-p", name, value], message) for name, value, message in [
        ("ofspring", "3", "no setting 'ofspring'.*did you mean 'offspring'"), ("offspring", "many", "offspring cannot be 'many'"), ("offspring", "0", "offspring.*got 0"), ("offspring", "2.5", "offspring.*2.5"), ("offspring", "1e9", "'1e9'"),
        ("generations", "nan", "'nan'"), ("generations", "-1", "generations.*-1"), ("generations", ".inf", "generations.*inf"), ("lr", "fast", "lr cannot be 'fast'"), ("lr", "inf", "lr.*inf"), ("lr", "nan", "lr.*nan"), ("lr", "-1", "lr.*-1"), ("sparsity", "1.5", "sparsity.*1.5"),
        ("sparsity", "half", "'half'"), ("params", "10", "10 parameters"), ("params", "0.5", "params.*0.5"), ("limits", "0.5", "limits and caps must be dicts.*0.5"), ("limits", "{flop: 0.5}", "did you mean 'flops'"), ("limits", "{flops: [1]}", r"flops.*\[1\]"), ("limits", "{flops", "limits cannot be"),
        ("limits", "[[1]]", "dicts"), ("caps", "{max_with: 3}", "did you mean 'max_width'"), ("caps", "[3]", "dicts"), ("caps", "{max_width: wide}", "'wide'"), ("stages", "3", "stages cannot be '3'.*survivors"), ("stages", "[3]", "stages cannot be"), ("stages", "[[2, 0]]", "stages cannot be"),
        ("stages", "[[2, 0, 512]]", r"\[2\]"), ("stages", "[[1, 0, -5]]", "stages cannot be"), ("stages", "[[4, 0, 512], [8, 0, 512], [1, 0, 512]]", r"\[4, 8, 1\]"), ("stages", "[[1, 0, 512", "stages cannot be"), ("stages", "{a: 1}", "stages cannot be"), ("stages", "", "stages cannot be ''"),
        ("fitness", "bleu", "fitness 'bleu'"), ("operator", "[swap]", "operator"), ("warm_start", "maybe", "warm_start.*'maybe'"), ("optimizer", "Adamw", "did you mean 'AdamW'"), ("seed", "1.5", "seed.*1.5"), ("batch_size", "0", "batch_size.*0"), ("tolerance", "2", "tolerance.*2"), ("max_swaps", "0", "max_swaps.*0")]],
    *[(["plan", "tiny", *more], message) for more, message in [
        (["--calibration-tokens", "-5"], "calibration_tokens.*-5"), (["--calibration-tokens", "x"], "invalid int value: 'x'"), (["--seq-len", "0"], "seq_len.*0"), (["--memory-gb", "inf"], "--memory-gb.*inf"), (["--memory-gb", "nan"], "--memory-gb.*nan"), (["--memory-gb", "-1"], "--memory-gb.*-1"),
        (["--memory-gb", "1e-6"], "memory_bytes=1,000"), (["--offload-gb", "inf"], "--offload-gb.*inf"), (["--heads", "gruop"], "did you mean 'group'"), (["--dtype", "float23"], "'float23'"), (["--device", "gpu"], "device 'gpu'"), (["--post-tokens", "-5"], "n_tokens.*-5"),
        (["--post-tokens", "99999", "--post-batch", "0"], "batch_size.*0"), (["--colour", "red"], "unrecognized arguments: --colour"), (["-p", "lr"], "expected 2 arguments")]],
    (["plan", "tinny"], "did you mean 'tiny'"), (["plan", "{models}/no json"], "no json"), (["plan", "{root}/missing"], "missing"), ([], "required: command"), (["pland"], "invalid choice: 'pland'"),
    (["fetch", "tinny"], "did you mean 'tiny'"), (["fetch", "../up"], "'../up'"),
    (["export", "{root}/missing", "{new}"], "neither a run directory nor a checkpoint"), (["export", "{root}/full", "{new}"], "neither a run directory nor a checkpoint"), (["export", "{run}", "{root}/full"], "full exists"), (["export", "{run}", "{root}/file"], "file exists"),
    (["export", "{run}", "{root}/file/below"], "file is not a directory"), (["export", "{run}", "{new}", "--format", "onnx"], "invalid choice: 'onnx'"), (["export", "{run}", "{new}", "--genome", "x"], "'x' is no genome"), (["export", "{run}", "{new}", "--genome", "1/1"], "the model has 3 and 3"),
    (["export", "{run}", "{new}", "--weights", "elastic"], "has trained no elastic model.*darwinlm"), (["export", "{export}", "{new}", "--weights", "elastic"], "--weights goes with a run"), (["export", "{run}", "{new}", "--weights", "dense"], "invalid choice: 'dense'"), (["post-train", "{export}", "{new}", "--tokens", "64", "--weights", "elastic"], "--weights goes with a run"),
    (["export", "{run}", "{new}", "--dtype", "float23"], "'float23'"), (["export", "{run}", "{new}", "--model", "tinny"], "did you mean 'tiny'"), (["export", "{run}", "{new}", "--model", "tiny"], "another model"), (["export", "{run}", "{new}", "--database", "{root}/full"], "full holds no level database"),
    (["export", "{runs}/no json", "{new}"], "no json/config.json is damaged"), (["export", "{runs}/bad line", "{new}"], "events.jsonl is damaged"), (["export", "{runs}/newer database", "{new}"], "format 99"), (["export", "{runs}/no database", "{new}"], "no level database"),
    (["export", "{runs}/damaged database", "{new}"], "mlp.00.safetensors is damaged"), (["export", "{run}", "{new}", "--pad-heads"], "--pad-heads.*hf"), (["export", "{run}", "{new}", "--format", "gguf", "--keep-head-count"], "--keep-head-count"), (["export", "{export}", "{new}", "--genome", "1/1"], "--genome goes with a run"),
    (["export", "{run}", "{new}", "--max-shard-size", "huge"], "'huge'"), (["export", "{models}/cut", "{new}"], "cut.*damaged"), (["export", "{models}/pickled", "{new}"], "safetensors"), (["export", "{models}/unheard of", "{new}"], "hovercraft"),
    (["post-train", "{export}", "{new}"], "required: --tokens"), ([*POST, "--tokens", "8"], "8 tokens do not fill"), ([*POST, "--tokens", "many"], "invalid int value: 'many'"), ([*POST, "--lr", "inf"], "lr.*inf"), ([*POST, "--lr", "-1"], "lr.*-1"), ([*POST, "--seq-len", "1"], "seq_len.*1"),
    ([*POST, "--batch-size", "0"], "batch_size.*0"), ([*POST, "--accumulation", "-1"], "accumulation.*-1"), ([*POST, "--warmup", "2"], "warmup.*2"), ([*POST, "--distillation", "0.5"], "teacher ''"), ([*POST, "--teacher", "tiny"], "teacher 'tiny'"), ([*POST, "--checkpoint-tokens", "0"], "checkpoint_tokens.*0"),
    ([*POST, "--text", "{text}/empty.txt"], "empty.txt"), ([*POST, "--text", "{text}/table.csv"], "table.csv.*jsonl"), ([*POST, "--column", "body"], "no column 'body'"), ([*POST, "--text", "{text}/cut.jsonl"], "cut.jsonl"), ([*POST, "--report-to", "nowhere"], "nowhere"), ([*POST, "--epochs", "0"], "epochs.*0"),
    (["post-train", "{root}/full", *POST[2:]], "full is no checkpoint"), (["post-train", "{models}/nan", *POST[2:]], "NaN or infinite"), (["post-train", "{export}", "{root}/full", *POST[3:]], "full exists"), (["post-train", "{runs}/no json", *POST[2:]], "is damaged"),
    *[([*EVAL, *more], message) for more, message in [
        (["--seq-len", "0"], "--seq-len.*0"), (["--seq-len", "1"], "--seq-len.*1"), (["--tokens", "-5"], "--tokens.*-5"), (["--tokens", "999999999"], "999,999,999"), (["--text", "{text}/empty.jsonl"], "empty.jsonl"), (["--text", "{text}/missing.txt"], "no such file"),
        (["--text", "{text}/table.csv"], "table.csv"), (["--column", "body"], "no column 'body'.*text"), (["--dtype", "float23"], "'float23'"), (["--device", "gpu"], "device 'gpu'"), (["--batch-size", "0"], "--batch-size.*0"), (["--repeats", "0", "--latency"], "--repeats.*0"), (["--prompt-tokens", "9999", "--latency"], "at most 128"),
        (["--limit", "0", "--tasks", "arc_easy"], "--limit.*0"), (["--tasks", "missing.yaml"], "missing.yaml"), (["--tasks", "{root}/questions/no gold.jsonl"], "line 1.*gold"), (["--tasks", "{root}/questions/empty.jsonl"], "no questions"), (["--out", "{root}/full"], "full is a directory"),
        (["--out", "{root}/file/below.json"], "file is not a directory")]],
    *[(["eval", "{models}/" + name, "--text", "{corpus}"], message) for name, message in [
        ("nan", "nan.*NaN or infinite values in"), ("cut", "cut.*damaged"), ("empty weights", "damaged"), ("pickled", "safetensors"), ("lacking", "lacks tensors"), ("other shapes", "other shapes"), ("no json", "config.json is damaged"), ("a list", "config.json is damaged"), ("unheard of", "hovercraft"),
        ("no tokenizer", "no tokenizer"), ("broken tokenizer.json", "broken tokenizer.json"), ("no config", "no config.json"), ("missing", "missing")]],
    (["eval", "tinny"], "did you mean 'tiny'"), (["eval", ""], "no checkpoint"),
    *[(["search", *words], message) for words, message in [
        (["tinny", "{new}"], "did you mean 'tiny'"), (["tiny"], "required: RUN_DIR"), (["tiny", "{new}", "-p", "ofspring", "3"], "did you mean 'offspring'"), (["tiny", "{new}", "-p", "generations", "nan"], "'nan'"), (["tiny", "{new}", "-p", "method", "elastik"], "did you mean 'elastic'"),
        (["tiny", "{new}", "--seq-len", "0"], "--seq-len.*0"), (["tiny", "{new}", "--calibration-tokens", "-5"], "--calibration-tokens.*-5"), (["tiny", "{new}", "--text-tokens", "0"], "tokens.*0"), (["tiny", "{new}", "--text", "{text}/empty.txt"], "empty.txt"), (["tiny", "{new}", "--text", "{text}/table.csv"], "table.csv"),
        (["tiny", "{new}", "--column", "body", "--text", "{corpus}"], "no column 'body'"), (["tiny", "{new}", "--dtype", "float23"], "'float23'"), (["tiny", "{new}", "--device", "gpu"], "device 'gpu'"), (["tiny", "{new}", "--heads", "gruop"], "did you mean 'group'"), (["tiny", "{new}", "--levels", "0"], "levels.*0"),
        (["tiny", "{new}", "--address", "nowhere"], "host:port.*nowhere"), (["tiny", "{new}", "--address", "127.0.0.1:1"], "no Ray cluster at '127.0.0.1:1'"), (["tiny", "{new}", "--address", "local", "--gpus", "nan"], "--gpus.*nan"), (["tiny", "{new}", "--gpus", "1"], "--address"), (["tiny", "{new}", "--per-candidate", "2"], "--address"), (["tiny", "{new}", "--address", "local", "--per-candidate", "0"], "--per-candidate.*0"), (["tiny", "{new}", "--address", "local", "--cpus", "0"], "--cpus.*0"),
        (["tiny", "{new}", "-p", "profile_weight", "-1"], "profile_weight.*-1"), (["tiny", "{new}", "-p", "scans", "[1]"], "scans"), (["tiny", "{new}", "-p", "scans", "3"], "scans must be a list.*3"), (["tiny", "{new}", "-p", "scan_steps", "2"], "scan_steps must be a list.*2"), (["tiny", "{root}/file"], "file is a file"), (["tiny", "{run}", "--text", "{corpus}"], "another model|other"), (["{models}/cut", "{new}"], "cut.*damaged"), (["{models}/unheard of", "{new}"], "hovercraft")]],
    *[(["push", *words], message) for words, message in [
        (["{root}/missing", "me/it"], "missing"), (["{root}/full", "me/it"], "full"), (["{export}"], "required: OWNER/NAME"), (["{export}", "me/it/there"], "me/it/there"), (["{export}", "-me/it"], "-me/it|arguments"), (["{export}", "me/it", "--only", "genome"], "run directory"), (["{runs}/no json", "me/it"], "no json"), (["{run}", "me/it", "--only", "all of it"], "invalid choice")]],
    *[(["rebuild", *words], message) for words, message in [
        (["{root}/missing.json", "{new}"], "missing.json"), (["{root}/file", "{new}"], "file"), (["{root}/full", "{new}"], "full"), (["{export}/config.json", "{new}"], "config.json"), (["{root}/missing.json"], "required: OUT")]],
    (["runs", "{root}/missing"], "missing"), (["candidates", "{root}/full"], "full"), (["share", "{root}/full", "--out", "{new}"], "full"), (["track", "{root}/full", "--to", "tensorboard"], "full"), (["track", "{run}", "--to", "nowhere"], "nowhere"),
    (["run", "{root}/missing.ipynb"], "missing.ipynb"), (["run", "{root}/file"], "file is no notebook"), (["run", "{demo}", "--name", "../up", "--reports", "{new}"], "plain file name.*'../up'"), (["run", "{demo}", "-f", "{root}/missing.yaml"], "missing.yaml"), (["run", "{demo}", "-f", "{root}/full"], "full"),
]


@pytest.fixture
def refused(place, tmp_path, monkeypatch, capsys):
    "A function that runs a command and returns its complaint: exit status 2, no traceback, nothing made."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("the notebook was run"))
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    words = {"root": place.root, "models": place.root / "models", "text": place.root / "text", "runs": place.root / "runs", "run": place.run, "export": place.root / "export", "new": place.new, "corpus": place.corpus, "demo": DEMO}

    def run(arguments):
        with unchanged_below(place.root), unchanged_below(tmp_path):
            try:
                status = main([re.sub(r"\{(\w+)\}", lambda m: str(words[m[1]]) if m[1] in words else m[0], word) for word in arguments])
            except SystemExit as end:  # argparse
                status = end.code
        error = capsys.readouterr().err
        last = error.strip().splitlines()[-1]
        assert status == 2 and "Traceback" not in error and re.match(r"evoprune( [\w-]+)?: ", last) and len(last) < 800, error
        return last

    return run


@pytest.mark.parametrize("arguments, message", COMMANDS, ids=[f"{n}-{' '.join(words[:1] + words[-2:]):.40}" for n, (words, _) in enumerate(COMMANDS)])
def test_commands(refused, arguments, message):
    "The command line, one wrong argument each."
    said = refused(arguments)
    assert re.search(message, said), said


# Parameters of experiment notebooks: their types, and what the search would refuse.

PARAMETERS = [
    *[("demo", name, value, name) for name, values in {
        "generations": ("many", "2.5", "nan", "true", "0", "-1", ""), "offspring": ("0", "2", ".inf", "1e9", "[8]"), "sparsity": ("half", "1.5", "-0.1", ".nan"), "tuning_lr": ("fast", "0", ".inf", "-0.001"), "seq_len": ("0", "-5", "x"), "calibration_tokens": ("-5", "0", "1.5"),
        "heldout_tokens": ("0", "-1"), "post_tokens": ("0", "lots"), "post_batch": ("0",), "post_lr": (".nan",), "post_epochs": ("0",), "n_jobs": ("0",), "seed": ("1.5",), "dtype": ("float23",), "device": ("gpu",), "fitness": ("bleu",), "survivors": ("4", "[4, 2", "[4, 2]", "[2, 4, 1]", "[4, 2, 0]", "[4, 2.5, 1]"),
        "tuning_tokens": ("[0, 2048]", "[0, -1, 4096]", "[0, x, 4096]"), "scoring_tokens": ("[0, 2048, 8192]", "{a: 1}"), "tuning_batch": ("0",), "method": ("elastik",)}.items() for value in values],
    ("demo", "rounds", "[1]", "scans"), ("demo", "entrants", "-1", "entrants.*-1"), ("demo", "elastic_tokens", "0", "tokens.*0"), ("demo", "scan_tokens", "x", "scan_tokens"), ("search", "ours", "mine", "unknown arms.*mine"), ("search", "variants", "{mine: {lr: 1}}", "mine changes.*lr"), ("search", "variants", "{mine: {genome_of: nobody}}", "genome of 'nobody'"), ("search", "variants", "{mine: {distillation: 2}}", "distillation.*2"), ("search", "anytime", "{mip: [1]}", "anytime names.*mip"), ("search", "anytime", "{darwinlm: 5}", "needs a list.*5"), ("search", "anytime", "{darwinlm: [3, 3]}", "each once"), ("search", "anytime", "{darwinlm: [true]}", "anytime of darwinlm.*True"), ("search", "anytime", "{darwinlm: [10]}", "darwinlm has 10 generations.*10"), ("train_tiny", "kind", "gpt", "kind.*gpt"), ("train_tiny", "kv_heads", "4", "kv_heads.*4"), ("train_tiny", "tokens", "0", "tokens.*0"), ("search", "question_limit", "0", "question_limit.*0"), ("search", "questions", "[nowhere.jsonl]", "nowhere.jsonl"), ("search", "variants", "{mine: {of: nobody}}", "variant of.*nobody"), ("demo", "profile_tokens", "-1", "profile_tokens.*-1"), ("demo", "profile_weight", "-1", "profile_weight.*-1"), ("demo", "weights", "elastic", "method elastic"),
    ("demo", "generation", "3", "did you mean 'generations'"), ("demo", "colour", "red", "no parameter 'colour'"), ("search", "seeds", "[a]", "every seed.*a"), ("search", "seeds", "[1.5]", "every seed.*1.5"), ("search", "seeds", "[0, 0]", "each once"), ("search", "seeds", "[]", "at least one"),
]


@pytest.mark.parametrize("notebook, name, value, message", PARAMETERS, ids=[f"{notebook}-{name}={value}" for notebook, name, value, _ in PARAMETERS])
def test_parameters(refused, place, notebook, name, value, message):
    "Parameters of notebooks, one wrong value each: refused before a kernel is started or a report directory made."
    said = refused(["run", str(EXPERIMENTS / f"{notebook}.ipynb"), "--reports", "{new}", "--name", "it", "-p", name, value])
    words = {"tuning_lr": "lr", "post_lr": "lr", "tuning_batch": "batch_size", "post_batch": "batch_size", "dtype": "dtype"}
    assert re.search(words.get(message, message), said), said


def test_a_fault_is_called_one(monkeypatch, capsys):
    "An error that nobody foresaw is one line, too, with its place; the status says that it is no wrong use."
    monkeypatch.setattr("evoprune_nb.ui.cli.plan", lambda *_, **__: {}["missing"])
    assert main(["plan", "tiny"]) == 3
    said = capsys.readouterr().err
    assert "a fault of the program: KeyError: 'missing' (test_bad_input.py, line" in said and "Traceback" not in said
    monkeypatch.setenv("EVOPRUNE_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["plan", "tiny"])
