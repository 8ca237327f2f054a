"""``sanm relabel``: correct labels from verdicts or suggestions."""

from jsonargparse import ArgumentParser

from sanm_lightning.audit.relabel import relabel, undo_relabel

__all__ = ["main"]


def main(words: list[str]) -> int:
    """Run the command.

    Args:
        words: the arguments after ``relabel``.

    Returns:
        Exit status 0.

    Raises:
        OSError: something cannot be read or written, or exists already.
        ValueError: the options contradict each other, or the verdicts are not of this audit.
    """
    parser = ArgumentParser(
        prog="sanm relabel",
        description="Write the labels of an audited data set anew, with corrections; the originals are not touched.",
    )
    parser.add_argument("audit_folder", nargs="?", type=str, help="folder that sanm audit wrote")
    parser.add_argument("--undo", type=str, help="remove what an earlier call wrote: its label file or linked folder")
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
