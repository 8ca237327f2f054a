"""``sanm relabel``: correct labels from verdicts or suggestions."""

from sanm_lightning.audit.relabel import relabel, undo_relabel
from sanm_lightning.command_line.parsing import CommandParser

__all__ = ["main"]


def main(words: list[str]) -> int:
    """Run the command.

    Args:
        words: the arguments after ``relabel``.

    Returns:
        Exit status 0.

    Raises:
        OSError: if a file cannot be read or written, or already exists.
        ValueError: if the options are contradictory, or the verdicts do not belong to this audit.
    """
    parser = CommandParser(
        prog="sanm relabel",
        description="Write the corrected labels of an audited data set; the originals are not modified.",
    )
    parser.add_argument("audit_folder", nargs="?", type=str, help="folder written by sanm audit")
    parser.add_argument("--undo", type=str, help="label file or linked folder of an earlier call to remove")
    parser.add_function_arguments(relabel, skip={"audit_folder"}, as_group=False, sub_configs=False)
    options = vars(parser.parse_args(words))
    undo, audit_folder = options.pop("undo"), options["audit_folder"]
    if (undo is None) == (audit_folder is None):
        what = "neither" if undo is None else "both"
        raise ValueError(f"expected either AUDIT_FOLDER or --undo FILE, got {what}; see sanm relabel --help")
    if undo is not None:
        print(f"{undo}: {undo_relabel(undo)} files removed")
    else:
        print(relabel(**options))
    return 0
