"""The README is true: its Python runs, its commands parse, its files, sizes and names exist."""
import ast
import importlib
import io
import re
import shlex
import subprocess
import sys
import tokenize
from importlib.util import find_spec
from pathlib import Path

import pytest

import lorasae
from lorasae.io.presets import PRESETS
from lorasae.runs.config import OPTIONS, option

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = (ROOT / "lorasae" / "variants" / "elsewhere.md").read_text(encoding="utf-8")
FILES = [path for path in ROOT.rglob("*") if not any(
    part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)]
SOURCES = {path: path.read_text(encoding="utf-8") for path in FILES
           if path.suffix == ".py" and ROOT / "tests" not in path.parents}


def blocks(text):
    """The text's code blocks: fenced, or indented by four spaces after a blank line."""
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


HERE, IN_PEFT, IN_NNSIGHT = filter(is_python, blocks(README) + blocks(ELSEWHERE))
CHECKS = {                                              # code to run after the blocks
    "here": """
with torch.no_grad(), lorasae.base(model):
    assert torch.equal(untouched, model(tokens)) and torch.equal(logits, model(tokens, {2: sae}))
    plain, with_sae = (lorasae.generate(model, tokens, 20, saes) for saes in ({}, {2: sae}))
assert kl < 1
assert latents.shape == (1, 5, 1024) and latents[0, -1, latent] > 0
assert text.shape[1] <= 25 and not any(map(text.equal, (plain, with_sae)))
""",
    "in peft": """
expected = model(tokens, {2: sae})
assert (adapted - expected).abs().max() <= 1e-5 * expected.abs().max()
assert (adapted - logits).abs().max() > 1e-2 * expected.abs().max()
""",
    "in nnsight": """
assert (seen - adapted).abs().max() <= 1e-5 * adapted.abs().max()
""",
}

NEEDED = {"here": [], "in peft": ["transformers", "peft"], "in nnsight": ["nnsight", "peft"]}


def test_the_readmes_python_runs_unchanged(tmp_path):
    """In another folder, after the README's line that adds the package to sys.path."""
    able = [place for place, needed in NEEDED.items() if all(map(find_spec, needed))]
    (tmp_path / "lorasae").mkdir()
    (tmp_path / "lorasae" / "tiny").symlink_to(ROOT / "lorasae" / "tiny")
    start, = re.findall(r"`(sys\.path\.append\(.*?\))`", README)
    parts = {"here": HERE, "in peft": IN_PEFT, "in nnsight": IN_NNSIGHT}
    script = "\n".join(["import sys", start, *(parts[place] + CHECKS[place] for place in able)])
    script = script.replace("THIS/FOLDER", str(ROOT))
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "def area(" in done.stdout and "KL 0." in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    if len(able) < len(NEEDED):
        pytest.skip("the other blocks need transformers, peft and nnsight")


def test_the_example_in_the_packages_docstring_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    example = next(block for block in blocks(lorasae.__doc__ + "\n") if "load_model" in block)
    names = {"lorasae": lorasae}
    exec(compile(example, "lorasae", "exec"), names)                    # noqa: S102 - it is ours
    assert names["logits"].shape == (1, 5, 4096)


# ---- Its commands --------------------------------------------------------------------------------

def commands():
    """Every `python ...` and `torchrun ...` in code or backticks, without remarks after it."""
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
    importlib.import_module(module).arguments(arguments)        # exits with 2 at an unknown word


def test_every_option_in_the_readme_exists():
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README))
    found = {option(name) for name in OPTIONS} | {"--nproc-per-node", "--help"}
    for source in SOURCES.values():
        found |= set(re.findall(r'add(?:_argument)?\(\s*"(--[a-z0-9-]+)"', source))
    found |= {"--no-" + name[2:] for name in found}
    assert named and not named - found


# ---- Its files and names -------------------------------------------------------------------------

def found_at(name):
    """Files and folders whose path is or ends with this name; * matches anything but a slash."""
    name = name.removeprefix("./").rstrip("/")
    pattern = re.compile("(?:.*/)?" + re.escape(name).replace(r"\*", "[^/]*"))
    return [path for path in FILES if pattern.fullmatch(path.relative_to(ROOT).as_posix())]


OF_A_RUN = re.compile(r"^(runs|RUN_DIR|OUT)(/|$)|[A-Z]{3,}")      # written by a command
PATH = re.compile(r"[\w./*-]+(\.(py|md|json|png|txt|toml|ini)|/)")
PATHS = [span for span in SPANS if PATH.fullmatch(span) and not OF_A_RUN.search(span)]
LINKS = sorted(set(re.findall(r"\]\((?!https://)([^)#]+)", README)))

SIZES = re.findall(r"^ {6}([\w/.]+) +([\d,]{3,}) ", README, re.M)       # in the annotated tree


@pytest.mark.parametrize("name", [*PATHS, *LINKS])
def test_a_path_or_link_exists(name):
    assert (ROOT / name).exists() or found_at(name)


@pytest.mark.parametrize("name, lines", SIZES)
def test_a_file_is_about_as_long_as_the_readme_says(name, lines):
    path = ROOT / "lorasae" / name
    files = [path] if path.is_file() else [file for file in SOURCES if path in file.parents]
    found = sum(len(SOURCES[file].splitlines()) for file in files)
    assert abs(found / int(lines.replace(",", "")) - 1) < 0.1


def words_of(source):
    """Every name in the code, but not in comments and strings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


WORDS = {path: words_of(source) for path, source in SOURCES.items()}
BESIDE = sorted(set(re.findall(r"`(\w+\.py)` `(\w+)`", PROSE)))


@pytest.mark.parametrize("file, name", BESIDE)
def test_a_name_next_to_a_file_is_in_that_file(file, name):
    assert any(name in WORDS.get(path, ()) for path in found_at(file)), f"{file} has no {name}"


NOT_OURS = {*PRESETS, "hf", "pip", 'sys.path.append("THIS/FOLDER")'}
NAMES = [span for span in SPANS if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(.*\))?", span)
         and not span.endswith((".py", ".json", ".md"))]


@pytest.mark.parametrize("span", sorted(set(NAMES) - NOT_OURS))
def test_a_name_in_backticks_is_in_the_code(span):
    """`adapt.objective`, `LoRALinear.forward`, `model.run(x, start, stop)`."""
    owner, *names = span.partition("(")[0].split(".")
    modules = [path for path in WORDS if path.stem == owner]
    assert names or modules or any(owner in words for words in WORDS.values())
    assert set(names) <= set().union(*(WORDS[path] for path in modules or WORDS))


def test_there_is_something_to_check():
    assert min(map(len, (commands(), PATHS, LINKS, SIZES, BESIDE, NAMES))) > 3
