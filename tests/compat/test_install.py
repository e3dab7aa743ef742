import subprocess
import sys
from pathlib import Path

import pytest

from lapilli.compat import MODULES, PACKAGES, PROGRAMS, LlavaFinder, install
from lapilli.compat.__main__ import main


def run_python(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", sorted({*PACKAGES, *MODULES, *PROGRAMS}))
def test_every_name_can_be_imported(name: str) -> None:
    __import__(name)
    assert sys.modules[name] is not None


def test_a_module_is_one_object_under_both_names() -> None:
    import llava.conversation

    import lapilli.compat.conversation

    assert llava.conversation is lapilli.compat.conversation


def test_packages_give_the_model_classes() -> None:
    from llava import LlavaLlamaForCausalLM
    from llava.model import LlavaMistralForCausalLM, LlavaMptForCausalLM

    assert LlavaLlamaForCausalLM.__name__ == "LlavaLlamaForCausalLM"
    assert LlavaMistralForCausalLM.__name__ != LlavaMptForCausalLM.__name__


def test_a_name_that_the_original_lacks_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"llava\.nothing"):
        __import__("llava.nothing")


def test_installing_again_changes_nothing() -> None:
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before


@pytest.mark.slow
def test_another_llava_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "llava.py").write_text("", encoding="utf-8")
    program = "import llava, lapilli.compat; lapilli.compat.install()"
    run = run_python("-c", program, cwd=tmp_path)
    assert "a package named llava is imported already" in run.stderr
    assert run.returncode == 1


@pytest.mark.slow
def test_a_script_runs_with_its_arguments_and_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("WORD = 'beside'", encoding="utf-8")
    (tmp_path / "script.py").write_text(
        "import sys, neighbour\n"
        "from llava.constants import IMAGE_TOKEN_INDEX\n"
        "from llava.utils import disable_torch_init\n"
        "disable_torch_init()\n"
        "if __name__ == '__main__':\n"
        "    print(neighbour.WORD, IMAGE_TOKEN_INDEX, sys.argv[1:])\n",
        encoding="utf-8",
    )
    run = run_python("-m", "lapilli.compat", "script.py", "--flag", "x", cwd=tmp_path)
    assert run.stdout == "beside -200 ['--flag', 'x']\n", run.stderr


@pytest.mark.parametrize("module", ["llava.eval.run_llava", "llava.serve.cli"])
def test_a_module_of_the_original_runs(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns about a second copy
    with pytest.raises(SystemExit, match="0"):
        main(["-m", module, "--help"])
    assert "--image-file" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava.serve.cli", "llava.train.train"])
def test_a_program_runs_from_the_command_line(name: str, tmp_path: Path) -> None:
    run = run_python("-m", "lapilli.compat", "-m", name, "--help", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: {name}")


@pytest.mark.parametrize("arguments", [[], ["-x"], ["-m"]])
def test_nothing_to_run_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.startswith("usage: python -m lapilli.compat")


def test_what_a_program_cannot_do_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.delitem(sys.modules, "llava.train.train", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(["-m", "llava.train.train", "--nothing", "1"])
    assert capsys.readouterr().err == "llava.train.train: unknown training option '--nothing'\n"


def test_a_module_without_a_program_is_named() -> None:
    with pytest.raises(ImportError, match=r"llava\.mm_utils cannot be run as a program"):
        LlavaFinder().get_code("llava.mm_utils")


def test_a_missing_script_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["lost.py"])
    assert capsys.readouterr().err == "lapilli.compat: no script at lost.py\n"


@pytest.mark.parametrize("arguments", [["-m", "llava.eval.model_vqa_loader"], ["script.py"]])
def test_without_transformers_one_line_says_what_to_install(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text("import llava.constants\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "llava.eval.model_vqa_loader", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    said = capsys.readouterr().err
    assert said.startswith("lapilli.compat: ")
    assert said.endswith("need transformers: pip install 'lapilli[compat]'\n")
    assert said.count("\n") == 1
