"""Reports on runs, drawn from the files in their folders."""
from pathlib import Path
def write_report(run_folder: str | Path) -> Path:
    """Temporary."""
    raise NotImplementedError("not yet")
