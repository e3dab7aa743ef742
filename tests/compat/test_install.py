import inspect
import pickle
import py_compile
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from lapilli.compat import MODULES, PACKAGES, PARTS, PROGRAMS, LlavaFinder, install
from lapilli.compat.__main__ import main


def run_python(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", sorted({*PACKAGES, *MODULES, *PARTS, *PROGRAMS}))
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


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("import llava.nothing", "llava.nothing"),
        ("import llava.nothing.more", "llava.nothing"),
        ("import llava.eval.model_qa", "llava.eval.model_qa"),
        ("from llava.eval import model_qa", "llava.eval.model_qa"),
        ("from llava.eval.model_qa import eval_model", "llava.eval.model_qa"),
        ("from llava.model import LlavaNothing", "llava.model.LlavaNothing"),
        ("import llava.model.language_model.x", "llava.model.language_model.x"),
    ],
)
def test_a_name_that_is_not_there_is_told_with_those_that_are(statement: str, name: str) -> None:
    package = name.rpartition(".")[0]
    parts = {"llava": "constants, conversation, ", "llava.eval": "m4c_evaluator, model_vqa, "}
    message = f"lapilli has no {name}: the modules of its {package} are {parts.get(package, '')}"
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)) as caught:
        exec(statement)
    assert "\n" not in str(caught.value)


def test_other_packages_are_nobody_s_business() -> None:
    assert LlavaFinder().find_spec("llava_next") is None
    assert LlavaFinder().find_spec("nothing") is None


def test_a_part_has_its_own_name_and_no_others() -> None:
    import llava.constants
    import llava.utils
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.utils import build_logger, disable_torch_init

    from lapilli.compat import mm_utils

    assert (llava.constants.__name__, llava.utils.__name__) == ("llava.constants", "llava.utils")
    public = {name for name in dir(llava.constants) if not name.startswith("_")}
    assert "IGNORE_INDEX" in public
    assert all(name.isupper() for name in public)
    names: dict[str, object] = {}
    exec("from llava.constants import *", names)
    assert public == names.keys() - {"__builtins__"}
    assert not hasattr(llava.utils, "process_images")
    assert not hasattr(llava.utils, "torch")
    assert IMAGE_TOKEN_INDEX == mm_utils.IMAGE_TOKEN_INDEX
    assert inspect.getmodule(build_logger) is mm_utils
    assert pickle.loads(pickle.dumps(disable_torch_init)) is disable_torch_init
    parts = {part for names in PARTS.values() for part in names.split()}
    assert parts & set(mm_utils.__all__) == {"IMAGE_TOKEN_INDEX"}


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nomod", "there is no module nomod, here or installed; the programs of the original"),
        ("nomod.x", "there is no module nomod.x, here or installed; the programs of"),
        ("json.x", "there is no module json.x, here or installed; the programs of"),
        ("json", "json is a package without __main__: name one of its modules"),
        ("sys", "the module sys is not written in Python and cannot be run; the programs of"),
        (".x", "'.x' is no name of a module: the programs of"),
        ("", "'' is no name of a module: the programs of"),
        (
            "llava",
            "llava is no program: the programs of the original here are llava.eval.model_vqa",
        ),
        ("llava.bogus", "llava.bogus is no program: the programs of"),
        ("llava.bogus.x", "llava.bogus.x is no program: the programs of"),
        ("llava.mm_utils", "llava.mm_utils is no program: the programs of"),
        ("llava.constants", "llava.constants is no program: the programs of"),
    ],
)
def test_a_module_that_cannot_be_run_is_one_line(
    name: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit, match="2"):
        main(["-m", name])
    said = capsys.readouterr().err
    assert said.startswith(f"lapilli.compat: {message}")
    assert said.count("\n") == 1


def test_what_is_no_program_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("drawing.png")
    Path("wide.py").write_text("print(1)", encoding="utf-16")
    with zipfile.ZipFile("archive.zip", "w") as archive:
        archive.writestr("a.txt", "")
    for name, message in (
        ("drawing.png", "is no Python program: it begins with b'\\x89PNG\\r\\n\\x1a\\n' and has"),
        ("wide.py", "is no Python program: it begins with b'\\xff\\xfep"),
        ("archive.zip", "is an archive without __main__.py"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([name])
        said = capsys.readouterr().err
        assert said.startswith(f"lapilli.compat: {name} {message}")
        assert said.count("\n") == 1


def test_what_python_runs_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv)
    Path("script.py").write_text("print('ran')", encoding="utf-8")
    py_compile.compile("script.py", "script.pyc")
    with zipfile.ZipFile("archive.zip", "w") as archive:
        archive.write("script.py", "__main__.py")
    Path("package").mkdir()
    Path("package/__main__.py").write_text("print('ran')", encoding="utf-8")
    for arguments in (["script.py"], ["script.pyc"], ["archive.zip"], ["-m", "package"]):
        main(arguments)
        assert capsys.readouterr().out == "ran\n"


def test_errors_of_a_program_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv)
    Path("bad.py").write_text("def f(:\n", encoding="utf-8")
    Path("needs.py").write_text("import nothing_like_it\n", encoding="utf-8")
    Path("broken").mkdir()
    Path("broken/__init__.py").write_text("import nothing_like_it\n", encoding="utf-8")
    for arguments in (["bad.py"], ["-m", "bad"]):
        with pytest.raises(SyntaxError, match="invalid syntax"):
            main(arguments)
    for arguments in (["needs.py"], ["-m", "needs"], ["-m", "broken.x"]):
        with pytest.raises(ModuleNotFoundError, match="nothing_like_it"):
            main(arguments)


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
