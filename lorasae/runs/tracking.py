"""--track: what a run writes to metrics.jsonl goes to trackio as well, as it is written.

trackio has wandb's interface and keeps everything on this machine: `trackio show` is its page.
metrics.jsonl stays the record.
"""
from contextlib import contextmanager

from lorasae.errors import InputError


@contextmanager
def tracked(run):
    """Inside the `with`, a run is tracked under the name of its folder, if it is to be.

    A resumed run goes on in the one that it began. With several processes, the first one tracks.
    """
    if not (run.config.track and run.writes):
        yield
        return
    try:
        import trackio
    except ImportError:
        raise InputError("--track needs trackio: pip install trackio") from None
    trackio.init(project="lorasae", name=str(run.folder.resolve()), resume="allow",
                 config=run.config.to_json())
    run.track = trackio.log
    try:
        yield
    finally:
        trackio.finish()
