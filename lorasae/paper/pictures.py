"""Pictures for README and RESULTS: how a step works, and two of what `lorasae.paper` found.

    python -m lorasae.paper.pictures                        draws the first again
    python -m lorasae.paper.pictures runs/paper             and takes the others from there
"""
import sys
from pathlib import Path

from lorasae.errors import InputError
from lorasae.evals.figures import save_figure
from lorasae.io.console import Parser, one_line_errors
from lorasae.io.files import write_bytes

HERE = Path(__file__).parent / "pictures"
FOUND = ("frontier", "scaling")
FROZEN, TRAINED, SAE, LOSS = "#dce6f1", "#fbd9b5", "#cfe8cf", "#eeeeee"


def draw_method(_, figure):
    """The shared prefix; the base model above, the adapted one below with its SAE; the loss."""
    figure.set_size_inches(9, 3.1)
    axes = figure.subplots()
    axes.set(xlim=(0, 18), ylim=(-1.0, 5.8))
    axes.axis("off")

    box(axes, 0.2, 2.6, 1.7, 1.2, "tokens", "white")
    box(axes, 2.7, 2.6, 3.0, 1.2, "blocks 0 … i\nshared prefix", FROZEN)
    box(axes, 8.9, 4.4, 3.4, 1.2, "blocks i+1 … L−1\nbase, no SAE", FROZEN)
    box(axes, 6.4, 0.8, 1.7, 1.2, "SAE\nx → x̂", SAE)
    box(axes, 8.9, 0.8, 3.4, 1.2, "blocks i+1 … L−1\nadapted, with SAE", TRAINED)
    box(axes, 13.2, 4.4, 1.6, 1.2, "head\np", FROZEN)
    box(axes, 13.2, 0.8, 1.6, 1.2, "head\nq", FROZEN)
    box(axes, 15.6, 2.6, 2.2, 1.2, "KL(p ‖ q)\nEq. 7", LOSS)

    arrow(axes, (1.9, 3.2), (2.7, 3.2))
    arrow(axes, (5.7, 3.4), (8.9, 5.0))
    arrow(axes, (5.7, 3.0), (6.6, 2.0))
    arrow(axes, (8.1, 1.4), (8.9, 1.4))
    arrow(axes, (12.3, 5.0), (13.2, 5.0))
    arrow(axes, (12.3, 1.4), (13.2, 1.4))
    arrow(axes, (14.8, 5.0), (16.4, 3.8))
    arrow(axes, (14.8, 1.4), (16.4, 2.6))

    axes.annotate("", (10.6, 0.75), (16.9, 2.55), arrowprops={
        "arrowstyle": "->", "linestyle": "--", "color": "C3", "connectionstyle": "arc3,rad=-0.5"})
    axes.text(13.9, -0.9, "gradients reach only the adapters", color="C3", ha="center", fontsize=9)
    axes.text(4.2, 2.2, "run once for both", ha="center", fontsize=9, color="0.35")
    axes.text(16.9, 4.9, "logits exist for a chunk\nof tokens at a time", ha="center", fontsize=9,
              color="0.35")


def box(axes, x, y, width, height, text, color):
    from matplotlib.patches import FancyBboxPatch
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05",
                                  facecolor=color, edgecolor="0.3"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)


def arrow(axes, start, end):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.3"})


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("study", nargs="?", type=Path,
                        help="folder of python -m lorasae.paper, whose pictures become the README's")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with one_line_errors():
        for name in FOUND if args.study else ():
            write_bytes(HERE / f"{name}.png", read_bytes(args.study / "pictures" / f"{name}.png"))
        save_figure(draw_method, None, HERE / "method.png", "python -m lorasae.paper.pictures")


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; python -m lorasae.paper makes it") from error


if __name__ == "__main__":
    main()
