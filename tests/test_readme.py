"""What the README says exists: its Python runs, its commands parse, its files, names and links are there."""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import lorasae
from lorasae.io.presets import PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [path for path in ROOT.rglob("*") if not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)]


def blocks(text):
    """Its blocks of code: fenced, or indented by four spaces after a blank line."""
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return found + [re.sub(r"^    ", "", block, flags=re.M) for block in re.findall(r"(?<=\n\n)((?:    .*\n|\n(?=    ))+)", text)]


PROSE = re.sub(r"^(    |```).*", "", README, flags=re.M)
SPANS = re.findall(r"`([^`\n]+)`", PROSE)


def is_python(block):
    try:
        return any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(block).body)
    except SyntaxError:
        return False


# ---- Its Python ------------------------------------------------------------------------------------------------------

def test_there_is_python_to_run():
    assert sum(map(is_python, blocks(README))) >= 1


@pytest.mark.parametrize("block", [block for block in blocks(README) if is_python(block)], ids=lambda block: block.splitlines()[0])
def test_a_block_of_python_runs_as_it_stands(block, tmp_path, monkeypatch):
    """In a folder that has the package in it, as the README says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lorasae").symlink_to(ROOT / "lorasae")
    names = {}
    exec(compile(block, "README.md", "exec"), names)                    # noqa: S102 - it is ours
    assert names["loss"].item() == pytest.approx(names["naive_loss"](names["model"], names["saes"], names["tokens"]).item(), rel=1e-4)
    if "save_adapter" in block:
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_example_of_the_package_itself_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    example = next(block for block in blocks(lorasae.__doc__ + "\n") if "load_model" in block)
    names = {"lorasae": lorasae, "tokens": torch.randint(3, 97, (1, 24))}
    exec(compile(example, "lorasae", "exec"), names)                    # noqa: S102 - it is ours
    assert names["logits"].shape == (1, 24, 4096)


# ---- Its commands ----------------------------------------------------------------------------------------------------

def commands():
    """The words of every `python ...` and `torchrun ...` in a block of code or between backticks, up to a remark."""
    lines = [line for block in blocks(README) for line in block.splitlines()] + SPANS
    for line in lines:
        for part in re.split(r"  +|&&| \(", line):
            if re.match(r"(python|torchrun) ", part.strip()):
                yield part.strip()


def script_of(words):
    """(the module of a command, its arguments)"""
    if words[0] == "torchrun":
        number = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[number:]]
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1].removesuffix(".py"), words[2:]


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_a_command_parses(line):
    module, arguments = script_of(shlex.split(line.replace(" ...", "")))
    if module == "pytest":
        return
    place = ROOT / (module.replace(".", "/"))
    assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), f"{line}: there is no {module}"
    script = importlib.import_module(module)
    if hasattr(script, "arguments"):
        script.arguments(arguments)                     # exits with status 2 where it does not know a word
    else:
        source = (place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__main__.py").read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--")), line


def test_there_are_commands_to_parse():
    assert len(set(commands())) > 8


def options():
    """Every option that a file of the repository offers."""
    sources = [path.read_text(encoding="utf-8") for path in FILES if path.suffix == ".py"]
    found = {option for source in sources for option in re.findall(r'add(?:_argument)?\(\s*"(--[a-z0-9-]+)"', source)}
    return found | {"--no-" + option[2:] for option in found} | {"--nproc-per-node", "--help"}


def test_every_option_it_names_exists():
    named = {option for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README)}
    assert named and not named - options(), named - options()


# ---- Its files and names ---------------------------------------------------------------------------------------------

def found_at(name):
    """The files and folders of the repository with this name, or whose path ends so; * stands for anything."""
    name = name.removeprefix("./").rstrip("/")
    pattern = re.compile("(?:.*/)?" + re.escape(name).replace(r"\*", "[^/]*"))
    return [path for path in FILES if pattern.fullmatch(path.relative_to(ROOT).as_posix())]


OF_A_RUN = re.compile(r"^(runs|RUN_DIR|OUT)(/|$)|[A-Z]{3,}")             # what a command will write; placeholders
PATH = re.compile(r"[\w./*-]+(\.(py|md|json|png|txt|toml|ini)|/)")


@pytest.mark.parametrize("span", sorted({span for span in SPANS if PATH.fullmatch(span) and not OF_A_RUN.search(span.replace("MADE.json", ""))}))
def test_a_path_between_backticks_exists(span):
    assert found_at(span), f"there is no {span}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)", README))))
def test_a_link_leads_somewhere(target):
    assert target.startswith("https://") or (ROOT / target).exists(), f"there is no {target}"


def tree():
    """(folder, name) of every file and folder in the annotated tree: `name.py` or `name/` at the start of a line."""
    for block in blocks(README):
        above = []                                      # (indent, folder) of the folders around a line
        for line in block.splitlines():
            indent = len(line) - len(line.lstrip())
            names = re.match(r"((?:[\w-]+(?:\.py|/) *)+)", line.lstrip())
            if not names or line.lstrip().startswith("python"):
                continue
            above = [(depth, folder) for depth, folder in above if depth < indent]
            for name in names.group(1).split():
                yield "".join(folder for _, folder in above) + name
                if name.endswith("/"):
                    above.append((indent, name))


@pytest.mark.parametrize("place", sorted(set(tree())))
def test_a_place_in_the_tree_exists(place):
    assert (ROOT / place).exists(), f"there is no {place}"


def definitions(path):
    """Every name that a file defines: functions, classes, methods, fields, constants, parameters."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


CODE = [path for path in FILES if path.suffix == ".py" and ROOT / "tests" not in path.parents]
DEFINED = {path: definitions(path) for path in CODE}
IDENTIFIER = r"[A-Za-z_]\w*"


def pairs():
    """(files, name): in a cell of a table or in a sentence, names between backticks belong to the files named just before."""
    for cell in re.split(r"[|;:.]\s", PROSE.replace("\n", " ")):
        files = []
        for span, gap in re.findall(r"`([^`]+)`([^`]*)", cell):
            if span.endswith(".py"):
                files.append(span)
            elif re.fullmatch(IDENTIFIER, span) and files:
                yield tuple(files), span
            if not re.fullmatch(r"[\s,]*(and|beside)?\s*|[])(lorasae/\w. ]*", gap):
                files = []                              # other words in between: it speaks of something else


@pytest.mark.parametrize("files, name", sorted(set(pairs())), ids=lambda value: value if isinstance(value, str) else value[-1])
def test_a_name_beside_a_file_is_defined_there(files, name):
    places = [path for file in files for path in found_at(file)]
    assert any(name in DEFINED.get(path, ()) for path in places), f"{' '.join(files)} defines no {name}"


KNOWN_ELSEWHERE = set(PRESETS) | {"hf", "pip"}


@pytest.mark.parametrize("span", sorted({span for span in SPANS if re.fullmatch(rf"{IDENTIFIER}(\.{IDENTIFIER})*(\(.*\))?", span)
                                         and not span.endswith((".py", ".json", ".md"))} - KNOWN_ELSEWHERE))
def test_a_name_between_backticks_is_defined_somewhere(span):
    """`adapt.learn` in adapt.py, `LoRALinear.forward`, `sae.on_special`, `model.run(x, start, stop)`."""
    everything = set().union(*DEFINED.values())
    owner, *names = span.partition("(")[0].split(".")
    if not names:
        printed = re.search(rf"\b{owner}\b", (ROOT / "train.py").read_text(encoding="utf-8"))
        assert printed or owner in everything or any(path.stem == owner for path in DEFINED), f"nothing defines {owner}"
        return
    modules = [path for path in DEFINED if path.stem == owner]
    where = set().union(*(DEFINED[path] for path in modules)) if modules else everything
    assert set(names) <= where, f"{span} is defined nowhere"
    assert modules or owner in everything, f"nothing defines {owner}"
