"""The command as a person meets it: help, one message for what cannot be, and a small run from training to writing."""

import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch

from nestling import arguments, cli, memory, models, optim
from nestling import state as fast
from nestling.learn import checkpoint, load_run, planning
from nestling.learn.metrics import draw_curve

VERBS = sorted(cli.VERBS)
TINY = ["--model", "gated_deltanet", "--size", "tiny", "--lanes", "2", "--length", "32", "--threads", "1"]
TEXTS = {
    f"{name}.txt": " ".join(f"{name} {number} reads — grün" for number in range(40)) for name in ("nest", "egg", "bird")
}


@pytest.fixture
def nestling(capsys, monkeypatch):
    """Runs a command line in this process; returns the exit code, what stood on stdout, and what stood on stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*argv):
        capsys.readouterr()
        try:
            code = cli.run([str(word) for word in argv])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, texts):
    """A run of ten steps: its folder."""
    out = tmp_path_factory.mktemp("runs") / "one"
    settings = ["--tokens", "640", "--checkpoint-every", "4", "--data", str(texts), "--out", str(out)]
    assert cli.run(["train", *TINY, *settings]) == 0
    return out


def one_message(err):
    """What `nestling` said on stderr, one line without box or traceback."""
    assert err.startswith("nestling: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err.removeprefix("nestling: ").rstrip("\n")


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_verb(nestling, argv):
    code, out, err = nestling(*argv)
    assert (code, err) == (0, "")
    for name, verb in cli.VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.about)}$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 110


def test_the_version_is_that_of_the_package(nestling):
    assert re.fullmatch(r"nestling \d+\.\d+\.\d+\S*\n", nestling("--version")[1])


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(nestling, verb):
    code, out, err = nestling(*verb.split(), "--help")
    assert (code, err) == (0, "")
    assert f"usage: nestling {verb} [-h]" in out
    assert max(map(len, out.splitlines())) <= 100
    assert "--config FILE" in out
    kind = cli._named(cli.VERBS[verb].settings)
    assert " ".join(kind.__doc__.split())[:60] in " ".join(out.split())
    cells = [line.strip("│ ") for line in out.splitlines()]
    for option in arguments.options_of(kind):
        at = next(i for i, cell in enumerate(cells) if re.match(rf"--{option}\b", cell))
        helped = re.search(r"  +[A-Z][^ ]* ", cells[at]) or re.match(r"[A-Z][^ ]* ", cells[at + 1])
        assert helped, f"{option} is not explained"
    assert nestling(*verb.split(), "-h")[1] == out


@pytest.mark.parametrize("argv", [["bench"], ["bench", "--help"]])
def test_a_verb_of_two_words_lists_its_second(nestling, argv):
    code, out, err = nestling(*argv)
    assert (code, err) == (0, "")
    assert "  bench capacity  " in out
    assert "  train" not in out


@pytest.mark.parametrize("verb", ["train", "bench capacity", "bench learning", "bench optimizers"])
def test_help_needs_no_pytorch(verb):
    code = (
        "import sys; from nestling.cli import run\n"
        f"try: run([*{verb.split()}, '--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60).returncode == 0


# ---- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("trian", r"there is no verb 'trian'\. Did you mean 'train'\?"),
        ("--lanes 3", r"there is no verb '--lanes'\. There is: train, .*, levels, memories, plan, bench, doctor, demo\."),
        ("train --lans 3", r"there is no option --lans\. Did you mean --lanes\? See nestling train --help\."),
        ("train --lerning-rate=3", r"there is no option --lerning-rate\. See nestling train --help\."),
        ("train -m 3", r"there is no option -m\."),
        ("train text.txt", r"'text\.txt' is one word too many"),
        ("eval one two", r"'two' is one word too many"),
        ("train --lanes", r"--lanes: expected a value after it"),
        ("train --lanes --length 3", r"--lanes: expected a value after it"),
        ("train --set vocab_size=5", r"set: got vocab_size, but --model and --size choose the model"),
        ("train --data --tokens 5", r"--data: expected at least one value after it"),
        ("train --lanes two", r"--lanes: got 'two', but expected a whole number\."),
        ("train --lanes 2.5", r"--lanes: got '2\.5', but expected a whole number\."),
        ("train --carry never", r"--carry: got 'never', but expected a whole number or None\."),
        ("train --lr fast", r"--lr: got 'fast', but expected a number or None\."),
        ("train --schedule linear", r"--schedule: got 'linear', but expected one of 'cosine', 'trapezoid', 'constant'"),
        ("train --resume=yes", r"there is no run here"),
        ("train --set dim", r"--set: got 'dim', but expected NAME=VALUE, for example dim=128\."),
        ("train --lanes 0", r"lanes: got 0, but expected a number from 1 on\."),
        ("train --tokens -5", r"tokens: got -5, but expected a number from 1 on\."),
        ("train --lr 0", r"lr: got 0\.0, but expected a number above 0\."),
        ("train --threads 100000", r"threads: got 100000, but expected a number from 1 to \d+; this machine has \d+ cores"),
        ("bench capacity --threads 100000", r"threads: got 100000, but expected a number from 1 to \d+"),
        ("bench learning --threads 0", r"threads: got 0, but expected a number from 1 to \d+"),
        ("bench optimizers --threads 100000", r"threads: got 100000, but expected a number from 1 to \d+"),
        ("train --lanes 1000000000", r"lanes: got 1000000000, but expected a number from 1 to 65,536"),
        ("train --lanes 1000 --length 1000000", r"lanes × length: got 1000 × 1000000 = 1,000,000,000 tokens a step, .* up to"),
        ("train --clip inf", r"clip: got inf, but expected a number above 0\."),
        ("train --minutes nan", r"minutes: got nan, but expected a number above 0\."),
        ("train --minutes 1 --tokens 5", r"minutes \(1\.0\) and tokens \(5\) exclude each other: give one of them\."),
        ("train --device warp", r"device: got 'warp', but expected cpu, cuda, cuda:1 \(and so on\), mps or xpu\."),
        ("train --device cpu:x", r"device: 'cpu:x' cannot be used here .* Try cpu, or see nestling doctor\."),
        ("eval --limit 0", r"limit: got 0, but expected at least 1\."),
        ("generate --temperature -1", r"temperature: got -1\.0, but expected a number from 0 on\."),
        ("generate --top-p 2", r"top-p: got 2\.0, but expected a share above 0 and up to 1\."),
        ("generate --seed -3", r"seed: got -3, but expected a number from 0 on\."),
        ("generate --count 0", r"count: got 0, but expected at least 1\."),
        ("generate --prompt a --prompt-file b", r"prompt and prompt-file exclude each other"),
        ("generate --prompt --wide", r"--prompt: expected a value after it \(one that begins with -- as --prompt=VALUE\)"),
        ("bench capcity", r"bench: there is no 'capcity'\. Did you mean 'capacity'\?"),
        ("bench capacity --experiments rules", r"experiments: there is none named 'rules'\. Did you mean 'rule'\?"),
        ("bench capacity --seeds 0", r"seeds is 0, but expected at least 1"),
        ("memories titan", r"memory: there is none named 'titan'\. Did you mean 'titans'"),
        ("memories --key-dim 0", r"key_dim is 0, but expected at least 1"),
        ("levels --model titans_lm", r"model: there is none named 'titans_lm'\. Did you mean 'titans_lmm'"),
        ("levels --model gated_deltanet --size tinny", r"size: there is none named 'tinny'\. Did you mean 'tiny'"),
        ("levels --model gated_deltanet --set depth=3", r"has no setting depth; expected some of: .*layers"),
        ("levels --optimizer nope", r"optimizer: there is none named 'nope'; expected one of ada.*adamw, "),
        ("levels lstm --optimizer nope", r"optimizer: there is none named 'nope'; expected one of ada.*adamw, "),
        ("levels --set dim=100000000000000000000", r"overrides: got {'dim': 1.*}, but expected whole numbers up to"),
        ("train --seed 100000000000000000000", r"seed: got 1.*, but expected whole numbers up to"),
        ("train --tokens 64 --set layers=1 --optimizer-set foo=1", r"no setting 'foo'; expected some of .*betas, .*eps"),
        ("train --tokens 64 --set layers=1 --optimizer-set betas=[0.9]", r"adamw expected more numbers in a list"),
        ("demo --minutes 0", r"minutes: got 0\.0, but expected a number above 0\."),
        ("demo --minutes 1 --tokens 100", r"minutes \(1\.0\) and tokens \(100\) exclude each other: give one of them\."),
        ("demo --seed -1", r"seed: got -1, but expected at least 0\."),
        ("demo --segment 2", r"segment: got 2, but expected at least 8\."),
        ("demo --model transformer", r"name a memory model"),
        ("demo --segment 1000000", r"segment: got 1000000, but no two held-out documents are 8,000,000 characters long"),
        ("train --config", r"--config: expected a file after it\."),
        ("train --config nowhere.yaml", r"--config nowhere\.yaml: cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_message_that_says_what_can(nestling, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = nestling(*argv.split())
    assert (code, out) == (1 if "no run" in words else 2, "")
    assert re.search(words, one_message(err))
    assert list(tmp_path.iterdir()) == [], "nothing is written"


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--data", ""],
        ["train", "--data", "a", ""],
        ["train", "--data", "a", "--data="],
        ["train", "--out", ""],
        ["train", "--out="],
        ["train", "--resume", ""],
        ["train", "--resume="],
        ["train", "--from", ""],
        ["train", "--optimizer="],
        ["train", "--config", ""],
        ["train", "--config="],
        ["eval", ""],
        ["eval", "--data", ""],
        ["generate", "--read="],
        ["generate", "--prompt-file", ""],
        ["convert", "--to", ""],
        ["levels", "--model", ""],
        ["levels", ""],
        ["levels", "--draw="],
        ["memories", ""],
        ["bench", "capacity", "--out="],
    ],
)
def test_an_empty_word_is_no_path_and_no_name(nestling, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    code, out, err = nestling(*argv)
    assert (code, out) == (2, "")
    options = [word.partition("=")[0] for word in argv if word.startswith("--")]
    assert one_message(err).startswith(f"{options[-1]}: got '' (empty), but expected" if options else "got '' (empty)")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_can_be_empty():
    assert cli.parse("generate", ["--prompt", ""]).prompt == cli.parse("generate", ["--prompt="]).prompt == ""


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.yaml", "out: ''", r"c\.yaml: out = '', but expected something: give a value, or leave the setting out\."),
        ("c.json", '{"data": [""]}', r"c\.json: data = \[''\], but expected something"),
        ("c.yaml", "lans: 3", r"c\.yaml: there is no setting 'lans'\. Did you mean 'lanes'"),
        ("c.toml", "lanes = 'two'", r"c\.toml: lanes = 'two', but expected a whole number"),
        ("c.json", '{"lanes": 0}', r"c\.json: lanes: got 0, but expected a number from 1 on\."),
        ("c.yaml", "minutes: 3\ntokens: 5", r"minutes \(3\.0\) and tokens \(5\) exclude each other"),
        ("c.yaml", "lanes: [", r"c\.yaml: is not valid YAML"),
        ("c.ini", "lanes = 3", r"expected a file ending in \.yaml, \.yml, \.toml or \.json"),
    ],
)
def test_settings_files_are_checked_like_options(nestling, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    code, _, err = nestling("train", "--config", tmp_path / name)
    assert code == 2
    assert one_message(err).startswith("--config ")
    assert re.search(words, err)


def test_options_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: titans_lmm\nlanes: 3\ntokens: 50\nset: {dim: 64}\nlr: 3e-4\n")
    config = cli.parse("train", ["--config", str(file), "--lanes=4", "--seed", "7"])
    assert (config.model, config.lanes, config.tokens, config.seed) == ("titans_lmm", 4, 50, 7)
    assert (config.overrides, config.lr, config.length) == ({"dim": 64}, 3e-4, 256)
    config = cli.parse("train", [f"--config={file}", "--minutes", "2"])
    assert (config.minutes, config.tokens) == (2.0, None)


def test_values_of_an_option_given_twice_add_up():
    argv = ["--set", "dim=64", "--data", "a", "b", "--set", "layers=1", "heads=2", "--data=c", "--seed", "1"]
    config = cli.parse("train", argv)
    assert config.overrides == {"dim": 64, "layers": 1, "heads": 2}
    assert [os.path.basename(path) for path in config.data] == ["a", "b", "c"]
    assert config.seed == 1


def broken(folder, kind):
    """A file with bad data of this kind."""
    path = folder / {
        "gzip": "a.txt.gz",
        "cut": "a.txt.gz",
        "field": "a.jsonl",
        "json": "a.jsonl",
        "number": "a.jsonl",
    }.get(kind, "a.txt")
    content = {
        "utf-8": b"nest \xff nest",
        "gzip": b"no gzip at all",
        "cut": gzip.compress(b"nest " * 100)[:-20],
        "field": b'{"text": "a nest"}\n{"body": "an egg"}\n',
        "number": b'{"text": "a nest"}\n{"text": 5}\n',
        "json": b'{"text": "a nest"}\n{"text": \n',
        "empty": b" \n",
        "zero": b"a\0b",
    }.get(kind)
    if content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", r"a\.txt does not exist"),
        ("utf-8", r"a\.txt is not UTF-8 text \(byte 5 is 0xff\)"),
        ("gzip", r"a\.txt\.gz is not a whole gzip file"),
        ("cut", r"a\.txt\.gz is not a whole gzip file"),
        ("field", r"a\.jsonl, line 2, has no text in a field 'text' \(found: body\)"),
        ("number", r"a\.jsonl, line 2: the field 'text' is a number, but expected text: write it in quotes"),
        ("json", r"a\.jsonl, line 2, is not JSON"),
        ("empty", r"no text was found in .*a\.txt"),
        ("zero", r"a\.txt holds zero bytes"),
    ],
)
def test_data_that_cannot_be_read_is_named(nestling, tmp_path, trained, kind, words):
    path = broken(tmp_path, kind)
    for argv in (
        ["train", *TINY, "--tokens", "64", "--out", tmp_path / "run", "--data", path],
        ["eval", trained, "--data", path],
        ["generate", trained, "--read", path],
    ):
        code, out, err = nestling(*argv)
        assert (code, out) == (1, "")
        assert re.search(words, one_message(err))
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_cannot_be_read_is_told(nestling, tmp_path, trained, monkeypatch):
    code, _, err = nestling("generate", trained, "--prompt-file", tmp_path / "nowhere")
    assert code == 1
    assert re.fullmatch(r".*nowhere: No such file or directory", one_message(err))
    code, _, err = nestling("generate", trained, "--prompt-file", broken(tmp_path, "utf-8"))
    assert code == 2
    assert "is not UTF-8 text" in one_message(err)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    code, _, err = nestling("generate", trained, "--prompt", "-")
    assert code == 2
    assert "standard input is not UTF-8 text" in one_message(err)


# ---- runs and checkpoints that are not there, taken, or damaged ----------------------------------------------------------


@pytest.mark.parametrize("argv", [["train", "--resume"], ["eval"], ["generate"], ["levels"]])
def test_a_run_that_is_not_there(nestling, tmp_path, trained, argv):
    code, out, err = nestling(*argv, tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert re.fullmatch(r".*nowhere: there is no run here \(no config\.json\)\.", one_message(err))
    shutil.copytree(trained, tmp_path / "nowhere1")
    assert "Did you mean" in one_message(nestling(*argv, tmp_path / "nowhere")[2])
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("argv", [["eval"], ["generate"]])
def test_no_run_at_all(nestling, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    code, _, err = nestling(*argv)
    assert code == 1
    assert re.search(r"There is no run in .*runs yet: train one \(nestling train\)", one_message(err))


def test_the_newest_run_is_the_default(nestling, tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        shutil.copytree(trained, tmp_path / "runs" / name)
        for path in (tmp_path / "runs" / name / "checkpoints").iterdir():
            os.utime(path, (2e9 - age, 2e9 - age))
    (tmp_path / "runs" / "new" / "checkpoints" / "latest").unlink()  # as a kill may leave it
    (tmp_path / "runs" / "new" / "checkpoints" / "step-copy").mkdir()
    code, out, err = nestling("eval", "--json", "--documents", "1", "--limit", "64")
    assert (code, err) == (0, "")
    assert json.loads(out)["run"] == "runs/new/checkpoints/step-00000010"


def test_a_folder_that_is_taken_is_left_alone(nestling, tmp_path, texts, trained):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    before = (trained / "metrics.jsonl").read_bytes()
    for out, words in (
        (tmp_path / "full", r"full exists and is not empty\. Choose a new or an empty folder\."),
        (tmp_path / "file", r"file exists and is not empty"),
        (trained, r"there is a run in .*one already\. Go on with it \(--resume .*one\) or choose another folder"),
    ):
        code, _, err = nestling("train", *TINY, "--tokens", "64", "--data", texts, "--out", out)
        assert code == 2
        assert re.search(words, one_message(err))
    assert (trained / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "0.1"], r"began with other settings \(lr was 0\.002, now 0\.1\)\. Leave these out to go on"),
        (["--tokens", "1280"], r"tokens was 640, now 1280"),
        (["--minutes", "1"], r"minutes was None, now 1\.0; tokens was 640, now None"),
        (["--set", "dim=64"], r"overrides was \{\}, now \{'dim': 64\}"),
        (["--model", "titans_lmm", "--seed", "3"], r"model was 'gated_deltanet', now 'titans_lmm'; seed was 0, now 3"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_alone(nestling, trained, argv, words):
    code, _, err = nestling("train", "--resume", trained, *argv)
    assert code == 2
    assert re.search(words, one_message(err))


def test_a_run_does_not_go_on_with_other_text(nestling, tmp_path, texts, trained):
    data = tmp_path / "texts"
    shutil.copytree(texts, data)
    out = tmp_path / "run"
    assert nestling("train", *TINY, "--tokens", "64", "--data", data, "--out", out)[0] == 0
    (data / "new.txt").write_text("a new text")
    code, _, err = nestling("train", "--resume", out)
    assert code == 1
    assert "belongs to other text" in one_message(err)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("verb", [["train", "--resume"], ["eval"], ["generate"]])
def test_a_damaged_checkpoint_is_told_and_the_way_out(nestling, tmp_path, trained, verb, name):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    file = run / "checkpoints" / "step-00000010" / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    code, out, err = nestling(*verb, run)
    assert (code, out) == (1, "")
    words = r"step-00000010: damaged, .*Remove that folder to go on from step-00000008\."
    assert re.search(words, one_message(err))
    shutil.rmtree(file.parent)
    assert nestling(*verb, run, *(["--count", "3"] if verb == ["generate"] else []))[0] == 0
    if verb[0] == "train":
        for a, b in zip(load_run(run).model.parameters(), load_run(trained).model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("content", ["[1]", "{}", "null", "5"])
def test_a_record_that_is_no_record_is_damage(nestling, tmp_path, trained, content):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "checkpoints" / "step-00000010" / "checkpoint.json").write_text(content)
    code, _, err = nestling("eval", run)
    assert code == 1
    words = r"damaged, checkpoint\.json is no record of a checkpoint\. Remove that folder to go on from step-00000008\."
    assert re.search(words, one_message(err))
    (run / "config.json").write_text(content)
    code, _, err = nestling("eval", run)
    assert code == 1
    assert re.search(
        "config.json cannot be read: expected settings" if content != "{}" else "damaged", one_message(err)
    )


@pytest.mark.parametrize("argv", [["eval"], ["generate"], ["train", "--resume"], ["train", "--from"]])
def test_a_file_is_no_run(nestling, trained, argv):
    code, out, err = nestling(*argv, trained / "checkpoints" / "latest")
    assert (code, out) == (1, "")
    assert re.search(r"latest is no folder, but expected a run's folder, or one of its checkpoints", one_message(err))


def test_a_folder_that_cannot_be_made_is_named_as_it_was_given(nestling, tmp_path, texts):
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "sub" / "run"
    code, _, err = nestling("train", *TINY, "--tokens", "64", "--data", texts, "--out", out)
    assert code == 1
    assert one_message(err).startswith(f"out: {out} cannot be made (Not a directory). Choose a folder")


def test_a_folder_in_a_place_that_takes_no_files_is_named_as_it_was_given(nestling, tmp_path, texts, monkeypatch):
    def refused(*where, **settings):
        raise PermissionError(13, "Permission denied", str(tmp_path / ".run-abc"))

    monkeypatch.setattr("nestling.learn.folder.tempfile.mkdtemp", refused)
    code, _, err = nestling("train", *TINY, "--tokens", "64", "--data", texts, "--out", tmp_path / "run")
    assert code == 1
    assert one_message(err).startswith(f"out: {tmp_path / 'run'} cannot be made (Permission denied).")


# ---- from training to writing ----------------------------------------------------------------------------------------


def test_training_leaves_everything_in_its_folder(trained, texts):
    assert {path.name for path in trained.iterdir()} == {
        ".lock", "checkpoints", "config.json", "loss.png", "metrics.jsonl", "summary.json"
    }  # fmt: skip
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["tokens"] for line in lines] == [64 * step for step in range(1, 11)]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["faults"] == 0 and not line["skipped"] and line["grad_norm"] > 0 for line in lines)
    assert lines[-1]["seconds"] > 0

    summary = json.loads((trained / "summary.json").read_text())
    expected = {"model": "gated_deltanet", "size": "tiny", "seed": 0, "steps": 10, "tokens": 640, "device": "cpu"}
    assert summary.items() >= expected.items()
    assert summary["parameters"] == sum(p.numel() for p in models.build("gated_deltanet", "tiny").parameters())
    assert summary["held_out_documents"] == 1
    assert 0 < summary["held_out_bits_per_byte"] < 9
    config = json.loads((trained / "config.json").read_text())
    assert (config["model"], config["tokens"], config["data"]) == ("gated_deltanet", 640, [str(texts)])

    png = (trained / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == (1200, 675)
    steps = [path.name for path in sorted((trained / "checkpoints").glob("step-*"))]
    assert steps == ["step-00000008", "step-00000010"]


def test_what_training_says(nestling, texts, tmp_path):
    out = tmp_path / "a run"
    code, said, err = nestling("train", *TINY, "--tokens", "64", "--data", texts, "--out", out)
    assert (code, said) == (0, "")
    assert re.search(
        r"gated_deltanet tiny \([\d,]+ parameters\) reads .*: 2 documents, [\d,]+ characters; 1 held out", err
    )
    assert re.search(r"64 tokens in 0:0\d, \d\.\d{3} bits per byte on held-out documents\.", err)
    assert err.endswith(f"try next:\n  nestling generate '{out}'\n")


@pytest.mark.parametrize("values", [[9.5, 9.4, 9.6], [None, 5.0], [0.0, 0.0], [7.9, 3.0]])
def test_every_curve_has_its_axes_the_right_way_up(tmp_path, monkeypatch, values):
    from matplotlib.axes import Axes

    limits = []
    original = Axes.set_ylim

    def watched(axes, *given, **settings):
        if len(given) == 2:
            limits.append(given)
        return original(axes, *given, **settings)

    monkeypatch.setattr(Axes, "set_ylim", watched)
    draw_curve(
        [{"tokens": 10 * (i + 1), "bits_per_byte": value} for i, value in enumerate(values)],
        tmp_path / "x.png",
        "x",
        0.0,
    )
    bottom, top = limits[-1]
    assert bottom < 0 < top
    draw_curve([{"tokens": 1, "bits_per_byte": value} for value in values], tmp_path / "y.png", "y")
    bottom, top = limits[-1]
    assert bottom < min(value for value in values if value is not None) < top


def test_eval_measures_what_training_measured(nestling, trained, texts):
    summary = json.loads((trained / "summary.json").read_text())
    code, out, _ = nestling("eval", trained, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["documents"] == 1
    assert result["readings"][0]["bits_per_byte"] == pytest.approx(summary["held_out_bits_per_byte"], rel=1e-5)
    assert result["run"] == str(trained / "checkpoints" / "step-00000010")
    assert result["bytes"] in {len(text.encode()) for text in TEXTS.values()}

    code, out, _ = nestling(
        "eval", trained / "checkpoints" / "step-00000008", "--data", texts, "--json",
        "--limit", "600", "--readings", "2", "--erase-every", "64", "--lanes", "2",
    )  # fmt: skip
    result = json.loads(out)
    assert (result["documents"], result["bytes"], result["erase_every"]) == (3, 1800, 64)
    first, second = result["readings"]
    assert first["by_position"]["from"] == [0, 256, 512]
    assert first["by_position"]["to"] == [256, 512, 600]
    assert first["by_position"]["documents"] == [3, 3, 3]
    assert second["bits_per_byte"] == pytest.approx(first["bits_per_byte"], rel=1e-5), "erased, so nothing is known"

    code, out, _ = nestling("eval", trained, "--limit", "300")
    assert code == 0
    assert "position (bytes)" in out
    assert "256 – 300" in out
    assert re.search(r"all bytes │ +1 │ +\d\.\d{3} │", out)


def test_generate_writes_what_its_seed_says(nestling, trained, texts, tmp_path):
    write = ["generate", trained, "--prompt", "the nest ", "--count", "12"]
    code, out, err = nestling(*write)
    assert (code, err) == (0, "")
    assert out.startswith("the nest ")
    assert out.endswith("\n")
    assert nestling(*write)[1] == out
    assert nestling(*write, "--seed", "1")[1] != out
    file = tmp_path / "prompt.txt"
    file.write_text("the nest ")
    assert nestling("generate", trained, "--prompt-file", file, "--count", "12")[1] == out
    greedy = ["generate", trained, "--count", "8", "--temperature", "0"]
    assert nestling(*greedy)[1] == nestling(*greedy, "--seed", "5")[1]
    assert nestling("generate", trained, "--count", "3", "--prompt", "\udcff")[1].startswith("?")


def test_generate_reads_a_document_to_its_end(nestling, trained, tmp_path, monkeypatch):
    import nestling.learn.evaluation as evaluation
    from nestling import learn

    seen = []
    original = evaluation.read

    def watched(model, tokens, state=None, **settings):
        seen.append((bytes(tokens[1:]).decode(), state is None))
        return original(model, tokens, state, **settings)

    monkeypatch.setattr(learn, "read", watched, raising=False)
    texts = {"a.txt": "a first text", "b.txt": "a second text"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert nestling("generate", trained, "--read", tmp_path / "a.txt", "--count", "2")[0] == 0
    assert seen == [("a first text", True)]
    assert nestling("generate", trained, "--read", tmp_path, "--count", "2")[0] == 0
    assert seen[1:] == [("a first text", True), ("a second text", False)]


def test_levels_show_the_nested_system(nestling, trained):
    code, out, err = nestling("levels", trained)
    assert (code, err) == (0, "")
    assert out.startswith("gated_deltanet tiny: ")
    for words in (
        "state of constant size",
        "every 1 token",
        "every 1 step",
        "frequency 1 per token",
        "frequency 1 per step",
        "AdamW",
        "initial states",
        "Models: ",
        "Sizes: tiny",
    ):
        assert words in out
    copied = nestling("levels", trained / "checkpoints" / "step-00000008")
    assert copied[1] == out
    code, out, _ = nestling("levels", "--model", "titans_lmm", "--size", "tiny", "--set", "layers=1", "--json")
    result = json.loads(out)
    assert (code, result["model"]) == (0, "titans_lmm")
    assert [level["name"] for level in result["levels"]][-1] == "slow weights"
    model = models.build("titans_lmm", "tiny", layers=1)
    tokens = torch.zeros(1, result["length"], dtype=torch.int64)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert (
        result["initial_state_parameters"] == sum(p.numel() for n, p in model.named_parameters() if ".initial" in n) > 0
    )
    assert result["state_bytes_per_lane"] == fast.nbytes(model(tokens)[1])
    real = planning.count(model, result["length"])
    assert result["forward_flops_per_token"] == pytest.approx(real.forward / result["length"], rel=0.05)
    assert result["decode_flops_per_token"] == pytest.approx(real.decode, rel=0.05)
    assert {name for level in result["levels"] for name in level["params"]} == {n for n, _ in model.named_parameters()}
    assert sum(level["slow"] for level in result["levels"]) == result["parameters"]
    often = {level["name"]: (level["frequency"], level["per"]) for level in result["levels"]}
    assert (often["blocks.0.mixer.memory"], often["slow weights"]) == ((0.25, "token"), (1, "step"))
    attention = json.loads(nestling("levels", "transformer", "--json")[1])["levels"][0]
    assert (attention["frequency"], attention["slow"]) == (None, 4 * 32 * 32)
    defaults = ("--model", "hope"), ("--size", "tiny"), ("--optimizer", "adamw")  # asked for all the same
    others = ("--model", "titans_lmm"), ("--size", "base"), ("--set", "dim=16"), ("--optimizer", "sgd")
    for option in (*defaults, *others):
        code, out, err = nestling("levels", trained, *option)
        assert (code, out) == (2, "")
        assert f"{option[0][2:]}: a run has settings of its own" in one_message(err)


def test_the_package_runs_as_a_module():
    for argv, code, words in ((["--version"], 0, "nestling "), (["levls"], 2, "Did you mean 'levels'")):
        ended = subprocess.run([sys.executable, "-m", "nestling", *argv], capture_output=True, text=True, timeout=60)
        assert ended.returncode == code
        assert words in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr


def test_levels_take_a_model_by_its_name_or_a_run(nestling, tmp_path, monkeypatch, trained):
    by_option = nestling("levels", "--model", "gated_deltanet", "--set", "layers=1")
    assert by_option[0] == 0
    assert nestling("levels", "gated_deltanet", "--set", "layers=1") == by_option
    assert nestling("levels", "gated_deltanet", "--model", "gated_deltanet", "--set", "layers=1") == by_option
    code, out, err = nestling("levels", "gated_deltanet", "--model", "lstm")
    assert (code, out) == (2, "")
    assert "model: got 'lstm', but 'gated_deltanet' is named already" in one_message(err)
    code, out, err = nestling("levels", "gated_delta_net")
    assert (code, out) == (2, "")
    assert "no model, optimizer or run named 'gated_delta_net'. Did you mean 'gated_deltanet'" in one_message(err)
    monkeypatch.chdir(tmp_path)
    for name in ("lstm", "mine"):
        shutil.copytree(trained, tmp_path / name)
    assert nestling("levels", "mine")[1].startswith("gated_deltanet tiny: ")
    assert nestling("levels", "./lstm")[1].startswith("gated_deltanet tiny: ")
    assert nestling("levels", "lstm")[1].startswith("lstm tiny: ")
    attention = " ".join(nestling("levels", "transformer")[1].replace("│", " ").split())
    assert "every token, from all" in attention
    assert "every every" not in attention


@pytest.mark.parametrize("name", optim.names())
def test_levels_show_an_optimizer_through_the_same_lens(nestling, tmp_path, name):
    code, out, err = nestling("levels", name)
    assert (code, err) == (0, "")
    assert out.startswith(f"{name}: ")
    for words in ("every 1 step", "data: inputs as keys, errors as values", "learns from gradients"):
        assert words in " ".join(out.replace("│", " ").split())
    told = json.loads(nestling("levels", name, "--json", "--draw", tmp_path / "nest.svg")[1])
    assert told["optimizer"] == name
    assert {"weights"} < {level["name"] for level in told["levels"]}
    assert (tmp_path / "nest.svg").exists()
    code, out, err = nestling("levels", name, "--size", "small")
    assert (code, out) == (2, "")
    assert f"size: {name} is an optimizer, which is shown alone" in one_message(err)


def test_levels_say_choices_in_words(nestling):
    code, out, _ = nestling("levels", "titans_lmm")
    assert code == 0
    for words in ("MLP of 2 layers, 4× wide, GELU", "squared error (L2)", "gradient descent with momentum"):
        assert words in out
    assert "MLP(" not in out


def test_memories_are_shown_as_their_choices(nestling):
    code, out, err = nestling("memories")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert f"{len(memory.names())} memories, at 64 a key" in out
    for name in memory.names():
        assert re.search(rf"^│ {name} +│ equation ", out, re.MULTILINE), name
    code, one, _ = nestling("memories", "yaad", "--key-dim", "8")
    assert code == 0
    told = " ".join(one.replace("│", " ").split())
    for part, words in memory.describe("yaad", key_dim=8).items():
        assert part == "name" or words in told, part
    assert memory.describe("yaad", key_dim=8)["state"] == "1024 numbers per lane and head"
    code, out, _ = nestling("memories", "yaad", "--key-dim", "8", "--json")
    (found,) = json.loads(out)["memories"]
    assert found["state_numbers"] == 1024
    assert found["source"] == memory.describe("yaad")["source"]
    assert found["flops_per_token"] > 1024


def test_doctor_finds_that_everything_works(nestling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = nestling("doctor")
    assert code == 0
    for name in ("python", "torch", "threads", "matmul", "accelerator", "extras", "disk", "self-test"):
        assert re.search(rf"│ {name} +│ (ok|–) ", out), name
    assert re.search(r"nestling\[\w+\]'", out) or "for more" not in out
    assert "Everything needed works." in out
    assert list(tmp_path.iterdir()) == []
    code, out, _ = nestling("doctor", "--device", "warp")
    assert code == 1
    assert "Broken: self-test" in out
    assert "device: got 'warp'" in out


# ---- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory: try fewer --lanes"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory: try fewer --lanes"),
        (OSError(28, "No space left on device", "metrics.jsonl"), 1, "metrics.jsonl: No space left on device"),
        (checkpoint.CheckpointError("it is gone"), 1, "it is gone"),
    ],
)
def test_ordinary_failures_are_one_message(nestling, monkeypatch, error, code, words):
    def failing(config):
        raise error

    monkeypatch.setattr("nestling.commands.levels.run", failing)
    ended, out, err = nestling("levels")
    assert (ended, out) == (code, "")
    assert words in one_message(err)


def test_a_defect_keeps_its_traceback(nestling, monkeypatch):
    monkeypatch.setattr("nestling.commands.levels.run", lambda config: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        nestling("levels")


def test_text_that_a_terminal_cannot_show_ends_nothing(trained):
    code = f"from nestling.cli import main; main(['generate', {str(trained)!r}, '--prompt', 'grün —', '--count', '2'])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"gr?n ?")


def test_a_reader_that_goes_away_is_no_failure_to_talk_about():
    read, write = os.pipe()
    os.close(read)
    code = "from nestling.cli import main; main(['--help'])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=environment, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
