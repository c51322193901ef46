"""The README is true: its Python runs, its commands parse, its files and names exist."""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import lorasae
from lorasae.io.presets import PRESETS
from lorasae.runs.config import OPTIONS, option

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [path for path in ROOT.rglob("*") if not any(
    part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)]
SOURCES = {path: path.read_text(encoding="utf-8") for path in FILES
           if path.suffix == ".py" and ROOT / "tests" not in path.parents}


def blocks(text):
    """Its blocks of code: fenced, or indented by four spaces after a blank line."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"(?<=\n\n)((?:    .*\n|\n(?=    ))+)", text)
    return fenced + [re.sub(r"^    ", "", block, flags=re.M) for block in indented]


PROSE = re.sub(r"^(    |```).*", "", README, flags=re.M)
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", PROSE)))


# ---- Its Python ----------------------------------------------------------------------------------

def is_python(block):
    try:
        return any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(block).body)
    except SyntaxError:
        return False


def test_its_python_runs_as_it_stands(tmp_path, monkeypatch):
    """In a folder that has the package in it, as the README says."""
    block, = filter(is_python, blocks(README))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lorasae").symlink_to(ROOT / "lorasae")
    names = {}
    exec(compile(block, "README.md", "exec"), names)                    # noqa: S102 - it is ours
    trained = {name for name, p in names["model"].named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    assert names["logits"].shape == names["untouched"].shape == (*names["tokens"].shape, 4096)
    assert not torch.equal(names["logits"], names["untouched"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_example_of_the_package_itself_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    example = next(block for block in blocks(lorasae.__doc__ + "\n") if "load_model" in block)
    names = {"lorasae": lorasae, "tokens": torch.randint(3, 97, (1, 24))}
    exec(compile(example, "lorasae", "exec"), names)                    # noqa: S102 - it is ours
    assert names["logits"].shape == (1, 24, 4096)


# ---- Its commands --------------------------------------------------------------------------------

def commands():
    """Every `python ...` and `torchrun ...` in code or between backticks, up to a remark."""
    lines = [line for block in blocks(README) for line in block.splitlines()] + SPANS
    parts = [part.strip() for line in lines for part in re.split(r"  +|&&| \(", line)]
    return sorted({part for part in parts if re.match(r"(python|torchrun) ", part)})


def script_of(words):
    """(the module of a command, its arguments)"""
    if words[0] == "torchrun":
        number = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[number:]]
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1].removesuffix(".py"), words[2:]


@pytest.mark.parametrize("line", [line for line in commands() if "pytest" not in line])
def test_a_command_parses(line):
    module, arguments = script_of(shlex.split(line.replace(" ...", "")))
    place = ROOT / module.replace(".", "/")
    if (place / "__main__.py").exists():
        module += ".__main__"
    assert place.with_suffix(".py").exists() or module.endswith("__main__"), f"no {module}: {line}"
    importlib.import_module(module).arguments(arguments)        # status 2 at a word it knows not


def test_every_option_it_names_exists():
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README))
    found = {option(name) for name in OPTIONS} | {"--nproc-per-node", "--help"}
    for source in SOURCES.values():
        found |= set(re.findall(r'add(?:_argument)?\(\s*"(--[a-z0-9-]+)"', source))
    found |= {"--no-" + name[2:] for name in found}
    assert len(commands()) > 8 and named and not named - found


# ---- Its files and names -------------------------------------------------------------------------

def found_at(name):
    """The files and folders with this name, or whose path ends so; * stands for anything."""
    name = name.removeprefix("./").rstrip("/")
    pattern = re.compile("(?:.*/)?" + re.escape(name).replace(r"\*", "[^/]*"))
    return [path for path in FILES if pattern.fullmatch(path.relative_to(ROOT).as_posix())]


OF_A_RUN = re.compile(r"^(runs|RUN_DIR|OUT)(/|$)|[A-Z]{3,}")      # written by a command
PATH = re.compile(r"[\w./*-]+(\.(py|md|json|png|txt|toml|ini)|/)")
PATHS = [span for span in SPANS if PATH.fullmatch(span) and not OF_A_RUN.search(span)]
LINKS = sorted(set(re.findall(r"\]\(([^)#]+)", README)))


def tree():
    """The path of every file and folder in the annotated tree: names at the start of a line."""
    for block in blocks(README):
        above = []                                      # (indent, folder) of the folders around
        for line in block.splitlines():
            indent = len(line) - len(line.lstrip())
            names = re.match(r"((?:[\w-]+(?:\.py|/) *)+)", line.lstrip())
            if not names or line.lstrip().startswith("python"):
                continue
            above = [(depth, folder) for depth, folder in above if depth < indent]
            inside = "".join(folder for _, folder in above)
            for name in names.group(1).split():
                yield inside + name
                if name.endswith("/"):
                    above.append((indent, name))


@pytest.mark.parametrize("name", [*PATHS, *LINKS, *sorted(set(tree()))])
def test_a_path_a_link_or_a_place_in_the_tree_exists(name):
    if name in PATHS:
        assert found_at(name), f"there is no {name}"
    else:
        assert name.startswith("https://") or (ROOT / name).exists(), f"there is no {name}"


def definitions(source):
    """Every name that a file defines: functions, classes, fields, constants, parameters."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


DEFINED = {path: definitions(source) for path, source in SOURCES.items()}
IDENTIFIER = r"[A-Za-z_]\w*"
BETWEEN = r"[\s,]*(and|beside)?\s*|\]\([\w./]+\)[\s,]*"         # or it speaks of something else


def pairs():
    """(files, name): in a cell or a sentence, names belong to the files named just before them."""
    for cell in re.split(r"[|;:.]\s", PROSE.replace("\n", " ")):
        files = ()
        for span, gap in re.findall(r"`([^`]+)`([^`]*)", cell):
            if span.endswith(".py"):
                files += (span,)
            elif re.fullmatch(IDENTIFIER, span) and files:
                yield files, span
            if not re.fullmatch(BETWEEN, gap):
                files = ()


@pytest.mark.parametrize("files, name", sorted(set(pairs())))
def test_a_name_beside_a_file_is_defined_there(files, name):
    places = [path for file in files for path in found_at(file)]
    assert any(name in DEFINED.get(path, ()) for path in places), f"{files} define no {name}"


ELSEWHERE = {*PRESETS, "hf", "pip", "PYTHONPATH"}
NAMES = [span for span in SPANS if re.fullmatch(rf"{IDENTIFIER}(\.{IDENTIFIER})*(\(.*\))?", span)
         and not span.endswith((".py", ".json", ".md"))]


@pytest.mark.parametrize("span", sorted(set(NAMES) - ELSEWHERE))
def test_a_name_between_backticks_is_defined_somewhere(span):
    """`adapt.objective` in adapt.py, `LoRALinear.forward`, `model.run(x, start, stop)`."""
    everything = set().union(*DEFINED.values())
    owner, *names = span.partition("(")[0].split(".")
    if not names:
        printed = re.search(rf"\b{owner}\b", SOURCES[ROOT / "train.py"])
        of_a_file = any(path.stem == owner for path in DEFINED)
        assert printed or owner in everything or of_a_file, f"nothing defines {owner}"
        return
    modules = [path for path in DEFINED if path.stem == owner]
    where = set().union(*(DEFINED[path] for path in modules)) if modules else everything
    assert set(names) <= where, f"{span} is defined nowhere"
    assert modules or owner in everything, f"nothing defines {owner}"
