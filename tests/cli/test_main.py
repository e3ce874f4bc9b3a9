"""The command line as a whole: commands, help, errors, codes, terminals.

Run: python -m pytest tests/cli/test_main.py
"""

import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from lora_fsdp import FineTuningArguments
from lora_fsdp.cli.configs import find_config, suggested_config
from lora_fsdp.cli.main import MODULES, commands_of, main
from lora_fsdp.cli.reference import reference_page
from lora_fsdp.cli.train import TRAINING_OPTIONS
from lora_fsdp.errors import ArgumentError

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [c.name for module in MODULES for c in commands_of(module).values()]
HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "sklearn")


def child(*arguments, **variables):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class TestFast:
    def test_no_command_imports_what_is_slow_for_its_help(self):
        program = f"""
import sys
from lora_fsdp.cli.main import main
for command in {COMMANDS!r}:
    try:
        main([*command.split(), "--help"])
    except SystemExit:
        pass
main(["tasks", "list"])
main([])
print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
        done = child("-c", program)
        assert done.stdout.splitlines()[-1] == "HEAVY []", done.stderr

    @pytest.mark.parametrize("words", [["tasks", "list"], ["train", "--help"], ["--help"]])
    def test_answers_before_torch_would_be_imported(self, words, torch_seconds):
        """In processor time, by this machine as it is now."""
        assert processor_seconds("-m", "lora_fsdp", *words) < torch_seconds


@pytest.fixture(scope="module")
def torch_seconds():
    return processor_seconds("-c", "import torch")


def processor_seconds(*arguments):
    """The least of three: a busy machine takes more."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert child(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


class TestWords:
    def test_nearest_command(self, capsys):
        code, _, error = run(capsys, "trian")
        assert code == 2
        assert "Did you mean 'train'?" in error

    def test_nearest_inner_command(self, capsys):
        code, _, error = run(capsys, "tasks", "chek")
        assert code == 2
        assert "Did you mean 'check'?" in error

    @pytest.mark.parametrize("option", ["--adaptr", "--adaptr=x", "--chunk-row"])
    def test_nearest_option(self, capsys, option):
        code, _, error = run(capsys, "predict", option, "x")
        assert code == 2
        assert "did you mean --" in error
        assert len(error.splitlines()) == 1

    def test_an_option_is_not_guessed_from_its_beginning(self, capsys):
        code, _, error = run(capsys, "predict", "--adap", "x")
        assert code == 2
        assert "did you mean --adapter?" in error

    def test_wrong_kind_of_value(self, capsys):
        code, _, error = run(capsys, "predict", "--chunk_rows", "many")
        assert code == 2
        assert "chunk_rows" in error
        assert "usage" not in error

    def test_group_without_a_command_lists_its_own(self, capsys):
        with pytest.raises(SystemExit) as left:
            main(["tasks"])
        assert left.value.code == 0
        assert "tasks check" in capsys.readouterr().out

    def test_missing_option_is_one_sentence(self, capsys):
        code, _, error = run(capsys, "evaluate")
        assert (code, len(error.splitlines())) == (2, 1)
        assert "DATA_FILE" in error

    def test_a_reader_that_leaves(self):
        program = (
            "import sys; from lora_fsdp.cli.main import main; sys.exit(main(['train', '--help']))"
        )
        pipe = f'{sys.executable} -c "{program}" | head -1'
        done = subprocess.run(
            ["bash", "-c", pipe], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
        )
        assert "Traceback" not in done.stderr
        assert done.stderr == ""


class TestRecipe:
    @pytest.fixture
    def recipe(self, tmp_path):
        def write(text):
            file = tmp_path / "recipe.yaml"
            file.write_text(text)
            return file

        return write

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("rwos: 3", "did you mean --rows?"),
            ("- a list", "must hold options"),
            ("a: b: c", "is no valid YAML"),
            ("", "must hold options"),
        ],
    )
    def test_faulty(self, capsys, recipe, text, words):
        code, _, error = run(capsys, "compare", "--config", recipe(text))
        assert code == 2
        assert words in error
        assert len(error.splitlines()) == 1

    def test_choice_that_does_not_exist(self, capsys, recipe):
        code, _, error = run(capsys, "compare", "--config", recipe("dtype: fp8"))
        assert code == 2
        assert "--dtype: invalid choice: 'fp8'" in error
        assert "bfloat16" in error

    def test_not_there(self, capsys, tmp_path):
        code, _, error = run(capsys, "compare", f"--config={tmp_path / 'no.yaml'}")
        assert code == 2
        assert "no.yaml" in error

    def test_without_its_path(self, capsys):
        assert "needs the path" in run(capsys, "compare", "--config")[2]


class TestTerminal:
    @pytest.mark.parametrize("columns", [60, 80, 200])
    @pytest.mark.parametrize("command", ["", *COMMANDS])
    def test_help_fits(self, capsys, monkeypatch, columns, command):
        monkeypatch.setenv("COLUMNS", str(columns))
        with suppress(SystemExit):  # argparse's way to end
            main([*command.split(), "--help"])
        text, _, examples = capsys.readouterr().out.partition("examples:")
        assert max(map(len, text.splitlines())) <= columns
        assert (command == "") == (examples == "")

    @pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
    def test_no_escape_codes_without_a_terminal(self, variables):
        done = child("-m", "lora_fsdp", "tasks", "list", COLUMNS="60", **variables)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout

    def test_table_in_sixty_columns(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("COLUMNS", "60")
        file = tmp_path / "t.csv"
        rows = "".join(
            f"text {i},{'a very long label ' * 5 if i % 2 else 'b'}\n" for i in range(40)
        )
        file.write_text(f"text,sentiment\n{rows}")
        code, out, _ = run(capsys, "tasks", "check", file, "--task", "sentiment", "--rows", 0)
        assert code == 0
        table = out.partition("brackets]\n")[2].partition("training rows")[0]
        assert max(map(len, table.splitlines())) <= 60


class TestReference:
    def test_page_is_the_help(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "90")
        page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
        assert page == reference_page(), "run: python -m lora_fsdp.cli.reference docs/commands.md"

    def test_training_options_exist_and_say_the_same(self):
        known = FineTuningArguments.__dataclass_fields__
        assert set(TRAINING_OPTIONS) <= set(known)
        own = {name for name in TRAINING_OPTIONS if name in FineTuningArguments.__annotations__}
        assert {n: known[n].metadata["help"] for n in own} == {n: TRAINING_OPTIONS[n] for n in own}


class TestConfigs:
    def test_by_name_and_by_path(self):
        assert find_config("fsdp2") == ROOT / "accelerate_configs" / "fsdp2.yaml"
        named = find_config("accelerate_configs/single.yaml")
        assert named.samefile(ROOT / "accelerate_configs" / "single.yaml")

    def test_unknown(self):
        with pytest.raises(ArgumentError, match="Did you mean 'fsdp2'"):
            find_config("fdsp2")

    @pytest.mark.parametrize(("gpus", "name"), [(0, "fsdp2_cpu"), (1, "single"), (8, "fsdp2")])
    def test_choice_for_a_machine(self, gpus, name):
        assert suggested_config(gpus) == name
        assert find_config(name).is_file()

    def test_a_built_package_has_them(self, tmp_path):
        done = child("setup.py", "--quiet", "build", "--build-base", tmp_path / "b",
                     "--build-lib", tmp_path / "lib")  # fmt: skip
        assert done.returncode == 0, done.stderr
        built = sorted(p.name for p in (tmp_path / "lib/lora_fsdp/accelerate_configs").iterdir())
        assert built == sorted(p.name for p in (ROOT / "accelerate_configs").iterdir())
        # As installed: the package alone, away from the checkout.
        found = subprocess.run(
            [sys.executable, "-m", "lora_fsdp", "train", "--dry_run", "--accelerate_config", "ddp"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert str(tmp_path / "lib/lora_fsdp/accelerate_configs/ddp.yaml") in found.stdout


class TestInit:
    def test_files_work_together(self, capsys, tmp_path, model_folder):
        table = tmp_path / "my data: 1.csv"
        table.write_text("body,team\n" + "".join(f"t {i},{'ab'[i % 2]}\n" for i in range(30)))
        code, out, _ = run(
            capsys, "init", "ticket", "--folder", tmp_path, "--data_file", table,
            "--text_column", "body", "--label_column", "team", "--instruction", 'Say "a" or \'b\':',
            "--model_name_or_path", model_folder,
        )  # fmt: skip
        assert code == 0
        assert "next: lora-fsdp tasks check" in out
        code, out, error = run(
            capsys, "tasks", "check", "--config", tmp_path / "ticket.yaml", "--json"
        )
        assert code == 0, error
        found = json.loads(out)
        assert found["task"] == "ticket"
        assert [sum(counts) for counts in found["balance"].values()] == [15, 15]
        assert "Say \"a\" or 'b':" in found["rows"][0]["prompt"]
        assert find_config(str(tmp_path / "ticket_accelerate.yaml")).is_file()

    def test_nothing_is_overwritten_and_nothing_written(self, capsys, tmp_path):
        (tmp_path / "ticket.yaml").write_text("mine")
        code, _, error = run(capsys, "init", "ticket", "--folder", tmp_path)
        assert code == 2
        assert "already there" in error
        assert [p.name for p in tmp_path.iterdir()] == ["ticket.yaml"]
        assert (tmp_path / "ticket.yaml").read_text() == "mine"

    @pytest.mark.parametrize("name", ["../x", "a-b", "class", "1a"])
    def test_names_that_cannot_be(self, capsys, tmp_path, name):
        assert run(capsys, "init", name, "--folder", tmp_path)[0] == 2
        assert list(tmp_path.iterdir()) == []


class TestCompletion:
    def complete(self, script, *words):
        listed = " ".join(f"'{word}'" for word in words)
        program = (
            f"source {script}; COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; "
            '_lora_fsdp; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "-c", program], capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.split()

    def test_bash(self, capsys, tmp_path):
        code, out, _ = run(capsys, "completion", "bash")
        assert code == 0
        script = tmp_path / "completion"
        script.write_text(out)
        assert self.complete(script, "lora-fsdp", "pre") == ["predict"]
        assert self.complete(script, "lora-fsdp", "tasks", "") == ["list", "show", "check"]
        assert self.complete(script, "lora-fsdp", "tasks", "check", "--ro") == ["--rows"]
        assert "--warmup_steps" in self.complete(script, "lora-fsdp", "train", "--warm")
        assert self.complete(script, "lora-fsdp", "predict", "new") == []  # files: bash's default

    @pytest.mark.parametrize("shell", ["zsh", "fish"])
    def test_others_name_every_command(self, capsys, shell):
        _, out, _ = run(capsys, "completion", shell)
        assert all(name.split()[-1] in out for name in COMMANDS)

    def test_other_shell(self, capsys):
        assert run(capsys, "completion", "tcsh")[0] == 2
